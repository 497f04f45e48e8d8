"""What a worker runs for joblib: a batch of calls, with the nested backend that joblib wants there.

joblib gives us a `BatchedCalls`: a list of (function, args, kwargs). Sent as it is, a function of
`__main__` would be pickled by value in every batch, which takes longer than most batches run. When all
calls of a batch are of one plain function, which is nearly always, we make that function part of the task's
*function* (which the engine ships to each worker once) and send only arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any


def uniform_batch(
    function: Callable[..., Any], nested_backend: Any, nested_n_jobs: int | None
) -> Callable[[Sequence[tuple[Any, Any]]], list[Any]]:
    """A function that calls `function` on each (args, kwargs), inside the nested joblib backend.

    It is a closure and no object with `__call__`, since only functions are shipped once.
    """

    def run(calls: Sequence[tuple[Any, Any]]) -> list[Any]:
        from joblib.parallel import parallel_config

        with parallel_config(backend=nested_backend, n_jobs=nested_n_jobs):
            return [function(*args, **kwargs) for args, kwargs in calls]

    return run


def run_batch(batch: Callable[[], Any]) -> Any:
    """Run joblib's own batch, which sets the nested backend itself."""
    return batch()


def uniform_function(items: Sequence[tuple[Any, Any, Any]]) -> Callable[..., Any] | None:
    """The one plain function that all of `items` call, if there is one.

    Only functions: an object with `__call__`, or a bound method's, may have changed since the last batch, and
    must be sent as it is now.
    """
    function: Any = items[0][0]
    if not isinstance(function, FunctionType):
        return None
    return function if all(item[0] is function for item in items) else None
