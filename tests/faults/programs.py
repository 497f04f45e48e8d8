"""What runs while something is killed: `python programs.py MOMENT CALLER FOLDER`. One function for each moment.

What tasks do they write into FOLDER/executions, one line each, as they begin. A program writes FOLDER/reached when it
waits to be told to go on, by FOLDER/go, and FOLDER/outcome at its end: {"right": true}, or which error came.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import clusterpool
from clusterpool.futures import ProcessPoolExecutor
from clusterpool.multiprocessing import Pool

LARGE_BYTES = 80_000_000
PIECE_BYTES = 16_000_000
PIECES = 20
ON_SPOT = {"num_cpus": 0, "resources": {"spot": 1}}
# Calls of a ledger; those before the moment, unless the call in question is one of them.
CALLS = 16
CALLS_BEFORE = 6
WAITING_CALL = 9
WORKERS = 6
WAITING = range(3, 3 + WORKERS)  # the items that wait to be told to go on: one for each worker


def wait_for_file(path: Path) -> None:
    deadline_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline_s, f"{path} did not come"
        time.sleep(0.005)


def pattern(size_bytes: int, seed: int = 0) -> bytes:
    """Other bytes for each seed, without a page like another."""
    block = b"".join((seed * 1_000_003 + number).to_bytes(8, "little") for number in range(4096))
    return (block * (size_bytes // len(block) + 1))[:size_bytes]


def note(folder: Path, name: object) -> None:
    line = json.dumps({"name": name, "node": os.environ["CLUSTERPOOL_NODE_ID"], "pid": os.getpid()}) + "\n"
    fd = os.open(folder / "executions", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, line.encode())
    os.close(fd)


def square(folder: Path, number: int, *, waits: bool = False) -> int:
    note(folder, number)
    time.sleep(0.02)
    if waits and number in WAITING:
        wait_for_file(folder / "go")
    return number * number


def waiting_square(item: tuple[Path, int]) -> int:
    return square(*item, waits=True)


def quick_square(item: tuple[Path, int]) -> int:
    return square(*item)


class Worker:
    """The same work for tasks and actors: its methods are called by both."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, folder: Path, waits: bool) -> int:
        self.calls += 1
        note(folder, "run")
        if waits:
            wait_for_file(folder / "go")
        return 42

    def digest(self, folder: Path, argument: bytes) -> int:
        note(folder, "digest")
        return zlib.crc32(argument)

    def make(self, folder: Path, size_bytes: int, seed: int) -> bytes:
        note(folder, seed)
        return pattern(size_bytes, seed)


def run(folder: Path, waits: bool) -> int:
    return Worker().run(folder, waits)


def digest(folder: Path, argument: bytes) -> int:
    return Worker().digest(folder, argument)


def make(folder: Path, size_bytes: int, seed: int) -> bytes:
    return Worker().make(folder, size_bytes, seed)


class Ledger:
    """Its state survives it. It waits once, at the moment of which the program is told, until that may go on."""

    def __init__(self, folder: Path, moment: str) -> None:
        self.folder, self.moment = folder, moment
        self.values: list[int] = []

    def add(self, number: int) -> int:
        if number == WAITING_CALL:
            self._come_to("replaying" if (self.folder / "again").exists() else "running")
        self.values.append(number)
        return len(self.values)

    def all(self) -> list[int]:
        return self.values

    def place(self) -> int:
        note(self.folder, "place")
        return os.getpid()

    def save(self) -> list[int]:
        if len(self.values) > CALLS_BEFORE:
            self._come_to("checkpointing")
        return self.values

    def load(self, values: list[int]) -> None:
        self._come_to("restoring")
        self.values = values

    def _come_to(self, moment: str) -> None:
        if moment == self.moment and not (self.folder / "go").exists():
            note(self.folder, moment)
            wait_for_file(self.folder / "go")


