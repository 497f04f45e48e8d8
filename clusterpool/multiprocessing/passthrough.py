"""Makes `clusterpool.multiprocessing.util` and its like the standard library's modules themselves.

They hold state that must be one in a process (the children, the finalizers, the logger), so a copy would not do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__: list[str] = []

STANDARD = frozenset(
    {
        "dummy", "dummy.connection", "forkserver", "popen_fork", "popen_forkserver", "popen_spawn_posix",
        "popen_spawn_win32", "process", "reduction", "resource_sharer", "resource_tracker", "spawn", "util",
    }
)  # fmt: skip
_PREFIX = __name__.rpartition(".")[0] + "."


def install() -> None:
    """Have imports find the standard modules; any number of times."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # First: the folder of the standard package `dummy` would yield a copy of its submodule.
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(_PREFIX) and fullname.removeprefix(_PREFIX) in STANDARD:
            return ModuleSpec(fullname, _Loader())
        return None


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # What an import returns is what `sys.modules` has when the module has been executed.
        sys.modules[module.__name__] = importlib.import_module("multiprocessing." + module.__name__[len(_PREFIX) :])
