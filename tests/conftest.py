"""Fixtures for all tests: a cluster to test on, and the proof that each test cleans up after itself.

After every test the autouse fixture `nothing_left_behind` looks for what the test left: processes,
shared-memory segments, semaphores and session folders of this run. What a module's `cluster` fixture holds is allowed
until it is shut down. The usual case, a test that starts nothing, costs a listing of /proc and two folders.

Tests may run side by side (`pytest -n`, as CI does): each process is a run of its own, with its own marker and folders.
A test that none of another run can bear, or that cannot bear one, is marked `alone`.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SHARED_MEMORY = Path("/dev/shm")
# Arenas and cells; POSIX semaphores.
SEGMENT_PREFIXES = ("clusterpool-", "sem.clusterpool-")
NODE_ID = re.compile(r"\bn[0-9a-f]{10}\b")
# What runs after that is a leak, and not a straggler on a busy machine. (That a driver's death is noticed within 5 s is
# the claim of tests of its own.)
LEAVE_WITHIN_S = 20.0
# Helpers of the standard library and of joblib that live until their program ends, whoever first needed them.
HELPERS_OF_OTHERS = (
    "multiprocessing.resource_tracker",
    "loky.backend.resource_tracker",
    "multiprocessing.forkserver",
)

# A shell's job in the background ignores Ctrl-C, and so do all that it starts; tests of Ctrl-C must not find it so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Leftovers:
    """What of this run is there at one moment, apart from the test process itself."""

    pids: frozenset[int] = frozenset()
    segments: frozenset[str] = frozenset()
    folders: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.pids or self.segments or self.folders)

    def describe(self) -> str:
        lines = [f"process {pid}: {describe_process(pid)}" for pid in sorted(self.pids)]
        lines += [f"shared memory {SHARED_MEMORY / name}" for name in sorted(self.segments)]
        lines += [f"session folder {name}" for name in sorted(self.folders)]
        return "\n".join(lines)


@dataclass
class Run:
    """One run of pytest: its marker, its folders, and what fixtures of wider scope hold at present."""

    marker: bytes
    tmpdir: Path
    home: Path
    segments_before: frozenset[str]
    held: list[Leftovers] = field(default_factory=list)
    # Processes that were seen once and are not ours: their environments are never read again.
    _foreign_pids: set[int] = field(default_factory=set)
    # Nodes of other runs, by their folders.
    _foreign_nodes: set[str] = field(default_factory=set)

    def look(self) -> Leftovers:
        """Everything of this run that exists now and that no fixture of wider scope holds."""
        pids = self._own_pids()
        segments = self._new_segments()
        folders = self._session_folders()
        if not (pids or segments or folders):
            return Leftovers()
        held_pids = frozenset().union(*(held.pids for held in self.held))
        allowed = {pid for pid in pids if held_pids.intersection(ancestors(pid))}
        held_folders = frozenset().union(*(held.folders for held in self.held))
        held_segments = frozenset().union(*(held.segments for held in self.held))
        # What was passed on of a held cluster's locks and queues lives as long as its job does.
        held_nodes = set(NODE_ID.findall(" ".join(held_segments)))
        segments = {name for name in segments - held_segments if held_nodes.isdisjoint(NODE_ID.findall(name))}
        if segments:
            living = nodes_of_legitimate_processes(segments, pids - allowed)
            segments = {
                name
                for name in segments
                if living.isdisjoint(NODE_ID.findall(name))
                and not is_mapped_by_a_legitimate_process(name, pids - allowed)
            }
        return Leftovers(frozenset(pids - allowed), frozenset(segments), folders - held_folders)

    def wait_until_clean(self, timeout_s: float = LEAVE_WITHIN_S) -> Leftovers:
        """What is still there once everything has had the time to end."""
        deadline_s = time.monotonic() + timeout_s
        leftovers = self.look()
        while leftovers and time.monotonic() < deadline_s:
            end_helpers_of_others()
            time.sleep(0.01)
            leftovers = self.look()
        return leftovers

    def clear(self, leftovers: Leftovers) -> None:
        """Ends what a test left, so that the tests after it are judged on their own."""
        clusterpool = sys.modules.get("clusterpool")
        if clusterpool is not None and not self.held and hasattr(clusterpool, "shutdown"):
            with contextlib.suppress(Exception):
                clusterpool.shutdown()
        for pid in leftovers.pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.waitpid(pid, 0)
        for name in leftovers.segments:
            (SHARED_MEMORY / name).unlink(missing_ok=True)
        for name in leftovers.folders:
            shutil.rmtree(self.tmpdir / name, ignore_errors=True)

    def _own_pids(self) -> set[int]:
        alive = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._foreign_pids &= alive
        own = set()
        for pid in alive - self._foreign_pids:
            if self._is_own(pid):
                own.add(pid)
            else:
                self._foreign_pids.add(pid)
        return {pid for pid in own if is_running(pid)}

    def _is_own(self, pid: int) -> bool:
        if pid == os.getpid():
            return False
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            environment = b""
        # A fork that has not yet called exec shows the environment that pytest was started with, without the
        # marker: hence the parents as well. A fork of a fork whose parent has died is what this cannot see.
        if self.marker in environment.split(b"\0"):
            return True
        # A server that shows a title of its own writes it over its environment; it runs in a folder of its session.
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd").startswith(f"{self.tmpdir}/"):
                return True
        return os.getpid() in ancestors(pid)

    def _session_folders(self) -> frozenset[str]:
        """Everything below the base folder of this user, which itself may stay, relative to `tmpdir`."""
        found = set()
        for name in os.listdir(self.tmpdir):
            is_base = name.startswith("clusterpool-")
            found |= {f"{name}/{below}" for below in os.listdir(self.tmpdir / name)} if is_base else {name}
        return frozenset(found)

    def _new_segments(self) -> set[str]:
        new = {name for name in segment_names() if name not in self.segments_before}
        if not new:
            return new
        # Of a node of theirs that was killed nothing is left but its files, until its cluster removes them.
        # (`Path.glob` raises when a folder of another run goes meanwhile.)
        for folder in map(Path, glob.glob(f"{self.tmpdir.parent}/cpt-*/clusterpool-*/s-*/n-*")):
            if self.tmpdir not in folder.parents:
                self._foreign_nodes.add(folder.name.replace("-", ""))
        return {name for name in new if self._foreign_nodes.isdisjoint(NODE_ID.findall(name))}


def segment_names() -> list[str]:
    """Shared-memory files of any clusterpool of this machine."""
    try:
        return [name for name in os.listdir(SHARED_MEMORY) if name.startswith(SEGMENT_PREFIXES)]
    except FileNotFoundError:
        return []


def is_running(pid: int) -> bool:
    """Whether the process is more than somebody else's zombie, and no helper of another library.

    A zombie that is our own child counts as running: the code that started it has not waited for it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    if fields[0] in "ZX":
        return int(fields[1]) == os.getpid()
    command = describe_process(pid)
    return not any(helper in command for helper in HELPERS_OF_OTHERS)


