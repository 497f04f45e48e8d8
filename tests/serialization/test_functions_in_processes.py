"""What a script's `__main__` ships works in another interpreter as if it had been defined there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serialization.sources import SINGLE_DISPATCH
from tests.serialization.two_interpreters import ScriptRunner


@pytest.fixture
def script(tmp_path: Path) -> ScriptRunner:
    return ScriptRunner(tmp_path)


def test_tasks_see_a_global_that_the_initializer_assigned(script: ScriptRunner) -> None:
    script.run(
        """
model = None
def initialize(name):
    global model
    model = name.upper()
def task(x):
    return model, x
worker.call(initialize, "net")
assert worker.call(task, 1) == ("NET", 1)
assert worker.call(lambda: model) == "NET"
assert model is None
"""
    )


def test_a_single_dispatch_function_is_one_in_each_process(script: ScriptRunner) -> None:
    script.run(
        SINGLE_DISPATCH
        + """
assert worker.call(name, [1, [Own()]]) == ["object", ["own"]]
assert worker.call(lambda: name(Own())) == "own"
name.register(int, lambda value: "int")
assert worker.call(name, 1) == "int"
"""
    )


def test_tasks_see_a_global_that_the_initializer_filled_in_place(script: ScriptRunner) -> None:
    script.run(
        """
STATE = {}
def initialize():
    STATE["model"] = 5
def task():
    return STATE
def other_task():
    return STATE, task()
worker.call(initialize)
assert worker.call(task) == {"model": 5}
assert worker.call(other_task) == ({"model": 5}, {"model": 5})
"""
    )


def test_a_new_value_of_the_drivers_global_reaches_the_worker(script: ScriptRunner) -> None:
    script.run(
        """
rate = 1
params = {"k": 1}
def task():
    return rate, params["k"]
assert worker.call(task) == (1, 1)
rate = 2
assert worker.call(task) == (2, 1)
params["k"] = 3
assert worker.call(task) == (2, 3)
params = {"k": 4}
assert worker.call(task) == (2, 4)
"""
    )


def test_a_global_of_the_workers_own_is_kept_when_the_driver_changes_its_own(script: ScriptRunner) -> None:
    script.run(
        """
x = 1
def assign():
    global x
    x = 100
def task():
    return x
worker.call(assign)
x = 2
assert worker.call(task) == 100
"""
    )


def test_a_function_defined_again_replaces_the_old_one(script: ScriptRunner) -> None:
    script.run(
        """
def helper():
    return "old"
def task():
    return helper()
assert worker.call(task) == "old"
def helper():
    return "new"
assert worker.call(task) == "new"
assert worker.call(helper) == "new"
"""
    )


def test_a_helper_defined_after_the_first_call_is_shipped(script: ScriptRunner) -> None:
    script.run(
        """
def task():
    try:
        return helper()
    except NameError:
        return "none yet"
shipped = functions.ship_function(task)
assert shipped.is_current()
assert worker.call(task) == "none yet"
def helper():
    return "there"
assert not shipped.is_current()
assert worker.call(task) == "there"
"""
    )


def test_recursion_closures_lambdas_decorators_and_partials(script: ScriptRunner) -> None:
    script.run(
        """
import functools, collections, os.path
def is_even(n):
    return n == 0 or is_odd(n - 1)
def is_odd(n):
    return n != 0 and is_even(n - 1)
def twice(function):
    @functools.wraps(function)
    def wrapper(*args):
        return [function(*args), function(*args)]
    return wrapper
@twice
def decorated(x):
    return x + 1
@functools.lru_cache(maxsize=None)
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)
def adder(n):
    return lambda x: x + n
def counter():
    count = 0
    def step():
        nonlocal count
        count += 1
        return count
    return step
def generate(n):
    yield from range(n)
def uses_modules():
    return os.path.join("a", "b"), collections.Counter("aab")["a"]
def with_defaults(a, b=[], *, c={"k": 1}):
    return a, b, c
assert worker.call(is_even, 10) and not worker.call(is_odd, 10)
assert worker.call(decorated, 1) == [2, 2]
assert worker.call(fib, 30) == 832040
assert worker.call(lambda f, x: f(x), fib, 10) == 55
assert worker.call(functools.partial(adder(3), 4)) == 7
assert worker.call(lambda f: f(1), functools.partial(with_defaults)) == (1, [], {"k": 1})
assert worker.call(counter()) == 1
assert worker.call(lambda: list(generate(3))) == [0, 1, 2]
assert worker.call(uses_modules) == (os.path.join("a", "b"), 2)
assert worker.call(adder, 5)(1) == 6
assert worker.call(lambda: is_even) is is_even
assert worker.call(lambda: decorated) is decorated
"""
    )


def test_classes_of_main_and_their_instances_come_back_as_the_drivers_own(script: ScriptRunner) -> None:
    script.run(
        """
