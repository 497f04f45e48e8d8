"""What is tested, and how it is put in the place of the standard names before a suite is imported."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import importlib
import json
import multiprocessing
import multiprocessing.context
import multiprocessing.pool
import sys
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

OURS = "clusterpool"
# Which name of each kind is the one that the others are measured against.
REFERENCES = {
    "module": "multiprocessing",
    "executor": "concurrent.futures.ProcessPoolExecutor",
    "backend": "loky",
}


@dataclass(frozen=True)
class Subject:
    """`kind` is "module", "executor" or "backend", `name` what stands in for the reference of that kind."""

    kind: str
    name: str

    def __post_init__(self) -> None:
        if self.kind not in REFERENCES:
            raise ValueError(f"kind must be one of {', '.join(REFERENCES)}: {self.kind!r}")

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Subject:
        return cls(**json.loads(text))

    @property
    def is_reference(self) -> bool:
        return self.name == REFERENCES[self.kind]

    @property
    def is_ours(self) -> bool:
        return self.name.partition(".")[0] == OURS

    def put_in_place(self) -> None:
        """Once in a process, before the suite is imported. A backend is put in place by `joblib_plugin` instead."""
        if self.is_reference or self.kind == "backend":
            return
        if self.is_ours:
            from clusterpool.cli.patch import patch_standard_library

            patch_standard_library()
        elif self.kind == "module":
            _put_module_in_place(importlib.import_module(self.name))
        else:
            _put_executor_in_place(_executor_named(self.name))


def _put_module_in_place(module: ModuleType) -> None:
    """A full copy of the standard module takes its place with all submodules; one that has some names lends those."""
    if hasattr(module, "Process"):
        for name, part in list(sys.modules.items()):
            if name == module.__name__ or name.startswith(f"{module.__name__}."):
                sys.modules["multiprocessing" + name.removeprefix(module.__name__)] = part
        return
    standard: Any = multiprocessing
    for name in standard.__all__:
        if hasattr(module, name):
            setattr(standard, name, getattr(module, name))
    if pool := getattr(module, "Pool", None):
        standard.pool.Pool = pool
        standard.context.BaseContext.Pool = lambda self, *args, **options: pool(*args, **options)


def _put_executor_in_place(executor_class: Any) -> None:
    futures: Any = concurrent.futures
    futures.ProcessPoolExecutor = futures.process.ProcessPoolExecutor = executor_class


def _executor_named(name: str) -> Any:
    """`package.module.Class`, with the constructor of the standard executor. Also "dask": its client's executor."""
    if name == "dask":
        return _dask_executor()
    module_name, _, class_name = name.rpartition(".")
    executor_class = getattr(importlib.import_module(module_name), class_name)
    return _loky_executor(executor_class) if "loky" in module_name else executor_class


def _loky_executor(executor_class: Any) -> Any:
    """loky calls the context differently, and has none named spawn."""

    class ProcessPoolExecutor(executor_class):  # type: ignore[misc]
        def __init__(self, max_workers: int | None = None, mp_context: Any = None, **options: Any) -> None:
            options.pop("max_tasks_per_child", None)
            super().__init__(max_workers, **options)

    return ProcessPoolExecutor


def _dask_executor() -> Any:
    from distributed import Client, LocalCluster

    def make_executor(max_workers: int | None = None, mp_context: Any = None, **options: Any) -> Any:
        """The tests read the class's name, and call it."""
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        cluster = LocalCluster(n_workers=max_workers, threads_per_worker=1, dashboard_address=None)
        return Client(cluster).get_executor()

    make_executor.__name__ = "ProcessPoolExecutor"
    return make_executor
