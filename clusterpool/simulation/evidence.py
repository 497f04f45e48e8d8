"""What faults have really done in a simulated cluster, to whom and when: the only excuses for what its programs miss.

A loss names in its text whom it blames: a process or a node. It is believed if that one has really ended by a fault, or
was taken for dead; and a living node may only be taken for dead if it was silent for everybody (a frozen process, or
no way to the control store and none to a peer).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clusterpool.core.membership import State

if TYPE_CHECKING:
    from clusterpool.core.messages import Address
    from clusterpool.simulation.node import SimulatedNode
    from clusterpool.simulation.party import Party
    from clusterpool.simulation.programs import Outcome
    from clusterpool.simulation.world import World

# Of what a process has ended, where nobody had asked for it. `task`: by what it ran. `host`: with its host or node.
# `fenced`: its node was taken for dead, and has ended its workers. `orphaned`: whoever had leased it has ended so.
VIOLENT = frozenset({"fault", "task", "host", "fenced", "orphaned"})
# Longer than it takes to find a silent node dead, to tell everybody, and to hear of it after a thaw.
ECHO_S = 20.0
_NAMES = re.compile(r"\b(w\d+x\d+|d\d+|n\d+)\b")
_CARRIERS = re.compile(r"\bj\d+-\w+-\d+\b")


class Evidence:
    """Of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._cause_by_process: dict[str, str] = {}
        self._until_s: dict[tuple[str, str], float] = {}  # by victim and kind of trouble, when it was over
        self._dead_s: dict[str, float] = {}  # by node, when it was last taken for dead
        self.over: set[str] = set()  # nodes of which a life is over; membership only
        self.void: set[str] = set()  # carriers and actors of which the control store has lost something
        self._retries: dict[tuple[str, int], int] = {}  # by owner and number of a task
        self._sendings: Counter[tuple[str, int]] = Counter()
        self.relayed = 0  # how often a node that was cut off had to have found a way through a peer
        self.asks_to_kill = False  # whether some program has workers killed (a limit of time, cancel)

    # --- what happens

    def ended(self, party: Party) -> None:
        """A process is no more."""
        self._cause_by_process[party.name] = party.cause
        if party.name.startswith("n"):
            self.over.add(party.name)

    def cause_of(self, name: str) -> str:
        """Of what a process has ended; empty while it lives."""
        return self._cause_by_process.get(name, "")

    def has_ended_by_fault(self, address: Address) -> bool:
        """Whether a process is no more, or seems so, without its will."""
        return address.node_id in self.over or self.cause_of(address.process_id) in VIOLENT

    @property
    def has_deaths(self) -> bool:
        """Whether anybody has ended without its will."""
        return any(cause in VIOLENT for cause in self._cause_by_process.values())

    def has_gone(self, address: Address) -> bool:
        """Whether a process is no more, or seems so."""
        return address.node_id in self.over or address.process_id in self._cause_by_process

    def struck(self, victim: str, kind: str) -> None:
        """A trouble begins that lasts."""
        self._until_s[(victim, kind)] = float("inf")

    def mended(self, victim: str, kind: str) -> None:
        """It is over."""
        self._until_s[(victim, kind)] = self._world.timeline.now_s

    def has_suffered(self, victim: str, *kinds: str) -> bool:
        """Whether any such trouble lasts, or was over not long ago."""
        since_s = self._world.timeline.now_s - ECHO_S
        return any(self._until_s.get((victim, kind), float("-inf")) >= since_s for kind in kinds)

    def taken_for_dead(self, node_id: str, reason: str) -> None:
        """The control store holds a life of a node for over."""
        self.over.add(node_id)
        self._dead_s[node_id] = self._world.timeline.now_s
        node = next((node for node in self._world.nodes if node.node_id == node_id), None)
        if node is None or not node.is_alive or self.has_suffered(node_id, "frozen"):
            return
        if node.machine.membership.state is State.JOINING:
            return  # the answer to its registration got lost: nobody can hear it, and it has nothing to lose yet
        was_unheard = self.has_suffered(node_id, "partition") and (
            self.has_suffered(node_id, "store_cut") or self.has_suffered("store", "loss")
        )
        self._world.monitor.check(was_unheard, f"{node_id} was taken for dead, and it could be heard: {reason}")

    def told_of_death(self, node_id: str, observer: str) -> None:
        """A node holds a life of another for over: what the control store does, or it has found out by itself."""
        if self._world.timeline.now_s - self._dead_s.get(node_id, float("-inf")) > ECHO_S:
            self.taken_for_dead(node_id, f"by {observer}")

    def check_relayed(self, node: SimulatedNode, since_s: float) -> None:
        """A node has been cut off from the control store since then: if nothing else is wrong, a peer helps it."""
        world = self._world
        took_s = world.timeline.now_s - since_s
        is_lasting = self._until_s[(node.name, "store_cut")] == float("inf")
        is_else_well = node.is_alive and not self.has_suffered("store", "away", "loss")
        is_else_well = is_else_well and not self.has_suffered(node.name, "frozen", "partition")
        peers = [other for other in world.nodes if other is not node]
        is_else_well = is_else_well and all(
            peer.is_alive and not self.has_suffered(peer.name, "frozen", "partition", "store_cut") for peer in peers
        )
        if peers and took_s >= 4.0 and is_lasting and is_else_well:
            self.relayed += 1
            text = f"{node.name} was cut off from the control store for {took_s:.1f} s, and nobody has helped it"
            world.monitor.check(node.store.way.answered_s > since_s + 1.0, text)

    def forgotten(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """The control store has come back, and knows this of each carrier and actor, instead of that."""
        self.void.update(name for name, known in before.items() if after.get(name) != known)

    # --- attempts

    def submitted(self, owner: str, number: int, retries: int) -> None:
        """A task is to be run, and after a loss so often again."""
        self._retries[(owner, number)] = retries

    def sent(self, owner: str, number: int) -> None:
        """A task goes to a worker."""
        self._sendings[(owner, number)] += 1

    def check_attempts(self, owner: str, number: int, outcome: Outcome) -> None:
        """A task is given up: not before it was tried as often as was asked for."""
        retries = self._retries.get((owner, number), -1)
        if outcome.kind == "worker_died" and retries >= 0:
            count = self._sendings[(owner, number)]
            text = f"task {number} of {owner} was given up after {count} attempts of {retries + 1}: {outcome}"
            self._world.monitor.check(count > retries, text)

    # --- what it explains

    def doubt(self, kind: str, text: str, subject: str = "") -> str:
        """Why a loss cannot be what it says; empty if it can. `subject`: the actor or carrier that it is about."""
        is_explained = _EXCUSES.get(kind)
        if subject in self.void or subject in self._world.ledger.killed:
            return ""
        if is_explained is None:
            return "it is no kind of loss that faults explain"
        if is_explained(self, text):
            return ""
        causes = {name: self.cause_of(name) for name in _NAMES.findall(text)}
        return f"no fault explains it; what has ended of what: {causes}"

    def is_end_of_actor(self, actor_id: str, text: str) -> bool:
        """Whether an actor that may come again for ever may have ended so."""
        is_asked = actor_id in self._world.ledger.killed or self._is_by_fork(text)
        is_orphan = "the node of its creator is gone" in text and self._is_by_death(text)
        return is_asked or is_orphan or actor_id in self.void

    def is_by_fault(self, text: str) -> bool:
        """Whether a fault has ended one of those that are named, and nothing that it ran."""
        return any(name in self.over or self.cause_of(name) in VIOLENT - {"task"} for name in _NAMES.findall(text))

    def _is_by_death(self, text: str) -> bool:
        return any(self._has_ended_by_fault(name) for name in _NAMES.findall(text))

    def _has_ended_by_fault(self, name: str) -> bool:
        cause = self.cause_of(name)
        return name in self.over or cause in VIOLENT or (cause == "asked" and self.asks_to_kill)

    def _is_by_end_of_actor(self, text: str) -> bool:
        return self._is_by_death(text) or self._is_by_fork(text)

    def _is_by_fork(self, text: str) -> bool:
        return "could not be started" in text and "fork" in self._world.monitor.happened

    def _names_node_that_is_over(self, text: str) -> bool:
        return not self.over.isdisjoint(_NAMES.findall(text))

    def _is_by_lost_copy(self, text: str) -> bool:
        return self._names_node_that_is_over(text) or self._is_by_disk(text)

    def _is_by_end_of_carrier(self, text: str) -> bool:
        names = _CARRIERS.findall(text)
        # Its home is its maker's node. Once that was taken for dead, the job was over for all others.
        return any(name in self.void or self._is_home_over(name) for name in names)

    def _is_home_over(self, carrier: str) -> bool:
        maker = self._world.clients.get(carrier.split("-")[1])
        return maker is not None and maker.node_party.node_id in self.over

    def _is_by_silence(self, text: str) -> bool:
        return self._names_node_that_is_over(text) or self._is_by_end_of_carrier(text)

    def _is_by_outage(self, text: str) -> bool:
        return (
            self.has_suffered("store", "away", "loss")
            or any(self.has_suffered(name, "store_cut", "frozen") for name in _NAMES.findall(text))
            or self._names_node_that_is_over(text)
        )

    def _is_by_small_store(self, _text: str) -> bool:
        return "memory" in self._world.monitor.happened

    def _is_by_disk(self, _text: str) -> bool:
        return any(self.has_suffered(node.name, "disk") for node in self._world.nodes)

    def _is_by_full_disk(self, text: str) -> bool:
        return self._is_by_small_store(text) or self._is_by_disk(text)


_EXCUSES: dict[str, Callable[[Evidence, str], bool]] = {
    "worker_died": Evidence._is_by_death,
    "owner_died": Evidence._is_by_death,
    "object_lost": Evidence._is_by_lost_copy,
    "lost": Evidence._is_by_lost_copy,
    "actor_died": Evidence._is_by_end_of_actor,
    "actor_unavailable": Evidence._is_by_end_of_actor,
    "timeout": lambda *_: True,  # asked for, where it is right
    "lock_lost": Evidence._is_by_silence,
    "carrier_lost": Evidence._is_by_end_of_carrier,
    "start_failed": Evidence._is_by_fork,
    "store_full": Evidence._is_by_small_store,
    "too_large": Evidence._is_by_small_store,
    "disk_full": Evidence._is_by_full_disk,
    "disk_failed": Evidence._is_by_disk,
    "not_connected": Evidence._is_by_outage,
}