import abc
SCALE = 10
class Base(abc.ABC):
    def __init__(self, x):
        self.x = x
    @abc.abstractmethod
    def value(self): ...
class Child(Base):
    made = 0
    def __init__(self, x):
        super().__init__(x)
        type(self).made += 1
    def value(self):
        return self.x * SCALE
    @classmethod
    def of(cls, x):
        return cls(x)
    @staticmethod
    def double(x):
        return 2 * x
    @property
    def half(self):
        return self.x / 2
def kinds(value):
    return type(value) is Child, isinstance(value, Base), value.value(), value.half
assert worker.call(kinds, Child(3)) == (True, True, 30, 1.5)
assert worker.call(Child(4).value) == 40
assert type(worker.call(Child.of, 5)) is Child
assert worker.call(Child.double, 5) == 10
assert worker.call(Child.value, Child(2)) == 20
assert worker.call(lambda: Child) is Child
assert Child.made == 3, Child.made   # what the worker did to its class is the worker's
"""
    )


def test_data_classes_of_main_come_back_as_the_drivers_own(script: ScriptRunner) -> None:
    script.run(
        """
import dataclasses, enum, collections, typing
SCALE = 10
class Slotted:
    __slots__ = ("a", "b", "__private")
    def __init__(self, a, b):
        self.a, self.b, self.__private = a, b, 3
    def private(self):
        return self.__private
@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: int = 0
    tags: list = dataclasses.field(default_factory=list)
class Color(enum.Enum):
    RED = 1
    BLUE = 2
Pair = collections.namedtuple("Pair", "a b")
class Row(typing.NamedTuple):
    a: int
class Outer:
    class Inner:
        pass
def same(value):
    return value
for value in [Point(1, 2), Color.RED, Pair(1, 2), Row(3), {Color.BLUE: [Pair(0, 0)]}]:
    back = worker.call(same, value)
    assert back == value and type(back) is type(value), (back, value)
assert worker.call(same, Color.RED) is Color.RED
assert type(worker.call(Outer.Inner)) is Outer.Inner
slotted = worker.call(same, Slotted(1, [2]))
assert type(slotted) is Slotted and (slotted.a, slotted.b) == (1, [2])
assert worker.call(lambda: hasattr(slotted, "__dict__")) is False
assert slotted.private() == 3
def local():
    class Local:
        def value(self):
            return SCALE
    return Local
Local = local()
assert worker.call(lambda item: item.value(), Local()) == 10
assert type(worker.call(same, Local())) is Local
"""
    )


def test_class_attributes_that_the_worker_set_are_kept(script: ScriptRunner) -> None:
    script.run(
        """
class Config:
    model = None
    cache = {}
def initialize():
    Config.model = "loaded"
    Config.cache["a"] = 1
def task(config=None):
    return Config.model, Config.cache
worker.call(initialize)
assert worker.call(task) == ("loaded", {"a": 1})
assert worker.call(task, Config()) == ("loaded", {"a": 1})
Config.rate = 2
assert worker.call(task) == ("loaded", {"a": 1})
assert worker.call(lambda: Config.rate) == 2
assert Config.model is None and Config.cache == {}
"""
    )


def test_plain_pickle_by_name_works_in_the_worker_and_back(script: ScriptRunner) -> None:
    script.run(
        """
class Point:
    def __init__(self, x):
        self.x = x
def make(x):
    import pickle, sys
    assert sys.modules["__main__"].make is make
    return pickle.dumps(Point(x)), pickle.dumps(make)
point, function = map(pickle.loads, worker.call(make, 3))
assert type(point) is Point and point.x == 3 and function is make
"""
    )


def test_what_a_worker_defines_never_replaces_the_drivers_globals(script: ScriptRunner) -> None:
    script.run(
        """
value = "driver"
def task():
    global value, fresh
    value, fresh = "worker", "made"
    return lambda: (value, fresh)
builtins_before = __builtins__
assert worker.call(task)() == ("driver", "made")
assert value == "driver" and __builtins__ is builtins_before
"""
    )


def test_guarded_script_and_a_module_registered_by_value(script: ScriptRunner) -> None:
    script.run(
        """
import sys, types
import cloudpickle
from driver_of_test import functions, packing, worker

