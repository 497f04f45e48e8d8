"""The names of all keys of one cluster in the control store; docs/key-schema.md tells what each holds."""

from __future__ import annotations

import re

_CLUSTER_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Keys:
    """The braces around the cluster's name are a hash tag: on a Redis Cluster all its keys share one slot, as
    scripts and transactions over several keys require.
    """

    def __init__(self, cluster_id: str) -> None:
        if not _CLUSTER_ID.fullmatch(cluster_id):
            raise ValueError(f"a cluster's name is 1 to 64 letters, digits, '_', '.', '-': {cluster_id!r}")
        self.prefix = f"clusterpool:{{{cluster_id}}}:"
        self.events = self.prefix + "events"
        self.event_number = self.prefix + "event_number"
        self.generation = self.prefix + "generation"
        self.incarnation = self.prefix + "incarnation"
        self.nodes = self.prefix + "nodes"
        self.node_incarnations = self.prefix + "node_incarnations"
        self.node_heartbeats = self.prefix + "node_heartbeats"
        self.node_loads = self.prefix + "node_loads"
        self.node_registrations = self.prefix + "node_registrations"
        self.jobs = self.prefix + "jobs"
        self.actors = self.prefix + "actors"
        self.actor_names = self.prefix + "actor_names"
        self.actor_keepers = self.prefix + "actor_keepers"
        self.replica_mark = self.prefix + "replica_mark"

    def for_nodes(self) -> tuple[str, ...]:
        """In the order in which the scripts about nodes expect them."""
        return (
            self.events,
            self.event_number,
            self.generation,
            self.incarnation,
            self.nodes,
            self.node_incarnations,
            self.node_heartbeats,
            self.node_loads,
            self.node_registrations,
        )

    def actor(self, actor_id: str) -> str:
        return f"{self.prefix}actor:{actor_id}"

    def actor_creation(self, actor_id: str) -> str:
        return f"{self.prefix}actor_creation:{actor_id}"

    def actor_checkpoint_chunk(self, actor_id: str, calls: int, number: int) -> str:
        return f"{self.actor_creation(actor_id)}:{calls}:{number}"

    def actor_log(self, actor_id: str) -> str:
        return f"{self.prefix}actor_log:{actor_id}"

    def package(self, digest: str) -> str:
        return f"{self.prefix}package:{digest}"

    def package_chunk(self, digest: str, number: int) -> str:
        return f"{self.prefix}package:{digest}:{number}"

    def carrier(self, name: str) -> str:
        return f"{self.prefix}carrier:{name}"

    def carrier_items(self, name: str) -> str:
        return f"{self.prefix}items:{name}"
