"""Who holds the tokens of a thin semaphore: a count among the living finds what the dead have not given back. Pure.

A thin semaphore is a counter that processes of one host take from and give to in the kernel, without telling anybody:
that is what makes it quick, and nothing of a killed process says that it held a token. But the living can be asked, and
tokens are conserved: total = free + held by the living + lost with the dead. So when somebody has waited for long:

    StuckReported -> [look] -> asked once -> [look again] -> asked twice -> [look a last time] -> ReturnTokens(lost)
                       |free?      |they hold all?  ^ the instant that counts  |all as before?
                       v           v                                           v
                    nothing is lost, or not to be told now: whoever waits reports again in a second

Each look reads the semaphore's free tokens and the records of processes that cannot be asked (forks, children of the
standard library). A process answers how many tokens it holds and how many it has ever given back. If both are the same
before and after the look in the middle, it held just as many at that instant: so does the sum. Whatever could be
otherwise ends the census without a result: an answer in between two steps of a release, another answer than before, a
process that ended meanwhile (the census begins anew), one that has never answered (it is stopped, or C code of it keeps
the GIL: it may be the holder). A token given back late is only slow; given back wrongly, two would hold one lock.

Of a semaphore that has moved to the control store, the total is what processes of its home still had then.

Invariant on which it stands: each process gives back only tokens that it holds. Who is about to do otherwise marks the
semaphore first, for ever: its tokens are signals, which belong to nobody, and nothing is ever given back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from clusterpool.core import coordination_events as e
from clusterpool.core import coordination_messages as c
from clusterpool.core.messages import Address
from clusterpool.core.node_events import Send

Commands = list[Any]
Counts = tuple[int, int]  # tokens held, and given back ever


class _Census:
    """The count for one semaphore."""

    def __init__(self, number: int, total: int, *, for_forks: bool) -> None:
        self.number = number
        self.total = total
        self.for_forks = for_forks
        self.looks: list[e.ThinTokensRead] = []
        self.unanswered: set[Address] = set()
        self.first: dict[Address, Counts] = {}
        self.second: dict[Address, Counts] = {}


class TokenCensus:
    """All counts of one node. `processes`: those that can be asked, now; they join before they use anything."""

    def __init__(self, processes: Callable[[], Iterable[Address]]) -> None:
        self._processes = processes
        self._running: dict[str, _Census] = {}  # by name
        self._holders: dict[str, Address] = {}  # by name, who alone held all of it at the last count
        self._last_number = 0

    def reported(self, message: c.ReportStuck, *, for_forks: bool = False) -> Commands:
        """A process has waited for a token of this semaphore for long.

        for_forks: nobody has, but processes that cannot be asked may have died; nothing is done if there were none.
        """
        if message.name in self._running:
            return []
        return self._begin(message.name, message.total, for_forks=for_forks)

    def token_given(self, name: str) -> None:
        """A process has given a token of a moved semaphore to the store: another total from here on."""
        self._running.pop(name, None)

    def _begin(self, name: str, total: int, *, for_forks: bool = False) -> Commands:
        self._last_number += 1
        self._running[name] = _Census(self._last_number, total, for_forks=for_forks)
        return [e.ReadThinTokens(name)]

    def read(self, event: e.ThinTokensRead) -> Commands:
        """A look at the semaphore and the records."""
        census = self._running.get(event.name)
        if census is None:
            return []
        if census.for_forks and not event.registrations:
            return self._end(event.name)
        census.looks.append(event)
        recorded = sum(record.held for record in event.records)
        nothing_lost = event.free + recorded >= census.total
        if event.is_signal or nothing_lost or any(record.is_busy or record.held < 0 for record in event.records):
            return self._end(event.name)
        if len(census.looks) == 1:
            holder = self._holders.get(event.name)
            living = set(self._processes())
            # Most who wait for long wait for one that goes on holding it: then nobody else need be asked.
            return self._ask(event.name, census, {holder} if holder is not None and holder in living else living)
        if len(census.looks) == 2:
            return self._ask(event.name, census, set(self._processes()))
        return self._conclude(event.name, census)

    def _ask(self, name: str, census: _Census, processes: set[Address]) -> Commands:
        census.unanswered = processes
        if not processes:
            return self._all_answered(name, census)
        return [Send(process, c.CountHeld(census.number, name)) for process in sorted(processes)]

    def answered(self, source: Address, message: c.HeldCounted) -> Commands:
        """A process says what it holds."""
        census = self._running.get(message.name)
        if census is None or message.request != census.number or source not in census.unanswered:
            return []
        if message.is_busy or message.held < 0:
            return self._end(message.name)
        counts = (message.held, message.given)
        if len(census.looks) == 1:
            census.first[source] = counts
        else:
            census.second[source] = counts
            # Who has joined since the first question had held nothing before.
            if counts != census.first.get(source, (0, 0)):
                return self._end(message.name)
        if message.held >= census.total:
            self._holders[message.name] = source
            return self._end(message.name)
        census.unanswered.discard(source)
        return self._all_answered(message.name, census) if not census.unanswered else []

    def _all_answered(self, name: str, census: _Census) -> Commands:
        if len(census.looks) == 1 and name in self._holders:
            del self._holders[name]  # only the last holder was asked, and it is that no longer
            others = {process for process in self._processes() if process not in census.first}
            if others:
                return self._ask(name, census, others)
        return [e.ReadThinTokens(name)]

    def _conclude(self, name: str, census: _Census) -> Commands:
        first, middle, last = census.looks
        commands = self._end(name)
        if first.registrations != last.registrations or first.records != last.records:
            return commands
        held = sum(held for held, _ in census.second.values()) + sum(record.held for record in first.records)
        lost = census.total - middle.free - held
        return [*commands, e.ReturnTokens(name, lost)] if lost > 0 else commands

    def missing(self, event: e.ThinTokensMissing) -> Commands:
        """There is no such semaphore."""
        self.forget(lambda name: name == event.name)
        return []

    def _end(self, name: str) -> Commands:
        self._running.pop(name, None)
        return []

    def process_gone(self, process: Address) -> Commands:
        """What it may have passed on before its end, nobody can say: all counts begin anew."""
        self._holders = {name: holder for name, holder in self._holders.items() if holder != process}
        commands: Commands = []
        for name, census in list(self._running.items()):
            commands += self._begin(name, census.total)
        return commands

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """These semaphores are no more, or not thin any more."""
        for name in [name for name in (*self._running, *self._holders) if is_gone(name)]:
            self._running.pop(name, None)
            self._holders.pop(name, None)
