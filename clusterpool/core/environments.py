"""When a worker may be forked: once the packages of its job's runtime environment are unpacked on its node.

    ForkWorker --all unpacked--> ForkWorker
        |
        +--some missing--> [held] --PackageUnpacked, the last one--> ForkWorker
                             |----PackageFailed--------------------> the fork fails, and its request with it
                             +----EndWorker------------------------> it was never forked

Unpacked packages stay for later jobs: what the tasks of an earlier one have changed in them is put right first, by
the same FetchPackage, unless workers of that job are still there, which then share the copy. Beyond `bytes_max` those
used longest ago go, but none that a worker, or a fork that is held, uses.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

import msgspec

from clusterpool.core.messages import Address
from clusterpool.core.node_events import Command, Event, ForkWorker
from clusterpool.core.package_messages import PackageAnswer

# Unpacked packages of a node. Lower fetches them again for jobs that take turns; higher fills the disk (or,
# where the session's folder is in memory, the memory) with packages that nobody uses any more.
CACHE_BYTES_MAX = 1024 * 1024 * 1024

Commands = list[Command]
# A digest becomes the name of a folder, so nothing else may be taken for one.
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Environment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What `JobPart.runtime_env` holds, as JSON: packages by digest, and environment variables."""

    working_dir: Digest | None = None
    py_modules: list[Digest] = []
    env_vars: dict[str, str] = {}

    @property
    def digests(self) -> list[str]:
        """The packages, each once."""
        return list(dict.fromkeys([*([self.working_dir] if self.working_dir else []), *self.py_modules]))


_decoder = msgspec.json.Decoder(Environment)
NO_ENVIRONMENT = Environment()


def parse_environment(text: str) -> Environment:
    """The environment in a job's `runtime_env`.

    Raises: msgspec.MsgspecError when it is not one.
    """
    return _decoder.decode(text) if text else NO_ENVIRONMENT


class PackageUnpacked(Event, frozen=True):
    """Answer to FetchPackage: its files are in the node's cache folder."""

    digest: str
    size_bytes: int


class PackageFailed(Event, frozen=True):
    """Answer to FetchPackage: it could not be fetched or unpacked."""

    digest: str
    text: str


class PackageAnswered(Event, frozen=True):
    """The control store has taken a piece of a package of this process, or not."""

    address: Address
    answer: PackageAnswer


class FetchPackage(Command, frozen=True):
    """Get the package from the control store and unpack it, unless it is there and as it was unpacked; answer
    PackageUnpacked or PackageFailed.
    """

    digest: str


class DropPackage(Command, frozen=True):
    """Remove an unpacked package."""

    digest: str


class Environments:
    """The unpacked packages of one node, and the forks that wait for some."""

    def __init__(self, *, bytes_max: int = CACHE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        # Sizes of the unpacked, by digest, used longest ago first.
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._fetching: set[str] = set()
        self._held: dict[str, tuple[ForkWorker, list[str]]] = {}  # by process id, with all digests
        self._used: dict[str, list[str]] = {}  # digests by process id of a worker that was forked
        self._job_by_digest: dict[str, str] = {}  # of the unpacked, whose worker was forked last
        self._unchanged: set[str] = set()  # of the unpacked, which nobody has used since they were fetched

    def admit(self, command: ForkWorker) -> Commands:
        """Fork now, or hold the fork and fetch what is missing.

        Raises: msgspec.MsgspecError when the job's environment is malformed.
        """
        digests = parse_environment(command.job.runtime_env).digests
        for digest in digests:
            if self._may_be_changed(digest, command.job.job_id):
                self._forget(digest)
        missing = [digest for digest in digests if digest not in self._sizes]
        if missing:
            self._held[command.process_id] = (command, digests)
            fetches: Commands = [FetchPackage(digest) for digest in missing if digest not in self._fetching]
            self._fetching.update(missing)
            return fetches
        if digests:
            self._used[command.process_id] = digests
            for digest in digests:
                self._sizes.move_to_end(digest)
                self._unchanged.discard(digest)
                self._job_by_digest[digest] = command.job.job_id
        return [command]

    def _may_be_changed(self, digest: str, job_id: str) -> bool:
        """Whether another job has had the copy to itself, and may have written to it."""
        if digest in self._unchanged or self._job_by_digest.get(digest, job_id) == job_id:
            return False
        return not any(digest in digests for digests in self._used.values())

    def _forget(self, digest: str) -> None:
        del self._sizes[digest]
        self._unchanged.discard(digest)
        self._job_by_digest.pop(digest, None)

    def unpacked(self, event: PackageUnpacked) -> Commands:
        """A package is there; the forks that waited for it alone (admit them), and what must go for it."""
        self._fetching.discard(event.digest)
        self._sizes[event.digest] = event.size_bytes
        self._sizes.move_to_end(event.digest)
        self._unchanged.add(event.digest)
        commands: Commands = self._drop_surplus()
        for process_id, (command, digests) in list(self._held.items()):
            if all(digest in self._sizes for digest in digests):
                del self._held[process_id]
                commands.append(command)
        return commands

    def failed(self, event: PackageFailed) -> list[str]:
        """A package will not come; the process ids of the forks that can never be."""
        self._fetching.discard(event.digest)
        failed = [process_id for process_id, (_, digests) in self._held.items() if event.digest in digests]
        for process_id in failed:
            del self._held[process_id]
        return failed

    def cancel(self, process_id: str) -> bool:
        """The worker is not wanted any more; whether it was held, so that there is no process to end."""
        return self._held.pop(process_id, None) is not None

    def worker_ended(self, process_id: str) -> None:
        """A worker uses its packages no more."""
        self._used.pop(process_id, None)

    def _drop_surplus(self) -> Commands:
        needed = {digest for digests in self._used.values() for digest in digests}
        needed |= {digest for _, digests in self._held.values() for digest in digests}
        dropped: Commands = []
        for digest in list(self._sizes):
            if sum(self._sizes.values()) <= self._bytes_max:
                break
            if digest not in needed:
                self._forget(digest)
                dropped.append(DropPackage(digest))
        return dropped
