"""clusterpool: `multiprocessing`, `concurrent.futures` and `joblib` code on a cluster, unchanged.

Change an import line (`from clusterpool.multiprocessing import Pool`), or say `joblib.parallel_backend("clusterpool")`
after `import clusterpool`. Names are loaded when they are first used, so that the import itself costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clusterpool.joblib.hook import install as _install_joblib_hook
from clusterpool.version import __version__ as __version__

if TYPE_CHECKING:
    from clusterpool.client.actor_handle import ActorHandle
    from clusterpool.client.api import (
        available_resources,
        cancel,
        cluster_resources,
        get,
        get_actor,
        init,
        is_initialized,
        kill,
        node_id,
        nodes,
        put,
        remote,
        shutdown,
        wait,
    )
    from clusterpool.client.object_ref import ObjectRef
    from clusterpool.client.worker_group import WorkerGroup
    from clusterpool.futures import ProcessPoolExecutor as Executor
    from clusterpool.multiprocessing.pool import Pool

_API = (
    "available_resources", "cancel", "cluster_resources", "get", "get_actor", "init", "is_initialized", "kill",
    "node_id", "nodes", "put", "remote", "shutdown", "wait",
)  # fmt: skip
_HOMES = {
    **{name: ("clusterpool.client.api", name) for name in _API},
    "ActorHandle": ("clusterpool.client.actor_handle", "ActorHandle"),
    "ObjectRef": ("clusterpool.client.object_ref", "ObjectRef"),
    "WorkerGroup": ("clusterpool.client.worker_group", "WorkerGroup"),
    "Executor": ("clusterpool.futures", "ProcessPoolExecutor"),
    "Pool": ("clusterpool.multiprocessing.pool", "Pool"),
}
_MODULES = ("errors", "futures", "joblib", "multiprocessing")

__all__ = [
    "ActorHandle", "Executor", "ObjectRef", "Pool", "WorkerGroup", "available_resources", "cancel", "cluster_resources",
    "get", "get_actor", "init", "is_initialized", "kill", "node_id", "nodes", "put", "remote", "shutdown", "wait",
]  # fmt: skip

_install_joblib_hook()


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        module, attribute = _HOMES[name]
        value = getattr(importlib.import_module(module), attribute)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"clusterpool.{name}")
    raise AttributeError(f"module 'clusterpool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_MODULES])
