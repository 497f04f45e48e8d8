"""The join file: what a node on any host needs to become part of a cluster. A secret, so its mode is 0600.

`clusterpool up` writes it to the home folder of clusterpool; `clusterpool start --address FILE` reads it.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import msgspec

from clusterpool.cli.failures import WrongFile
from clusterpool.config import home_folder, make_private_folder, write_private_file
from clusterpool.node.cluster_keys import ClusterKeys

_VERSION = 1
_CLUSTER_ID = re.compile(r"[0-9a-f]{8}")


class JoinFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the control store is, and the cluster's secrets."""

    version: int
    cluster_id: str
    control_store_url: str
    control_store_password: str
    keys: str  # as ClusterKeys.to_json wrote it

    @classmethod
    def make(cls, cluster_id: str, url: str, password: str, keys: ClusterKeys) -> JoinFile:
        """That of a new cluster."""
        return cls(_VERSION, cluster_id, url, password, keys.to_json())


def join_file_path() -> Path:
    """Where `up` writes it."""
    return home_folder() / "join.json"


def write_join_file(join: JoinFile) -> Path:
    """Write it, readable by this user only."""
    path = join_file_path()
    make_private_folder(path.parent, variable="CLUSTERPOOL_HOME")
    write_private_file(path, msgspec.json.encode(join).decode() + "\n")
    return path


def read_join_file(path: Path) -> JoinFile:
    """Raises: WrongFile if it is none, or if others may read it."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
    except OSError as exc:
        raise WrongFile(
            f"the join file {path} cannot be read: {exc}; it is the file join.json that `clusterpool up` wrote on the "
            "host of the cluster's head: copy it here"
        ) from exc
    if mode & 0o077:
        raise WrongFile(
            f"the join file {path} holds the cluster's keys, and others may read it (mode {mode:04o}); "
            f"run `chmod 600 {path}`, and start the cluster anew if a stranger may have seen it"
        )
    try:
        join = msgspec.json.decode(content, type=JoinFile)
        ClusterKeys.from_json(join.keys)
    except ValueError as exc:
        raise WrongFile(f"{path} is no join file of this version of clusterpool: {exc}") from exc
    if join.version != _VERSION or not _CLUSTER_ID.fullmatch(join.cluster_id):
        raise WrongFile(f"{path} is no join file of this version of clusterpool; use the same version everywhere")
    return join


def remove_join_file(cluster_id: str) -> None:
    """When the cluster has ended; a file of another cluster stays."""
    path = join_file_path()
    try:
        if msgspec.json.decode(path.read_bytes(), type=JoinFile).cluster_id == cluster_id:
            path.unlink()
    except (OSError, ValueError):
        pass
