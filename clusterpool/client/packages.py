"""A job's runtime environment: `init(runtime_env=...)` checked, packed, and brought into the control store.

    folder --prepare--> zip, named by its SHA-256 --upload--> the driver's node --> control store --> nodes

Only digests travel with the job (`JobPart.runtime_env`); each node fetches and unpacks a package once, before
it forks the first worker that needs it. The zip of the same files is the same bytes, whatever the order of
the folder and the times of its files, so that what is there already is not sent again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clusterpool.config import WORKING_DIR_VARIABLE
from clusterpool.core.package_messages import PACKAGE_BYTES_MAX, OfferPackage, PackageAnswer, SendPackage
from clusterpool.errors import WorkerSetupFailed

if TYPE_CHECKING:
    from clusterpool.client.client import Client

JOB_KEYS = ("env_vars", "py_modules", "working_dir")
TASK_KEYS = ("env_vars",)
# Histories, and byte code that each node makes anew.
EXCLUDED = frozenset({".git", ".hg", ".svn", "__pycache__"})
CHUNK_BYTES = 1024 * 1024
# The node may have to start its control store first, and retries for some time when that is away.
_ANSWER_TIMEOUT_S = 60.0
_SAMPLE_BYTES = 64 * 1024
# The first moment that a zip file can express.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


class Package(NamedTuple):
    """A folder or module as a zip file; `source`: where it came from."""

    digest: str
    content: bytes
    source: Path


class Prepared(NamedTuple):
    """A runtime environment: `text` goes into the job, the packages to the control store."""

    text: str
    packages: list[Package]


NOTHING = Prepared("", [])


def prepare(runtime_env: Mapping[str, Any] | None, *, bytes_max: int = PACKAGE_BYTES_MAX) -> Prepared:
    """Check a job's runtime environment, and pack its folders. Without a working_dir in it, that of
    CLUSTERPOOL_WORKING_DIR counts, which `clusterpool run --working-dir` sets.

    Raises: ValueError for unknown keys, for folders that are missing or larger than `bytes_max`; TypeError.
    """
    asked = os.environ.get(WORKING_DIR_VARIABLE)
    if asked and "working_dir" not in (runtime_env or {}):
        runtime_env = {**(runtime_env or {}), "working_dir": asked}
    if not runtime_env:
        return NOTHING
    check_keys(runtime_env, JOB_KEYS)
    variables = checked_variables(runtime_env)
    packages: list[Package] = []
    working_dir = None
    if runtime_env.get("working_dir") is not None:
        folder = _checked_path("working_dir", runtime_env["working_dir"])
        if not folder.is_dir():
            raise ValueError(f"runtime_env: working_dir must be a folder that exists: {folder}")
        working_dir = pack(folder, "", bytes_max=bytes_max)
        packages.append(working_dir)
    modules = [_pack_module(entry, bytes_max) for entry in _checked_modules(runtime_env)]
    packages += modules
    if not packages and not variables:
        return NOTHING
    return Prepared(_to_json(working_dir, modules, variables), packages)


def _to_json(working_dir: Package | None, modules: list[Package], variables: dict[str, str]) -> str:
    import msgspec

    from clusterpool.core.environments import Environment

    digest = working_dir.digest if working_dir is not None else None
    environment = Environment(digest, [package.digest for package in modules], variables)
    return msgspec.json.encode(environment).decode()


def check_keys(runtime_env: Any, known: tuple[str, ...]) -> None:
    """Raises: TypeError unless it is a mapping; ValueError for keys other than `known`."""
    if not isinstance(runtime_env, Mapping):
        raise TypeError(f"runtime_env must be a dict, not {type(runtime_env).__name__}: {runtime_env!r}")
    unknown = [key for key in runtime_env if key not in known]
    if not unknown:
        return
    text = f"runtime_env has unknown keys: {', '.join(map(repr, unknown))}; there are: {', '.join(known)}"
    if known is TASK_KEYS and set(unknown) <= set(JOB_KEYS):
        text += "; working_dir and py_modules are for the whole job: clusterpool.init(runtime_env=...)"
    raise ValueError(text)


def checked_variables(runtime_env: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables.

    Raises: TypeError for what is no text, ValueError for what no variable can be called.
    """
    variables = runtime_env.get("env_vars") or {}
    if not isinstance(variables, Mapping):
        raise TypeError(f"runtime_env: env_vars must be a dict of strings, not {variables!r}")
    for name, value in variables.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"runtime_env: env_vars must map strings to strings: {name!r}: {value!r}")
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"runtime_env: no environment variable can be {name!r}: {value!r}")
    return dict(variables)