def describe_process(pid: int) -> str:
    """The command line, for the message of a failure."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "(gone)"
    return command or "(a zombie, not waited for)"


def ancestors(pid: int) -> list[int]:
    """`pid` itself, its parent, and so on up to the first process."""
    line = []
    while pid > 1:
        line.append(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return line


def nodes_of_legitimate_processes(segments: set[str], leaked_pids: set[int]) -> set[str]:
    """The nodes of these segments whose arena another run is using: nobody need map their semaphores and cells."""
    nodes = set(NODE_ID.findall(" ".join(segments)))
    arenas = [name for name in segment_names() if re.fullmatch(rf"clusterpool-\d+-.*{NODE_ID.pattern}", name)]
    return {
        name[-11:] for name in arenas if name[-11:] in nodes and is_mapped_by_a_legitimate_process(name, leaked_pids)
    }


def is_mapped_by_a_legitimate_process(segment: str, leaked_pids: set[int]) -> bool:
    """Whether a living process outside this test has the segment: a held cluster, or another run of tests."""
    path = str(SHARED_MEMORY / segment)
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid() or int(name) in leaked_pids:
            continue
        with contextlib.suppress(OSError):
            if path in Path(f"/proc/{name}/maps").read_text():
                return True
            # A node may have the file open without having mapped it.
            for link in Path(f"/proc/{name}/fd").iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile; the others still count
                    if os.readlink(link) == path:
                        return True
    return False


def end_helpers_of_others() -> None:
    """Reaps what the standard library and joblib leave running by design, which is no leak of ours."""
    multiprocessing.active_children()
    reusable = sys.modules.get("joblib.externals.loky.reusable_executor")
    executor = getattr(reusable, "_executor", None)
    if executor is not None:
        executor.shutdown(wait=True, kill_workers=True)
        vars(reusable)["_executor"] = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that must be alone come last: amid the others each would have to wait for those that run."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: who waits here does not use up the test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """While a test marked `alone` runs, no process of this run of pytest runs another."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    is_alone = item.get_closest_marker("alone") is not None
    # Any two files do. Whoever wants to be alone keeps the gate shut while the others come out.
    with open(__file__) as floor, open(item.config.rootpath / "pyproject.toml") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(floor, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(floor, fcntl.LOCK_UN)  # closing is not enough: a fork may still have it open


@pytest.fixture(scope="session", autouse=True)
def run_of_tests() -> Iterator[Run]:
    """Folders and a marker of this run alone, in the environment that every process of a cluster inherits."""
    # Short, because the path of a UNIX socket has 107 bytes at the most.
    # With the process number, so that a run that was killed can be told from one that is still going on.
    tmpdir = Path(tempfile.mkdtemp(prefix=f"cpt-{os.getpid()}-"))
    home = Path(tempfile.mkdtemp(prefix=f"cph-{os.getpid()}-"))
    marker = f"CLUSTERPOOL_TEST_RUN={os.getpid()}-{os.urandom(6).hex()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*marker.split("=", 1))
        patch.setenv("CLUSTERPOOL_TMPDIR", str(tmpdir))
        patch.setenv("CLUSTERPOOL_HOME", str(home))
        patch.delenv("CLUSTERPOOL_ADDRESS", raising=False)
        run = Run(marker.encode(), tmpdir, home, frozenset(segment_names()))
        yield run
        leftovers = run.wait_until_clean()
        run.clear(leftovers)
        shutil.rmtree(tmpdir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
    if leftovers:
        pytest.fail(f"the run left behind:\n{leftovers.describe()}", pytrace=False)


@pytest.fixture(autouse=True)
def nothing_left_behind(run_of_tests: Run) -> Iterator[None]:
    """Fails the test that leaves a process, a shared-memory segment or a session folder."""
    yield
    leftovers = run_of_tests.wait_until_clean()
    if leftovers:
        description = leftovers.describe()
        run_of_tests.clear(leftovers)
        pytest.fail(
            f"the test left behind, {LEAVE_WITHIN_S:g} s after its end:\n{description}\n"
            "A test that starts a cluster takes the fixture `cluster` (the module's) or `fresh` (its own).",
            pytrace=False,
        )


@pytest.fixture(scope="module")
def cluster(run_of_tests: Run) -> Iterator[None]:
    """An embedded cluster with two CPUs that all tests of the module share."""
    import clusterpool

    clusterpool.init(num_cpus=2)
    held = run_of_tests.look()
    run_of_tests.held.append(held)
    try:
        yield
    finally:
        clusterpool.shutdown()
        run_of_tests.held.remove(held)
    leftovers = run_of_tests.wait_until_clean()
    if leftovers:
        description = leftovers.describe()
        run_of_tests.clear(leftovers)
        pytest.fail(f"the module's cluster left behind:\n{description}", pytrace=False)


@pytest.fixture
def fresh() -> Iterator[None]:
    """A test that starts a cluster of its own, by `init` or by first use; it is shut down afterwards."""
    import clusterpool

    assert not clusterpool.is_initialized(), "an earlier test left this process connected to a cluster"
    yield
    clusterpool.shutdown()
