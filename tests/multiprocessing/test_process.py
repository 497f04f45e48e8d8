"""`Process` on a cluster of two CPUs: real processes, started, ended, watched and signalled."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import clusterpool.multiprocessing as mp
from clusterpool.client import api
from tests.waiting import is_alive, wait_for

pytestmark = pytest.mark.usefixtures("cluster")
WAIT_S = 20.0


def run(target: Callable[..., Any], *args: Any, **options: Any) -> mp.Process:
    """Start a process and wait for its end."""
    process = mp.Process(target=target, args=args, **options)
    process.start()
    process.join(WAIT_S)
    return process


def write(path: Path, text: object) -> None:
    """At once: who waits for the file finds all of it."""
    path.with_suffix(".new").write_text(str(text))
    path.with_suffix(".new").rename(path)


def sleep_long(path: Path | None = None) -> None:
    if path is not None:
        write(path, os.getpid())
    time.sleep(100)


# --- ends


def fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("target", "args", "exit_code"),
    [
        (int, (), 0),
        (sys.exit, (), 0),
        (sys.exit, (7,), 7),
        (sys.exit, (True,), 1),
        (sys.exit, ("a text",), 1),
        (fail, (), 1),
        (os._exit, (9,), 9),
        (signal.raise_signal, (signal.SIGKILL,), -signal.SIGKILL),
    ],
)
def test_exit_codes(target: Callable[..., Any], args: tuple[Any, ...], exit_code: int) -> None:
    process = run(target, *args)
    assert process.exitcode == exit_code
    assert not process.is_alive()


@pytest.mark.parametrize(("end", "exit_code"), [("terminate", -signal.SIGTERM), ("kill", -signal.SIGKILL)])
def test_a_process_is_ended_by_a_signal(tmp_path: Path, end: str, exit_code: int) -> None:
    process = mp.Process(target=sleep_long, args=(tmp_path / "pid",))
    process.start()
    wait_for((tmp_path / "pid").exists)
    assert int((tmp_path / "pid").read_text()) == process.pid
    assert process.is_alive() and process.exitcode is None
    process.join(0)
    process.join(-1)
    assert process.is_alive()
    getattr(process, end)()
    process.join(WAIT_S)
    assert process.exitcode == exit_code
    getattr(process, end)()  # does nothing any more


def test_sigint_is_a_keyboard_interrupt(tmp_path: Path) -> None:
    def wait_for_interrupt() -> None:
        try:
            sleep_long(tmp_path / "pid")
        except KeyboardInterrupt:
            write(tmp_path / "end", "interrupted")

    process = mp.Process(target=wait_for_interrupt)
    process.start()
    wait_for((tmp_path / "pid").exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(WAIT_S)
    assert process.exitcode == 0
    assert (tmp_path / "end").read_text() == "interrupted"


def test_the_sentinel_becomes_readable_at_the_end_and_stays_so() -> None:
    event, process = threading.Event(), mp.Process(target=sleep_long)
    with pytest.raises(ValueError, match="not started"):
        _ = process.sentinel
    process.start()
    sentinel = process.sentinel
    assert multiprocessing.connection.wait([sentinel], 0) == []
    threading.Timer(0.1, lambda: (event.set(), process.kill())).start()
    assert multiprocessing.connection.wait([sentinel], WAIT_S) == [sentinel]
    assert event.is_set()
    assert process.exitcode == -signal.SIGKILL
    assert multiprocessing.connection.wait([sentinel], 0) == [sentinel]


def test_a_running_process_cannot_be_closed_and_a_closed_one_not_used() -> None:
    process = mp.Process(target=sleep_long)
    process.start()
    sentinel = process.sentinel
    with pytest.raises(ValueError, match="still running"):
        process.close()
    process.kill()
    process.join(WAIT_S)
    process.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(sentinel)
    for use in (process.is_alive, process.join, process.terminate):
        with pytest.raises(ValueError, match="closed"):
            use()
    watch = weakref.ref(process)
    del process, use
    gc.collect()
    assert watch() is None


def test_a_process_that_is_not_closed_leaves_no_descriptor() -> None:
    run(int)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run(int)
    gc.collect()
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


# --- what it gets


class Greeter(mp.Process):
    """A subclass with its own `run` and attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="greeter")
        self.path = path

    def run(self) -> None:
        write(self.path, f"{self.name} {os.getpid() == self.pid} {mp.current_process() is self}")


