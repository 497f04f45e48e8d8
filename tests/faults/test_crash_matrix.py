"""The crash matrix: each kind of process is killed at each moment of a program's life, and what was promised happens.

A cell starts a program of programs.py at `home`, waits until its work has come to the moment, kills, and compares the
outcome with the table: the right results (and how often the work was done), or an error that says what happened. Then
the dead are replaced, and the cluster must be as new. The promises: "What happens when something dies" in
docs/architecture.md.
"""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.clusters import DEAD_WITHIN_S, is_alive, wait_for
from tests.faults.hosts import SLACK_S, Hosts, Program, kill
from tests.faults.programs import WAITING

pytestmark = pytest.mark.cluster

PROGRAMS = Path(__file__).with_name("programs.py")
REACHED_WITHIN_S = 30.0
WORK_S = 20.0  # what the work itself may take on a busy machine, once nothing holds it up
SPOTS = ("left", "right")
SIGKILL_OF_WORKER = (r"signal 9 \(SIGKILL\)", "{node}", "worker w")


@dataclass(frozen=True)
class Cell:
    """`outcome`: "right", the name of an error and patterns of its text ("{node}": where it ran), or "" for a victim
    that is the program itself. `executions`: how often the work may have begun, at least and at most.
    """

    victim: str  # worker, node, zygote, home (the driver's own node), store (the control store's server), driver
    moment: str
    kind: str = "task"  # task, actor, pool, executor
    outcome: tuple[str, ...] = ("right",)
    executions: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "-".join(f"{name}={value}" for name, value in self.options.items())
        return "-".join(filter(None, (self.victim, self.moment, self.kind, options)))


ACTOR_DIED = ("ActorDied", *SIGKILL_OF_WORKER)
CELLS = [
    # A worker: what it ran is done again, as often as was said.
    Cell("worker", "idle", "pool", executions=(100, 100)),
    Cell("worker", "running", executions=(2, 2)),
    Cell("worker", "running", outcome=("WorkerDied", *SIGKILL_OF_WORKER, "run"), executions=(1, 1),
         options={"retries": 0}),
    Cell("worker", "running", "pool", executions=(101, 101)),
    Cell("worker", "running", "executor", ("BrokenProcessPool", *SIGKILL_OF_WORKER)),
    Cell("worker", "running", "executor", executions=(101, 101), options={"retries": 1}),
    Cell("worker", "fetching", executions=(1, 1)),
    Cell("worker", "replying", executions=(2, 2)),
    Cell("worker", "transferring", executions=(1, 1)),
    Cell("worker", "spilling", executions=(20, 21)),
    # An actor's worker.
    Cell("worker", "idle", "actor", ACTOR_DIED),
    Cell("worker", "running", "actor", ACTOR_DIED, executions=(1, 1)),
    Cell("worker", "fetching", "actor", ACTOR_DIED, executions=(0, 0)),
    Cell("worker", "replying", "actor", ACTOR_DIED, executions=(1, 1)),
    # The node where the work is: as if all its workers had died, and its objects are gone.
    Cell("node", "idle", "pool", executions=(100, 100)),
    Cell("node", "running", executions=(2, 2)),
    Cell("node", "running", outcome=("WorkerDied", "{node}"), executions=(1, 1), options={"retries": 0}),
    Cell("node", "running", "pool"),
    Cell("node", "running", "executor", ("BrokenProcessPool", "{node}")),
    Cell("node", "fetching", executions=(1, 1)),
    Cell("node", "replying", executions=(2, 2)),
    Cell("node", "transferring", executions=(2, 2)),
    Cell("node", "spilling"),
    Cell("node", "idle", "actor", ("ActorDied", "{node}")),
    Cell("node", "running", "actor", ("ActorDied", "{node}"), executions=(1, 1)),
    # The zygote: its node ends at once.
    Cell("zygote", "running", executions=(2, 2)),
    Cell("zygote", "idle", "pool", executions=(100, 100)),
    Cell("zygote", "idle", "actor", ("ActorDied", "{node}")),
    # The driver's own node: the program hears of it (calls of a pool end as if all workers had died), and nothing of it
    # stays on the other nodes.
    Cell("home", "idle", "pool", ("WorkerDied", "has ended")),
    Cell("home", "running", outcome=("NotConnected",)),
    Cell("home", "running", "pool", ("WorkerDied", "has ended")),
    Cell("home", "running", "executor", ("BrokenProcessPool",)),
    Cell("home", "fetching", outcome=("NotConnected",)),
    Cell("home", "transferring", outcome=("NotConnected",)),
    Cell("home", "running", "actor", ("NotConnected",)),
    # The control store: nobody notices, and it is started again.
    Cell("store", "idle", "pool", executions=(100, 100)),
    Cell("store", "running", executions=(1, 1), options={"retries": 0}),
    Cell("store", "running", "pool", executions=(100, 100)),
    Cell("store", "fetching", executions=(1, 1), options={"retries": 0}),
    Cell("store", "replying", executions=(1, 1), options={"retries": 0}),
    Cell("store", "transferring", executions=(1, 1), options={"retries": 0}),
    Cell("store", "spilling", executions=(20, 20), options={"retries": 0}),
    Cell("store", "idle", "actor", executions=(1, 1)),
    Cell("store", "running", "actor", executions=(1, 1)),
    # The driver: nothing of it stays on any node.
    *(Cell("driver", moment) for moment in ("running", "fetching", "replying", "transferring", "spilling")),
    Cell("driver", "idle", "pool"),
    Cell("driver", "running", "pool"),
    Cell("driver", "running", "executor"),
    Cell("driver", "running", "actor"),
    Cell("driver", "idle", "actor"),
]  # fmt: skip


