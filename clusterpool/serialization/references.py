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


_captures = _Captures()


class capture_references:  # noqa: N801 - used like a function; a class is three times as fast as contextlib's
    """Collect the references that are pickled in the `with` block by this thread, in order.

    Blocks nest: a reference belongs to the innermost one. The list has a reference once for each time that
    its `__reduce__` ran.
    """

    def __enter__(self) -> list[Any]:
        self._previous = _captures.active
        captured: list[Any] = []
        _captures.active = captured
        return captured

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _captures.active = self._previous


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
