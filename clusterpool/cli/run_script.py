"""Run a Python script on the cluster, as `python script.py args` would run it."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from clusterpool.cli.failures import ExitCode


def replace_process(script: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Become `python script arguments`: its output, its signals and its exit code are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, str(script), *arguments], dict(environment))


def run_patched(script: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the script in this process, with the standard library's modules replaced; its exit code.

    Raises: SystemExit when the script does.
    """
    from clusterpool.cli.patch import patch_standard_library

    os.environ.update(environment)
    patch_standard_library()
    sys.argv[:] = [str(script), *arguments]
    folder = str(script.resolve().parent)
    # What Python has put first is the folder of the program `clusterpool`; with -P it has put nothing there.
    if getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, folder)
    else:
        sys.path[0] = folder
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit:
        raise
    except BaseException as exc:
        _show(exc, str(script))
        return ExitCode.INTERRUPTED if isinstance(exc, KeyboardInterrupt) else ExitCode.FAILED
    return ExitCode.OK


def _show(exc: BaseException, script: str) -> None:
    """As the interpreter would, but for the frames of ours below the script's first."""
    frames = exc.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != script:
        frames = frames.tb_next
    hook = sys.excepthook
    shown: TracebackType | None = frames or exc.__traceback__  # a syntax error has no frame of the script's
    try:
        hook(type(exc), exc.with_traceback(shown), shown)
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
