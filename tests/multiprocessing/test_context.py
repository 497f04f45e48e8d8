"""The module's surface: every name and submodule of the standard one, its contexts, and what an import costs."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.context
import multiprocessing.process
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

import clusterpool.multiprocessing as mp

METHODS = ("fork", "spawn", "forkserver")
OURS = {
    "connection", "context", "heap", "managers", "pool", "queues", "shared_memory", "sharedctypes", "synchronize",
}  # fmt: skip
INTERNAL = {"annotations", "imap", "passthrough", "popen_cluster", "results", "workers"}
STANDARD_SUBMODULES = sorted(
    module.name for module in pkgutil.iter_modules(multiprocessing.__path__) if module.name != "popen_spawn_win32"
)


@pytest.fixture(autouse=True)
def start_method_of_before() -> Iterator[None]:
    method = mp.get_start_method(allow_none=True)
    yield
    mp.set_start_method(method, force=True)


def test_every_name_is_there() -> None:
    assert set(mp.__all__) == set(multiprocessing.__all__)
    assert [name for name in mp.__all__ if not hasattr(mp, name)] == []
    public = {name for name in vars(mp) if not name.startswith("_")}
    assert public <= set(dir(multiprocessing)) | OURS | INTERNAL
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mp.nothing


@pytest.mark.parametrize("name", STANDARD_SUBMODULES)
def test_every_submodule_is_there(name: str) -> None:
    ours = importlib.import_module(f"clusterpool.multiprocessing.{name}")
    standard = importlib.import_module(f"multiprocessing.{name}")
    assert getattr(mp, name) is ours
    assert (ours is standard) == (name not in OURS)
    assert standard.__spec__ is not None and standard.__spec__.name == f"multiprocessing.{name}"
    missing = [public for public in standard.__all__ if not hasattr(ours, public)]
    assert missing == []


def test_a_submodule_of_a_standard_package_is_no_copy() -> None:
    import multiprocessing.dummy.connection as standard

    import clusterpool.multiprocessing.dummy.connection as ours

    assert ours is standard


def test_nothing_of_the_engine_is_imported_with_the_module() -> None:
    program = (
        "import sys, clusterpool.multiprocessing as mp; mp.get_context('spawn'); mp.current_process(); mp.Process();"
        "print([name for name in sys.modules if name.startswith(('clusterpool.client', 'clusterpool.core', 'zmq',"
        "'redis', 'msgspec', 'cloudpickle', 'multiprocessing.managers', 'multiprocessing.pool'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("method", METHODS)
def test_contexts_are_named_as_the_standard_ones(method: str) -> None:
    context = mp.get_context(method)
    assert context.get_start_method() == method
    assert context.get_context() is context and mp.get_context(method) is context
    assert type(context).__name__.lower().startswith(method)
    assert context.Process.__name__.lower().startswith(method)
    assert isinstance(context, multiprocessing.context.BaseContext)
    assert isinstance(context.Process(), multiprocessing.process.BaseProcess)
    assert isinstance(context.Process(), type(multiprocessing.get_context(method)).Process)
    with pytest.raises(ValueError, match="concrete context"):
        context.set_start_method("spawn")


def test_the_default_is_the_standard_library_s() -> None:
    mp.set_start_method(None, force=True)
    assert mp.get_start_method(allow_none=True) is None
    assert mp.get_start_method() == multiprocessing.context._default_context._default_context._name  # type: ignore[attr-defined]
    assert mp.get_all_start_methods() == multiprocessing.get_all_start_methods()
    assert isinstance(mp.Process(), multiprocessing.Process)


def test_the_start_method_can_be_set_once() -> None:
    mp.set_start_method(None, force=True)
    mp.set_start_method("forkserver")
    assert mp.get_context() is mp.get_context("forkserver")
    with pytest.raises(RuntimeError, match="already been set"):
        mp.set_start_method("spawn")
    mp.set_start_method("spawn", force=True)
    assert mp.get_start_method() == "spawn"


def test_setting_ours_does_not_set_the_standard_one() -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    mp.set_start_method("forkserver", force=True)
    assert multiprocessing.get_start_method(allow_none=True) == before


@pytest.mark.parametrize("method", ["teleport", ""])
def test_an_unknown_start_method_is_an_error(method: str) -> None:
    with pytest.raises(ValueError, match="cannot find context for"):
        mp.get_context(method)
    with pytest.raises(ValueError, match="cannot find context for"):
        mp.set_start_method(method, force=True)


def test_exceptions_are_the_standard_ones() -> None:
    for name in ("ProcessError", "BufferTooShort", "TimeoutError", "AuthenticationError"):
        assert getattr(mp, name) is getattr(multiprocessing, name)


def test_a_context_and_its_methods_can_be_pickled() -> None:
    context = pickle.loads(pickle.dumps(mp.get_context("spawn")))
    assert type(context) is type(mp.get_context("spawn"))
    assert pickle.loads(pickle.dumps(mp.Process)) is mp.Process
