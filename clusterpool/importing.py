"""What import hooks have in common: the ordinary finders find a module, and something is done when it is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class WrappedLoader(Loader):
    """Loads a module as `loader` would, and leaves that one's traces on it. Override `load`."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self.load(module, self._loader)

    def load(self, module: ModuleType, loader: Loader) -> None:
        """Have `loader` execute the module, with whatever is to happen before and after."""
        loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def find_by_others(
    skipped: type[MetaPathFinder],
    wrapper: type[WrappedLoader],
    fullname: str,
    path: Sequence[str] | None,
    target: ModuleType | None,
) -> ModuleSpec | None:
    """What the finders that are not of the kind `skipped` find, to be loaded by a `wrapper`."""
    for finder in sys.meta_path:
        if isinstance(finder, skipped) or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec(fullname, path, target)
        if spec is not None:
            if spec.loader is not None:
                spec.loader = wrapper(spec.loader)
            return spec
    return None
