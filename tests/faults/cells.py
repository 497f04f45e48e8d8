"""The crash matrix: each kind of process is killed at each moment of a program's life, and what was promised happens.

A cell starts a program of programs.py at `home`, waits until its work has come to the moment, kills, and compares the
outcome with the table (crash.py): the right results (and how often the work was done), or an error that says what
happened. Then the dead are replaced, and the cluster must be as new. The promises: "What happens when something dies"
in docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any


@dataclass(frozen=True)
class Cell:
    """`outcome`: "right", or the name of an error ("|": or another) and patterns of its text ("{node}": where it ran;
    "{home}": the driver's own node); of no use where the program itself is the victim. `executions`: how often the work
    may have begun, at least and at most.
    """

    victim: str  # worker, node, zygote, home (the driver's own node), store (the control store's server), driver
    moment: str
    kind: str = "task"  # task, actor, pool, executor; ledger, detached: actors with checkpoints
    outcome: tuple[str, ...] = ("right",)
    executions: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "-".join(f"{name}={value}" for name, value in self.options.items())
        return "-".join(filter(None, (self.victim, self.moment, self.kind, options)))


# What an error says: which attempt at what failed, who was killed, where, by what, and what probably did it.
WORKER_KILLED = ("worker w", "{node}", r"signal 9 \(SIGKILL\)", "for want of memory")
NODE_GONE = ("{node}, which is gone", "no heartbeat")
TASK_ONCE = (r"task \d+ \(run\)", "attempt 1 of 1")
TASK_RETRIED = (r"task \d+ \((run|digest)\)", "attempt 1 of 4")
CALL_ONCE = (r"task \d+ \(Worker\.\w+\)", "attempt 1 of 1")
LEDGER_CALL = (r"task \d+ \(Ledger\.\w+\)", r"attempt \d")  # without limit
EXECUTOR_ONCE = (r"task \d+ \(waiting_square\)", "attempt 1 of 1")
ACTOR_DIED = ("ActorDied", *CALL_ONCE, *WORKER_KILLED)
HOME_GONE = ("{home}", "has ended", "the node failed, or somebody ended it")
RESTARTED = {"max_restarts": -1, "max_task_retries": -1}
LIFE_MOMENTS = ("idle", "running", "checkpointing", "restoring", "replaying")
CELLS = [
    # A worker: what it ran is done again, as often as was said.
    Cell("worker", "idle", "pool", executions=(100, 100)),
    Cell("worker", "running", executions=(2, 2)),
    Cell("worker", "running", outcome=("WorkerDied", *WORKER_KILLED, *TASK_ONCE), executions=(1, 1),
         options={"retries": 0}),
    Cell("worker", "running", "pool", executions=(101, 101)),
    Cell("worker", "running", "executor", ("BrokenProcessPool", *WORKER_KILLED, *EXECUTOR_ONCE)),
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
    Cell("node", "running", outcome=("WorkerDied", *NODE_GONE, *TASK_ONCE), executions=(1, 1), options={"retries": 0}),
    Cell("node", "running", "pool"),
    Cell("node", "running", "executor"),
    Cell("node", "running", "executor", ("BrokenProcessPool", *NODE_GONE, *EXECUTOR_ONCE), options={"retries": 0}),
    Cell("node", "fetching", executions=(1, 1)),
    Cell("node", "replying", executions=(2, 2)),
    Cell("node", "transferring", executions=(2, 2)),
    Cell("node", "spilling"),
    Cell("node", "idle", "actor", ("ActorDied", *NODE_GONE, *CALL_ONCE)),
    Cell("node", "running", "actor", ("ActorDied", *NODE_GONE, *CALL_ONCE), executions=(1, 1)),
    # The zygote: its node ends at once.
    Cell("zygote", "running", executions=(2, 2)),
    Cell("zygote", "idle", "pool", executions=(100, 100)),
    Cell("zygote", "idle", "actor", ("ActorDied", "{node}, which is gone", "left the cluster", *CALL_ONCE)),
    # The driver's own node: the program hears of it (calls of a pool end as if all workers had died), and nothing of it
    # stays on the other nodes.
    Cell("home", "idle", "pool", ("WorkerDied|NotConnected", *HOME_GONE)),  # which, tells who was first
    Cell("home", "running", outcome=("NotConnected", *HOME_GONE, *TASK_RETRIED)),
    Cell("home", "running", "pool", ("WorkerDied", *HOME_GONE, r"task \d+ \(waiting_square\)", "attempt 1 of 4")),
    Cell("home", "running", "executor", ("BrokenProcessPool", *HOME_GONE, *EXECUTOR_ONCE)),
    Cell("home", "fetching", outcome=("NotConnected", *HOME_GONE, *TASK_RETRIED)),
    Cell("home", "transferring", outcome=("NotConnected", *HOME_GONE)),  # the task had ended
    Cell("home", "running", "actor", ("NotConnected", *HOME_GONE, *CALL_ONCE)),
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
    # Actors that are made again: without a checkpoint they begin anew, and die when they may not.
    Cell("worker", "running", "actor", executions=(2, 2), options=RESTARTED),
    Cell("node", "running", "actor", executions=(2, 2), options=RESTARTED),
    Cell("worker", "running", "actor", ("ActorUnavailable", *CALL_ONCE, *WORKER_KILLED), executions=(1, 1),
         options={"max_restarts": 1}),
    # Actors with checkpoints: each call counts once and in order, whoever dies while they run, save or are made again.
    *(Cell(victim, moment, "ledger") for victim in ("worker", "node", "store", "driver") for moment in LIFE_MOMENTS),
    *(Cell("home", moment, "ledger", ("NotConnected", *HOME_GONE, *LEDGER_CALL)) for moment in LIFE_MOMENTS[1:]),
    Cell("home", "idle", "ledger", ("NotConnected", *HOME_GONE)),
    # Detached ones do not notice the end of their driver; their nodes, or those that are left, make them again.
    *(Cell(victim, moment, "detached") for victim in ("node", "driver") for moment in LIFE_MOMENTS),
    Cell("worker", "restoring", "detached"),
    Cell("worker", "replaying", "detached"),
]  # fmt: skip


def quarter(number: int) -> list[Cell]:
    """Of the cells (1 to 4), victim by victim: four files of tests run side by side, each with a cluster of its own,
    and a control store that is killed too often in a row is started again more slowly.
    """
    rows = [[cell for cell in CELLS if cell.victim == victim] for victim in dict.fromkeys(c.victim for c in CELLS)]
    in_turn = [cell for column in zip_longest(*rows) for cell in column if cell is not None]
    return in_turn[number - 1 :: 4]
