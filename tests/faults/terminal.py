"""A program at a terminal of its own, and what a person would do there: look at what it says, type, press Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.waiting import HANGS_AFTER_S


class Terminal:
    """`python arguments` in the foreground of a new terminal; killed at the end if it is still there."""

    def __init__(self, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        ours, theirs = pty.openpty()
        self._fd = ours
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
            env={**os.environ, "TERM": "dumb", "PYTHON_BASIC_REPL": "1", **(environment or {})},
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def type(self, line: str) -> None:
        """A line, and Enter."""
        os.write(self._fd, line.encode() + b"\n")

    def press_ctrl_c(self) -> None:
        """The terminal sends SIGINT to its foreground group."""
        os.write(self._fd, b"\x03")

    def wait_said(self, wanted: str, *, within_s: float = HANGS_AFTER_S, after: int = 0) -> int:
        """Wait until it has said `wanted` after the first `after` characters; where that ends."""
        deadline_s = time.monotonic() + within_s
        while self.text.find(wanted, after) < 0:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"not within {within_s:g} s: {wanted!r}; it said:\n{self.text[after:]}"
            self._read(left_s)
        return self.text.find(wanted, after) + len(wanted)

    def wait_ended(self, *, within_s: float = HANGS_AFTER_S) -> int:
        """Its exit code."""
        deadline_s = time.monotonic() + within_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, f"it hangs; it said:\n{self.text}"
            self._read(0.05)
        self._read(0.05)
        return int(self.process.returncode)

    def _read(self, wait_s: float) -> None:
        if select.select([self._fd], [], [], wait_s)[0]:
            with contextlib.suppress(OSError):  # the program has closed the terminal
                self.text += os.read(self._fd, 65536).decode(errors="replace").replace("\r\n", "\n")


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