def test_a_subclass_runs_its_run(tmp_path: Path) -> None:
    process = Greeter(tmp_path / "said")
    process.start()
    process.join(WAIT_S)
    assert (tmp_path / "said").read_text() == "greeter True True"


def test_closures_and_lambdas_and_large_arguments_work(tmp_path: Path) -> None:
    path, large = tmp_path / "sum", bytearray(b"\1") * 3_000_000
    assert run(lambda data, times: write(path, sum(data) * times), large, times := 2).exitcode == 0
    assert int(path.read_text()) == 3_000_000 * times


def test_the_child_knows_itself_and_its_parent(tmp_path: Path) -> None:
    def tell() -> None:
        me, parent = mp.current_process(), mp.parent_process()
        assert parent is not None
        facts = (me.name, me.daemon, me.authkey, me.pid == os.getpid(), parent.pid, parent.name, parent.is_alive())
        write(tmp_path / "facts", repr(facts))
        assert mp.active_children() == []
        assert mp.get_start_method() == "spawn"

    process = mp.get_context("spawn").Process(target=tell, daemon=True, name="child")
    process.start()
    process.join(WAIT_S)
    assert process.exitcode == 0
    current = mp.current_process()
    expected = ("child", True, bytes(current.authkey), True, os.getpid(), current.name, True)
    assert (tmp_path / "facts").read_text() == repr(expected)


def test_the_child_has_the_environment_and_arguments_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_JUST_NOW", "yes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prog", "x"])
    run(lambda: write(Path("facts").resolve(), (os.environ["SET_JUST_NOW"], sys.argv, sys.stdin.read())))
    assert (tmp_path / "facts").read_text() == str(("yes", ["prog", "x"], ""))


def test_a_socket_goes_to_the_child() -> None:
    ours, theirs = socket.socketpair()
    process = mp.Process(target=lambda sock: sock.sendall(b"hello"), args=(theirs,))
    process.start()
    theirs.close()
    ours.settimeout(WAIT_S)
    assert ours.recv(10) == b"hello"
    process.join(WAIT_S)
    ours.close()


def test_the_arguments_live_until_the_child_has_them_and_no_longer(tmp_path: Path) -> None:
    class Held:
        def __call__(self) -> None:
            sleep_long(tmp_path / "pid")

    held = Held()
    watch = weakref.ref(held)
    process = mp.Process(target=held)
    del held
    process.start()
    wait_for((tmp_path / "pid").exists)
    wait_for(lambda: gc.collect() >= 0 and watch() is None)
    process.kill()
    process.join(WAIT_S)


def test_what_cannot_be_pickled_is_said_at_the_start() -> None:
    process = mp.Process(target=print, args=(threading.current_thread(),))
    with pytest.raises(TypeError, match="pickle"):
        process.start()
    assert process not in mp.active_children()


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_broken_standard_streams_do_not_matter(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None) -> None:
    if stream is not None:
        stream.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        process = run(int)
    assert process.exitcode == 0


# --- families


def test_children_are_listed_until_they_are_joined() -> None:
    process = mp.Process(target=sleep_long)
    assert process not in mp.active_children()
    process.start()
    assert process in mp.active_children() and process in multiprocessing.active_children()
    process.kill()
    process.join(WAIT_S)
    assert process not in mp.active_children()


def test_a_child_waits_for_its_own_and_ends_its_daemons(tmp_path: Path) -> None:
    def work(path: Path) -> None:
        time.sleep(0.3)
        write(path, "done")

    def have_children() -> None:
        mp.Process(target=work, args=(tmp_path / "work",)).start()
        mp.Process(target=sleep_long, args=(tmp_path / "daemon",), daemon=True).start()
        wait_for((tmp_path / "daemon").exists)

    assert run(have_children).exitcode == 0
    assert (tmp_path / "work").read_text() == "done"
    wait_for(lambda: not is_alive(int((tmp_path / "daemon").read_text())))


