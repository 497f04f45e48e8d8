"""One sample, in a process of its own: `python -m benchmarks.sample CONTENDER FIGURE AMOUNT`.

Prints the sample as JSON on a line that starts with MARK; whatever else a library prints is ignored.
"""

from __future__ import annotations

import json
import sys

from benchmarks.contenders import measures_of

MARK = "benchmark-sample "


def main(contender: str, figure: str, amount: str) -> None:
    """Measures once."""
    sample = measures_of(contender)[figure](int(amount))
    print(MARK + json.dumps(sample), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
