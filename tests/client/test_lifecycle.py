"""Start, end, start again; forks, crashes, resources of a cluster: each test has its own."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from clusterpool.client import api, current
from tests.client.engine import wait_for
from tests.waiting import pid_at_meeting

# Driver programs run apart: what they print is what the test looks at.
SCRIPT_S = 40


@pytest.fixture
def started(fresh: None) -> None:
    clusterpool.init(num_cpus=2)


def run_script(code: str, *, timeout_s: float = SCRIPT_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout_s
    )


@clusterpool.remote
def add(x: int, y: int = 1) -> int:
    return x + y


# --- init and shutdown ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_init_says_what_it_joined() -> None:
    assert not clusterpool.is_initialized()
    answer = clusterpool.init(num_cpus=1, resources={"licence": 2})
    assert clusterpool.is_initialized()
    assert answer["is_embedded"] is True and answer["node_id"].startswith("n")
    assert Path(answer["address"]).is_socket()
    total = clusterpool.cluster_resources()
    assert (total["CPU"], total["licence"]) == (1, 2)
    (node,) = clusterpool.nodes()
    assert node["node_id"] == answer["node_id"] and node["alive"]


@pytest.mark.usefixtures("started")
def test_init_twice_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="started already"):
        clusterpool.init()


@pytest.mark.usefixtures("fresh")
def test_sizes_of_a_cluster_that_runs_cannot_be_set(tmp_path: Path) -> None:
    address = clusterpool.init(num_cpus=1)["address"]
    script = f"""
    import clusterpool
    try:
        clusterpool.init({address!r}, num_cpus=3)
    except ValueError as exc:
        print("refused:", exc)
    print(clusterpool.init({address!r})["is_embedded"])
    @clusterpool.remote
    def f(x): return x + 1
    print(clusterpool.get(f.remote(1), timeout=20))
    """
    done = run_script(script)
    assert done.stderr == ""
    assert done.stdout.startswith("refused: num_cpus") and done.stdout.endswith("False\n2\n")
    assert clusterpool.get(add.remote(1), timeout=20) == 2


@pytest.mark.usefixtures("fresh")
def test_an_address_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(errors.NotConnected, match="no cluster is at"):
        clusterpool.init(str(tmp_path / "nothing"))
    assert not clusterpool.is_initialized()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        ({"num_cpus": -1}, ValueError),
        ({"num_gpus": -1}, ValueError),
        ({"resources": {"CPU": 3}}, ValueError),
        ({"resources": {"licence": -1}}, ValueError),
        ({"resources": {3: 1}}, TypeError),
        ({"namespace": 5}, TypeError),
        ({"object_store_bytes": -5}, ValueError),
        ({"memory": -5}, ValueError),
        ({"runtime_env": {"container": "x"}}, ValueError),
    ],
)
def test_bad_sizes_are_refused(sizes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        clusterpool.init(**sizes)
    assert not clusterpool.is_initialized()


@pytest.mark.usefixtures("fresh")
def test_first_use_starts_a_cluster() -> None:
    assert clusterpool.get(add.remote(1), timeout=20) == 2
    assert clusterpool.is_initialized()


@pytest.mark.usefixtures("fresh")
def test_shutdown_and_start_again() -> None:
    for _ in range(3):
        clusterpool.init(num_cpus=1)
        assert clusterpool.get(add.remote(1), timeout=20) == 2
        clusterpool.shutdown()
        assert not clusterpool.is_initialized()
    clusterpool.shutdown()  # twice


@pytest.mark.usefixtures("fresh")
def test_what_belongs_to_a_cluster_that_was_shut_down_says_so() -> None:
    @clusterpool.remote
    class Counter:
        def add(self) -> int:
            return 1

    clusterpool.init(num_cpus=2)
    ref, counter, stored = add.remote(1), Counter.remote(), clusterpool.put(1)
    method = counter.add
    clusterpool.get([ref, counter.add.remote()], timeout=20)
    clusterpool.shutdown()
    for again in (False, True):
        if again:
            clusterpool.init(num_cpus=2)
        for use in (
            lambda: clusterpool.get(ref, timeout=30),
            lambda: clusterpool.wait([stored], timeout=30),
            lambda: clusterpool.cancel(ref),
            lambda: ref.future(),
            lambda: counter.add.remote(),
            lambda: method.remote(),
            lambda: clusterpool.kill(counter),
            lambda: add.remote(ref),
        ):
            with pytest.raises(errors.NotConnected, match="shut down"):
                use()
        assert clusterpool.is_initialized() is again
    for use in (lambda: add.remote([ref]), lambda: clusterpool.put([ref]), lambda: add.remote(counter)):
        with pytest.raises(errors.NotConnected, match="shut down"):
            use()


@pytest.mark.usefixtures("fresh")
def test_shutdown_wakes_those_who_wait() -> None:
    import threading

    @clusterpool.remote
    def sleep() -> None:
        time.sleep(60)

    clusterpool.init(num_cpus=1)
    ref = sleep.remote()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            clusterpool.get(ref, timeout=30)
        except BaseException as exc:
            caught.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.5)
    clusterpool.shutdown()
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(caught[0], errors.NotConnected)


# --- the end of a program -------------------------------------------------------------------------------------------


def test_the_end_of_a_program_ends_its_cluster_without_a_word() -> None:
    done = run_script(
        """
        import clusterpool
        @clusterpool.remote
        def f(x): return x + 1
        print(clusterpool.get([f.remote(n) for n in range(3)], timeout=20))
        ref = f.remote(5)          # still there at the end
        @clusterpool.remote
        class A:
            def hello(self): return "hello"
        a = A.remote()
        print(clusterpool.get(a.hello.remote(), timeout=20))
        # What the interpreter takes apart after our own end: functions, arrays and references that were passed.
        import numpy as np
        array, local = np.zeros(1_000_000), [lambda x: x.sum()]
        refs = [clusterpool.remote(local[0]).remote(array), clusterpool.put([f.remote(1)])]
        clusterpool.wait(refs, num_returns=2, timeout=20)
        stream = clusterpool.remote(num_returns="streaming")(lambda: iter([1, 2])).remote()
        next(stream)
        """
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[1, 2, 3]\nhello\n", "", 0)


def test_an_exception_of_the_program_is_seen() -> None:
    done = run_script(
        """
        import clusterpool, time
        @clusterpool.remote
        def f(): time.sleep(60)
        ref = f.remote()
        raise KeyError("the program's own")
        """
    )
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1 and "the program's own" in done.stderr


def test_an_interrupted_program_ends() -> None:
    code = """
    import clusterpool, time
    @clusterpool.remote
    def f(): time.sleep(60)
    ref = f.remote()
    print("waiting", flush=True)
    clusterpool.get(ref)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in err
    assert process.returncode == -signal.SIGINT


