"""The packages of runtime environments: taken from drivers, fetched and unpacked for workers.

    driver --SendPackage--> [package thread] --put_package--> control store
    NodeMachine --FetchPackage--> [package thread] --get_package, unzip--> <node's folder>/packages/<digest>/

A thread of its own with a connection of its own: a large package would otherwise hold up heartbeats. It
starts with the first package.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clusterpool.core import environments as env
from clusterpool.core import package_messages as p
from clusterpool.core.messages import Address
from clusterpool.errors import ClusterpoolError, NotConnected
from clusterpool.node.store_thread import PATIENCE_S

logger = logging.getLogger(__name__)

_RETRY_S = 0.25

Files = dict[str, tuple[int, int]]


class PackageThread:
    """Carries packages between drivers, the control store and the node's cache folder.

    `connect` gives a new connection to the control store (for this thread alone), `post` takes events.
    """

    def __init__(self, folder: Path, post: Callable[[Any], None], connect: Callable[[], Any]) -> None:
        self.folder = folder
        self._post = post
        self._connect = connect
        self._store: Any = None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._uploads: dict[Address, _Upload] = {}
        self._files: dict[str, Files] = {}  # of the unpacked packages, as they were then
        self._is_stopping = False

    # --- the node's loop

    def take(self, command: env.FetchPackage | env.DropPackage) -> None:
        """Carry out a command of the machine."""
        if isinstance(command, env.FetchPackage):
            self._enqueue(lambda: self._fetch(command.digest))
        else:
            self._enqueue(lambda: self._drop(command.digest))

    def message(self, source: Address, message: p.OfferPackage | p.SendPackage) -> None:
        """A driver has a package; the answer comes as an event."""
        if isinstance(message, p.OfferPackage):
            offer = message
            self._enqueue(lambda: self._answer(source, offer.request, lambda: self._offered(source, offer)))
        else:
            piece = message
            self._enqueue(lambda: self._answer(source, piece.request, lambda: self._sent(source, piece)))

    def forget(self, source: Address) -> None:
        """A process has ended; what it had begun to send is dropped."""
        if self._thread is not None:
            self._enqueue(lambda: self._uploads.pop(source, None) and None)

    def environment_paths(self, text: str) -> tuple[str, tuple[str, ...], dict[str, str]]:
        """A job's working folder ("" for none), its module folders, and its variables; all is unpacked."""
        environment = env.parse_environment(text)
        working_dir = str(self.folder / environment.working_dir) if environment.working_dir else ""
        modules = tuple(str(self.folder / digest) for digest in environment.py_modules)
        return working_dir, modules, environment.env_vars

    def stop(self) -> None:
        """Finish what is under way, but wait no longer for a control store that is away."""
        self._is_stopping = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(5.0)

    def _enqueue(self, work: Callable[[], Any]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="packages", daemon=True)
            self._thread.start()
        self._queue.put(work)

    # --- the thread

    def _main(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.close()

    def _call(self, operation: str, *arguments: Any) -> Any:
        """Call the control store, and again while it is away."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                if self._store is None:
                    self._store = self._connect()
                return getattr(self._store, operation)(*arguments)
            except NotConnected:
                if self._is_stopping or time.monotonic() >= deadline_s:
                    raise
                time.sleep(_RETRY_S)

    def _answer(self, source: Address, request: int, work: Callable[[], bool]) -> None:
        try:
            answer = p.PackageAnswer(request, work())
        except Exception as exc:  # a border: whatever it was, the driver must hear of it
            if not isinstance(exc, (ClusterpoolError, ValueError)):
                logger.exception("a package could not be taken")
            self._uploads.pop(source, None)
            answer = p.PackageAnswer(request, False, f"{type(exc).__name__}: {exc}")
        self._post(env.PackageAnswered(source, answer))

    def _offered(self, source: Address, offer: p.OfferPackage) -> bool:
        if not 0 < offer.size_bytes <= p.PACKAGE_BYTES_MAX:
            raise ValueError(f"a package has 1 to {p.PACKAGE_BYTES_MAX} bytes, not {offer.size_bytes}")
        if self._call("has_package", offer.digest):
            return True
        self._uploads[source] = _Upload(offer)
        return False

    def _sent(self, source: Address, message: p.SendPackage) -> bool:
        upload = self._uploads.get(source)
        if upload is None or not upload.add(message):
            raise ValueError(f"a piece of package {message.digest} came out of turn")
        if not upload.is_complete:
            return False
        del self._uploads[source]
        content = bytes(upload.content)
        self._call("put_package", message.digest, content)
        logger.info("package %s: %d bytes went to the control store", message.digest, len(content))
        return True

    def _fetch(self, digest: str) -> None:
        try:
            target = self.folder / digest
            if not target.is_dir() or self._files.get(digest) != files_of(target):
                remove_package(self.folder, digest)
                content = self._call("get_package", digest)
                if content is None:
                    raise ValueError(
                        "the control store does not have it (any more: it keeps packages for seven days "
                        "after their last use); start the program again, which brings it there"
                    )
                unpack(content, digest, self.folder)
                self._files[digest] = files_of(target)
            event: Any = env.PackageUnpacked(digest, folder_bytes(target))
        except Exception as exc:  # a border: those who wait for the package must hear of it
            logger.warning("package %s could not be unpacked: %s", digest, exc)
            text = f"package {digest[:12]} of its runtime_env could not be unpacked on this node: {exc}"
            event = env.PackageFailed(digest, text)
        self._post(event)

    def _drop(self, digest: str) -> None:
        self._files.pop(digest, None)
        remove_package(self.folder, digest)


class _Upload:
    """A package on its way from a driver, of which a part is here."""

    def __init__(self, offer: p.OfferPackage) -> None:
        self._digest = offer.digest
        self._size_bytes = offer.size_bytes
        self.content = bytearray()

    def add(self, message: p.SendPackage) -> bool:
        """Append a piece; whether it was the next one."""
        end = len(self.content) + len(message.chunk)
        if message.digest != self._digest or message.offset != len(self.content) or end > self._size_bytes:
            return False
        self.content += message.chunk
        return True

    @property
    def is_complete(self) -> bool:
        return len(self.content) == self._size_bytes


def unpack(content: bytes, digest: str, folder: Path) -> None:
    """Unpack a package to `folder/<digest>`, which appears complete or not at all.

    Raises: ValueError when it is not the package of this digest, or too large; OSError when there is no room.
    """
    import zipfile

    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError("its content does not have this digest")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = folder / f".{digest[:12]}.{os.urandom(4).hex()}"
    part.mkdir(mode=0o700)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > p.PACKAGE_BYTES_MAX:
                raise ValueError(f"its files have more than {p.PACKAGE_BYTES_MAX} bytes")
            for entry in entries:
                # `extract` keeps every name inside of the folder, but forgets who may execute it.
                path = Path(archive.extract(entry, part))
                if not entry.is_dir():
                    path.chmod(0o700 if entry.external_attr >> 16 & 0o100 else 0o600)
        part.rename(folder / digest)
    except zipfile.BadZipFile as exc:
        raise ValueError(f"it is no zip file: {exc}") from exc
    finally:
        _remove(part)


def remove_package(folder: Path, digest: str) -> None:
    """Remove an unpacked package; at no time is a part of it to be seen under its name."""
    part = folder / f".{digest[:12]}.{os.urandom(4).hex()}"
    with contextlib.suppress(FileNotFoundError):
        (folder / digest).rename(part)
        _remove(part)


def files_of(folder: Path) -> Files:
    """What changes when somebody writes below the folder: sizes and times by path. Byte code does not count, which
    whoever imports a module makes.
    """
    found: Files = {}
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        # A folder's time changes with the byte code in it, and what is new in it shows by itself.
        found.update((f"{where}/{name}", (0, 0)) for name in [*folders, *names])
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # what somebody has left running takes it away
                status = os.lstat(f"{where}/{name}")
                found[f"{where}/{name}"] = (status.st_size, status.st_ctime_ns)
    return found


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
