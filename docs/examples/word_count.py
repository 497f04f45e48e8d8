"""The words that the standard library's sources use most, counted by an Executor, one task a file."""

from __future__ import annotations

import argparse
import importlib
import re
from collections import Counter
from pathlib import Path


def count_words(path: Path) -> Counter[str]:
    """The words of one file."""
    return Counter(re.findall(r"[a-z]{4,}", path.read_text(encoding="utf-8", errors="replace").lower()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", default="clusterpool.futures", help="where ProcessPoolExecutor comes from")
    parser.add_argument("--files", type=int, default=150)
    arguments = parser.parse_args()
    futures = importlib.import_module(arguments.module)

    paths = sorted(Path(argparse.__file__).parent.glob("*.py"))[: arguments.files]
    total: Counter[str] = Counter()
    with futures.ProcessPoolExecutor() as executor:
        running = [executor.submit(count_words, path) for path in paths]
        for future in futures.as_completed(running):
            total.update(future.result())
    print(f"{total.total():,} words in {len(paths)} files")
    for word, count in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:5]:
        print(f"{word:12}{count:>8,}")


if __name__ == "__main__":
    main()
