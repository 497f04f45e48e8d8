"""What cannot leave its host says so when it is pickled for a new process, which is then started there."""

from __future__ import annotations

from typing import Any


def keep_child_on(node_id: str) -> None:
    """Called while something of that node is pickled. Does nothing if that is not for a `Process` that starts."""
    from multiprocessing.context import get_spawning_popen

    popen: Any = get_spawning_popen()
    if hasattr(popen, "keep_on"):
        popen.keep_on(node_id)
