"""`python -m clusterpool.simulation`: one world, or a search through many."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback
from dataclasses import replace

from clusterpool.simulation.coverage import Coverage
from clusterpool.simulation.world import QUIET_S, Plan, World

# A second of a thousand nodes costs a second or two.
LARGE_NODES = 50
LARGE_BUSY_S = LARGE_QUIET_S = 5.0


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 when something was found that must never happen."""
    options = _parser().parse_args(arguments)
    is_large = options.nodes > LARGE_NODES
    busy_s = options.busy or (LARGE_BUSY_S if is_large else 8.0)
    plan = Plan(
        options.seed, options.nodes, options.drivers, options.faults, busy_s, options.size,
        programs=tuple(name for name in options.programs.split(",") if name),
        quiet_s=LARGE_QUIET_S if is_large else QUIET_S,
        only=tuple(int(item) for item in options.only.split(",") if item) if options.only is not None else None,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        coverage = stack.enter_context(Coverage()) if options.coverage or options.lines else None
        if coverage is not None and options.lines:
            stack.callback(coverage.stop_lines)
            coverage.trace_lines()
        code = _search(plan, options) if options.seeds or options.minutes else 0 if _run(plan, options) else 1
        if coverage is not None:
            coverage.stop_lines()
            print_coverage(coverage, with_lines=options.lines)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m clusterpool.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="which world")
    parser.add_argument("--seeds", default="", metavar="A-B", help="all worlds from A to B")
    parser.add_argument("--minutes", type=float, default=0.0, help="worlds from --seed on, for so long")
    parser.add_argument("--nodes", type=int, default=0, help="how many nodes; 0: as the seed says")
    parser.add_argument("--drivers", type=int, default=0, help="how many drivers; 0: as the seed says")
    parser.add_argument("--faults", type=int, default=-1, help="how many faults; -1: as the seed says")
    parser.add_argument("--busy", type=float, default=0.0, help="virtual seconds with faults; 0: 8, if large 5")
    parser.add_argument("--size", type=float, default=1.0, help="scales what each program does")
    parser.add_argument("--programs", default="", help="what drivers do, by comma (workloads.PROGRAMS); all")
    parser.add_argument("--only", help="positions of the faults to keep, by comma; the others are left out")
    parser.add_argument("--shrink", action="store_true", help="leave out faults that a failure does not need")
    parser.add_argument("--coverage", action="store_true", help="say which transitions no world has taken")
    parser.add_argument("--lines", action="store_true", help="and which lines of the core never ran (slow)")
    parser.add_argument("--keep-going", action="store_true", help="search on after a failure")
    return parser


def _search(plan: Plan, options: argparse.Namespace) -> int:
    first, _, last = options.seeds.partition("-")
    seed = int(first) if first else options.seed
    end_s = time.monotonic() + options.minutes * 60 if options.minutes else float("inf")
    last_seed = int(last or first) if first else sys.maxsize
    failed: list[int] = []
    runs = 0
    while seed <= last_seed and time.monotonic() < end_s:
        runs += 1
        if not _run(replace(plan, seed=seed), options, is_brief=True):
            failed.append(seed)
            if not options.keep_going:
                break
        seed += 1
    print(f"{runs} worlds, {len(failed)} failed{': ' + ', '.join(map(str, failed)) if failed else ''}")
    return 1 if failed else 0


def _run(plan: Plan, options: argparse.Namespace, *, is_brief: bool = False) -> bool:
    started_s = time.monotonic()
    world = World(plan)
    error = attempt(world)
    took_s = time.monotonic() - started_s
    if error is None:
        if not is_brief:
            print(
                f"seed {plan.seed}: {len(world.nodes)} nodes, {len(world.drivers)} drivers, "
                f"{len(world.faults)} faults, "
                f"{world.timeline.steps} steps, {world.monitor.outcomes} values judged, "
                f"lost {dict(world.monitor.losses)}, {world.timeline.now_s:.0f} s of virtual time in {took_s:.1f} s, "
                f"trace {world.trace.digest()}"
            )
        return True
    if options.shrink:
        plan, world, error = shrunk(plan, world, error)
    print_failure(plan, world, error, is_brief=options.keep_going)
    return False


def attempt(world: World) -> Exception | None:
    """Run a world; what was wrong, if anything."""
    try:
        world.run()
    except Exception as exc:  # a machine's assertion is as good a find as a violation
        return exc
    return None


def shrunk(plan: Plan, world: World, error: Exception) -> tuple[Plan, World, Exception]:
    """The same failure with as few faults as can be left out one at a time."""
    kept = list(plan.only) if plan.only is not None else list(range(len(world.faults)))
    for position in list(kept):
        fewer = replace(plan, only=tuple(item for item in kept if item != position))
        trial = World(fewer)
        trial_error = attempt(trial)
        if trial_error is not None and type(trial_error) is type(error):
            kept.remove(position)
            plan, world, error = fewer, trial, trial_error
    return plan, world, error


def print_failure(plan: Plan, world: World, error: Exception, *, is_brief: bool) -> None:
    """What was wrong, what went before it, and how to see it again."""
    print(f"--- seed {plan.seed} failed at {world.timeline.now_s:.6f} s of virtual time, step {world.timeline.steps}")
    if not is_brief:
        print("\n".join(world.trace.lines()))
        print("".join(traceback.format_exception(error)))
    for number, fault in enumerate(world.faults):
        print(f"fault {number}: {fault.kind} at {fault.time_s:.3f} s for {fault.duration_s} s")
    print(f"{type(error).__name__}: {error}")
    print(f"again: {command_of(plan)}", flush=True)


def command_of(plan: Plan) -> str:
    """The command that runs this world."""
    parts = [f"python -m clusterpool.simulation --seed {plan.seed}"]
    default = Plan(plan.seed)
    for option, name in (
        ("nodes", "nodes"), ("drivers", "drivers"), ("faults", "faults"), ("busy", "busy_s"), ("size", "size"),
    ):  # fmt: skip
        if getattr(plan, name) != getattr(default, name):
            parts.append(f"--{option} {getattr(plan, name)}")
    if plan.programs:
        parts.append(f"--programs {','.join(plan.programs)}")
    if plan.only is not None:
        parts.append(f"--only '{','.join(map(str, plan.only))}'")
    return " ".join(parts)


def print_coverage(coverage: Coverage, *, with_lines: bool) -> None:
    """What no world has done with a machine of the core, and which lines never ran."""
    total, taken = coverage.counts()
    print(f"{taken} of {total} transitions were taken; never:")
    for machine, left in coverage.never_taken().items():
        print(f"  {machine}: {'; '.join(left)}")
    for change in coverage.unforeseen():
        print(f"  not in transitions.py: {change}")
    if with_lines:
        for file, lines in coverage.lines_never_run().items():
            print(f"never run: core/{file}: {len(lines)} lines: {', '.join(map(str, lines[:40]))}")


if __name__ == "__main__":
    sys.exit(main())
