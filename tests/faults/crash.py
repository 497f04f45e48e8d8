"""One cell of the crash matrix: run its program, wait for the moment, kill, and compare what comes with the table."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.clusters import DEAD_WITHIN_S, is_alive, wait_for
from tests.faults.cells import Cell
from tests.faults.hosts import SLACK_S, Hosts, Program, kill
from tests.faults.programs import WAITING

PROGRAMS = Path(__file__).with_name("programs.py")
REACHED_WITHIN_S = 30.0
WORK_S = 20.0  # what the work itself may take on a busy machine, once nothing holds it up
SPOTS = ("left", "right")
# Some moments are short, and looked for from outside: a program that was through before is started again.
TRIES = 3
SHORT_S = 0.002  # between two looks


class MomentMissed(Exception):
    """The program has ended before it was seen at its moment."""


@dataclass
class Place:
    """Where the work was at the moment."""

    role: str
    worker_pid: int


def run_cell(cell: Cell, hosts: Hosts, folder: Path) -> None:
    """Raises: AssertionError if something else came than was promised."""
    for number in range(1, TRIES + 1):
        own = folder / f"try-{number}"
        own.mkdir(parents=True)
        try:
            run_once(cell, hosts, own)
        except MomentMissed:
            if number == TRIES:
                raise
        else:
            return


def run_once(cell: Cell, hosts: Hosts, folder: Path) -> None:
    home_id = hosts.node_id("home")
    arguments = [cell.moment, cell.kind, str(folder), json.dumps(cell.options)]
    with Program(str(PROGRAMS), *arguments, address=hosts.address("home"), folder=folder) as program:
        place = Moments(hosts, folder, program).reach(cell)
        kill(victim_pid(cell, hosts, program, place))
        if cell.victim == "zygote":
            node_pid = hosts.node_pid(place.role)
            wait_for(lambda: not is_alive(node_pid), within_s=5, what="the node of the dead zygote ends")
        (folder / "go").touch()
        if cell.victim == "driver":
            assert program.wait(30) == -signal.SIGKILL
        else:
            assert program.wait(DEAD_WITHIN_S + SLACK_S + WORK_S) == 0, program.said()
            assert_outcome(cell, folder, {"{node}": hosts.node_id(place.role), "{home}": home_id})
            assert_executions(cell, folder)
    if cell.kind == "detached" and cell.victim == "driver":
        with Program(str(PROGRAMS), "check", *arguments[1:], address=hosts.address("home"), folder=folder) as program:
            assert program.wait(WORK_S) == 0, program.said()
            assert_outcome(cell, folder, {})


def read_executions(folder: Path, name: str = "executions") -> list[dict[str, Any]]:
    try:
        lines = (folder / name).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


class Moments:
    """Waits until a program has come to its moment; says where it works."""

    def __init__(self, hosts: Hosts, folder: Path, program: Program) -> None:
        self.hosts = hosts
        self.folder = folder
        self.program = program

    def reach(self, cell: Cell) -> Place:
        moments: dict[str, Callable[[], Place]] = {
            "idle": self.idle, "running": self.running, "fetching": self.fetching, "replying": self.replying,
            "transferring": self.transferring, "spilling": self.spilling,
        }  # fmt: skip
        if cell.kind in ("ledger", "detached") and cell.moment != "idle":
            return self.life(cell.moment)
        return moments[cell.moment]()

    def _wait(self, condition: Callable[[], bool], what: str, *, period_s: float = 0.01) -> None:
        def is_there() -> bool:
            if condition():
                return True
            if not is_alive(self.program.pid):
                raise MomentMissed(f"not seen: {what}; the program said {self.program.said()!r}")
            return False

        try:
            wait_for(is_there, within_s=REACHED_WITHIN_S, what=what, period_s=period_s)
        except AssertionError as exc:
            begun = [(one["name"], self.hosts.role_of(one["node"])) for one in read_executions(self.folder)]
            raise AssertionError(f"{exc}; begun: {begun}; said: {self.program.said()!r}") from None

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

        self._wait(look, f"{name} on one of the nodes", period_s=SHORT_S)
        return found[0]

    def _wait_execution(self, names: list[object]) -> Place:
        """Not at home, where a pool has workers too: its node is the driver's own."""
        found: list[Place] = []

        def look() -> bool:
            waiting = [one for one in read_executions(self.folder) if one["name"] in names]
            found[:] = [place for place in map(self._place_of, waiting) if place.role in SPOTS]
            return bool(found)

        self._wait(look, f"one of {names} has begun on one of the nodes")
        return found[0]

    def idle(self) -> Place:
        self._wait_reached()
        places = [self._place_of(execution) for execution in read_executions(self.folder, "before")]
        return next(place for place in places if place.role in SPOTS)

    def running(self) -> Place:
        return self._wait_execution(["run", *WAITING])

    def life(self, moment: str) -> Place:
        """Of an actor with checkpoints, which says where it waits."""
        return self._wait_execution([moment])

    def fetching(self) -> Place:
        role = self._wait_spot("pulls")
        return Place(role, self.hosts.worker_pids(role)[0])

    def replying(self) -> Place:
        self._wait_spot("objects_creating")
        return self._place_of(read_executions(self.folder)[0])

    def transferring(self) -> Place:
        self._wait_reached()
        self._wait(lambda: self.hosts.detail("home", "pulls") > 0, "the result is on its way", period_s=SHORT_S)
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


def assert_outcome(cell: Cell, folder: Path, names: dict[str, str]) -> None:
    outcome = json.loads((folder / "outcome").read_text())
    wanted, *patterns = cell.outcome
    if wanted == "right":
        assert outcome == {"right": True}, outcome
        return
    assert not set(wanted.split("|")).isdisjoint(outcome.get("bases", ())), outcome
    for pattern in patterns:
        for name, value in names.items():
            pattern = pattern.replace(name, value)
        assert re.search(pattern, outcome["text"]), (pattern, outcome["text"])


def assert_executions(cell: Cell, folder: Path) -> None:
    if cell.executions is None:
        return
    executions = read_executions(folder)
    at_least, at_most = cell.executions
    assert at_least <= len(executions) <= at_most, (len(executions), Counter(one["name"] for one in executions))
