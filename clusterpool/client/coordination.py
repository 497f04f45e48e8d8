"""Semaphores, channels and cells of the whole cluster, as one process uses them: what is *fat* goes through its node.

    process --AcquireToken--> node --Lua--> control store        (core/coordination.py decides, on the node)
            <-CoordinationDone-    <-grant-

Whoever waits turns the client's loop, so waits end at Ctrl-C and can be made in any thread. A wait that is given up
(timeout, Ctrl-C) is cancelled at the node; what had been granted meanwhile is taken, or given back.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusterpool import errors
from clusterpool.client.token_counts import TokenCounts
from clusterpool.core import coordination_messages as c
from clusterpool.core.messages import Message

if TYPE_CHECKING:
    from clusterpool.client.client import Client

# In the node's folder; `node/coordination.py` makes it.
MOVED_PAGE = "moved"
_PAGE_BYTES = 8
# Names that have not moved are remembered to save questions; so many are some 200 KB.
_UNMOVED_MAX = 1000


class Token(int):
    """The fencing number of a token, which knows the `request` that brought it: by that the store knows its holder."""

    request: int

    def __new__(cls, number: int, request: int) -> Token:
        made = super().__new__(cls, number)
        made.request = request
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Token, (int(self), self.request)


def _request_of(token: int) -> int:
    return token.request if isinstance(token, Token) else 0


class Coordination:
    """One per client; `Runtime.coordination`. Any thread may use it."""

    def __init__(self, client: Client) -> None:
        self.node_id = client.address.node_id
        self._client = client
        self._prefix = f"{client.job.job_id}-{client.address.process_id}-"
        self._numbers = itertools.count(1)
        self._page: memoryview | None = None
        self._counter: Any = None  # the page as one number
        self._moved: set[str] = set()
        self._unmoved: dict[str, int] = {}  # by name, the counter at which it had not moved
        self._forgotten: deque[str] = deque()
        self.counts = TokenCounts(client)

    # --- names and the moved page

    def new_name(self) -> str:
        """A name for a carrier made by this process, unique in the cluster: `<job id>-<process id>-<number>`."""
        return self._prefix + str(next(self._numbers))

    @property
    def page(self) -> memoryview:
        """The moved page, 8 bytes: `page.cast("Q")[0]` grows before anything of this node moves."""
        if self._page is None:
            page = _map_page(self._client)
            self._counter = page.cast("Q")  # first: another thread may come in between
            self._page = page
        return self._page

    def is_moved(self, name: str) -> bool:
        """Whether the carrier, made on this node or adopted by this process, is in the control store (or on its way).

        Costs a question to the node after each change of the page, else nothing.
        """
        if name in self._moved:
            return True
        if self._counter is None:
            _ = self.page
        counter: int = self._counter[0]  # before the question: what moves afterwards changes it
        if counter == 0 or self._unmoved.get(name) == counter:
            return False
        is_moved = bool(self._ask(lambda request: c.IsMoved(request, name)).number)
        if is_moved:
            self._unmoved.pop(name, None)
            self._moved.add(name)
        else:
            if len(self._unmoved) >= _UNMOVED_MAX:
                self._unmoved.clear()  # a long-running program makes any number of them
            self._unmoved[name] = counter
        return is_moved

    def adopt(self, kind: str, name: str, home: str, maximum: int = 0, total: int = -1) -> None:
        """Have a carrier that was made on node `home` moved to the control store; at once when it is there.

        kind: "channel", "cell", "semaphore", "guard": a semaphore whose `total` tokens come back when their holder
        dies, or "lock": one of one token. A cell's lock must be adopted before it.

        Raises: ObjectLost when its home is gone and it had never moved, or its job has ended.
        """
        if name not in self._moved:
            self._ask(lambda request: c.AdoptCarrier(request, kind, name, home, maximum, total))
            self._moved.add(name)

    def forget(self, name: str) -> None:
        """Remove a carrier of this process that was never pickled; safe in `__del__`."""
        self._moved.discard(name)
        self._unmoved.pop(name, None)
        self._forgotten.append(name)
        # The loop's thread sends it: whoever collects garbage may hold the client's lock.
        self._client.call_later(self._send_forgotten)

    def _send_forgotten(self) -> None:
        names = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        if names and not self._client.is_closed:
            self._client.send(self._client.node, c.ForgetCarriers(names))

    # --- semaphores

    def acquire(self, name: str, timeout_s: float | None) -> Token:
        """A token: its fencing number, greater than that of all tokens before; 0 when `timeout_s` went by.

        timeout_s: None waits for ever, 0 not at all.
        Raises: ObjectLost when there is no such semaphore, NotConnected.
        """
        waits = timeout_s is None or timeout_s > 0
        requests: list[int] = []

        def make(request: int) -> Message:
            requests.append(request)
            return c.AcquireToken(request, name, waits)

        def give_back(request: int, answer: c.CoordinationDone) -> None:
            self._client.send(self._client.node, c.ReturnToken(request, name))

        answer = self._wait(make, timeout_s, give_back)
        return Token(answer.number, requests[0])

    def release(self, name: str, maximum: int, token: int = 0, *, is_thin: bool = False) -> None:
        """Give a token, to the process that has waited longest if any does.

        token: what `acquire` returned; 0 when this process does not hold it. is_thin: it was taken before the move.
        Raises: ValueError when `maximum` tokens are there already; LockLost; ObjectLost, NotConnected.
        """
        self._ask(lambda request: c.ReleaseToken(request, name, maximum, _request_of(token), is_thin))

    def report_stuck(self, name: str, total: int) -> None:
        """Tell the node that a token of a thin semaphore has been waited for in vain; it was made with `total`."""
        if not self._client.is_closed:
            self._client.send(self._client.node, c.ReportStuck(name, total))

    def value(self, name: str) -> int:
        """How many tokens nobody has."""
        return self._ask(lambda request: c.ReadValue(request, name)).number

    # --- channels

    def put(self, name: str, payload: bytes) -> None:
        """Append an item; there when this returns."""
        self._ask(lambda request: c.PutItem(request, name, payload))

    def get(self, name: str, timeout_s: float | None) -> bytes | None:
        """The first item; None when `timeout_s` went by (None: never, 0: at once)."""
        waits = timeout_s is None or timeout_s > 0

        def give_back(_request: int, answer: c.CoordinationDone) -> None:
            self._client.send(self._client.node, c.ReturnItem(name, answer.content))

        answer = self._wait(lambda request: c.GetItem(request, name, waits), timeout_s, give_back)
        return answer.content if answer.number else None

    def length(self, name: str) -> int:
        """How many items are in the channel."""
        return self._ask(lambda request: c.CountItems(request, name)).number

    # --- cells

    def read_cell(self, name: str, known_version: int) -> tuple[int, bytes] | None:
        """The cell's version and bytes; None when `known_version` is the newest."""
        answer = self._ask(lambda request: c.ReadCell(request, name, known_version))
        return (answer.number, answer.content) if answer.number else None

    def write_cell(self, name: str, content: bytes, guard: str = "", token: int = 0, *, is_thin: bool = False) -> int:
        """Replace the cell's bytes; their version. The caller holds `guard`, by `token` or `is_thin` as in `release`.

        Raises: LockLost when it does not any more.
        """
        return self._ask(lambda request: c.WriteCell(request, name, content, guard, _request_of(token), is_thin)).number

    # --- requests

    def _ask(self, make: Callable[[int], Message]) -> c.CoordinationDone:
        self._client.check_open()  # a fork of this process has copies of its locks, perhaps locked ones
        return self._checked(self._client.request(make))

    def _wait(
        self,
        make: Callable[[int], Message],
        timeout_s: float | None,
        give_back: Callable[[int, c.CoordinationDone], None],
    ) -> c.CoordinationDone:
        """Ask for something that may take long; `give_back` undoes what came after we had gone."""
        client = self._client
        client.check_open()
        pending = _Pending(make, give_back)
        try:
            client.request_nowait(pending.make, pending.answered)
            # Asked not to wait, the node answers at once: only an answer says whether there was something.
            patience_s = timeout_s if timeout_s is not None and timeout_s > 0 else None
            if not client.loop.wait_until(lambda: bool(pending.answers) or client.is_closed, patience_s):
                client.send(client.node, c.CancelWait(pending.request))
                # The answer that was on its way, or the one to this.
                client.loop.wait_until(lambda: bool(pending.answers) or client.is_closed)
        except BaseException:
            pending.abandon()
            if pending.request and not client.is_closed:
                client.send(client.node, c.CancelWait(pending.request))
            raise
        answer = pending.take()
        if answer is None:
            client.check_open()
            raise errors.NotConnected("this process is not connected to a cluster any more")
        return self._checked(answer)

    def _checked(self, answer: Message) -> c.CoordinationDone:
        if isinstance(answer, c.CoordinationDone):
            return answer
        assert isinstance(answer, c.CoordinationFailed)
        if answer.kind == "ValueError":
            raise ValueError(answer.text)
        error = getattr(errors, answer.kind, None)
        is_ours = isinstance(error, type) and issubclass(error, errors.ClusterpoolError)
        raise (error if is_ours and error is not None else errors.ClusterpoolError)(answer.text)


