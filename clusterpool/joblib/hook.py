"""Registers the backend in joblib without importing joblib, which takes longer than starting a pool.

If joblib is there already, at once; otherwise a finder waits in `sys.meta_path` for `joblib.parallel`, lets
the ordinary finders load it, registers, and is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from clusterpool.importing import WrappedLoader, find_by_others

NAME = "clusterpool"
_MODULE = "joblib.parallel"


def register() -> None:
    """Make `joblib.parallel_config(backend="clusterpool")` work; imports joblib."""
    from joblib.parallel import register_parallel_backend

    register_parallel_backend(NAME, backend_class())


def install() -> None:
    """Register now if joblib is imported, else as soon as it is. Any number of times."""
    if hasattr(sys.modules.get(_MODULE), "register_parallel_backend"):
        register()
    elif not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())


def backend_class() -> type[Any]:
    """What joblib is given under the name "clusterpool": the class, for programs that look it up and compare."""
    from clusterpool.joblib.backend import ClusterpoolBackend

    return ClusterpoolBackend


class _RegisteringFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        return find_by_others(_RegisteringFinder, _RegisteringLoader, fullname, path, target)


class _RegisteringLoader(WrappedLoader):
    def load(self, module: ModuleType, loader: Loader) -> None:
        loader.exec_module(module)
        # Only now: if joblib failed to import, the program may try again.
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _RegisteringFinder)]
        # A joblib too old to have it leaves its user with joblib's own message about an unknown backend.
        if hasattr(module, "register_parallel_backend"):
            module.register_parallel_backend(NAME, backend_class())
