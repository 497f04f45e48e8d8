"""What users define, as text: to be defined in a module that is sent by value, or in a script's `__main__`."""

from __future__ import annotations

# Its last line fills the cache of types that it has met.
SINGLE_DISPATCH = """
import functools
class Own: pass
@functools.singledispatch
def name(value): return "object"
@name.register
def _(value: list): return [name(item) for item in value]
@name.register(Own)
def _(value): return "own"
name(Own())
"""
