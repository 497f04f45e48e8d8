"""What a node is told when it starts, where a session keeps its files, and what this machine has.

Only light imports: every driver, worker and command imports this first.

    $CLUSTERPOOL_TMPDIR | $XDG_RUNTIME_DIR | /tmp
      clusterpool-<uid>/          0700, ours
        s-<session id>/           flock: shared, by each living node of the session
          n-<node id's digits>/   flock: exclusive, by the node; *.pid, node.json, node.sock, valkey.sock
            p/<process id>.sock   logs/   spill/
    /dev/shm/clusterpool-<uid>-<session id>-<node id>        the arena
    ~/.clusterpool/cluster.json   the cluster that `clusterpool up` recorded
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusterpool.sizes import parse_size

# `sockaddr_un.sun_path` has 108 bytes, the last of which is the closing zero.
SOCKET_PATH_BYTES_MAX = 107
# Names as long as any that ids.py makes: they show whether a base folder is short enough.
_LONGEST_BELOW_BASE = f"/clusterpool-{os.getuid()}/s-00000000/n-0000000000/p/w000000000000.sock"

# Share of the memory for objects. More starves the workers' own memory, less spills to disk early; Ray's
# default is 30 %.
OBJECT_STORE_MEMORY_SHARE = 0.3
# In use beyond this part of the memory, a node ends workers (core/memory_monitor.py). Ray's default, too.
MEMORY_THRESHOLD_DEFAULT = 0.95
# Of the free shared memory we leave a tenth to others: a full tmpfs kills its writers with SIGBUS, not with
# an error.
SHARED_MEMORY_FREE_SHARE = 0.9
SHARED_MEMORY_FOLDER = Path("/dev/shm")

# The folder that programs take along to all nodes where they say nothing of it: `clusterpool run --working-dir`.
WORKING_DIR_VARIABLE = "CLUSTERPOOL_WORKING_DIR"
# Names a function, "module:name", that each worker of a job calls before it loads anything of the job's.
WORKER_SETUP_VARIABLE = "CLUSTERPOOL_WORKER_SETUP"
PATCHING_SETUP = "clusterpool.cli.patch:patch_standard_library"


def runs_unchanged_program() -> bool:
    """Whether this process is of a job that knows of the standard library only (`clusterpool run --patch`)."""
    return os.environ.get(WORKER_SETUP_VARIABLE) == PATCHING_SETUP


@dataclass(frozen=True)
class NodeConfig:
    """Everything that a node process needs to know; handed over as JSON.

    `driver_pid`: an embedded node ends with this process. `memory_bytes`: what tasks may ask for.
    `spill_folder`: None for the node's own folder. `spill_bytes_max`: None for no bound but the disk.
    `memory_limit_bytes`: of the node's processes and object store together; None for what the machine has.
    `memory_threshold`: in use beyond this part of the memory, workers are ended; 1 for never.
    `control_store_url`: None to start an embedded server. `listen_port`: None for no TCP at all, 0 for any
    free port.
    """

    session_folder: str
    node_id: str
    cluster_id: str
    is_head: bool = True
    is_embedded: bool = False
    driver_pid: int | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    memory_bytes: int = 0
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    object_store_bytes: int = 0
    spill_folder: str | None = None
    spill_bytes_max: int | None = None
    memory_limit_bytes: int | None = None
    memory_threshold: float = MEMORY_THRESHOLD_DEFAULT
    control_store_url: str | None = None
    control_store_password_file: str | None = None
    listen_host: str = "127.0.0.1"
    listen_port: int | None = None
    keys_file: str | None = None
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if not self.node_id.startswith("n") or not self.node_id[1:].isalnum():
            raise ValueError(f"node_id must be 'n' and digits, as ids.new_node_id makes it: {self.node_id!r}")
        if not Path(self.session_folder).name.startswith("s-"):
            raise ValueError(f"session_folder must end in s-<session id>: {self.session_folder!r}")
        amounts = {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "memory_bytes": self.memory_bytes,
            "object_store_bytes": self.object_store_bytes,
            "memory_limit_bytes": self.memory_limit_bytes or 0,
            "memory_threshold": self.memory_threshold,
            **self.resources,
        }
        for name, amount in amounts.items():
            if not (amount >= 0 and math.isfinite(amount)):
                raise ValueError(f"{name} must be a number of 0 or more: {amount!r}")
        if self.is_embedded and self.driver_pid is None:
            raise ValueError("an embedded node needs driver_pid: it ends with its driver")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeConfig:
        """Raises: ValueError if a field is missing or unknown, as when two versions of clusterpool meet."""
        return cls(**_checked_fields(cls, text))

    def control_store_password(self) -> str | None:
        """What its file holds. Raises: OSError."""
        file = self.control_store_password_file
        return Path(file).read_text().strip() if file else None

    @property
    def paths(self) -> NodePaths:
        return SessionPaths(Path(self.session_folder)).node(self.node_id)

    @property
    def spill_path(self) -> Path:
        """The folder that only this node writes spilled objects to, and that is removed with it."""
        if self.spill_folder is None:
            return self.paths.spill_folder
        session_id = SessionPaths(Path(self.session_folder)).session_id
        return Path(self.spill_folder) / _machine_wide_name(session_id, self.node_id)


@dataclass(frozen=True)
class SessionPaths:
    """The folder of one session: a cluster's life on this host."""

    folder: Path

    @classmethod
    def in_base(cls, session_id: str) -> SessionPaths:
        """The paths of a new session in this user's base folder, which is made and checked; the session's
        is not made.

        Raises: PermissionError if the base folder belongs to another user.
        """
        return cls(user_folder() / f"s-{session_id}")

    @property
    def session_id(self) -> str:
        return self.folder.name.removeprefix("s-")

    @property
    def store_folder(self) -> Path:
        """Where a cluster's own control store runs, which outlives its head."""
        return self.folder / "store"

    def node(self, node_id: str) -> NodePaths:
        return NodePaths(self.folder / f"n-{node_id.removeprefix('n')}")

    def nodes(self) -> list[NodePaths]:
        """Of every node folder that is there now, of living nodes and of dead ones."""
        try:
            return [
                NodePaths(path)
                for path in sorted(self.folder.iterdir())
                if path.name.startswith("n-") and not path.is_symlink()
            ]
        except FileNotFoundError:
            return []


