"""What goes in the place of a global, or of a class's attribute, that cannot be pickled.

The standard library sends a function of `__main__` by its name, so nothing that its globals hold can be in
the way: a fork has them all, a spawned child makes its own. We send the function's globals with it, and a
program whose module has a lock, an open file or its own pool must work nevertheless. So a definition is made
in attempts:

    dump --fails--> try each global, attribute and closed-over variable that was met, by itself
      ^                 it can be pickled but for its locks  -> sent with fresh locks, as a spawned child's
      |                 it cannot                            -> a `LeftBehind`, which raises when it is used
      +--- again, with these in their places; when nothing new was found, the first error stands

Only a dump that fails costs anything.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from clusterpool.errors import SerializationFailed
from clusterpool.serialization import references


class LeftBehind:
    """Stands where a value was that could not be sent; whatever is done with it raises the reason."""

    def __init__(self, place: str, reason: str) -> None:
        self.__dict__.update(_place=place, _reason=reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return LeftBehind, (self._place, self._reason)

    def __repr__(self) -> str:
        return f"<{self._place}, left behind because it cannot be pickled: {self._reason}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # Asked by the interpreter and by libraries that only want to know what this is.
            raise AttributeError(name)
        self._refuse()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise SerializationFailed(
            f"{self._place} is not in this worker, because it cannot be pickled ({self._reason}); make it in the "
            "worker, by an initializer or at first use, or give the task as an argument what it needs of it"
        )

    __setattr__ = __call__ = __enter__ = __exit__ = __iter__ = __next__ = __len__ = __contains__ = _refuse
    __getitem__ = __setitem__ = __delitem__ = __await__ = _refuse


class Pickled:
    """Stands for a value that was pickled already; `captured`: the object references in it; `kept`: what must live as
    long as it.
    """

    def __init__(self, stream: bytes, captured: list[Any], kept: list[Any]) -> None:
        self._stream = stream
        self._captured = captured
        self._kept = kept

    def __reduce__(self) -> tuple[Any, ...]:
        for reference in self._captured:
            references.capture(reference)
        references.keep(self._kept)
        return pickle.loads, (self._stream,)


_LOCK_MAKERS: dict[type, Callable[[], Any]] = {
    type(threading.Lock()): threading.Lock,
    type(threading.RLock()): threading.RLock,
}


def reduce_lock(thing: Any) -> Any:
    """The reduction of a lock to a fresh one, which nobody holds; None for anything else."""
    maker = _LOCK_MAKERS.get(type(thing))
    return None if maker is None else (maker, ())


def reason_of(error: BaseException) -> str:
    """One line for the messages."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
