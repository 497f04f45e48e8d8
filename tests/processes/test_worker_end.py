from __future__ import annotations

import signal
from pathlib import Path

import pytest

from clusterpool.core.node_messages import EndCause
from clusterpool.processes import worker_end
from clusterpool.processes.logs import WorkerLog
from clusterpool.processes.worker_end import explain_end

WHO = "worker w1 (job, pid 7) on node n1"
BY_ITSELF = "its code, or a library of it, called os._exit or sys.exit, or exit in C"
SENT = "somebody, or its own code, sent that"
OURS = str(Path(worker_end.__file__).parents[1] / "worker" / "calls.py")


def log_of(tmp_path: Path, *lines: str) -> WorkerLog:
    log = WorkerLog(tmp_path / "w1.log")
    log.append("".join(f"{line}\n" for line in lines).encode())
    log.close()
    return log


def crash(*calls: str) -> list[str]:
    return [
        "what the task printed",
        "Fatal Python error: Segmentation fault",
        "",
        "Thread 0x01 (most recent call first):",
        '  File "/lib/threading.py", line 1 in run',
        "",
        "Current thread 0x02 (most recent call first):",
        *calls,
        f'  File "{OURS}", line 9 in _call',
        '  File "/main.py", line 1 in <module>',
        "",
        "Extension modules: msgspec._core (total: 1)",
    ]


@pytest.mark.parametrize(
    ("exit_code", "memory", "expected"),
    [
        (3, "", f"{WHO} ended with exit code 3 (peak memory 1.2 GB); {BY_ITSELF}"),
        (-15, "", f"{WHO} was killed by signal 15 (SIGTERM); peak memory 1.2 GB; {SENT}"),
        (-64, "", f"{WHO} was killed by signal 64 (SIGRTMAX); peak memory 1.2 GB; {SENT}"),
        (-70, "", f"{WHO} was killed by signal 70; peak memory 1.2 GB; {SENT}"),
        (
            -24,
            "",
            f"{WHO} was killed by signal 24 (SIGXCPU); peak memory 1.2 GB; it had used up the CPU time that a limit "
            "allows it (ulimit -t, RLIMIT_CPU)",
        ),
        (
            -9,
            "1 GB free",
            f"{WHO} was killed by signal 9 (SIGKILL); peak memory 1.2 GB; 1 GB free; if nobody sent the signal, the "
            "kernel ended it for want of memory: use fewer workers",
        ),
    ],
)
def test_an_end_is_told_with_signal_and_peak_memory(exit_code: int, memory: str, expected: str) -> None:
    assert explain_end(WHO, exit_code, 1_234_000_000, memory=memory) == (expected, EndCause.UNKNOWN)


def test_a_crash_shows_the_calls_of_the_users_code_only(tmp_path: Path) -> None:
    log = log_of(tmp_path, *crash('  File "/lib/ctypes.py", line 5 in string_at', '  File "/job.py", line 12 in train'))
    text, cause = explain_end(WHO, -signal.SIGSEGV, 21_000_000, log=log)
    assert text.endswith("; its last calls, innermost first: string_at (ctypes.py:5), train (job.py:12)")
    assert "peak memory 21 MB" in text
    assert cause == EndCause.UNKNOWN


def test_a_hundred_nested_calls_are_a_stack_overflow(tmp_path: Path) -> None:
    log = log_of(tmp_path, *crash(*['  File "/job.py", line 3 in f'] * 100, "  ..."))
    text, cause = explain_end(WHO, -signal.SIGSEGV, 0, log=log)
    assert "probably a stack overflow" in text
    assert text.endswith("f (job.py:3) 100 times")
    assert cause == EndCause.STACK_OVERFLOW


def test_only_the_last_crash_of_a_log_counts(tmp_path: Path) -> None:
    log = log_of(tmp_path, *crash('  File "/old.py", line 1 in old'), *crash('  File "/new.py", line 1 in new'))
    text, _ = explain_end(WHO, -signal.SIGSEGV, 0, log=log)
    assert text.endswith("new (new.py:1)")


@pytest.mark.parametrize("lines", [[], ["no traceback"], ["Fatal Python error: Aborted"]])
def test_a_crash_without_a_traceback_is_told_as_well(lines: list[str], tmp_path: Path) -> None:
    text, cause = explain_end(WHO, -signal.SIGABRT, 0, log=log_of(tmp_path, *lines))
    assert "a crash in C code, or a stack overflow" in text
    assert cause == EndCause.UNKNOWN


def test_a_worker_that_printed_nothing_has_no_log(tmp_path: Path) -> None:
    text, _ = explain_end(WHO, -signal.SIGSEGV, 0, log=WorkerLog(tmp_path / "none.log"))
    assert "a crash in C code" in text
