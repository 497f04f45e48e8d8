"""What workers print: kept in a bounded file for each worker, and split into lines for the driver's
terminal.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from clusterpool.processes.named_output import strip_marks

# A longer line reaches the driver in pieces. Less breaks up people's printed tables, more lets one line
# fill a message.
LINE_BYTES_MAX = 16 * 1024
# How much one call reads: a worker that prints without end must not keep the node's loop from other work.
READ_BYTES_MAX = 256 * 1024
# Of a worker's log, in two files: the current one and the one before. Both are read when somebody looks for
# a cause.
LOG_BYTES_MAX = 16 * 1024 * 1024
# Of the logs of dead workers on a node: a pool with maxtasksperchild=1 makes thousands.
LOG_FILES_MAX = 1000


@dataclass(frozen=True)
class LogLine:
    """`stream`: stdout or stderr. `text` has no line end. `name`: of the function that has printed it; "" if the worker
    has but one.
    """

    stream: str
    text: str
    name: str = ""


class WorkerLog:
    """The log file of one worker; made at its first output, because most workers print nothing."""

    def __init__(self, path: Path, *, bytes_max: int = LOG_BYTES_MAX) -> None:
        if bytes_max < 2:
            raise ValueError(f"need bytes_max >= 2: {bytes_max=}")
        self.path = path
        self._half_bytes_max = bytes_max // 2
        self._file: BinaryIO | None = None
        self._size_bytes = 0

    @property
    def older_path(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def append(self, output: bytes) -> None:
        """Raises: OSError if the disk is full; the output is lost then, and later output is tried again."""
        output = output[-self._half_bytes_max :]
        if self._size_bytes + len(output) > self._half_bytes_max:
            self.close()
            self.path.replace(self.older_path)
            self._size_bytes = 0
        if self._file is None:
            descriptor = os.open(
                self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._size_bytes += self._file.write(output)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class LogPipe:
    """The reading end of a worker's stdout or stderr; never blocks. Owned by the node's loop.

    The end of the stream is not the end of the worker: a program that it started may hold the pipe for
    days. So on the worker's death `read` what is there, then `close`.
    """

    def __init__(
        self,
        descriptor: int,
        stream: str,
        log: WorkerLog | None = None,
        *,
        line_bytes_max: int = LINE_BYTES_MAX,
    ) -> None:
        if line_bytes_max < 4:
            raise ValueError(f"need line_bytes_max >= 4, one character of UTF-8: {line_bytes_max=}")
        os.set_blocking(descriptor, False)
        self.stream = stream
        self.is_at_end = False
        self._descriptor = descriptor
        self._log = log
        self._line_bytes_max = line_bytes_max
        self._unfinished = b""
        self._name = ""

    def fileno(self) -> int:
        return self._descriptor

    def read(self, bytes_max: int = READ_BYTES_MAX) -> list[LogLine]:
        """The lines that are complete, of at most about `bytes_max` new bytes; sets `is_at_end` when all
        ends are closed.

        Raises: nothing for a full disk: the driver's terminal then still gets the lines.
        """
        parts: list[bytes] = []
        left_bytes = bytes_max
        while left_bytes > 0 and not self.is_at_end and self._descriptor >= 0:
            try:
                part = os.read(self._descriptor, min(left_bytes, 65536))
            except BlockingIOError:
                break
            if not part:
                self.is_at_end = True
                break
            parts.append(part)
            left_bytes -= len(part)
        output = b"".join(parts)
        if output and self._log is not None:
            try:
                self._log.append(strip_marks(output)[0])
            except OSError:
                pass
        lines = self._split(output) if output else []
        if self.is_at_end:
            lines += self._rest()
        return lines

    def close(self) -> list[LogLine]:
        """Close the pipe; gives back the last line, if it has no end."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self.is_at_end = True
        return self._rest()

    def _split(self, output: bytes) -> list[LogLine]:
        *complete, unfinished = (self._unfinished + output).split(b"\n")
        lines = [self._line(piece) for line in complete for piece in self._pieces(_as_shown(self._unmarked(line)))]
        # A progress bar redraws itself with "\r" for hours: only what a terminal would now show is kept.
        *pieces, self._unfinished = self._pieces(_latest_redraw(self._unmarked(unfinished)))
        return lines + [self._line(piece) for piece in pieces]

    def _unmarked(self, line: bytes) -> bytes:
        """A line is whose who has printed the last of it."""
        line, name = strip_marks(line)
        if name is not None:
            self._name = name
        return line

    def _rest(self) -> list[LogLine]:
        rest, self._unfinished = _as_shown(self._unfinished), b""
        return [self._line(rest)] if rest else []

    def _line(self, raw: bytes) -> LogLine:
        return LogLine(self.stream, raw.decode("utf-8", "replace"), self._name)

    def _pieces(self, line: bytes) -> list[bytes]:
        pieces = []
        while len(line) > self._line_bytes_max:
            cut = self._line_bytes_max
            # Not within a character, which has at most three bytes of continuation.
            while cut > self._line_bytes_max - 3 and line[cut] & 0xC0 == 0x80:
                cut -= 1
            pieces.append(line[:cut])
            line = line[cut:]
        pieces.append(line)
        return pieces


def prune_logs(folder: Path, *, in_use: Iterable[Path] = (), files_max: int = LOG_FILES_MAX) -> int:
    """Remove the oldest `*.log` and `*.log.1` files beyond `files_max`, never those `in_use`. Says how
    many.
    """
    kept = set(in_use)
    files = [path for path in folder.iterdir() if path.name.endswith((".log", ".log.1"))]
    if len(files) <= files_max:
        return 0
    files.sort(key=lambda path: path.stat().st_mtime_ns)
    removed = [path for path in files[: len(files) - files_max] if path not in kept]
    for path in removed:
        path.unlink(missing_ok=True)
    return len(removed)


def _as_shown(line: bytes) -> bytes:
    """A complete line as a terminal shows it at last: without the end's "\\r", from the last redraw on."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _latest_redraw(unfinished: bytes) -> bytes:
    """From the last "\\r" that something follows; the one at the very end may be half of a "\\r\\n"."""
    start = unfinished.rstrip(b"\r").rfind(b"\r") + 1
    return unfinished[start:]
