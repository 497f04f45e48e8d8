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
        for finder in sys.meta_path:
            if isinstance(finder, _RegisteringFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


class _RegisteringLoader(Loader):
    """Loads the module as `loader` would, and leaves that one's traces on it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        # Only now: if joblib failed to import, the program may try again.
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _RegisteringFinder)]
        # A joblib too old to have it leaves its user with joblib's own message about an unknown backend.
        if hasattr(module, "register_parallel_backend"):
            module.register_parallel_backend(NAME, backend_class())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