def read_executions(folder: Path, name: str = "executions") -> list[dict[str, Any]]:
    try:
        lines = (folder / name).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


@dataclass
class Place:
    """Where the work was at the moment."""

    role: str
    worker_pid: int


class Moments:
    """Waits until a program has come to its moment; says where it works."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts = hosts
        self.folder = folder

    def reach(self, cell: Cell) -> Place:
        return getattr(self, cell.moment)()  # type: ignore[no-any-return]

    def _wait(self, condition: Any, what: str) -> None:
        wait_for(condition, within_s=REACHED_WITHIN_S, what=what, period_s=0.002)

    def _wait_reached(self) -> None:
        self._wait((self.folder / "reached").exists, "the program is where it waits")

    def _place_of(self, execution: dict[str, Any]) -> Place:
        return Place(self.hosts.role_of(execution["node"]), execution["pid"])

    def _wait_spot(self, name: str) -> str:
        """The role of the first of the two nodes of which a detail is above 0."""
        found: list[str] = []

        def look() -> bool:
            found.extend(role for role in SPOTS if self.hosts.detail(role, name) > 0)
            return bool(found)

        self._wait(look, f"{name} on one of the nodes")
        return found[0]

    def idle(self) -> Place:
        self._wait_reached()
        places = [self._place_of(execution) for execution in read_executions(self.folder, "before")]
        return next(place for place in places if place.role in SPOTS)

    def running(self) -> Place:
        """Not at home, where a pool has workers too: its node is the driver's own."""
        found: list[Place] = []

        def look() -> bool:
            waiting = [one for one in read_executions(self.folder) if one["name"] in ("run", *WAITING)]
            found[:] = [place for place in map(self._place_of, waiting) if place.role in SPOTS]
            return bool(found)

        self._wait(look, "the work has begun on one of the nodes")
        return found[0]

    def fetching(self) -> Place:
        role = self._wait_spot("pulls")
        return Place(role, self.hosts.worker_pids(role)[0])

    def replying(self) -> Place:
        self._wait_spot("objects_creating")
        return self._place_of(read_executions(self.folder)[0])

    def transferring(self) -> Place:
        self._wait_reached()
        self._wait(lambda: self.hosts.detail("home", "pulls") > 0, "the result is on its way")
        return self._place_of(read_executions(self.folder)[0])

    def spilling(self) -> Place:
        role = self._wait_spot("objects_spilling")
        here = [self._place_of(execution) for execution in read_executions(self.folder)]
        return [place for place in here if place.role == role][-1]


def victim_pid(cell: Cell, hosts: Hosts, program: Program, place: Place) -> int:
    if cell.victim == "worker":
        return place.worker_pid
    if cell.victim == "driver":
        return program.pid
    if cell.victim == "store":
        return hosts.store_pid()
    if cell.victim == "home":
        return hosts.node_pid("home")
    return hosts.zygote_pid(place.role) if cell.victim == "zygote" else hosts.node_pid(place.role)


def assert_outcome(cell: Cell, folder: Path, node_id: str) -> None:
    outcome = json.loads((folder / "outcome").read_text())
    wanted, *patterns = cell.outcome
    if wanted == "right":
        assert outcome == {"right": True}, outcome.get("text")
        return
    assert wanted in outcome.get("bases", ()), outcome
    for pattern in patterns:
        assert re.search(pattern.replace("{node}", node_id), outcome["text"]), (pattern, outcome["text"])


def assert_executions(cell: Cell, folder: Path) -> None:
    if cell.executions is None:
        return
    executions = read_executions(folder)
    at_least, at_most = cell.executions
    assert at_least <= len(executions) <= at_most, (len(executions), Counter(one["name"] for one in executions))


@pytest.fixture
def mended(hosts: Hosts) -> Any:
    """Whatever became of the cell, the next one has four healthy nodes."""
    yield
    hosts.mend()
    hosts.assert_healthy()


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_what_was_promised_happens(cell: Cell, hosts: Hosts, mended: None, tmp_path: Path) -> None:
    arguments = [cell.moment, cell.kind, str(tmp_path), json.dumps(cell.options)]
    with Program(str(PROGRAMS), *arguments, address=hosts.address("home"), folder=tmp_path) as program:
        place = Moments(hosts, tmp_path).reach(cell)
        kill(victim_pid(cell, hosts, program, place))
        if cell.victim == "zygote":
            node_pid = hosts.node_pid(place.role)
            wait_for(lambda: not is_alive(node_pid), within_s=5, what="the node of the dead zygote ends")
        (tmp_path / "go").touch()
        if cell.victim == "driver":
            assert program.wait(5) == -signal.SIGKILL
            return
        assert program.wait(DEAD_WITHIN_S + SLACK_S + WORK_S) == 0, program.said()
        assert_outcome(cell, tmp_path, hosts.node_id(place.role))
        assert_executions(cell, tmp_path)
