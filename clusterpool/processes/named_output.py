"""Who has printed: a worker that runs functions of several names says so in what it prints.

    print() --NamedOutput--> mark, text --the worker's pipe--> node --strip_marks--> lines, each with its name

In the stream itself, because the node reads it whenever it has the time: by then another task may run. A mark comes
only before output of another function than the last, so that who prints nothing, or is alone, pays nothing. It is an
operating system command of the kind that terminals ignore.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any

_START = b"\x1b]clusterpool;"
_MARK = re.compile(re.escape(_START) + rb"([^\x07\n]*)\x07")
_NAME_CHARACTERS_MAX = 200
_naming: list[Callable[[], str]] = []  # at most one: set in workers


def name_output(name_now: Callable[[], str]) -> None:
    """From now on what this process prints is `name_now()`'s; "" for the name that the node knows it by."""
    _naming[:] = [name_now]
    for stream in (sys.stdout, sys.stderr):
        output = getattr(stream, "buffer", None)
        if isinstance(output, NamedOutput):
            output.remember_pipe()


class NamedOutput(io.BufferedWriter):
    """The binary layer of `sys.stdout` and `sys.stderr` in the processes of a zygote.

    Not the lowest one: an interrupt between its write and its return would have the same bytes written once more.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(io.FileIO(descriptor, "w", closefd=False))
        self._told = ""
        self._pipe: tuple[int, int] | None = None  # to the node

    def remember_pipe(self) -> None:
        """The descriptor leads to the node at present."""
        self._pipe = self._target()

    def write(self, data: Any) -> Any:
        """As that of any file; the name comes first, if it is not that of the last output."""
        if _naming:
            name = _naming[0]()
            if name != self._told and self._leads_to_node():
                self._told = name
                super().write(_START + name[:_NAME_CHARACTERS_MAX].encode("utf-8", "replace") + b"\x07")
        return super().write(data)

    def _leads_to_node(self) -> bool:
        """Not to a file to which a task has redirected the descriptor (`os.dup2`)."""
        return self._pipe == self._target()

    def _target(self) -> tuple[int, int]:
        status = os.fstat(self.fileno())
        return status.st_dev, status.st_ino


def rebuild_standard_streams() -> None:
    """Fresh objects on descriptors 1 and 2, which each worker points at its own pipes; made once, shared by
    all forks.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        # Whole lines: else what two workers print at once is mixed, and what a killed one printed is lost.
        # Any text can be printed: a worker must not fail because the node was started with LANG=C.
        stream = io.TextIOWrapper(NamedOutput(number), "utf-8", "backslashreplace", line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def strip_marks(output: bytes) -> tuple[bytes, str | None]:
    """Output without its marks, and the name that the last of them gives; None where there is none."""
    if _START not in output:
        return output, None
    names = _MARK.findall(output)
    return _MARK.sub(b"", output), names[-1].decode("utf-8", "replace") if names else None