@dataclass(frozen=True)
class NodePaths:
    """The files of one node."""

    folder: Path

    @property
    def node_id(self) -> str:
        return "n" + self.folder.name.removeprefix("n-")

    @property
    def session(self) -> SessionPaths:
        return SessionPaths(self.folder.parent)

    @property
    def node_socket(self) -> Path:
        return checked_socket_path(self.folder / "node.sock")

    def process_socket(self, process_id: str) -> Path:
        return checked_socket_path(self.folder / "p" / f"{process_id}.sock")

    @property
    def process_sockets_folder(self) -> Path:
        return self.folder / "p"

    @property
    def valkey_socket(self) -> Path:
        return checked_socket_path(self.folder / "valkey.sock")

    @property
    def logs_folder(self) -> Path:
        return self.folder / "logs"

    @property
    def node_log(self) -> Path:
        return self.logs_folder / "node.log"

    @property
    def spill_folder(self) -> Path:
        return self.folder / "spill"

    @property
    def config_file(self) -> Path:
        return self.folder / "node.json"

    def pid_file(self, role: str) -> Path:
        """`role`: node, driver, zygote, valkey; written by `processes.death.record_process`."""
        return self.folder / f"{role}.pid"

    @property
    def arena_file(self) -> Path:
        return SHARED_MEMORY_FOLDER / _machine_wide_name(self.session.session_id, self.node_id)


def user_folder() -> Path:
    """Make and check `<base>/clusterpool-<uid>`.

    Raises: PermissionError if somebody else owns it, so that nobody can plant sockets for us in a shared
    /tmp.
    """
    folder = base_folder() / f"clusterpool-{os.getuid()}"
    make_private_folder(folder)
    return folder


def user_folders() -> list[Path]:
    """Every folder in which an earlier start of this user may have left something: a cron job has no
    XDG_RUNTIME_DIR.
    """
    candidates = [os.environ.get("CLUSTERPOOL_TMPDIR"), os.environ.get("XDG_RUNTIME_DIR"), "/tmp"]
    distinct = dict.fromkeys(Path(candidate) for candidate in candidates if candidate)
    return [folder for base in distinct if (folder := base / f"clusterpool-{os.getuid()}").is_dir()]


def base_folder() -> Path:
    """$CLUSTERPOOL_TMPDIR, or $XDG_RUNTIME_DIR where it outlives the login, or /tmp."""
    chosen = os.environ.get("CLUSTERPOOL_TMPDIR")
    if chosen:
        if _is_short_enough(chosen):
            return Path(chosen).absolute()
        warnings.warn(
            f"CLUSTERPOOL_TMPDIR is too long for UNIX sockets ({chosen!r}; at most "
            f"{SOCKET_PATH_BYTES_MAX - len(_LONGEST_BELOW_BASE)} bytes): /tmp is used instead",
            stacklevel=2,
        )
        return Path("/tmp")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and _is_short_enough(runtime) and os.access(runtime, os.W_OK) and _outlives_login(runtime):
        return Path(runtime)
    return Path("/tmp")


