"""What a worker runs for joblib: a batch of calls, with the nested backend that joblib wants there.

joblib gives us a `BatchedCalls`: a list of (function, args, kwargs). Sent as it is, a function of
`__main__` would be pickled by value in every batch, which takes longer than most batches run. When all
calls of a batch are of one plain function, which is nearly always, we make that function part of the task's
*function* (which the engine ships to each worker once) and send only arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple


class UniformBatch(NamedTuple):
    """Functions that call one function inside the nested joblib backend, and return the list of its results.

    They are closures and no objects with `__call__`, since only functions are shipped once. `one` and `many` are apart
    from `calls` because arguments that stand alone, or in tuples of their own, are pickled several times faster.
    """

    one: Callable[..., list[Any]]  # (*args, **kwargs)
    many: Callable[[Sequence[Any]], list[Any]]  # [args, ...]
    calls: Callable[[Sequence[tuple[Any, Any]]], list[Any]]  # [(args, kwargs), ...]

    def call_for(self, items: Sequence[tuple[Any, Any, Any]]) -> tuple[Callable[..., Any], Any, Any]:
        """The (function, args, kwargs) that run a batch of several (function, args, kwargs)."""
        if any(item[2] for item in items):
            return self.calls, ([(args, kwargs) for _, args, kwargs in items],), {}
        return self.many, ([args for _, args, _ in items],), {}


def uniform_batch(function: Callable[..., Any], nested_backend: Any, nested_n_jobs: int | None) -> UniformBatch:
    """What runs batches of calls of `function`."""

    def one(*args: Any, **kwargs: Any) -> list[Any]:
        from joblib.parallel import parallel_config

        with parallel_config(backend=nested_backend, n_jobs=nested_n_jobs):
            return [function(*args, **kwargs)]

    def many(calls: Sequence[Any]) -> list[Any]:
        from joblib.parallel import parallel_config

        with parallel_config(backend=nested_backend, n_jobs=nested_n_jobs):
            return [function(*args) for args in calls]

    def with_keywords(calls: Sequence[tuple[Any, Any]]) -> list[Any]:
        from joblib.parallel import parallel_config

        with parallel_config(backend=nested_backend, n_jobs=nested_n_jobs):
            return [function(*args, **kwargs) for args, kwargs in calls]

    return UniformBatch(one, many, with_keywords)


def run_batch(batch: Callable[[], Any]) -> Any:
    """Run joblib's own batch, which sets the nested backend itself."""
    return batch()


def uniform_function(items: Sequence[tuple[Any, Any, Any]]) -> Callable[..., Any] | None:
    """The one plain function that all of `items` call, if there is one.

    Only functions: an object with `__call__`, or a bound method's, may have changed since the last batch, and
    must be sent as it is now.
    """
    function: Callable[..., Any] | None = items[0][0] if items else None
    if type(function) is not FunctionType:  # which has no subclasses
        return None
    return function if len(items) == 1 or all(item[0] is function for item in items) else None