@pytest.mark.usefixtures("fresh")
def test_the_tasks_that_a_task_leaves_behind_may_run_in_its_own_worker() -> None:
    clusterpool.init(num_cpus=1)
    pid_of_task = clusterpool.remote(os.getpid)

    @clusterpool.remote
    def leave_tasks() -> tuple[int, list[Any]]:
        return os.getpid(), [pid_of_task.remote() for _ in range(3)]

    pid, refs = clusterpool.get(leave_tasks.remote(), timeout=20)
    assert clusterpool.get(refs, timeout=20) == [pid] * 3


@pytest.mark.usefixtures("fresh")
def test_ctrl_c_just_before_a_wait_goes_to_sleep_is_not_lost() -> None:
    for _ in range(2):  # a second cluster of the same program is no worse off
        clusterpool.shutdown()
        clusterpool.init(num_cpus=1)
        ref = clusterpool.remote(time.sleep).remote(60)
        # The signal is noted, but interrupts no system call: as if it had come an instant before the call.
        timer = threading.Timer(0.2, _thread.interrupt_main)
        timer.start()
        asked_s = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            clusterpool.get(ref, timeout=20)
        assert time.monotonic() - asked_s < 15
        timer.join()


def test_interrupts_never_leave_the_client_half_changed() -> None:
    done = run_script(
        """
        import clusterpool, os, signal, threading, time
        @clusterpool.remote
        def f(x): return x
        clusterpool.init(num_cpus=2)
        clusterpool.get(f.remote(0))
        INTERRUPTS = 60
        is_working, calls, caught = False, 0, 0
        def interrupt():
            for number in range(INTERRUPTS):
                done = calls
                # Where it is caught; and now and then it lets the program get on, however slow the machine is.
                while not is_working or (number % 10 == 0 and calls == done):
                    time.sleep(0.0005)
                time.sleep(0.003 + 0.0001 * (number % 7))
                os.kill(os.getpid(), signal.SIGINT)
                while caught == number:
                    time.sleep(0.0005)
        threading.Thread(target=interrupt, daemon=True).start()
        while caught < INTERRUPTS:
            try:
                is_working = True
                while True:
                    refs = [f.remote(n) for n in range(20)]
                    assert clusterpool.get(refs, timeout=20) == list(range(20))
                    clusterpool.wait(refs)
                    calls += 1
            except KeyboardInterrupt:
                is_working = False
                caught += 1
        print(clusterpool.get([f.remote(n) for n in range(5)], timeout=20))
        """
    )
    assert (done.stdout, done.stderr) == ("[0, 1, 2, 3, 4]\n", "")


