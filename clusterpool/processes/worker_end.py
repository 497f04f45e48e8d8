"""How a worker ended, in words: from its exit code, its peak memory, and what it printed last."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path

from clusterpool.core.node_messages import EndCause
from clusterpool.processes.logs import WorkerLog
from clusterpool.sizes import memory_amount

# What faulthandler prints of a thread at most; then comes a line of three dots. (In Python that is a constant in C.)
TRACEBACK_LINES_MAX = 100
# Of a crash's traceback, how many calls an error's text holds: enough to see whose code it was.
CALLS_MAX = 6
# The traceback of each thread may have a hundred lines; more than this is other output.
_LOG_TAIL_BYTES = 256 * 1024
_CALL = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)')
_OUR_FOLDER = str(Path(__file__).parents[1])
_BY_ITSELF = "its code, or a library of it, called os._exit or sys.exit, or exit in C"
_SENT = "somebody, or its own code, sent that"
_LIMITS = {
    int(signal.SIGXCPU): "it had used up the CPU time that a limit allows it (ulimit -t, RLIMIT_CPU)",
    int(signal.SIGXFSZ): "a file had grown beyond what a limit allows it (ulimit -f, RLIMIT_FSIZE)",
}
_CRASHES = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE)


def explain_end(
    who: str,
    exit_code: int,
    peak_bytes: int,
    *,
    memory: str = "",
    is_kernels_doing: bool = False,
    log: WorkerLog | None = None,
) -> tuple[str, str]:
    """The text for people, and one of `EndCause`.

    `memory`: what the host has left; `is_kernels_doing`: it has just ended something for want of memory; `log`: all
    that the worker printed.
    """
    peak = f"peak memory {memory_amount(peak_bytes)}"
    if exit_code >= 0:
        return f"{who} ended with exit code {exit_code} ({peak}); {_BY_ITSELF}", EndCause.UNKNOWN
    name = str(-exit_code)
    with contextlib.suppress(ValueError):
        name = f"{-exit_code} ({signal.Signals(-exit_code).name})"
    text = f"{who} was killed by signal {name}; {peak}"
    if exit_code == -signal.SIGKILL:
        text += f"; {memory}" if memory else ""
        if is_kernels_doing:
            text += (
                "; the kernel has just ended a process for want of memory: use fewer workers, or say memory= for each"
            )
            return text, EndCause.OUT_OF_MEMORY
        text += "; if nobody sent the signal, the kernel ended it for want of memory: use fewer workers"
    elif exit_code in _CRASHES:
        crash, cause = _explain_crash(crash_traceback(log))
        return f"{text}; {crash}", cause
    else:
        text += f"; {_LIMITS.get(-exit_code, _SENT)}"
    return text, EndCause.UNKNOWN


def crash_traceback(log: WorkerLog | None) -> list[str]:
    """The lines that faulthandler printed of the thread that crashed, without line ends; empty if there are none."""
    lines: list[str] = []
    for path in (log.path, log.older_path) if log is not None else ():
        printed = _tail(path)
        start = printed.rfind("Fatal Python error: ")
        if start >= 0:
            lines = printed[start:].splitlines()
            break
    # "Fatal Python error: ...", an empty line, "Current thread 0x... (most recent call first):", the calls, and after
    # an empty line the other threads.
    starts = [number for number, line in enumerate(lines) if line.startswith("Current thread")]
    if not starts:
        return lines[:1]
    calls: list[str] = []
    for line in lines[starts[0] + 1 :]:
        if not line.startswith("  "):
            break
        calls.append(line)
    return [lines[0], *calls]


def _explain_crash(traceback: list[str]) -> tuple[str, str]:
    if not traceback:
        return "a crash in C code, or a stack overflow: its log holds what it printed last", EndCause.UNKNOWN
    calls = _shown_calls(traceback[1:])
    where = f"; its last calls, innermost first: {calls}" if calls else ""
    if len(traceback) > TRACEBACK_LINES_MAX:
        return (
            "probably a stack overflow, since calls were nested more than a hundred deep: recurse less deeply, or in a "
            f"thread with a larger stack (threading.stack_size){where}"
        ), EndCause.STACK_OVERFLOW
    return f"a crash in C code, or a stack overflow in it{where}", EndCause.UNKNOWN


def _shown_calls(lines: list[str]) -> str:
    """In one line, so that others can put it into a sentence: `f (job.py:12) 98 times, g (job.py:3)`."""
    calls: list[tuple[str, int]] = []
    for line in lines:
        found = _CALL.match(line)
        if found is None:
            continue
        if found["file"].startswith(_OUR_FOLDER):
            break  # from here on outwards it is only how the worker came to call the user's code
        call = f"{found['name']} ({Path(found['file']).name}:{found['line']})"
        if calls and calls[-1][0] == call:
            calls[-1] = (call, calls[-1][1] + 1)
        else:
            calls.append((call, 1))
    shown = [call if count == 1 else f"{call} {count} times" for call, count in calls[:CALLS_MAX]]
    return ", ".join(shown) + (", ..." if len(calls) > CALLS_MAX else "")


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