class Caller:
    """Calls by tasks or of an actor: `options` are those of the cell."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        self.actor = None
        if kind == "actor":
            self.actor = clusterpool.remote(**ON_SPOT, **options)(Worker).remote()
        self.options = options

    def call(self, function: Any, *arguments: Any) -> Any:
        if self.actor is not None:
            return getattr(self.actor, function.__name__).remote(*arguments)
        return clusterpool.remote(**ON_SPOT, **self.options)(function).remote(*arguments)


def squares_with(folder: Path, kind: str, options: dict[str, Any], *, waits: bool) -> list[int]:
    """A hundred by a pool or an executor; some of the first calls wait to be told to go on."""
    function = waiting_square if waits else quick_square
    if kind == "pool":
        with Pool(WORKERS) as pool:
            if not waits:
                pool.map(quick_square, [(folder, number) for number in range(30)], chunksize=1)
                (folder / "executions").rename(folder / "before")
                (folder / "reached").touch()
                wait_for_file(folder / "go")
            return pool.map(function, [(folder, number) for number in range(100)], chunksize=1)
    with ProcessPoolExecutor(WORKERS, **options) as executor:
        futures = [executor.submit(function, (folder, number)) for number in range(100)]
        wait(futures)
        return [future.result() for future in futures]


def idle(folder: Path, kind: str, options: dict[str, Any]) -> bool:
    if kind == "pool":
        return squares_with(folder, kind, options, waits=False) == [number * number for number in range(100)]
    caller = Caller(kind, options)
    assert clusterpool.get(caller.call(run, folder, False)) == 42
    (folder / "executions").rename(folder / "before")
    (folder / "reached").touch()
    wait_for_file(folder / "go")
    return bool(clusterpool.get(caller.call(run, folder, False)) == 42)


def running(folder: Path, kind: str, options: dict[str, Any]) -> bool:
    if kind in ("pool", "executor"):
        return squares_with(folder, kind, options, waits=True) == [number * number for number in range(100)]
    return bool(clusterpool.get(Caller(kind, options).call(run, folder, True)) == 42)


def fetching(folder: Path, kind: str, options: dict[str, Any]) -> bool:
    """The argument lies at home, and nobody works there who has a spot."""
    value = pattern(LARGE_BYTES)
    return bool(
        clusterpool.get(Caller(kind, options).call(digest, folder, clusterpool.put(value))) == zlib.crc32(value)
    )


def replying(folder: Path, kind: str, options: dict[str, Any]) -> bool:
    return bool(clusterpool.get(Caller(kind, options).call(make, folder, LARGE_BYTES, 1)) == pattern(LARGE_BYTES, 1))


def transferring(folder: Path, kind: str, options: dict[str, Any]) -> bool:
    made = Caller(kind, options).call(make, folder, LARGE_BYTES, 1)
    clusterpool.wait([made])
    (folder / "reached").touch()
    return bool(clusterpool.get(made) == pattern(LARGE_BYTES, 1))


def spilling(folder: Path, kind: str, options: dict[str, Any]) -> bool:
    """More results than the two stores hold; then all of them are read."""
    caller = Caller(kind, options)
    made = [caller.call(make, folder, PIECE_BYTES, seed) for seed in range(PIECES)]
    for seed in range(PIECES):
        if clusterpool.get(made[seed]) != pattern(PIECE_BYTES, seed):
            return False
    return True


def ledger(folder: Path, kind: str, options: dict[str, Any], moment: str) -> bool:
    """Calls of an actor with checkpoints, some before and some after the moment."""
    lasting = {"max_restarts": -1, "max_task_retries": -1, "checkpoint_every": 4, **options}
    if kind == "detached":
        lasting |= {"name": "ledger", "lifetime": "detached"}
    actor = clusterpool.remote(Ledger).options(**ON_SPOT, **lasting).remote(folder, moment)
    is_again = moment in ("restoring", "replaying")
    # The last of those before is in the log, and not in a checkpoint: a next life runs it again.
    before = WAITING_CALL + 1 if is_again else CALLS_BEFORE
    answers = [acknowledged(folder, actor.add.remote(number)) for number in range(before)]
    pid = clusterpool.get(actor.place.remote())
    if is_again:
        (folder / "again").touch()
        os.kill(pid, 9)
    if moment == "idle":
        (folder / "executions").rename(folder / "before")
        (folder / "reached").touch()
        wait_for_file(folder / "go")
    references = [actor.add.remote(number) for number in range(before, CALLS)]
    answers += [acknowledged(folder, reference) for reference in references]
    is_right: bool = clusterpool.get(actor.all.remote()) == list(range(CALLS))
    if kind == "detached":
        clusterpool.kill(actor)
    return is_right and answers == list(range(1, CALLS + 1))


def acknowledged(folder: Path, reference: Any) -> Any:
    """The result, of which note is taken."""
    answer = clusterpool.get(reference)
    (folder / "acknowledged.new").write_text(str(answer))
    (folder / "acknowledged.new").rename(folder / "acknowledged")
    return answer


def check(folder: Path) -> bool:
    """What a detached ledger has when its driver is dead: all that was acknowledged, each once and in order."""
    actor = clusterpool.get_actor("ledger")
    values = clusterpool.get(actor.all.remote())
    again = clusterpool.get(actor.add.remote(len(values)))
    clusterpool.kill(actor)
    read = int((folder / "acknowledged").read_text())
    return bool(values == list(range(len(values))) and read <= len(values) <= CALLS and again == len(values) + 1)


def main(moment: str, kind: str, folder: Path, options: dict[str, Any]) -> None:
    try:
        if moment == "check":
            outcome: dict[str, Any] = {"right": check(folder)}
        elif kind in ("ledger", "detached"):
            outcome = {"right": ledger(folder, kind, options, moment)}
        else:
            outcome = {"right": globals()[moment](folder, kind, options)}
    except Exception as exc:
        outcome = {
            "error": type(exc).__name__,
            "bases": [base.__name__ for base in type(exc).__mro__],
            "text": str(exc),
        }
    (folder / "outcome.new").write_text(json.dumps(outcome))
    (folder / "outcome.new").rename(folder / "outcome")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