def default_spill_folder() -> str | None:
    """A folder on a disk: /tmp and /run are often memory themselves. None for the node's own folder."""
    chosen = os.environ.get("CLUSTERPOOL_TMPDIR")
    if chosen:
        return chosen
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else None


def make_private_folder(folder: Path, *, variable: str = "CLUSTERPOOL_TMPDIR") -> None:
    """Make `folder` with mode 0700, and those above it, or check that it is ours. `variable` says where it lies.

    Raises: PermissionError if it is a link, no folder, or another user's.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    except OSError as exc:
        text = f"{exc.strerror}; set {variable} to a folder where you may write"
        raise OSError(exc.errno, text, str(folder)) from exc
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{folder} is no folder but a file or a link; remove it, or set {variable} to a folder")
    if status.st_uid != os.getuid():
        raise PermissionError(
            f"{folder} is not a folder of user {os.getuid()} (its owner is {status.st_uid}); somebody else "
            f"made it, so its contents cannot be trusted; remove it, or set {variable} to a folder of "
            "your own"
        )
    if status.st_mode & 0o077:
        folder.chmod(0o700)


def checked_socket_path(path: Path) -> Path:
    """Raises: ValueError if `path` is too long for a UNIX socket."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise ValueError(
            f"the socket path {str(path)!r} has {length} bytes, but UNIX sockets allow "
            f"{SOCKET_PATH_BYTES_MAX}; set CLUSTERPOOL_TMPDIR to a shorter folder, such as /tmp"
        )
    return path


def is_folder_locked(folder: Path) -> bool:
    """Whether a living process holds the flock of `folder`; False also if it is not there."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def write_private_file(path: Path, text: str) -> None:
    """Replace `path` by a file of mode 0600, so that a reader sees the old text or the new, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(3).hex()}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class ClusterRecord:
    """The cluster that this user's programs join without being told."""

    cluster_id: str
    session_folder: str
    node_socket: str
    address: str
    control_store_url: str
    keys_file: str | None
    started_at_s: float


def home_folder() -> Path:
    """$CLUSTERPOOL_HOME or ~/.clusterpool; not made."""
    chosen = os.environ.get("CLUSTERPOOL_HOME")
    return Path(chosen).absolute() if chosen else Path.home() / ".clusterpool"


def write_cluster_record(record: ClusterRecord) -> Path:
    """Make `record` the cluster that this user's programs join; returns the file."""
    home = home_folder()
    make_private_folder(home, variable="CLUSTERPOOL_HOME")
    path = home / "cluster.json"
    write_private_file(path, json.dumps(dataclasses.asdict(record), indent=2) + "\n")
    return path


