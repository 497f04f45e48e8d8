"""Messages of every type with any values that the wire lets pass, from a seed: some thousand in a second."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any, get_args

import msgspec
from msgspec import inspect

from clusterpool.core import wire
from clusterpool.core.messages import Address

KINDS: list[type] = list(get_args(wire.AnyMessage))

# Names that mean something where the machines are tested, and some that do not.
NODES = ["n1", "n1", "n2", "n3", ""]
PROCESSES = ["d1", "w1", "w2", "d9", "n1", "n2", ""]
TEXTS = [*PROCESSES, "j1", "a1", "d1.1024", "w1.2048", "o1", "node:n2", "near:n2", "spread", "CPU", "GPU", "l1", "x/.."]
INTEGERS = [-1, 0, 1, 1, 2, 3, 4, 5, 1024, 2048, 1 << 20, 1 << 40, 2**63 - 1, -(2**63)]
FLOATS = [0.0, 0.5, 1.0, 2.0, -1.0, 1e300, float("inf"), float("nan")]
DEPTH_MAX = 6


class Sampler:
    """Random values of types."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def address(self) -> Address:
        return Address(self.random.choice(NODES), self.random.choice(PROCESSES))

    def message(self) -> Any:
        """One that comes through the wire."""
        while True:
            message = self._value(_info(self.random.choice(KINDS)), 0)
            try:
                return wire.decode(wire.encode(message))
            except msgspec.MsgspecError:
                continue  # such as a number that its type does not allow

    def _value(self, info: Any, depth: int) -> Any:
        random = self.random
        kind = type(info)
        if kind is inspect.StructType:
            return info.cls(*(self._value(field.type, depth + 1) for field in info.fields))
        if kind is inspect.NamedTupleType:
            return (
                self.address() if info.cls is Address else info.cls(*(self._value(f.type, depth) for f in info.fields))
            )
        if kind is inspect.UnionType:
            none = next((one for one in info.types if type(one) is inspect.NoneType), None)
            return self._value(none if none is not None and depth > DEPTH_MAX else random.choice(info.types), depth + 1)
        if kind in (inspect.ListType, inspect.VarTupleType):
            count = 0 if depth > DEPTH_MAX else random.choice([0, 1, 1, 2, 3])
            values = [self._value(info.item_type, depth + 1) for _ in range(count)]
            return values if kind is inspect.ListType else tuple(values)
        if kind is inspect.DictType:
            count = random.choice([0, 1, 2])
            return {self._value(info.key_type, depth): self._value(info.value_type, depth) for _ in range(count)}
        if kind is inspect.IntType:
            return random.choice(INTEGERS)
        if kind is inspect.FloatType:
            return random.choice(FLOATS)
        if kind is inspect.StrType:
            return random.choice(TEXTS)
        if kind is inspect.BytesType:
            return random.randbytes(random.choice([0, 1, 8]))
        return random.random() < 0.5 if kind is inspect.BoolType else None


@cache
def _info(kind: type) -> Any:
    return inspect.type_info(kind)
