"""What happens to an object reference that is pickled or unpickled, wherever in a value it sits.

The reference class itself lives above this package, so it registers here, once a process, what it wants done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any


class _Hooks:
    """What the client of this process registered; pickle offers no other way to reach it from a reducer."""

    restore: Callable[..., Any] | None = None
    escape: Callable[[Any], None] | None = None
    resolve: Callable[[Any], Any] | None = None


class _Captures(threading.local):
    """The list that the innermost `capture_references` of this thread fills, if there is one."""

    active: list[Any] | None = None
    kept: list[Any] | None = None
    is_sent = True
    once_count = 0


_captures = _Captures()


class capture_references:  # noqa: N801 - used like a function; a class is three times as fast as contextlib's
    """Collect the references that are pickled in the `with` block by this thread, in order.

    Blocks nest: a reference belongs to the innermost one. The list has a reference once for each time that
    its `__reduce__` ran.

    `kept`: gets what must live for as long as the pickle may still be loaded (see `keeper`). `is_sent`: False when the
    pickle is only looked at.
    """

    def __init__(self, kept: list[Any] | None = None, *, is_sent: bool = True) -> None:
        self._kept = kept
        self._is_sent = is_sent

    def __enter__(self) -> list[Any]:
        self._previous = _captures.active, _captures.kept, _captures.is_sent
        captured: list[Any] = []
        _captures.active, _captures.kept, _captures.is_sent = captured, self._kept, self._is_sent
        return captured

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _captures.active, _captures.kept, _captures.is_sent = self._previous


def keeper() -> list[Any] | None:
    """For the `__reduce__` of what can be loaded only while something lives in this process, such as a descriptor.

    Returns: the list that is to get the something, if the pickle may be loaded several times and whoever pickles says
    until when; None if it is loaded once.
    Raises: TypeError when nothing is sent, and so nothing should be made ready.
    """
    if not _captures.is_sent:
        raise TypeError("this has no content that could be compared")
    if _captures.kept is None:
        _captures.once_count += 1
    return _captures.kept


def keep(items: list[Any]) -> None:
    """For what was pickled apart and is pickled again, in the bytes that were made then: keep what these need."""
    if _captures.kept is not None:
        _captures.kept += items


def is_keeping() -> bool:
    """Whether `keeper` of this thread gives a list."""
    return _captures.kept is not None


def once_count() -> int:
    """How often `keeper` gave None to this thread."""
    return _captures.once_count


def capture(reference: Any) -> None:
    """Note that `reference` is being pickled; for its `__reduce__`.

    Outside any `capture_references` the user pickles it himself, to where nobody can see, so the escape hook
    is told and the owner keeps the object for good.
    """
    if _captures.active is not None:
        _captures.active.append(reference)
    elif _Hooks.escape is not None:
        _Hooks.escape(reference)


def restore(*identity: Any) -> Any:
    """Make a reference again from what its `__reduce__` gave; named in the pickles themselves."""
    if _Hooks.restore is None:
        raise RuntimeError(
            "an object reference was unpickled in a process that has no clusterpool client; "
            "call clusterpool.init() before loading pickles that hold references"
        )
    return _Hooks.restore(*identity)


def resolve(reference: Any) -> Any:
    """Put the value in the place of a large part of an argument that was stored on its own."""
    if _Hooks.resolve is None:
        raise RuntimeError(
            "an argument with a stored part was unpickled in a process that has no clusterpool client; "
            "call clusterpool.init() first"
        )
    return _Hooks.resolve(reference)


def set_restore_hook(hook: Callable[..., Any] | None) -> None:
    """`hook(*identity)` makes a reference from what the reference class's `__reduce__` returned."""
    _Hooks.restore = staticmethod(hook) if hook is not None else None


def set_escape_hook(hook: Callable[[Any], None] | None) -> None:
    """`hook(reference)` is told of each reference pickled outside `capture_references`."""
    _Hooks.escape = staticmethod(hook) if hook is not None else None


def set_resolve_hook(hook: Callable[[Any], Any] | None) -> None:
    """`hook(reference)` gives the value of a stored part of an argument (it may wait for it)."""
    _Hooks.resolve = staticmethod(hook) if hook is not None else None