def test_a_killed_driver_leaves_nothing() -> None:
    # The fixture `nothing_left_behind` looks for workers, arena and folder.
    code = """
    import clusterpool, time, os
    import numpy as np
    @clusterpool.remote
    def f(): time.sleep(60)
    @clusterpool.remote
    class A:
        def pid(self): return os.getpid()
    a = A.remote()
    big = clusterpool.put(np.zeros(5_000_000))
    refs = [f.remote() for _ in range(2)]
    print(clusterpool.get(a.pid.remote(), timeout=20), clusterpool.nodes()[0]["pid"], flush=True)
    time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = process.stdout.readline().split()
        process.kill()
    assert len(pids) == 2 and wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5)


def test_a_killed_node_is_told_to_the_driver() -> None:
    done = run_script(
        """
        import clusterpool, os, signal, time
        @clusterpool.remote
        def f(): time.sleep(60)
        clusterpool.init(num_cpus=1)
        ref = f.remote()
        pid = clusterpool.nodes()[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        try:
            clusterpool.get(ref, timeout=20)
        except clusterpool.errors.NotConnected as exc:
            print("told")
        print(clusterpool.is_initialized())
        """
    )
    assert done.stdout == "told\nFalse\n", done


def test_what_a_program_has_of_a_killed_node_is_told_by_that_and_not_by_a_new_one() -> None:
    done = run_script(
        """
        import clusterpool, os, signal, time
        from clusterpool import errors
        clusterpool.init(num_cpus=2)
        class Echo:
            def say(self, value): return value
        say, echo = clusterpool.remote(Echo().say), clusterpool.remote(Echo).remote()
        known, late = say.remote(1), echo.say.remote(2)
        assert clusterpool.get([known, late]) == [1, 2]
        sleeping = clusterpool.remote(time.sleep).remote(60)
        os.kill(clusterpool.nodes()[0]["pid"], signal.SIGKILL)
        try:
            clusterpool.get(sleeping, timeout=20)
        except errors.NotConnected:
            pass
        # Nothing has started another cluster until now, and nothing of the former one does.
        for question in (
            lambda: clusterpool.get(echo.say.remote(3), timeout=20),
            lambda: clusterpool.get(sleeping, timeout=20),
        ):
            try:
                print(question())
            except errors.NotConnected as exc:
                print("has ended" in str(exc))
        print(clusterpool.wait([known, sleeping], num_returns=2, timeout=20) == ([known, sleeping], []))
        print(clusterpool.get(known), clusterpool.get(say.remote(4), timeout=20))
        """
    )
    assert (done.stdout, done.stderr) == ("True\nTrue\nTrue\n1 4\n", "")


@pytest.mark.usefixtures("started")
def test_the_control_store_of_a_killed_node_ends_with_it() -> None:
    (node,) = clusterpool.nodes()
    servers: list[int] = []

    def find_server() -> bool:
        children = Path(f"/proc/{node['pid']}/task").glob("*/children")
        pids = [int(pid) for file in children for pid in file.read_text().split()]
        servers[:] = [pid for pid in pids if b"valkey" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return bool(servers)

    assert wait_for(find_server, 20), "it starts a moment after its node"
    os.kill(node["pid"], signal.SIGKILL)
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in servers))


# --- forks ----------------------------------------------------------------------------------------------------------


def in_child(function: Any) -> str:
    """What `function` returns in a forked child, as text; the child ends by os._exit."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(function())
        except BaseException as exc:
            text = f"{type(exc).__name__}: {exc}"
        os.write(write_fd, text.encode())
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


@pytest.mark.usefixtures("started")
def test_a_forked_child_that_does_nothing_changes_nothing() -> None:
    ref = clusterpool.put(b"x" * 1_000_000)
    array_ref = add.remote(1)
    assert in_child(lambda: clusterpool.is_initialized()) == "False"
    assert clusterpool.get(array_ref, timeout=20) == 2
    assert len(clusterpool.get(ref)) == 1_000_000


@pytest.mark.usefixtures("started")
def test_references_of_the_parent_are_refused_in_a_forked_child() -> None:
    ref = clusterpool.put(5)
    assert in_child(lambda: clusterpool.get(ref, timeout=30)).startswith("NotConnected")
    assert clusterpool.get(ref) == 5


@pytest.mark.usefixtures("started")
def test_a_forked_child_may_have_a_cluster_of_its_own() -> None:
    def use() -> int:
        value: int = clusterpool.get(add.remote(1), timeout=20)
        clusterpool.shutdown()
        return value

    assert in_child(use) == "2"
    assert clusterpool.get(add.remote(2), timeout=20) == 3


@pytest.mark.usefixtures("started")
def test_a_forked_child_that_ends_normally_does_not_end_the_parents_cluster() -> None:
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=print, args=("",))
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert clusterpool.get(add.remote(2), timeout=20) == 3


