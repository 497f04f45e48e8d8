"""Put the cluster's modules in the place of the standard library's: in this process, and in the workers of its job.

    sys.modules["multiprocessing.queues"]  ->  clusterpool.multiprocessing.queues, and so on
    sys.modules["multiprocessing"]         ->  a module with the names of clusterpool.multiprocessing

No class of the standard library is changed. Its modules are loaded first and go on using one another, because they and
others build on them: our own modules, `concurrent.futures.process`, joblib's loky. Whatever imports the standard names
from now on gets ours; what ours do not have (private names too, by which some things are pickled) is the standard's.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import importlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import clusterpool.multiprocessing
from clusterpool.config import PATCHING_SETUP, WORKER_SETUP_VARIABLE
from clusterpool.importing import WrappedLoader, find_by_others

_REPLACED = (
    "context", "connection", "heap", "managers", "pool", "queues", "shared_memory", "sharedctypes", "synchronize",
)  # fmt: skip
# The others, so that every name is in `sys.modules`, and none is looked for in our folder.
_KEPT = ("dummy.connection", "forkserver", "popen_fork", "popen_forkserver", "popen_spawn_posix", "spawn")
_ours = {name: importlib.import_module(f"clusterpool.multiprocessing.{name}") for name in _REPLACED}
_standard = {
    f"multiprocessing.{name}": importlib.import_module(f"multiprocessing.{name}") for name in (*_REPLACED, *_KEPT)
}
_standard["multiprocessing"] = multiprocessing

_FACTORIES = (
    "Manager", "Pipe", "Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "Event", "Barrier", "Queue",
    "JoinableQueue", "SimpleQueue", "Pool", "RawValue", "RawArray", "Value", "Array",
)  # fmt: skip

# These subclass the standard library's own classes, private parts included.
_BUILD_ON_STANDARD = ("joblib", "loky")


def patch_standard_library() -> None:
    """Once, before the program is loaded. What was imported from the modules before keeps what it has."""
    if sys.modules["multiprocessing"] is not multiprocessing:
        return
    os.environ[WORKER_SETUP_VARIABLE] = PATCHING_SETUP  # the job takes the environment along
    for name, ours in _ours.items():
        _fill(ours, _standard[f"multiprocessing.{name}"])
        sys.modules[f"multiprocessing.{name}"] = ours
    sys.modules["multiprocessing"] = _make_package()
    _keep_contexts_standard()

    from clusterpool.futures import ProcessPoolExecutor

    futures: Any = concurrent.futures
    futures.ProcessPoolExecutor = ProcessPoolExecutor
    futures.process.ProcessPoolExecutor = ProcessPoolExecutor
    if "joblib.parallel" in sys.modules:
        _use_joblib_backend()
    sys.meta_path.insert(0, _OnStandardFinder())


def _fill(ours: ModuleType, standard: ModuleType) -> None:
    for name, value in vars(standard).items():
        if name == "__all__" or not name.startswith("__"):
            vars(ours).setdefault(name, value)


def _make_package() -> ModuleType:
    """A package of the standard name and folder, with our names: pickles that name it load in any process."""
    package = ModuleType("multiprocessing")
    vars(package).update(vars(multiprocessing))
    names = vars(clusterpool.multiprocessing)
    vars(package).update({name: names[name] for name in multiprocessing.__all__ if name != "Pool"})
    vars(package).update(_ours, Pool=clusterpool.multiprocessing.Pool)
    return package


# --- what builds on the standard modules ----------------------------------------------------------------------------


def _keep_contexts_standard() -> None:
    """A `ThreadPool`, say, makes its queue by a standard context, whose methods import modules by their names."""
    state: dict[str, Any] = vars(_standard["multiprocessing.context"])
    for context in (state["_default_context"], *state["_concrete_contexts"].values()):
        for name in _FACTORIES:
            setattr(context, name, _on_standard(getattr(context, name)))


def _on_standard(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with _standard_modules():
            return method(*args, **options)

    return call


def _use_joblib_backend() -> None:
    from joblib.parallel import register_parallel_backend

    from clusterpool.joblib.hook import NAME, backend_class

    register_parallel_backend(NAME, backend_class(), make_default=True)


_swap_lock = threading.RLock()
_swaps: list[dict[str, ModuleType]] = []


@contextmanager
def _standard_modules() -> Iterator[None]:
    """Imports in this block find the standard modules. (Those of other threads as well, for that time.)"""
    with _swap_lock:
        _swaps.append({name: sys.modules[name] for name in _standard})
        sys.modules.update(_standard)
        try:
            yield
        finally:
            sys.modules.update(_swaps.pop())


class _OnStandardFinder(MetaPathFinder):
    """Has the libraries of `_BUILD_ON_STANDARD` loaded on the standard modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _BUILD_ON_STANDARD:  # what these import comes along
            return None
        return find_by_others(_OnStandardFinder, _OnStandardLoader, fullname, path, target)


class _OnStandardLoader(WrappedLoader):
    def load(self, module: ModuleType, loader: Loader) -> None:
        with _standard_modules():
            loader.exec_module(module)
        if module.__name__ == "joblib":
            _use_joblib_backend()