class _Pending:
    """A request whose answer is either taken by the thread that waits or given back: `answers` is popped once."""

    def __init__(self, make: Callable[[int], Message], give_back: Callable[[int, c.CoordinationDone], None]) -> None:
        self.request = 0
        self.answers: deque[Message] = deque()
        self._make = make
        self._give_back = give_back
        self._is_abandoned = False

    def make(self, request: int) -> Message:
        self.request = request
        return self._make(request)

    def answered(self, message: Message) -> None:
        """Called by whoever turns the loop, under the client's lock."""
        self.answers.append(message)
        if self._is_abandoned:
            self._return_answer()

    def abandon(self) -> None:
        """Nobody will take the answer."""
        self._is_abandoned = True
        self._return_answer()

    def take(self) -> Message | None:
        try:
            return self.answers.popleft()
        except IndexError:
            return None

    def _return_answer(self) -> None:
        answer = self.take()
        if isinstance(answer, c.CoordinationDone) and answer.number:
            self._give_back(self.request, answer)


def _map_page(client: Client) -> memoryview:
    assert client.registered is not None, "the client has not joined its node"
    path = Path(client.registered.processes_folder).parent / MOVED_PAGE
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise errors.NotConnected(f"the node {client.address.node_id} has ended: {path} is gone") from exc
    try:
        return memoryview(mmap.mmap(fd, _PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ))
    finally:
        os.close(fd)