plugin = types.ModuleType("plugin")
exec('''
STATE = []
def add(x):
    STATE.append(x)
def read():
    return list(STATE)
class Thing:
    pass
''', plugin.__dict__)
sys.modules["plugin"] = plugin
cloudpickle.register_pickle_by_value(plugin)

total = 0
def bump(n):
    global total
    total += n
    return total

if __name__ == "__main__":
    assert [worker.call(bump, n) for n in (1, 2, 3)] == [1, 3, 6]
    worker.call(plugin.add, 7)
    assert worker.call(plugin.read) == [7] and plugin.STATE == []
    assert type(worker.call(lambda x: x, plugin.Thing())) is plugin.Thing
""",
        guarded=True,
    )


def test_a_missing_module_is_named_with_the_node(script: ScriptRunner) -> None:
    script.run(
        """
import types
from clusterpool import errors
only_here = types.ModuleType("only_here")
exec("def f(): return 1", only_here.__dict__)
only_here.f.__module__ = "only_here"
sys.modules["only_here"] = only_here
try:
    worker.call(only_here.f)
except errors.VersionMismatch as exc:
    assert "only_here" in str(exc) and "sys.path" in str(exc), exc
else:
    raise AssertionError("no error")
"""
    )


def test_exceptions_of_main_classes_come_back_as_the_drivers_own(script: ScriptRunner) -> None:
    script.run(
        """
class Refused(Exception):
    def __init__(self, code, *, why):
        super().__init__(f"{code}: {why}")
        self.code = code
def refuse():
    raise Refused(3, why="no")
try:
    worker.call(refuse)
except Refused as exc:
    assert exc.code == 3 and exc.args == ("3: no",), exc
    text = str(exc.__cause__)
    assert "in refuse" in text and "node n1" in text and "process 7" in text, text
    assert "clusterpool/serialization" not in text, text
else:
    raise AssertionError("no error")
"""
    )


def test_a_worker_sends_on_what_it_got_and_what_it_changed(script: ScriptRunner) -> None:
    script.run(
        """
model = None
class Config:
    rate = 1
def initialize():
    global model
    model = "loaded"
    Config.rate = 2
def task(argument=None):
    return model, Config.rate
def send_on(thing):
    return functions.dumps_function(thing), packing.dumps_arguments((Config(),), {}).to_bytes()
first, second = worker, Worker()
unchanged = first.call(send_on, task)
assert functions.loads_function(unchanged[0]) is task
assert second.send(*unchanged) == (None, 1)
first.call(initialize)
assert first.call(task) == ("loaded", 2)
assert second.send(*first.call(send_on, task)) == ("loaded", 2)
assert first.call(task) == ("loaded", 2)
assert task() == (None, 1)
"""
    )


def test_structures_unions_arrays_and_pointers_of_main_arrive(script: ScriptRunner) -> None:
    script.run(
        """
import ctypes
class Point(ctypes.Structure):
    _fields_ = [("x", ctypes.c_double), ("y", ctypes.c_double)]
    def norm(self):
        return (self.x**2 + self.y**2) ** 0.5
class Number(ctypes.Union):
    _fields_ = [("whole", ctypes.c_int), ("parts", ctypes.c_byte * 4)]
class Link(ctypes.Structure):
    pass
Link._fields_ = [("next", ctypes.POINTER(Link)), ("value", ctypes.c_int)]
class Packed(ctypes.BigEndianStructure):
    _pack_ = 1
    _fields_ = [("a", ctypes.c_byte), ("b", ctypes.c_uint32)]
class Named(ctypes.Structure):
    _anonymous_ = ("number",)
    _fields_ = [("number", Number), ("points", Point * 2)]
def facts(point):
    point.x *= 2
    link = Link(None, 7)
    first = Link(ctypes.pointer(link), 1)
    named = Named(number=Number(whole=513), points=(Point(1, 2), Point(3, 4)))
    packed = bytes(Packed(1, 2))
    return point, point.norm(), first.next[0].value, list(named.parts), named.points[1].y, packed, ctypes.sizeof(Packed)
point, norm, value, parts, y, packed, size = worker.call(facts, Point(1.5, 4))
assert type(point) is Point and (point.x, norm) == (3.0, 5.0)
assert (value, parts, y, packed, size) == (7, [1, 2, 0, 0], 4.0, b"\\x01\\0\\0\\0\\x02", 5)
Point.norm = lambda self: "new"
assert worker.call(facts, Point(1.5, 4))[1] == "new"
"""
    )