@pytest.mark.usefixtures("started")
def test_a_task_may_fork() -> None:
    @clusterpool.remote
    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert clusterpool.get(fork.remote(), timeout=20) == 7
    assert clusterpool.get(add.remote(2), timeout=20) == 3


# --- resources ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_tasks_with_gpus_see_different_ones(tmp_path: Path) -> None:
    clusterpool.init(num_cpus=2, num_gpus=2)

    @clusterpool.remote(num_gpus=1)
    def devices() -> str:
        pid_at_meeting(tmp_path, 2)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    assert sorted(clusterpool.get([devices.remote() for _ in range(2)], timeout=50)) == ["0", "1"]

    @clusterpool.remote
    def no_device() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert clusterpool.get([no_device.remote() for _ in range(5)], timeout=20) == [before] * 5


@pytest.mark.usefixtures("fresh")
def test_a_gpu_is_free_when_the_process_that_used_it_has_ended() -> None:
    clusterpool.init(num_cpus=2, num_gpus=1)

    @clusterpool.remote(num_gpus=1)
    def own_pid() -> int:
        return os.getpid()

    @clusterpool.remote(num_gpus=1)
    def starts_another() -> Any:
        return own_pid.remote()  # which needs the GPU, and keeps this process from ending

    pid = clusterpool.get(own_pid.remote(), timeout=20)
    assert wait_for(lambda: clusterpool.available_resources().get("GPU") == 1.0)
    assert not Path(f"/proc/{pid}").exists()
    assert clusterpool.get(clusterpool.get(starts_another.remote(), timeout=20), timeout=20) > 0


@pytest.mark.usefixtures("fresh")
def test_custom_resources_bound_what_runs_at_once(tmp_path: Path) -> None:
    clusterpool.init(num_cpus=4, resources={"licence": 1})

    @clusterpool.remote(num_cpus=0.5, resources={"licence": 1})
    def alone(folder: str, number: int) -> int:
        path = Path(folder, str(number))
        path.touch()
        others = len(os.listdir(folder))
        time.sleep(0.05)
        path.unlink()
        return others

    assert clusterpool.get([alone.remote(str(tmp_path), n) for n in range(4)], timeout=30) == [1] * 4
    assert wait_for(lambda: clusterpool.available_resources()["licence"] == 1)


@pytest.mark.usefixtures("fresh")
def test_environment_variables_of_a_job() -> None:
    clusterpool.init(num_cpus=1, runtime_env={"env_vars": {"ENGINE_TEST": "job"}})

    @clusterpool.remote
    def variable() -> str | None:
        return os.environ.get("ENGINE_TEST")

    assert clusterpool.get(variable.remote(), timeout=20) == "job"
    own = variable.options(runtime_env={"env_vars": {"ENGINE_TEST": "task"}})
    assert clusterpool.get(own.remote(), timeout=20) == "task"


