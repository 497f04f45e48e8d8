"""What one process has refused at its borders: counted by cause, and told once for each.

A port that somebody scans, or a peer of another version, sends rubbish as fast as it can: a line in the log for each
would fill the disk, and none would hide it. The count goes on, and is to be seen with the node (`clusterpool status`).
"""

from __future__ import annotations

from clusterpool.core.messages import Address

# No stranger may make the table grow.
CAUSES_MAX = 100


class Rejections:
    """`count_by_cause`: how often each cause has come."""

    def __init__(self) -> None:
        self.count_by_cause: dict[str, int] = {}

    def note(self, cause: str) -> bool:
        """Count one; whether it is the first, which is to be logged."""
        if cause not in self.count_by_cause and len(self.count_by_cause) >= CAUSES_MAX:
            cause = "other"
        count = self.count_by_cause.get(cause, 0) + 1
        self.count_by_cause[cause] = count
        return count == 1

    def figures(self) -> dict[str, float]:
        """For people, by cause, and `rejected` for all together."""
        by_cause = {f"rejected: {cause}": float(count) for cause, count in self.count_by_cause.items()}
        return {"rejected": sum(by_cause.values()), **by_cause}


def greeting_fault(ours: Address, claimed: Address, connected_to: Address | None, *, is_taken: bool) -> str:
    """Why a process cannot be who its greeting says; empty if it can. Connections are between processes of one node.

    `connected_to`: whom we called, if it was us. `is_taken`: another connection has that name already.
    """
    if connected_to is not None:
        return "" if claimed == connected_to else f"{connected_to} was called, and {claimed} answered"
    if claimed.node_id != ours.node_id:
        return f"a process of node {claimed.node_id} can only be reached through its own node"
    if claimed == ours or claimed.process_id == claimed.node_id:
        return f"it claims to be {claimed}, which it cannot be"
    return f"another process is called {claimed.process_id} already" if is_taken else ""
