"""The main job: two ordinary programs on real data, on the standard backend and on clusterpool, compared.

Each run is a process of its own. Two runs of a program differ only in an argument that stands for its import
line. The exit code is 0 if clusterpool gave exactly the standard backend's results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
# Title, program, and the argument for the standard backend and for clusterpool.
JOBS = (
    (
        "Pool: nearest neighbours of 1,797 handwritten digits",
        "digits_neighbours.py",
        (("--module", "multiprocessing"), ("--module", "clusterpool.multiprocessing")),
    ),
    (
        "scikit-learn: grid search of a support vector machine",
        "digits_grid_search.py",
        (("--backend", "loky"), ("--backend", "clusterpool")),
    ),
)


def run(program: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """What the program printed, and the seconds that the process took. Raises SystemExit if it failed."""
    command = [sys.executable, str(HERE / program), *arguments]
    started_s = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    total_s = time.perf_counter() - started_s
    if process.returncode != 0:
        raise SystemExit(f"{program} {' '.join(arguments)}: exit code {process.returncode}\n{process.stdout}")
    outcome: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return {**outcome, "total": total_s}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title="The same programs on the standard backend and on clusterpool")
    for heading in ("program", "backend", "work", "whole process", "answer", "results"):
        table.add_column(heading, justify="right" if heading in ("work", "whole process") else "left")
    are_equal = True
    for title, program, (standard, ours) in JOBS:
        outcomes = []
        for arguments in (standard, ours):
            console.print(f"running {program} {' '.join(arguments)}", highlight=False)
            outcomes.append(run(program, arguments))
        is_equal = outcomes[0]["result"] == outcomes[1]["result"]
        are_equal = are_equal and is_equal
        verdict = "[green]the same[/green]" if is_equal else "[red]DIFFERENT[/red]"
        for arguments, outcome, results in zip((standard, ours), outcomes, ("", verdict), strict=True):
            name = title if arguments is standard else ""
            seconds = (f"{outcome['seconds']:.2f} s", f"{outcome['total']:.2f} s")
            table.add_row(name, arguments[-1], *seconds, outcome["answer"], results)
        table.add_section()
    console.print(table)
    console.print("All results are the same." if are_equal else "Results differ.", style="bold")
    raise SystemExit(0 if are_equal else 1)


if __name__ == "__main__":
    main()