@pytest.mark.usefixtures("fresh")
def test_detached_actors_outlive_their_driver() -> None:
    address = clusterpool.init(num_cpus=2)["address"]
    done = run_script(
        f"""
        import clusterpool
        clusterpool.init({address!r})
        @clusterpool.remote(name="detached", lifetime="detached")
        class Counter:
            def __init__(self): self.value = 0
            def add(self):
                self.value += 1
                return self.value
        print(clusterpool.get(Counter.remote().add.remote(), timeout=20))
        """
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
    counter = clusterpool.get_actor("detached")
    assert clusterpool.get(counter.add.remote(), timeout=20) == 2
    clusterpool.kill(counter)


@pytest.mark.usefixtures("fresh")
def test_actors_and_names_of_a_driver_go_with_it() -> None:
    address = clusterpool.init(num_cpus=2)["address"]
    done = run_script(
        f"""
        import clusterpool
        clusterpool.init({address!r})
        @clusterpool.remote(name="mine")
        class Counter:
            def add(self): return 1
        print(clusterpool.get(Counter.remote().add.remote(), timeout=20))
        """
    )
    assert (done.stdout, done.stderr) == ("1\n", "")

    def is_unknown() -> bool:
        try:
            clusterpool.get_actor("mine")
        except errors.ActorNotFound:
            return True
        return False

    assert wait_for(is_unknown)


@pytest.mark.usefixtures("started")
def test_what_arrives_while_the_cluster_is_left_does_not_wait_for_who_leaves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = api.connect()
    answers: list[BaseException] = []
    is_answered = threading.Event()

    def ask() -> None:
        try:
            api.runtime()
        except errors.NotConnected as exc:
            answers.append(exc)
        is_answered.set()

    # As in `shutdown`: the lock is taken, the client is closed, and its thread is joined.
    with current.lock:
        monkeypatch.setattr(client, "is_closed", True)
        client.call_later(ask)
        assert is_answered.wait(30)
        monkeypatch.undo()
    assert len(answers) == 1


def test_each_line_has_the_name_of_the_function_that_printed_it() -> None:
    done = run_script(
        """
        import os, sys, tempfile, clusterpool
        from clusterpool.client import api, current
        clusterpool.init(num_cpus=1)
        client, seen = current.get().client, []
        show = client.on_log_lines
        client.on_log_lines = lambda message: (show(message), seen.extend(message.lines))

        @clusterpool.remote
        def first(ref): print("one", os.getpid())

        @clusterpool.remote
        def second(): print("two", os.getpid())

        def redirected(path):
            kept = os.dup(1)
            os.dup2(os.open(path, os.O_WRONLY), 1)
            print("into a file")
            os.dup2(kept, 1)
            print(repr(open(path).read()))

        for _ in range(2):
            clusterpool.get(first.remote(clusterpool.put(1)))
            clusterpool.get(second.remote())
            clusterpool.get(second.options(name="third").remote())
        with tempfile.NamedTemporaryFile() as file:
            clusterpool.get(clusterpool.remote(redirected).remote(file.name))
        api.wait_until(lambda: len(seen) >= 7, 30)
        """
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 7, done
    assert len({line.split()[-1] for line in lines[:6]}) == 1, "all in one worker"
    said = [(line.partition(" ")[0], line.partition(") ")[2].split()[0]) for line in lines[:6]]
    assert said == [("(first", "one"), ("(second", "two"), ("(third", "two")] * 2
    assert lines[6].startswith("(redirected ")
    assert lines[6].endswith(r" 'into a file\n'")


def test_a_program_that_was_started_without_standard_streams(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import os, sys, clusterpool
            print("lost")
            with clusterpool.Pool(1) as pool:
                found = pool.map(abs, [-1]), [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
            with open(sys.argv[1], "w") as file:
                file.write(repr(found))
            """
        )
    )
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, str(program), str(tmp_path / "result")]
    assert subprocess.run(command, timeout=SCRIPT_S).returncode == 0
    assert (tmp_path / "result").read_text() == repr(([1], ["/dev/null"] * 3))
