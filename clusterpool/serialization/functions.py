"""Functions and classes that no import can find, sent by value into one namespace where they arrive.

    driver                                    worker
    def f(): return helper(x)                 __main__.__dict__  <- f.__globals__ is this dictionary
      reduced by cloudpickle to               x, helper, f       <- merged into it (namespaces, versions)
      (make, (code, base, ...), (state, {"__globals__": {...}}), None, None, set_state)
      and changed here to
      (make_function, (code, "__main__", closure), (set_state, state, ...), None, None, set_function_state)

cloudpickle does the hard part. Only the form of its reduction is assumed, and checked each time: where
another version of it gives another form, functions go as it would send them, with a dictionary each.
"""

from __future__ import annotations

import copyreg
import functools
import io
import pickle
import platform
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle

from clusterpool import errors
from clusterpool.serialization import left_behind, references
from clusterpool.serialization.ctypes_classes import reduce_ctypes_class, settable_attributes, without_layout
from clusterpool.serialization.definitions import Definition, definitions, load_definition, place_by_value
from clusterpool.serialization.namespaces import namespaces
from clusterpool.serialization.versions import (
    Dependency,
    cell_dependency,
    global_dependency,
    new_token,
)

PROTOCOL = 5

Reduction = tuple[Any, ...]
Export = tuple[str, str, str]  # module, name there, token
Replaced = dict[int, tuple[Any, Any]]  # by id: a value that cannot be pickled, and what goes in its place

_LruCacheWrapper: type = type(functools.lru_cache(lambda: None))
_SINGLE_DISPATCH: types.CodeType = vars(functools)["singledispatch"](lambda _: None).__code__
# Functions and classes of these packages stay what they are, so one look is enough: numpy's `_frombuffer` is
# in every array's pickle, and cloudpickle takes 3 us each time to find that it can be imported.
_STABLE_PACKAGES = frozenset({"numpy", "pandas", "pyarrow", "scipy", "clusterpool"}) | sys.stdlib_module_names
_STABLE_MAX = 4096
DESCRIPTOR_MODULES = frozenset({"socket", "multiprocessing.connection"})  # of kinds that hold a descriptor
_SEMAPHORES = "clusterpool.client.semaphore"  # which makes functions that stand for methods
_ALWAYS_PICKLABLE = frozenset({int, float, complex, str, bytes, bool, type(None), types.ModuleType})
_stable_by_id: dict[int, Any] = {}


class CodePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles one definition: everything of `__main__` that it uses goes into the same pickle, by value."""

    # The C pickler's own field: cloudpickle's class attribute of that name hides it, and what is assigned to an
    # instance would not reach the pickler.
    dispatch_table = pickle.Pickler.__dict__["dispatch_table"]

    def __init__(
        self,
        file: io.BytesIO,
        buffer_callback: Callable[[pickle.PickleBuffer], object] | None = None,
        *,
        dependencies: list[Dependency] | None = None,
        replaced: Replaced | None = None,
        has_fresh_locks: bool = False,
    ) -> None:
        super().__init__(file, protocol=PROTOCOL, buffer_callback=buffer_callback)
        self.met: list[tuple[str, Any]] = []  # globals, attributes, closed-over variables: what and value
        self._replaced = replaced or {}
        self._has_fresh_locks = has_fresh_locks
        # A plain dictionary: the C pickler takes a microsecond and more for each object with cloudpickle's
        # ChainMap.
        self.dispatch_table = _dispatch_table()
        self._dependencies = dependencies

    def reducer_override(self, thing: Any) -> Any:
        """Called by the C pickler for everything but plain containers, numbers and strings."""
        if id(thing) in _stable_by_id:
            return NotImplemented
        kind = type(thing)
        if kind is types.FunctionType:
            return self._reduce_function(thing)
        if kind is _LruCacheWrapper:
            return self._reduce_cached_function(thing)
        if isinstance(thing, type):
            return self._reduce_class(thing)
        if self._has_fresh_locks:
            reduction = left_behind.reduce_lock(thing)
            if reduction is not None:
                return reduction
        if kind is types.CellType and self._replaced:
            return self._reduce_cell(thing)
        return NotImplemented

    def _instead(self, value: Any) -> Any:
        entry = self._replaced.get(id(value))
        return value if entry is None else entry[1]

    def _reduce_cell(self, cell: types.CellType) -> Any:
        try:
            instead = self._instead(cell.cell_contents)
        except ValueError:  # not assigned yet
            return NotImplemented
        return NotImplemented if instead is cell.cell_contents else (types.CellType, (instead,))

    def _reduce_function(self, function: types.FunctionType) -> Any:
        method = getattr(function, "pickled_as", None) if function.__module__ == _SEMAPHORES else None
        if method is not None:
            return getattr, (method.__self__, method.__name__)
        reduction = super().reducer_override(function)
        if reduction is NotImplemented:
            _remember_stable(function)
            return NotImplemented
        if function.__code__ is _SINGLE_DISPATCH:
            return self._reduce_single_dispatch(function)
        if not is_function_reduction(reduction):
            return reduction
        _, (code, base, _, _, closure), (state, slots), _, _, setter = reduction
        if self._dependencies is not None:
            self._dependencies.extend(_dependencies_of(function, slots["__globals__"]))
        self._meet_variables(function, slots["__globals__"])
        namespace = namespaces.name_of(function.__globals__)
        ship, instead = namespaces.versions.token_to_ship, self._instead
        if namespace is None:
            slots["__globals__"] = {key: instead(value) for key, value in slots["__globals__"].items()}
            return reduction
        shipped = {key: (ship(namespace, key, value), instead(value)) for key, value in slots["__globals__"].items()}
        slots["__globals__"] = {}
        filled = (setter, state, slots, namespace, base, shipped, _export(function))
        return make_function, (code, namespace, closure), filled, None, None, set_function_state

    def _meet_variables(self, function: types.FunctionType, shipped: dict[str, Any]) -> None:
        module = function.__module__
        self.met += [(f"the global {name!r} of {module}", value) for name, value in shipped.items()]
        if function.__closure__ and place_by_value(function) is not None:
            # Of a local function these are arguments as much as globals: there the caller is told at once.
            for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
                try:
                    self.met.append((f"the variable {name!r} of {function.__qualname__}", cell.cell_contents))
                except ValueError:
                    pass  # not assigned yet

    def _reduce_class(self, cls: type) -> Any:
        reduction = super().reducer_override(cls)
        if reduction is NotImplemented:
            _remember_stable(cls)
            return NotImplemented
        of_ctypes = reduce_ctypes_class(cls)
        if of_ctypes is not NotImplemented:
            return of_ctypes
        if not is_class_reduction(reduction):  # type(None) and its like too
            return reduction
        make, arguments, state, _, _, setter = reduction
        if "__slots__" in vars(cls) and isinstance(arguments[3], dict) and not issubclass(cls, tuple):
            # cloudpickle leaves them out, and then instances pickle in a form that the real class rejects.
            # (A tuple's are always empty, and `typing.NamedTuple` makes them itself.)
            arguments[3].setdefault("__slots__", vars(cls)["__slots__"])
        attributes = settable_attributes(cls, state[0])
        state = (attributes, *state[1:])
        self.met += [(f"the attribute {name!r} of {cls.__qualname__}", value) for name, value in attributes.items()]
        if self._replaced:
            state = ({name: self._instead(value) for name, value in attributes.items()}, *state[1:])
        token = namespaces.versions.class_to_ship(cls)
        if self._dependencies is not None:
            self._dependencies.append(Dependency(lambda: namespaces.versions.class_to_ship(cls), token))
        return make, arguments, (setter, state, token, _export(cls)), None, None, set_class_state

    def _reduce_single_dispatch(self, wrapper: Any) -> Any:
        # Its closure has weak references, to classes that it was called with.
        kinds = tuple(wrapper.registry.items())
        if self._dependencies is not None:
            self._dependencies.append(Dependency(lambda: tuple(wrapper.registry.items()) == kinds, True))
        return make_single_dispatch, (wrapper.__wrapped__, kinds, _export(wrapper))

    def _reduce_cached_function(self, wrapper: Any) -> Any:
        # functools' own way is by name only, which finds nothing where the module is sent by value.
        if namespaces.located(wrapper) is not None and place_by_value(wrapper) is None:
            return NotImplemented
        parameters = wrapper.cache_parameters()
        return make_cached_function, (
            wrapper.__wrapped__,
            parameters["maxsize"],
            parameters["typed"],
            _export(wrapper),
        )


class ShippingPickler(CodePickler):
    """Pickles values: module-level functions and classes that go by value do so as definitions, made once."""

    def reducer_override(self, thing: Any) -> Any:
        if id(thing) in _stable_by_id:
            return NotImplemented
        kind = type(thing)
        if kind is types.MethodType:
            return _reduce_method(thing)
        if kind is types.FunctionType or kind is _LruCacheWrapper or isinstance(thing, type):
            place = place_by_value(thing)
            if place is not None:
                path, _, name = place[1].rpartition(".")
                if path:
                    return getattr, (_resolve(place[0], path), name)
                return self._reduce_to_definition(thing, place)
        return super().reducer_override(thing)

    def _reduce_to_definition(self, thing: Any, place: tuple[str, str]) -> Reduction:
        definition = definitions.find(thing, place)
        kept = definition.kept() if definition is not None and definition.is_current() else None
        # What is kept for others may have gone when this pickle is loaded, if nobody keeps it for this one.
        if definition is None or kept is None or (kept and not references.is_keeping()):
            definition, kept = _define(thing, place, definition)
        for reference in definition.references:
            references.capture(reference)
        references.keep(kept)
        if self._dependencies is not None and definition.dependencies is not None:
            self._dependencies.extend(definition.dependencies)
        return load_definition, (definition.token, definition.pickle)


class ShippedFunction:
    """A function as bytes to send, which knows when it must be made anew."""

    __slots__ = ("_dependencies", "kept", "payload", "references")

    def __init__(self, payload: bytes, references: list[Any], dependencies: list[Dependency], kept: list[Any]) -> None:
        self.payload = payload
        self.references = references  # object references among its globals, defaults and closure
        self.kept = kept  # what must live for as long as the payload may be loaded
        self._dependencies = dependencies

    def is_current(self) -> bool:
        """Whether making it again would give the same: some 100 ns for each global that the function uses."""
        for dependency in self._dependencies:  # noqa: SIM110 (asked for each task, and `all` takes twice as long)
            if not dependency.is_current():
                return False
        return True


def ship_function(function: Callable[..., Any]) -> ShippedFunction:
    """Pickle a callable for sending.

    Raises: what pickle raises (PicklingError, TypeError, AttributeError) for a callable that holds something
    unpicklable.
    """
    return ShippedFunction(*_dump_code(function, ShippingPickler, is_kept=True))


def dumps_function(function: Callable[..., Any]) -> bytes:
    """The bytes of `ship_function`, for a caller that needs no more."""
    return ship_function(function).payload


def loads_function(payload: bytes | memoryview, *, node_id: str = "") -> Any:
    """The callable in a payload of `dumps_function`.

    Raises: errors.VersionMismatch when a module or a name that it needs is missing here.
    """
    try:
        return pickle.loads(payload)
    except (ImportError, AttributeError) as exc:
        raise explain_load_failure(exc, node_id) from exc


def install_main_module() -> types.ModuleType:
    """Give a worker an empty `__main__` for its job; call it once, before anything of the job is loaded."""
    return namespaces.install_main_module()


def make_function(code: types.CodeType, namespace: str, closure: Any) -> types.FunctionType:
    """A function on the globals that its module has here; named in pickles."""
    return types.FunctionType(code, namespaces.get(namespace), None, None, closure)


def set_function_state(function: types.FunctionType, filled: Reduction) -> None:
    """Merge the globals that came with a function, then fill it; named in pickles."""
    setter, state, slots, namespace, base, shipped, export = filled
    namespaces.merge(namespace, shipped, base)
    # cloudpickle's setter puts its own builtins into the globals, which may be those of the user's real
    # `__main__`.
    own_builtins = function.__globals__.get("__builtins__")
    setter(function, (state, slots))
    if own_builtins is not None:
        function.__globals__["__builtins__"] = own_builtins
    _apply_export(function, export)


def set_class_state(cls: type, filled: Reduction) -> None:
    """Fill a class that arrives, unless it is our own or this version is here; named in pickles."""
    setter, state, token, export = filled
    versions = namespaces.versions
    known = versions.class_token(cls)
    is_own = known is not None or namespaces.located(cls) is not None
    if known == token or (is_own and not namespaces.is_worker):
        return
    changed: set[str] = set()
    if known is not None:
        changed = versions.changed_attributes(cls)
        attributes = {name: value for name, value in state[0].items() if name not in changed}
        state = (without_layout(cls, attributes), *state[1:])
    setter(cls, state)
    versions.class_arrived(cls, token, changed)
    _apply_export(cls, export)


def make_cached_function(
    function: Callable[..., Any], maxsize: int | None, typed: bool, export: Export | None
) -> Callable[..., Any]:
    """A `functools.lru_cache` function with an empty cache of its own; named in pickles."""
    wrapper = functools.lru_cache(maxsize, typed)(function)
    _apply_export(wrapper, export)
    return wrapper


def make_single_dispatch(
    function: Callable[..., Any], kinds: tuple[tuple[type, Callable[..., Any]], ...], export: Export | None
) -> Callable[..., Any]:
    """A `functools.singledispatch` function; named in pickles."""
    wrapper = functools.singledispatch(function)
    for kind, implementation in kinds:
        wrapper.register(kind, implementation)
    _apply_export(wrapper, export)
    return wrapper


def is_function_reduction(reduction: Any) -> bool:
    """Whether cloudpickle reduced a function to the form that this file knows (3.0 to 3.1 do)."""
    if not _has_state_setter(reduction) or len(reduction[1]) != 5:
        return False
    code, base = reduction[1][:2]
    return isinstance(code, types.CodeType) and isinstance(base, dict) and "__globals__" in reduction[2][1]


def is_class_reduction(reduction: Any) -> bool:
    """The same for classes and enumerations."""
    return _has_state_setter(reduction) and len(reduction[1]) in (6, 7)


def explain_load_failure(error: BaseException, node_id: str) -> BaseException:
    """VersionMismatch in place of a load that failed for a missing module or name; else `error` itself."""
    where = f"node {node_id}" if node_id else f"process {platform.node()}"
    python = f"Python {platform.python_version()} at {sys.executable}"
    if isinstance(error, ModuleNotFoundError):
        return errors.VersionMismatch(
            f"module {error.name!r} is needed by the task but cannot be imported on {where} ({python}); "
            "install it there, put its folder on PYTHONPATH, or ship it with runtime_env={'py_modules': [...]} or "
            f"`clusterpool run --working-dir FOLDER`; sys.path there is {sys.path}"
        )
    if isinstance(error, (ImportError, AttributeError)):
        return errors.VersionMismatch(
            f"the task needs something that its module does not have on {where} ({python}): {error}; another "
            f"version of the module is probably installed or found first there; sys.path there is {sys.path}"
        )
    return error


def _define(thing: Any, place: tuple[str, str], older: Definition | None) -> tuple[Definition, list[Any]]:
    made_before, once_before = namespaces.versions.made_count, references.once_count()
    pickled, captured, dependencies, kept = _dump_code(thing, CodePickler)
    if older is not None and older.dependencies is None and namespaces.versions.made_count == made_before:
        definition = older  # it arrived and nothing was changed here: send it on under the name that others know
    else:
        definition = definitions.add(thing, place, new_token(), pickled)
    definition.references = captured
    definition.dependencies = dependencies
    definition.is_spent = references.once_count() != once_before
    definition.keep(kept)
    return definition, kept


def _dump_code(
    thing: Any,
    pickler_type: type[CodePickler],
    replaced: Replaced | None = None,
    *,
    outer: frozenset[int] = frozenset(),
    has_fresh_locks: bool = False,
    is_kept: bool = False,
) -> tuple[bytes, list[Any], list[Dependency], list[Any]]:
    """Pickle code, leaving behind what it refers to and cannot be pickled (see left_behind.py).

    Returns: the pickle, the object references in it, what it depends on, what must live as long as it. `replaced` gets
    what was found; `outer`: ids of what is being pickled by our callers. `is_kept`: somebody keeps the last of these;
    else so it is if it is for whoever pickles around this.
    """
    replaced = {} if replaced is None else replaced
    is_kept = is_kept or references.is_keeping()
    while True:
        dependencies: list[Dependency] = []
        kept: list[Any] = []
        with io.BytesIO() as file, references.capture_references(kept if is_kept else None) as captured:
            pickler = pickler_type(file, dependencies=dependencies, replaced=replaced, has_fresh_locks=has_fresh_locks)
            try:
                pickler.dump(thing)
                return file.getvalue(), captured, dependencies, kept
            except Exception:  # A user's __reduce__ may raise anything.
                if not _replace_unpicklable(pickler.met, replaced, outer | {id(thing)}):
                    raise


def _replace_unpicklable(met: list[tuple[str, Any]], replaced: Replaced, outer: frozenset[int]) -> bool:
    """Find what stands in the way of a pickle; whether anything was found."""
    known_before = len(replaced)
    # What functions and classes refer to is the cause more often than they are themselves.
    for place, value in sorted(met, key=lambda item: isinstance(item[1], (types.FunctionType, type))):
        if id(value) in replaced or id(value) in outer or type(value) in _ALWAYS_PICKLABLE:
            continue
        try:
            _dump_code(value, CodePickler, replaced, outer=outer)
            continue
        except Exception as error:
            reason = left_behind.reason_of(error)
        instead: Any
        try:
            stream, captured, _, kept = _dump_code(value, CodePickler, replaced, outer=outer, has_fresh_locks=True)
            instead = left_behind.Pickled(stream, captured, kept)
        except Exception:
            instead = left_behind.LeftBehind(place, reason)
        replaced[id(value)] = (value, instead)
    return len(replaced) > known_before


def _reduce_method(method: types.MethodType) -> Any:
    # By name, as the standard pickle has it, so that the function of a class is not sent apart from its
    # class.
    name = method.__func__.__name__
    found = getattr(method.__self__, name, None)
    if not isinstance(found, types.MethodType) or found.__func__ is not method.__func__:
        return NotImplemented
    return (getattr, (method.__self__, name)) if found.__self__ is method.__self__ else NotImplemented


def _resolve(module: str, path: str) -> Any:
    first, *rest = path.split(".")
    return functools.reduce(getattr, rest, namespaces.get(module)[first])


def _export(thing: Any) -> Export | None:
    """Under which name of which module the thing is found, so that it can be found there on arrival too."""
    place = place_by_value(thing)
    if place is None or "." in place[1]:
        return None
    return (*place, namespaces.versions.token_to_ship(*place, thing))


def _apply_export(thing: Any, export: Export | None) -> None:
    if export is not None:
        module, name, token = export
        namespaces.merge(module, {name: (token, thing)}, {})


def _has_state_setter(reduction: Any) -> bool:
    return (
        isinstance(reduction, tuple)
        and len(reduction) == 6
        and reduction[3] is None
        and reduction[4] is None
        and callable(reduction[5])
        and isinstance(reduction[2], tuple)
        and len(reduction[2]) == 2
        and all(isinstance(part, dict) for part in reduction[2])
    )


def _dependencies_of(function: types.FunctionType, shipped: dict[str, Any]) -> list[Dependency]:
    namespace = function.__globals__
    if _is_stable_package(namespace.get("__name__")):
        return []  # such as the methods that `dataclass` makes
    dependencies = [global_dependency(namespace, name) for name in shipped]
    dependencies += [cell_dependency(cell) for cell in function.__closure__ or ()]
    absent = frozenset(name for name in _names_in(function.__code__) if name not in namespace)
    if absent:
        # A helper may be defined after the first call. Attribute names are among these, which does no harm.
        dependencies.append(Dependency(lambda: namespace.keys().isdisjoint(absent), True))
    return dependencies


def _names_in(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _remember_stable(thing: Any) -> None:
    if len(_stable_by_id) < _STABLE_MAX and _is_stable_package(getattr(thing, "__module__", None)):
        _stable_by_id[id(thing)] = thing


def _is_stable_package(module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _STABLE_PACKAGES


class _DispatchTable:
    """The reducers of cloudpickle and of `copyreg` in one dictionary, made again when one was registered."""

    registered: dict[Any, Any] | None = None
    registered_by_kind: dict[Any, Any] = {}  # with `multiprocessing`'s own pickler
    of_cluster: dict[Any, Any] = {}
    merged: dict[Any, Any] = {}


def set_reducers(reducers: Mapping[type, Callable[[Any], Any]]) -> None:
    """Reducers, by class, that are used in the place of all others."""
    _DispatchTable.of_cluster = dict(reducers)
    _DispatchTable.registered = None


def _dispatch_table() -> dict[Any, Any]:
    reduction = sys.modules.get("multiprocessing.reduction")
    by_kind = {} if reduction is None else reduction.ForkingPickler._extra_reducers
    if _DispatchTable.registered != copyreg.dispatch_table or len(by_kind) != len(_DispatchTable.registered_by_kind):
        _DispatchTable.registered_by_kind = dict(by_kind)
        merged = dict(cloudpickle.Pickler.dispatch_table)
        # Sockets and connections, which hold descriptors. Not others: cloudpickle has better ones for methods, and
        # libraries share memory of this host by theirs.
        merged.update((kind, by_kind[kind]) for kind in by_kind if kind.__module__ in DESCRIPTOR_MODULES)
        merged.update(_DispatchTable.of_cluster)
        _DispatchTable.merged = merged
        _DispatchTable.registered = dict(copyreg.dispatch_table)
    return _DispatchTable.merged
