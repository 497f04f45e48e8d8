"""Make, hold and remove the folders of a session and of a node, so that whether their owners live is never
a guess.

A living node holds a shared flock on its session's folder and an exclusive one on its own. The locks are
taken on the folders themselves, not on files inside: systemd-tmpfiles leaves a locked folder alone when it
cleans /tmp of old files. A folder gets its name (by a rename) only once it is locked, so that no sweep ever
finds one that nobody holds yet.

    .new-<random>  --locked, renamed-->  s-<id> or n-<id>  --renamed-->  .dead-<random>  --> removed
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from clusterpool.config import NodeConfig, NodePaths, SessionPaths, make_private_folder
from clusterpool.errors import StartFailed
from clusterpool.processes.thin_files import remove_thin_files

NEW_PREFIX = ".new-"
DEAD_PREFIX = ".dead-"
_TRIES_MAX = 20
# Keeps a session's folder from ever being empty; see `_make_locked`.
_SESSION_FILLER = ".nodes"


@dataclass
class NodeFolderLock:
    """The two flocks that say that a node lives; inherited by the node process, where they count until it
    ends.
    """

    paths: NodePaths
    session_fd: int
    node_fd: int

    @property
    def descriptors(self) -> tuple[int, int]:
        return self.session_fd, self.node_fd

    def close(self) -> None:
        """Let go of this process's share; the locks stay held while another process has it."""
        for descriptor in self.descriptors:
            if descriptor >= 0:
                os.close(descriptor)
        self.session_fd = self.node_fd = -1

    def remove(self, spill_path: Path | None = None) -> None:
        """At an orderly end: remove the node's folder, arena and spilled objects, and with the last node
        the session.
        """
        session = self.paths.session
        remove_node_files(self.paths, spill_path)
        if self.session_fd >= 0:
            try:
                # Fails while another node holds its share. Whoever tries to join in between is refused.
                fcntl.flock(self.session_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_folder(session.folder)
                remove_user_folder_if_empty(session.folder.parent)
            except BlockingIOError:
                pass
        self.close()


def make_node_folder(config: NodeConfig) -> NodeFolderLock:
    """Make the node's folder, and the session's if this is its first node on this host, and lock both.

    Raises: StartFailed if the session is just being removed or the node's folder is in use; PermissionError
    if a folder belongs to another user; ValueError if the socket paths would be too long.
    """
    paths = config.paths
    paths.process_socket("w000000000000")  # the longest; refused before anything is made
    session_fd = _make_or_join_session(paths.session)
    try:
        below = (paths.process_sockets_folder.name, paths.logs_folder.name, paths.spill_folder.name)
        node_fd = _make_locked(paths.folder, fcntl.LOCK_EX, below)
    except BaseException as error:
        os.close(session_fd)
        if isinstance(error, FileExistsError):
            raise StartFailed(
                f"node {config.node_id} was started before: its folder {paths.folder} is in use; "
                "give each node an id of its own"
            ) from error
        raise
    if config.spill_folder is not None:
        make_private_folder(config.spill_path, variable="the spill folder")
    return NodeFolderLock(paths, session_fd, node_fd)


def make_or_join_session(session: SessionPaths) -> int:
    """A descriptor of a shared flock on the session's folder, which is made if it is not there.

    As long as it is open, here or in a process that inherited it, the session counts as living.

    Raises: StartFailed if the session is just being removed; PermissionError if the folder is another user's.
    """
    return _make_or_join_session(session)


def remove_session_if_over(session: SessionPaths) -> bool:
    """Remove what is left of a session that nobody alive belongs to; whether nothing is left."""
    descriptor = try_lock(session.folder)
    if descriptor is None:
        return not session.folder.exists()
    try:
        remove_folder(session.folder)
        remove_user_folder_if_empty(session.folder.parent)
    finally:
        os.close(descriptor)
    return True


def try_lock(folder: Path) -> int | None:
    """The descriptor of an exclusive flock on `folder`; None if somebody alive holds it, or if it is not
    there.
    """
    try:
        descriptor = _open_folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the opening and the lock it may have been removed, and the lock would be on nothing.
        if folder.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def remove_node_files(paths: NodePaths, spill_path: Path | None = None) -> None:
    """Remove all that a node and its processes wrote: arena, semaphores and cells, its folder, and spilled objects."""
    paths.arena_file.unlink(missing_ok=True)
    remove_thin_files(paths.node_id)
    # A folder of the user's choosing: nothing is removed there but a folder that bears this very node's name.
    if spill_path is not None and spill_path.name == paths.arena_file.name:
        remove_folder(spill_path)
    remove_folder(paths.folder)


def remove_folder(folder: Path) -> None:
    """Remove it with all that is in it; at no time is a part of it to be seen under its name."""
    import shutil  # brings three compression libraries with it, and most starts remove nothing

    dead = folder.with_name(f"{DEAD_PREFIX}{os.urandom(6).hex()}")
    try:
        folder.rename(dead)
    except FileNotFoundError:
        return
    shutil.rmtree(dead, ignore_errors=True)


def remove_user_folder_if_empty(folder: Path) -> None:
    """After the last session's end, so that nothing stays behind; whoever starts meanwhile makes it again."""
    try:
        folder.rmdir()
    except OSError:
        pass


def _make_or_join_session(session: SessionPaths) -> int:
    for _ in range(_TRIES_MAX):
        try:
            return _join_session(session)
        except FileNotFoundError:
            pass
        try:
            make_private_folder(session.folder.parent)
            return _make_locked(session.folder, fcntl.LOCK_SH, (_SESSION_FILLER,))
        except (FileExistsError, FileNotFoundError):
            pass  # another node made it at the same time, or the last session's end removed the user's folder
    raise StartFailed(f"the session folder {session.folder} appeared and vanished again; please start again")


def _join_session(session: SessionPaths) -> int:
    descriptor = _open_folder(session.folder)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(f"the session folder {session.folder} belongs to another user")
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # As in `try_lock`: it may have been removed.
        if session.folder.stat().st_ino != os.fstat(descriptor).st_ino:
            raise FileNotFoundError(session.folder)
    except BlockingIOError:
        os.close(descriptor)
        raise StartFailed(
            f"the session {session.session_id} has ended, and {session.folder} is being removed; start a new one"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make_locked(folder: Path, lock: int, below: tuple[str, ...]) -> int:
    """`below`: folders in it, at least one: a rename silently replaces an empty folder, but never a full
    one.
    """
    new = folder.with_name(f"{NEW_PREFIX}{os.urandom(6).hex()}")
    new.mkdir(mode=0o700)
    descriptor = -1
    try:
        descriptor = _open_folder(new)
        fcntl.flock(descriptor, lock)
        for name in below:
            (new / name).mkdir(mode=0o700)
        new.rename(folder)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        remove_folder(new)
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, "in use already", str(folder)) from error
        raise
    return descriptor


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