def read_cluster_record() -> ClusterRecord | None:
    """None if there is none, if another version wrote it, or if it is not ours: it names a socket that we
    would trust. A cluster whose node in the record has died is reached through another one on this host.
    """
    path = home_folder() / "cluster.json"
    try:
        with path.open(encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            record = ClusterRecord(**_checked_fields(ClusterRecord, file.read()))
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home folder can be found
        return None
    return record if is_alive(record) else _through_another_node(record)


def remove_cluster_record(cluster_id: str | None = None) -> bool:
    """Remove the record; with `cluster_id`, only if it is that cluster's. Says whether it was removed."""
    if cluster_id is not None:
        record = read_cluster_record()
        if record is None or record.cluster_id != cluster_id:
            return False
    try:
        (home_folder() / "cluster.json").unlink()
    except FileNotFoundError:
        return False
    return True


def is_alive(record: ClusterRecord) -> bool:
    """Whether the node of `record` lives on this host: it holds the flock of its folder as long as it does."""
    return _is_living(Path(record.node_socket))


def _is_living(node_socket: Path) -> bool:
    return is_folder_locked(node_socket.parent) and node_socket.exists()


def _through_another_node(record: ClusterRecord) -> ClusterRecord:
    # Else a program that is started after the head has died would run on a private cluster, and `up` end this one.
    living = [node.node_socket for node in SessionPaths(Path(record.session_folder)).nodes()]
    living = [node_socket for node_socket in living if _is_living(node_socket)]
    return dataclasses.replace(record, node_socket=str(living[0])) if living else record


def detect_cpus(*, root: Path = Path("/")) -> int:
    """CPUs that this process may use: its affinity, less where a cgroup quota allows less time than that.

    A quota of 1.5 CPUs counts as 2, as in loky's `cpu_count`. `root` is for tests.
    """
    cpus = float(len(os.sched_getaffinity(0)))
    for folder in cgroup_folders(root, "cpu"):
        quota = _read_words(folder / "cpu.max") or [
            *_read_words(folder / "cpu.cfs_quota_us"),
            *_read_words(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:  # else "max", or -1: no bound
            cpus = min(cpus, int(quota[0]) / int(quota[1]))
    return max(1, math.ceil(cpus))


def detect_memory_bytes(*, root: Path = Path("/")) -> int:
    """Memory of this machine, or of the cgroup that bounds this process. `root` is for tests."""
    memory_bytes = _memory_total_bytes(root)
    for folder in cgroup_folders(root, "memory"):
        limit = _read_words(folder / "memory.max") or _read_words(folder / "memory.limit_in_bytes")
        if limit and limit[0].isdigit():
            memory_bytes = min(memory_bytes, int(limit[0]))
    return memory_bytes


def memory_settings(memory_limit: int | str | None = None) -> dict[str, Any]:
    """`memory_limit_bytes` and `memory_threshold` of a node: what was asked for, else CLUSTERPOOL_MEMORY_LIMIT (as
    8GiB) and CLUSTERPOOL_MEMORY_THRESHOLD (as 0.95).

    Raises: ValueError that names the variable.
    """
    limit = memory_limit or os.environ.get("CLUSTERPOOL_MEMORY_LIMIT") or None
    threshold = os.environ.get("CLUSTERPOOL_MEMORY_THRESHOLD") or MEMORY_THRESHOLD_DEFAULT
    try:
        limit_bytes = None if limit is None else parse_size(limit)
    except ValueError as exc:
        raise ValueError(f"CLUSTERPOOL_MEMORY_LIMIT: {exc}") from exc
    try:
        threshold = float(threshold)
        if not 0 < threshold <= 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"CLUSTERPOOL_MEMORY_THRESHOLD is a part of the memory, above 0 and at most 1: {threshold!r}"
        ) from None
    return {"memory_limit_bytes": limit_bytes, "memory_threshold": threshold}


def detect_gpus(*, root: Path = Path("/")) -> list[str]:
    """The GPUs, each by the name that CUDA_VISIBLE_DEVICES would call it. `root` is for tests."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names: list[str] = []
        for name in (part.strip() for part in visible.split(",")):
            if not name or name.startswith("-"):  # CUDA itself stops at the first name that is no device
                break
            names.append(name)
        return names
    try:
        count = len(list((root / "proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        count = 0
    if count == 0:
        count = sum(1 for _ in (root / "dev").glob("nvidia[0-9]*"))
    return [str(index) for index in range(count)]


def default_object_store_bytes(memory_bytes: int, *, folder: Path = SHARED_MEMORY_FOLDER) -> int:
    """30 % of `memory_bytes`, bounded by the free shared memory, in whole pages; 0 if there is no shared
    memory.
    """
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    free_bytes = status.f_bavail * status.f_frsize * SHARED_MEMORY_FREE_SHARE
    return int(min(memory_bytes * OBJECT_STORE_MEMORY_SHARE, free_bytes)) // 4096 * 4096


def _checked_fields(kind: Any, text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{kind.__name__} must be a JSON object: {text[:80]!r}")
    known = dataclasses.fields(kind)
    unknown = sorted(found.keys() - {each.name for each in known})
    missing = [
        each.name
        for each in known
        if each.name not in found
        and each.default is dataclasses.MISSING
        and each.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        raise ValueError(
            f"{kind.__name__} has unknown fields {unknown} and lacks {missing}; was it written by another version?"
        )
    return found


def _machine_wide_name(session_id: str, node_id: str) -> str:
    return f"clusterpool-{os.getuid()}-{session_id}-{node_id}"


def _is_short_enough(base: str) -> bool:
    return len(os.fsencode(base)) + len(_LONGEST_BELOW_BASE) <= SOCKET_PATH_BYTES_MAX


def _outlives_login(runtime_folder: str) -> bool:
    """systemd removes /run/user/<uid> at the user's last logout, under the feet of what nohup or tmux keep
    running.
    """
    if not runtime_folder.startswith("/run/user/"):
        return True
    user = os.environ.get("USER") or os.environ.get("LOGNAME")  # pwd would ask a directory server
    return bool(user) and Path("/var/lib/systemd/linger", str(user)).exists()


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's cgroup and all above it (each may set a limit), of version 2 and of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the path may be the host's, which is not to be seen here; then only the top is.
        below = top / path.lstrip("/")
        folders += [folder for folder in (below, *below.parents) if folder == top or top in folder.parents]
    return folders


def _memory_total_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo has no MemTotal")


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