def test_a_daemon_may_not_have_children(tmp_path: Path) -> None:
    def try_it() -> None:
        try:
            mp.Process(target=int).start()
        except AssertionError as exc:
            write(tmp_path / "error", exc)

    run(try_it, daemon=True)
    assert "not allowed to have children" in (tmp_path / "error").read_text()


def test_an_orphan_goes_on_and_sees_that_its_parent_has_died(tmp_path: Path) -> None:
    def watch_parent() -> None:
        parent = mp.parent_process()
        assert parent is not None
        write(tmp_path / "before", parent.is_alive())
        parent.join(WAIT_S)
        write(tmp_path / "after", parent.is_alive())

    def have_child() -> None:
        mp.Process(target=watch_parent).start()
        time.sleep(100)

    process = mp.Process(target=have_child)
    process.start()
    wait_for((tmp_path / "before").exists)
    process.kill()
    process.join(WAIT_S)
    wait_for((tmp_path / "after").exists)
    assert [(tmp_path / name).read_text() for name in ("before", "after")] == ["True", "False"]


def test_a_pool_and_a_process_may_be_used_in_each_other(tmp_path: Path) -> None:
    def use_pool() -> None:
        with mp.Pool(1) as pool:
            write(tmp_path / "squares", pool.map(pow_and_process, [2, 3]))

    def pow_and_process(number: int) -> int:
        return number**2 + (run(int).exitcode or 0)

    assert run(use_pool).exitcode == 0
    assert (tmp_path / "squares").read_text() == "[4, 9]"


def test_processes_hold_no_cpu(tmp_path: Path) -> None:
    processes = [mp.Process(target=sleep_long, args=(tmp_path / str(number),)) for number in range(4)]
    for process in processes:
        process.start()
    for number in range(4):
        wait_for((tmp_path / str(number)).exists)
    wait_for(lambda: api.available_resources()["CPU"] == 2.0)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(WAIT_S)


def test_log_settings_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # loky's processes, in tests after this one, stumble over a logger that pytest has given its handlers.
    monkeypatch.setattr(multiprocessing.util, "_logger", None)
    logger = mp.get_logger()
    level = logger.level
    logger.setLevel(37)
    try:
        run(lambda: write(tmp_path / "level", mp.get_logger().getEffectiveLevel()))
    finally:
        logger.setLevel(level)
    assert (tmp_path / "level").read_text() == "37"


# --- whole programs


def program(text: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_program_waits_at_its_end_for_its_children_but_not_for_daemons() -> None:
    done = program(
        """
        import time
        from clusterpool.multiprocessing import Process  # no guard is needed
        def work():
            time.sleep(0.5)
            print("worked")
        Process(target=work).start()
        Process(target=time.sleep, args=(100,), daemon=True).start()
        print("at the end", flush=True)
        """
    )
    out, err = done.communicate(timeout=WAIT_S)
    assert (done.returncode, err) == (0, "")
    assert out.splitlines()[0] == "at the end" and out.endswith(" worked\n")


def test_a_traceback_goes_to_standard_error() -> None:
    done = program(
        """
        from clusterpool.multiprocessing import Process
        def fail():
            1 / 0
        process = Process(target=fail)
        process.start()
        process.join()
        """
    )
    _, err = done.communicate(timeout=WAIT_S)
    assert "Process Process-1:" in err and err.rstrip().endswith("ZeroDivisionError: division by zero")


def test_the_children_of_a_program_that_is_killed_end_too() -> None:
    killed = program(
        """
        import os, time
        from clusterpool.multiprocessing import Process
        def sleep():
            print(os.getpid(), flush=True)
            time.sleep(100)
        Process(target=sleep).start()
        time.sleep(100)
        """
    )
    assert killed.stdout is not None
    pid = int(killed.stdout.readline().rpartition(" ")[2])
    assert is_alive(pid)
    killed.kill()
    wait_for(lambda: not is_alive(pid))
    with contextlib.suppress(OSError):
        killed.communicate(timeout=WAIT_S)