def upload(client: Client, packages: list[Package]) -> None:
    """Bring packages into the control store, by way of this process's node.

    Raises: WorkerSetupFailed when that cannot be done; NotConnected when the node goes away meanwhile.
    """
    for package in {package.digest: package for package in packages}.values():
        size_bytes = len(package.content)
        is_there = _ask(client, package, lambda r, p=package: OfferPackage(r, p.digest, len(p.content)))  # type: ignore[misc]
        offset = 0
        while not is_there and offset < size_bytes:
            chunk = package.content[offset : offset + CHUNK_BYTES]
            is_there = _ask(client, package, _piece(package.digest, offset, chunk))
            offset += len(chunk)


def _piece(digest: str, offset: int, chunk: bytes) -> Callable[[int], SendPackage]:
    return lambda request: SendPackage(request, digest, offset, chunk)


def _ask(client: Client, package: Package, make: Callable[[int], Any]) -> bool:
    try:
        answer = client.request(make, timeout_s=_ANSWER_TIMEOUT_S)
    except TimeoutError as exc:
        raise WorkerSetupFailed(f"{package.source} could not be sent to the cluster: {exc}") from exc
    assert isinstance(answer, PackageAnswer)
    if answer.error:
        raise WorkerSetupFailed(
            f"{package.source} ({len(package.content) / 1e6:.1f} MB) could not be put into the control "
            f"store: {answer.error}"
        )
    return answer.is_there


# --- packing ----------------------------------------------------------------------------------------------


def _checked_path(key: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"runtime_env: {key} takes paths, not {type(value).__name__}: {value!r}")
    return Path(value).expanduser().absolute()


def _checked_modules(runtime_env: Mapping[str, Any]) -> list[Any]:
    modules = runtime_env.get("py_modules") or []
    if isinstance(modules, (str, os.PathLike)) or not hasattr(modules, "__iter__"):
        raise TypeError(f"runtime_env: py_modules must be a list of paths, not {modules!r}")
    return list(modules)


def _pack_module(entry: Any, bytes_max: int) -> Package:
    path = _checked_path("py_modules", entry)
    if not path.is_dir() and not (path.is_file() and path.suffix == ".py"):
        raise ValueError(f"runtime_env: each of py_modules must be a package's folder or a .py file: {path}")
    if not path.stem.isidentifier() or (path.is_dir() and path.suffix):
        raise ValueError(f"runtime_env: py_modules: nothing can be imported under this name: {path}")
    return pack(path, path.name, bytes_max=bytes_max)


def pack(source: Path, name: str, *, bytes_max: int = PACKAGE_BYTES_MAX) -> Package:
    """Pack a file under this name, or a folder's content below it (at the top for an empty name).

    Raises: ValueError when the files have more than `bytes_max` bytes; OSError when one cannot be read.
    """
    import hashlib
    import io
    import zipfile

    entries = sorted(_entries(source, name, ()))
    sizes = {path: path.stat().st_size for entry, path in entries if not entry.endswith("/")}
    if sum(sizes.values()) > bytes_max:
        largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:3]
        raise ValueError(
            f"runtime_env: {source} has {sum(sizes.values()) / 1e6:.0f} MB in {len(sizes)} files, at most "
            f"{bytes_max / 1e6:.0f} MB can be sent; the largest are "
            + ", ".join(f"{path.relative_to(source.parent)} ({sizes[path] / 1e6:.1f} MB)" for path in largest)
            + "; name a smaller folder, and put data where each node can read it, or into arguments"
        )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for entry, path in entries:
            info = zipfile.ZipInfo(entry, _ZIP_TIME)
            info.create_system = 3  # modes are as on UNIX, wherever this runs
            info.compress_type = zipfile.ZIP_DEFLATED
            if entry.endswith("/"):
                info.external_attr = (stat.S_IFDIR | 0o700) << 16
                archive.writestr(info, b"")
            else:
                is_program = bool(path.stat().st_mode & 0o100)
                info.external_attr = (stat.S_IFREG | (0o700 if is_program else 0o600)) << 16
                content = path.read_bytes()
                if not _shrinks(content):
                    info.compress_type = zipfile.ZIP_STORED
                archive.writestr(info, content)
    packed = file.getvalue()
    return Package(hashlib.sha256(packed).hexdigest(), packed, source)


def _shrinks(content: bytes) -> bool:
    """Whether to compress a file, by its beginning: images, archives and weights would cost a second for each 30 MB,
    at every start of the program, and come out as they went in.
    """
    import zlib

    if len(content) <= _SAMPLE_BYTES:
        return True
    return len(zlib.compress(content[:_SAMPLE_BYTES], 1)) < 0.9 * _SAMPLE_BYTES


def _entries(path: Path, name: str, above: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """Names in the zip file, those of folders with a slash at their end, and where each is.

    Links are followed, except to a folder that we are in. Sockets, pipes and devices are left out.
    """
    if path.is_file():
        yield name, path
        return
    if not path.is_dir() or (real := path.resolve()) in above:
        return
    if name:
        yield f"{name}/", path
    for child in path.iterdir():
        if child.name not in EXCLUDED:
            yield from _entries(child, f"{name}/{child.name}" if name else child.name, (*above, real))
