from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterpool.processes import death
from clusterpool.processes.death import (
    ProcessIdentity,
    has_exited,
    is_same_process,
    kill_process,
    open_pidfd,
    open_pidfd_of,
    process_identity,
    read_process,
    record_process,
    send_signal,
)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(params=["functions of the standard library", "system calls"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in builds of Python that lack the functions."""
    if request.param == "system calls":
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.delattr(signal, "pidfd_send_signal")


def identity_of(pid: int) -> ProcessIdentity:
    identity = process_identity(pid)
    assert identity is not None
    return identity


def test_an_identity_is_that_of_one_process_only(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identity_of(sleeper.pid)
    assert identity.pid == sleeper.pid
    assert is_same_process(identity)
    assert not is_same_process(dataclasses.replace(identity, start_ticks=identity.start_ticks - 1))
    assert identity != process_identity(os.getpid())
    assert ProcessIdentity.parse(str(identity)) == identity


def test_a_process_that_ended_is_dead_before_it_is_waited_for(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identity_of(sleeper.pid)
    pidfd = open_pidfd(sleeper.pid)
    assert not has_exited(pidfd)
    os.kill(sleeper.pid, signal.SIGKILL)
    assert has_exited(pidfd, 5)
    os.close(pidfd)
    assert not is_same_process(identity)
    assert process_identity(sleeper.pid) is None
    assert open_pidfd_of(identity) is None


def test_the_name_of_a_process_cannot_confuse_us(tmp_path: Path) -> None:
    program = tmp_path / ") R 1 1 (x"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "60"]) as process:
        while ") R" not in Path(f"/proc/{process.pid}/comm").read_text():
            pass
        assert abs(identity_of(process.pid).start_ticks - identity_of(os.getpid()).start_ticks) < 1_000_000
        assert is_same_process(identity_of(process.pid))
        process.kill()


def test_a_process_of_another_namespace_may_be_alive_and_is_never_killed(
    sleeper: subprocess.Popen[bytes],
) -> None:
    foreign = dataclasses.replace(identity_of(sleeper.pid), pid_namespace=1)
    assert is_same_process(foreign)
    assert not kill_process(foreign)
    assert sleeper.poll() is None


@pytest.mark.usefixtures("either_way")
def test_only_the_process_that_was_meant_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identity_of(sleeper.pid)
    assert not kill_process(dataclasses.replace(identity, start_ticks=1))
    assert sleeper.poll() is None
    assert kill_process(identity, timeout_s=30)
    assert process_identity(sleeper.pid) is None
    assert sleeper.wait(30) == -signal.SIGKILL
    assert not kill_process(identity)


@pytest.mark.usefixtures("either_way")
def test_a_signal_to_one_that_is_gone_says_so(sleeper: subprocess.Popen[bytes]) -> None:
    pidfd = open_pidfd(sleeper.pid)
    assert send_signal(pidfd, signal.SIGTERM)
    assert sleeper.wait(30) == -signal.SIGTERM
    assert not send_signal(pidfd, signal.SIGTERM)
    os.close(pidfd)
    with pytest.raises(ProcessLookupError):
        open_pidfd(sleeper.pid)


def test_an_old_kernel_can_kill_too(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pidfd(pid: int) -> int:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(death, "open_pidfd", no_pidfd)
    assert not kill_process(dataclasses.replace(identity_of(sleeper.pid), start_ticks=1))
    assert kill_process(identity_of(sleeper.pid))
    assert sleeper.wait(30) == -signal.SIGKILL


def test_a_recorded_process_is_read_back(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    file = tmp_path / "node.pid"
    assert read_process(file) is None
    assert record_process(file, sleeper.pid) == read_process(file) == process_identity(sleeper.pid)
    file.write_text("not a pid")
    assert read_process(file) is None
    sleeper.kill()
    sleeper.wait()
    assert record_process(tmp_path / "late.pid", sleeper.pid) is None
    assert not (tmp_path / "late.pid").exists()


def test_a_child_dies_with_its_parent_even_if_that_died_first() -> None:
    program = (
        "import os, sys, time; from clusterpool.processes.death import die_with_parent\n"
        "read, write = os.pipe(); parent = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    die_with_parent(parent if sys.argv[1] == 'alive' else 1 << 30)\n"
        "    os.write(write, b'bound'); time.sleep(60)\n"
        "os.close(write); print(os.read(read, 5).decode(), flush=True); os._exit(0)\n"
    )
    for argument, expected in (("alive", "bound"), ("dead", "")):
        completed = subprocess.run(
            # The output stays open as long as the child lives: that `run` returns shows that it is dead.
            [sys.executable, "-c", program, argument],
            capture_output=True,
            text=True,
            timeout=50,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert completed.stdout.strip() == expected, completed.stderr
