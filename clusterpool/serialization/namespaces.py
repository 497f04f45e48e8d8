"""The dictionaries that functions shipped by value have as their globals: one a module for the whole job.

cloudpickle gives each function that it loads a dictionary of its own, so a global that an initializer sets
would be unknown to the tasks. Here all functions of the driver's `__main__` share the dictionary of the
worker's `__main__`, and the functions of any other module that cannot be imported share one that is private
to the job.

In a process that has its own program (a driver) the module is the real one, and arriving globals never
replace anything in it.
"""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Mapping
from typing import Any

from clusterpool.serialization.versions import VersionTable

MAIN = "__main__"


class Namespaces:
    """All the namespaces of this process, and what was shipped into them."""

    def __init__(self) -> None:
        self.versions = VersionTable()
        self.is_worker = False
        self._private: dict[str, dict[str, Any]] = {}
        self._name_by_id: dict[int, str] = {}

    def install_main_module(self) -> types.ModuleType:
        """Make an empty `__main__` for a job, in place of the worker's own program."""
        module = types.ModuleType(MAIN)
        module.__dict__["__builtins__"] = builtins
        sys.modules[MAIN] = module
        self.is_worker = True
        self.versions = VersionTable()
        self._private.clear()
        self._name_by_id.clear()
        return module

    def name_of(self, globals_: dict[str, Any]) -> str | None:
        """The name of the module that these globals belong to; None when they belong to none (`exec`)."""
        name = globals_.get("__name__")
        if not isinstance(name, str):
            return None
        module = sys.modules.get(name)
        if module is not None and getattr(module, "__dict__", None) is globals_:
            return name
        return self._name_by_id.get(id(globals_))

    def is_private(self, name: str) -> bool:
        """Whether functions of the module `name` live here in a dictionary of the job's own."""
        return name in self._private

    def get(self, name: str) -> dict[str, Any]:
        """The globals that functions of the module `name` have here."""
        if name == MAIN or not self.is_worker:
            module = sys.modules.get(name)
            if module is not None:
                return module.__dict__
        namespace = self._private.get(name)
        if namespace is None:
            namespace = self._private.setdefault(name, {"__name__": name, "__builtins__": builtins})
            self._name_by_id[id(namespace)] = name
        return namespace

    def merge(self, name: str, shipped: Mapping[str, tuple[str, Any]], base: Mapping[str, Any]) -> None:
        """Put arriving globals (token and value by name) where the policy of `versions` lets them.

        `base`: `__package__`, `__file__` and so on, which only fill what is empty.
        """
        namespace = self.get(name)
        for key, value in base.items():
            if namespace.get(key) is None:
                namespace[key] = value
        for key, (token, value) in shipped.items():
            if key not in namespace or (self.is_worker and self.versions.should_take(name, key, namespace[key], token)):
                namespace[key] = value
                self.versions.arrived(name, key, value, token)

    def located(self, thing: Any) -> tuple[str, str] | None:
        """Module and qualified name under which just this function or class is found; else None."""
        name, path = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
        if not isinstance(name, str) or not isinstance(path, str) or "<" in path:
            return None
        module = sys.modules.get(name)
        found: Any = vars(module) if isinstance(module, types.ModuleType) else None
        if name != MAIN and self.is_worker and name in self._private:
            found = self._private[name]
        if found is None:
            return None
        first, *rest = path.split(".")
        found = found.get(first)
        for part in rest:
            found = getattr(found, part, None)
        return (name, path) if found is thing else None


# Unpickling can pass no context to what it calls, so the namespaces, like `sys.modules`, are the process's.
namespaces = Namespaces()
