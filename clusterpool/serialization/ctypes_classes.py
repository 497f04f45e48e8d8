"""How ctypes' own kinds of classes are pickled: structures and unions by value, arrays and pointers by their items'.

cloudpickle makes a class and then sets its attributes, one by one. Here the fields' descriptors are among them, which
cannot be pickled and which the class makes itself once it has `_fields_`; and its metaclass has no name to import.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

# What must be set before `_fields_`, which can be set once and is what the layout is made from.
_LAYOUT = ("_align_", "_anonymous_", "_layout_", "_pack_", "_swappedbytes_", "_fields_")


def reduce_ctypes_class(cls: type) -> Any:
    """The reduction of a metaclass, array type, pointer type or swapped number of ctypes'; else NotImplemented."""
    ctypes: Any = sys.modules.get("ctypes")
    if ctypes is None:
        return NotImplemented
    for base in (ctypes.Structure, ctypes.Union, ctypes._SimpleCData):
        if cls is type(base):
            return type, (base,)
    attributes: Any = cls
    if cls.__bases__ == (ctypes._SimpleCData,):
        # Only that of the other byte order has no name of its own.
        for native, swapped in (("__ctype_le__", "__ctype_be__"), ("__ctype_be__", "__ctype_le__")):
            if getattr(attributes, swapped, None) is cls and getattr(attributes, native, cls) is not cls:
                return getattr, (getattr(attributes, native), swapped)
    if cls.__bases__ == (ctypes.Array,) and cls.__name__ == f"{attributes._type_.__name__}_Array_{attributes._length_}":
        return operator.mul, (attributes._type_, attributes._length_)
    if cls.__bases__ == (ctypes._Pointer,) and cls.__name__ == f"LP_{attributes._type_.__name__}":
        return ctypes.POINTER, (attributes._type_,)
    return NotImplemented


def settable_attributes(cls: type, attributes: dict[str, Any]) -> dict[str, Any]:
    """Those of a class that can be set on a new one, in an order in which they can be."""
    ctypes: Any = sys.modules.get("ctypes")
    if ctypes is None or not issubclass(cls, ctypes.Structure | ctypes.Union):
        return attributes
    # Fields, and what `_anonymous_` takes over from theirs: they come with `_fields_`. (The type has no public name.)
    others = {
        name: value for name, value in attributes.items() if name not in _LAYOUT and type(value).__name__ != "CField"
    }
    return {name: attributes[name] for name in _LAYOUT if name in attributes} | others


def without_layout(cls: type, attributes: dict[str, Any]) -> dict[str, Any]:
    """What may be set again on a class that has its layout."""
    if "ctypes" not in sys.modules or "_fields_" not in vars(cls):
        return attributes
    return {name: value for name, value in attributes.items() if name not in _LAYOUT}
