"""Run a Python script on the cluster, as `python script.py args` would run it."""

from __future__ import annotations

import builtins
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
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
    path = os.path.abspath(script)  # noqa: PTH100  # `resolve` would follow links, which Python does not
    try:
        _run_as_main(path)
    except SystemExit:
        raise
    except BaseException as exc:
        _show(exc, path)
        return ExitCode.INTERRUPTED if isinstance(exc, KeyboardInterrupt) else ExitCode.FAILED
    return ExitCode.OK


def _run_as_main(path: str) -> None:
    """Run the file as the module `__main__`, for good: threads and exit handlers may need that after the last line.

    (`runpy.run_path` takes it away again, and knows a script by the relative path that it was given.)
    """
    loader = SourceFileLoader("__main__", path)
    code = loader.source_to_code(loader.get_data(path), path)
    module = ModuleType("__main__")
    vars(module).update(__annotations__={}, __builtins__=builtins, __cached__=None, __file__=path, __loader__=loader)
    sys.modules["__main__"] = module
    exec(code, vars(module))


def _show(exc: BaseException, script: str) -> None:
    """As the interpreter would, but for the frames of ours below the script's first."""
    frames = exc.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != script:
        frames = frames.tb_next
    hook = sys.excepthook
    # A syntax error has no frame of the script's.
    shown: TracebackType | None = frames if isinstance(exc, SyntaxError) else frames or exc.__traceback__
    try:
        hook(type(exc), exc.with_traceback(shown), shown)
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
