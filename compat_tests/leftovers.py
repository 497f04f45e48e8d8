"""Ends whatever a class's process started: by session, and by a mark in the environment for what left the session."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

# A name of the environment whose value is unique to one process of the harness; what it starts inherits it.
MARK = "COMPAT_TESTS_PROCESS"
# Helpers of the standard library and of clusterpool end by themselves when their program has ended. Sooner, and they
# would be reported as left behind.
_LEAVE_WITHIN_S = 2.0
_POLL_S = 0.05
_COMMAND_MAX = 120


def end_all(session: int, mark: str, *, at_once: bool) -> list[str]:
    """Kill what is alive of the session and of the mark. `at_once`: without waiting for it to end by itself.

    Returns: the command lines of the processes that had to be killed.
    """
    if not at_once:
        deadline_s = time.monotonic() + _LEAVE_WITHIN_S
        while _alive(session, mark) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
    killed: dict[int, str] = {}
    # Again until nothing is found: a process may have started another while it was looked for.
    while pids := _alive(session, mark):
        has_new = not pids <= set(killed)
        for pid in pids:
            killed.setdefault(pid, _command_of(pid))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not has_new:
            time.sleep(_POLL_S)
    return list(killed.values())


def _command_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "?"
    return " ".join(words.split())[:_COMMAND_MAX]


def _alive(session: int, mark: str) -> set[int]:
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return {pid for pid in pids if _belongs(pid, session, mark.encode())}


def _belongs(pid: int, session: int, mark: bytes) -> bool:
    folder = Path(f"/proc/{pid}")
    try:
        stat = (folder / "stat").read_bytes()
        # The name, in brackets, may itself hold spaces and brackets.
        state, _parent, _group, session_of_process = stat[stat.rindex(b")") + 2 :].split()[:4]
        if state in (b"Z", b"X"):
            return False
        if int(session_of_process) == session:
            return True
        return b"%s=%s" % (MARK.encode(), mark) in (folder / "environ").read_bytes().split(b"\0")
    except (OSError, ValueError):  # it has ended, or is another user's
        return False
