"""Runs the command line as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def clusterpool_command(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `clusterpool arguments`; its output as text. No command may ever show a traceback of its own."""
    command = [sys.executable, "-m", "clusterpool.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=cwd)


def answer_of(*arguments: str | Path) -> Any:
    """What the command prints with `--json`."""
    done = clusterpool_command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
