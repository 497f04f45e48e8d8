"""The child processes of one owner: workers that each run one `multiprocessing.Process` and end with it.

    opened --request--> [asked for] --granted--> [runs] --WorkerExited--> ended, with its exit code
                            |                       ^ loaded: it has its arguments
                            +--RequestFailed--> failed: it never ran

Unlike the workers of a set they are never replaced, and what they run is never run again. It is here, too, that a
process watches another for its end: a child its parent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import SIGKILL, Address

if TYPE_CHECKING:
    from clusterpool.core.owner import OwnerMachine

Commands = list[e.Command]


class Child:
    """One child, from the wish for it to its end."""

    __slots__ = ("number", "wish", "worker")

    def __init__(self, wish: e.ChildOpened) -> None:
        self.number = wish.set_number
        self.wish: e.ChildOpened | None = wish  # until it is met: what it carries may be large
        self.worker: m.WorkerPart | None = None


class Children:
    """All children that this process has started and that have not ended."""

    def __init__(self, owner: OwnerMachine) -> None:
        self._owner = owner
        self._by_request: dict[int, Child] = {}
        self._by_process: dict[str, Child] = {}
        self._watched: dict[Address, int] = {}  # the number under which the end of a process is told

    def has(self, process_id: str) -> bool:
        """Whether this is the process of a child, so that its node will report its end."""
        return process_id in self._by_process

    # --- from the shell

    def opened(self, event: e.ChildOpened, _now_s: float) -> Commands:
        """Ask for a worker."""
        return [self._request(Child(event))]

    def _request(self, child: Child) -> e.Command:
        assert child.wish is not None
        request = next(self._owner.requests)
        self._by_request[request] = child
        return e.Send(self._owner.node, m.RequestWorkers(request, 1, child.wish.demand, child.wish.job))

    def signalled(self, event: e.ChildSignalled, _now_s: float) -> Commands:
        """Send a child a signal; nothing happens if it has ended."""
        child = self._find(event.set_number)
        if child is None or child.worker is None:
            return []
        kill = m.KillWorker(child.worker.lease, event.signal, "its parent has sent it the signal")
        return [e.Send(child.worker.address.node, kill)]

    def dropped(self, event: e.ChildDropped, now_s: float) -> Commands:
        """Nobody waits for this child any more. If its worker comes nevertheless, it is given back."""
        for request, child in list(self._by_request.items()):
            if child.number == event.set_number:
                del self._by_request[request]
                return [e.Send(self._owner.node, m.CancelRequest(request, 1))]
        return self.signalled(e.ChildSignalled(event.set_number, SIGKILL), now_s)

    def watched(self, event: e.ProcessWatched, _now_s: float) -> Commands:
        """Somebody here wants to know when a process ends."""
        self._watched[event.address] = event.set_number
        return [e.Send(event.address.node, m.WatchProcess(event.address.process_id))]

    def _find(self, number: int) -> Child | None:
        return next((child for child in self._by_process.values() if child.number == number), None)

    # --- from nodes and workers

    def granted(self, message: m.WorkerGranted) -> Commands | None:
        """A worker came; None if it was not for a child."""
        child = self._by_request.pop(message.request, None)
        if child is None:
            return None
        worker = child.worker = message.worker
        self._by_process[worker.address.process_id] = child
        assert child.wish is not None
        plan, child.wish = child.wish.setup, None
        setup = m.SetupWorker(plan.env, plan.payload, plan.name, worker.lease, plan.references, is_process=True)
        commands = self._owner.objects.hand_over(worker.address, plan.references)
        return [*commands, e.Send(worker.address, setup), e.ChildStarted(child.number, worker)]

    def loaded(self, process_id: str) -> Commands:
        """The child has its arguments: what they need may go here."""
        child = self._by_process.get(process_id)
        return [e.ChildLoaded(child.number)] if child is not None else []

    def request_failed(self, message: m.RequestFailed) -> Commands | None:
        """There will be no worker; None if it was not for a child."""
        child = self._by_request.pop(message.request, None)
        return None if child is None else [e.ChildFailed(child.number, message.kind, message.text)]

    def process_gone(self, address: Address, exit_code: int = -SIGKILL) -> Commands:
        """A process has ended: a child, or one that is watched."""
        commands: Commands = []
        child = self._by_process.pop(address.process_id, None)
        if child is not None:
            commands.append(e.ChildEnded(child.number, exit_code))
        number = self._watched.pop(address, None)
        if number is not None:
            commands.append(e.WatchedEnded(number))
        return commands

    def node_gone(self, node_id: str) -> Commands:
        """A node is lost with all of its processes. Children that had started there are not started again."""
        commands: Commands = []
        workers = [child.worker.address for child in self._by_process.values() if child.worker is not None]
        for address in (*workers, *self._watched.copy()):
            if address.node_id == node_id:
                commands += self.process_gone(address)
        return commands + self.ask_again()

    def ask_again(self) -> Commands:
        """Requests may have gone with the node that they were passed on to."""
        commands: Commands = []
        for request, child in list(self._by_request.items()):
            # If the old one is met nevertheless, the worker is given back.
            del self._by_request[request]
            commands.append(e.Send(self._owner.node, m.CancelRequest(request, 1)))
            commands.append(self._request(child))
        return commands

    def all_gone(self, text: str) -> Commands:
        """There is no cluster any more."""
        commands: Commands = [e.ChildFailed(child.number, "not_connected", text) for child in self._by_request.values()]
        commands += [e.ChildEnded(child.number, -SIGKILL) for child in self._by_process.values()]
        commands += [e.WatchedEnded(number) for number in self._watched.values()]
        self._by_request.clear()
        self._by_process.clear()
        self._watched.clear()
        return commands
