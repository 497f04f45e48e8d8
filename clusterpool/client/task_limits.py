"""`timeout=` and `retry_exceptions=`: what users say of limits and retries, as tasks carry it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from clusterpool import errors
from clusterpool.core.messages import TaskExtras, TaskLimits
from clusterpool.serialization.functions import dumps_function


def checked_timeout(timeout: Any) -> float:
    """A limit of time in seconds; 0.0 for none.

    Raises: TypeError, ValueError.
    """
    if timeout is None:
        return 0.0
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    if math.isnan(timeout) or timeout <= 0:
        raise ValueError(f"timeout must be more than 0 seconds, not {timeout!r}; None means no limit")
    return 0.0 if math.isinf(timeout) else float(timeout)


def checked_exceptions(retry_exceptions: Any) -> tuple[type[BaseException], ...]:
    """The exception classes after which a task is tried again; none for False.

    Raises: TypeError for anything but a bool, an exception class, or several in a list or tuple.
    """
    if retry_exceptions is None or retry_exceptions is False:
        return ()
    if retry_exceptions is True:
        return (Exception,)
    if isinstance(retry_exceptions, type):
        retry_exceptions = (retry_exceptions,)
    classes = tuple(retry_exceptions) if isinstance(retry_exceptions, Iterable) else (retry_exceptions,)
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, BaseException)):
            raise TypeError(f"retry_exceptions must be True, False or a list of exception classes; {cls!r} is none")
    return classes


def limits_for(timeout: Any = None, retry_exceptions: Any = False, *, travels_alone: bool = False) -> TaskLimits | None:
    """What a task is to carry; None where nothing out of the ordinary is asked.

    Raises: TypeError, ValueError; what pickle raises for exception classes that cannot be sent.
    """
    timeout_s = checked_timeout(timeout)
    classes = checked_exceptions(retry_exceptions)
    if not timeout_s and not classes and not travels_alone:
        return None
    retry_on = dumps_function(classes) if classes else b""  # type: ignore[arg-type]
    retries_timeout = any(issubclass(errors.TaskTimeout, cls) for cls in classes)
    return TaskLimits(timeout_s, travels_alone or timeout_s > 0, retries_timeout, retry_on)


def extras_with(limits: TaskLimits | None, timeout: Any = None) -> TaskExtras | None:
    """Extras of a task with these limits, and with a limit of time of its own."""
    timeout_s = checked_timeout(timeout)
    if timeout_s:
        old = limits or TaskLimits()
        limits = TaskLimits(timeout_s, True, old.retries_timeout, old.retry_on)
    return TaskExtras(limits=limits) if limits is not None else None
