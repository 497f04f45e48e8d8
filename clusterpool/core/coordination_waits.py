"""Who waits for a token or an item, as one node sees it: the part of its coordination that asks the store. Pure.

    wait of a process          AcquireToken, GetItem
                                     |
                                     v      granted
                                   asked -----------------------> answered (a token), or popping --> answered (an item)
                                     |waits                          ^
                                     v      GrantRead                |
                                  waiting ---------------------------+
                                     |CancelWait: cancelled in the store, which knows of no grant, or is silent;
                                     v                       ProcessGone
                                 forgotten: a grant that comes all the same is given back

So each grant that reaches the node is delivered or given back. It may reach it twice: read again from the stream of
another server, which has not heard that it was read, or also in the answer to a question that was put again. Its token
tells: the store counts them up for each carrier, and what is granted to one waiter over and above has another.

Who gives up waiting goes on when the store knows it, so that what is released afterwards is there for whoever asks.
What a process holds (the token of a lock, an item that was reserved for it) the store knows, and gives back at its end.

All waits bear the node's life, and end with it. A node that was declared dead and has not heard of it yet gets nothing
(LIFE_OVER): its waits stay `asked`, and are asked anew in the name of the next life as soon as that has begun.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from clusterpool.core import coordination_events as e
from clusterpool.core import coordination_messages as c
from clusterpool.core.coordination_answers import done, failed, waiter_id
from clusterpool.core.coordination_events import GRANTED, LIFE_OVER, WAITING
from clusterpool.core.coordination_records import Wait
from clusterpool.core.messages import Address

Commands = list[Any]
# So many half seconds, and not the first, a process that gives up waiting waits for the store's answer to that.
_CANCEL_TICKS = 3
# Carriers of which the last token read is kept, the latest: only what is still in the stream can be read again, which
# is of far fewer. A job that makes lock after lock must not fill the node's memory.
_CARRIERS_READ_MAX = 10_000
# Who has waited for so many half seconds asks again: its grant may have been lost (somebody has removed or trimmed the
# stream in which it stood). More often burdens a store with a thousand who wait; more seldom leaves one of them longer.
_ASK_AGAIN_TICKS = 120


class StoreCall(Protocol):
    """Has the store do something. `on_answer(value, error kind, error text)` is called with the answer."""

    def __call__(
        self,
        operation: str,
        arguments: tuple[Any, ...],
        on_answer: Callable[[Any, str, str], Commands] | None = None,
    ) -> Commands: ...


class Waits:
    """Of the processes of one node. life: in whose name they wait now."""

    def __init__(self, call: StoreCall, life: Callable[[], str]) -> None:
        self._call = call
        self._life = life
        self._waits: dict[str, Wait] = {}  # by waiter id
        self._read: dict[str, int] = {}  # by carrier, the token of its last grant that was read
        # By waiter, a token that came with an answer, and its process: the grant of it may yet be read.
        self._answered: dict[str, tuple[int, Address]] = {}
        self._users: set[str] = set()  # ids of processes that the store may know of

    def __len__(self) -> int:
        return len(self._waits)

    def waiter(self, source: Address, request: int) -> str:
        """The name by which the store knows a process's wait, and what it got by it."""
        return waiter_id(self._life(), source, request)

    def begin(self, source: Address, message: c.AcquireToken | c.GetItem) -> Commands:
        """A process wants a token or an item; it may wait for it."""
        waiter = self.waiter(source, message.request)
        wait = self._waits[waiter] = Wait(source, message)
        self._users.add(source.process_id)
        return self._ask(waiter, wait)

    def _ask(self, waiter: str, wait: Wait) -> Commands:
        message = wait.message
        wait.is_stale = False
        wait.calls += 1
        wait.times_asked += 1

        def on_answer(value: Any, kind: str, text: str) -> Commands:
            wait.calls -= 1
            if kind:
                return self._fail_wait(waiter, kind, text)
            state, result = value
            if state in (WAITING, LIFE_OVER):
                return self._ask_anew(waiter, wait) if wait.is_stale else []
            if wait.wants_item:
                return self._item_came(waiter, message.name, result if state == GRANTED else None)
            if self._waits.get(waiter) is wait:
                if result and wait.times_asked > 1:
                    self._answered[waiter] = (result, wait.source)
                return self._tell_token(waiter, wait, result)
            return self.give_back(message.name, waiter, result) if result not in (0, wait.token) else []

        operation = "get" if wait.wants_item else "acquire"
        return self._call(operation, (message.name, waiter, message.waits), on_answer)

    def _ask_anew(self, waiter: str, wait: Wait) -> Commands:
        """The store may have forgotten it. But a call that is under way may bring an item: asked after that, the store
        would give the next one as well, which would come back behind those that others have got meanwhile.
        """
        wait.is_stale = True
        return self._ask(waiter, wait) if not wait.calls and self._waits.get(waiter) is wait else []

    def granted(self, event: e.GrantRead) -> Commands:
        """The store has something for a waiter; without a token it has forgotten that it waits, or who all wait."""
        wait = self._waits.get(event.waiter)
        if not event.token:
            if not event.waiter:
                return self.ask_again()
            return self._ask_anew(event.waiter, wait) if wait is not None else []
        last = self._read.pop(event.name, 0)
        self._read[event.name] = max(last, event.token)
        if len(self._read) > _CARRIERS_READ_MAX:
            del self._read[next(iter(self._read))]
        if event.token <= last:
            return []
        if wait is None:
            answered, _ = self._answered.pop(event.waiter, (0, None))
            return self.give_back(event.name, event.waiter, event.token) if event.token != answered else []
        if not wait.wants_item:
            return self._tell_token(event.waiter, wait, event.token)
        if wait.is_popping:
            return []
        wait.is_popping = True
        wait.calls += 1

        def on_popped(value: Any, kind: str, text: str) -> Commands:
            wait.calls -= 1
            if kind:
                return self._fail_wait(event.waiter, kind, text)
            if value is None and event.waiter in self._waits:
                # What was reserved for it was given back, because this node was taken for dead.
                wait.is_popping = False
                return self._ask(event.waiter, wait)
            return self._item_came(event.waiter, event.name, value)

        return self._call("pop", (event.name, event.waiter), on_popped)

    def _tell_token(self, waiter: str, wait: Wait, token: int) -> Commands:
        del self._waits[waiter]
        wait.token = token
        return [done(wait.source, wait.message, token)]

    def _item_came(self, waiter: str, name: str, item: bytes | None) -> Commands:
        wait = self._waits.pop(waiter, None)
        if wait is not None:
            return [done(wait.source, wait.message, int(item is not None), item or b"")]
        return self._call("put_back", (name, item)) if item is not None else []

    def give_back(self, name: str, waiter: str, token: int = 0) -> Commands:
        """This token does not reach it; 0: whichever the store knows it to hold."""
        return self._call("give_back", (name, waiter, token))

    def _fail_wait(self, waiter: str, kind: str, text: str) -> Commands:
        wait = self._waits.pop(waiter, None)
        if wait is None:
            return []
        # The store may have taken the question in, and only its answer got lost.
        cancel = [] if kind == "CarrierUnknown" else self._call("cancel", (wait.message.name, waiter))
        return [failed(wait.source, wait.message, kind, text), *cancel]

    def cancel(self, source: Address, message: c.CancelWait) -> Commands:
        """A process gives up waiting."""
        waiter = self.waiter(source, message.request)
        wait = self._waits.get(waiter)
        if wait is None:
            return []  # its answer is on its way to the process
        wait.cancelled_ticks = wait.cancelled_ticks or 1
        # If it did not wait in the store, it has been granted, and that comes.
        return self._call(
            "cancel",
            (wait.message.name, waiter),
            lambda was_waiting, kind, _: self._give_up([waiter] if kind or was_waiting else []),
        )

    def _give_up(self, waiters: list[str]) -> Commands:
        waits = [self._waits.pop(waiter) for waiter in waiters if waiter in self._waits]
        return [done(wait.source, wait.message) for wait in waits]

    def _cancelled_for(self, ticks: int) -> list[str]:
        return [waiter for waiter, wait in self._waits.items() if wait.cancelled_ticks >= ticks]

    def ask_again(self) -> Commands:
        """Whoever waits must be known to the store; it takes a question that it knows for the same one."""
        commands = self._give_up(self._cancelled_for(1))
        waits, self._waits = self._waits, {}
        for former, wait in waits.items():
            waiter = self.waiter(wait.source, wait.message.request)  # of this life now
            self._waits[waiter] = wait
            if waiter == former:
                commands += self._ask_anew(waiter, wait)
            else:
                wait.is_popping = False
                commands += self._ask(waiter, wait)
        return commands

    def tick(self) -> Commands:
        """Half a second has passed."""
        commands = self._give_up(self._cancelled_for(_CANCEL_TICKS))
        for waiter, wait in self._waits.items():
            wait.cancelled_ticks += wait.cancelled_ticks > 0
            wait.ticks += 1
            if wait.ticks % _ASK_AGAIN_TICKS == 0 and not wait.cancelled_ticks and not wait.calls:
                commands += self._ask(waiter, wait)
        return commands

    def process_gone(self, event: e.ProcessGone) -> Commands:
        """Its waits are over, and what it holds comes free."""
        if event.address.process_id not in self._users:
            return []
        self._users.discard(event.address.process_id)
        for waiter in [waiter for waiter, (_, source) in self._answered.items() if source == event.address]:
            del self._answered[waiter]
        for waiter in [waiter for waiter, wait in self._waits.items() if wait.source == event.address]:
            del self._waits[waiter]
        return self._call("end_process", (f"{self._life()}/{event.address.process_id}/",))

    def job_gone(self, prefix: str, text: str) -> Commands:
        """All carriers whose names begin so are no more."""
        self._read = {name: token for name, token in self._read.items() if not name.startswith(prefix)}
        # Only an actor that outlives its driver can still be there to hear it.
        gone = [waiter for waiter, wait in self._waits.items() if wait.message.name.startswith(prefix)]
        waits = [self._waits.pop(waiter) for waiter in gone]
        return [failed(wait.source, wait.message, "ObjectLost", text) for wait in waits]
