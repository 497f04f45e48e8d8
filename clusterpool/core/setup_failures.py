"""Workers of a set that did not get through their setup, one after another: when it is no use to start more."""

from __future__ import annotations

# An initializer that has failed this often for each worker, with no success between, will not get better by itself.
# Once may be bad luck: somebody ended the worker, memory was short for a moment.
SETUP_FAILURES_MAX = 4


class SetupFailures:
    """Counts them for one set. `name`: of its workers."""

    def __init__(self, name: str) -> None:
        self._name = name or "the worker"
        self.in_a_row = 0  # the set sets it back when a worker is ready

    def raised(self, size: int | None) -> tuple[str, str]:
        """An initializer raised: what to say, and why no other worker is tried (empty while one is)."""
        self.in_a_row += 1
        text = f"the initializer of {self._name} raised an exception"
        if self.in_a_row < _failures_max(size):
            return text, ""
        return text, f"{text} {self.in_a_row} times in a row; no worker will be tried again"

    def died(self, size: int | None, text: str) -> str:
        """A worker ended, as `text` says, in its setup: why no other one is tried (empty while one is)."""
        self.in_a_row += 1
        if self.in_a_row < _failures_max(size):
            return ""
        return (
            f"{self.in_a_row} workers of {self._name} in a row ended before they were ready for tasks, so no other one "
            "is tried; an initializer that ends its process (os._exit, a crash in C code, too much memory) does that; "
            f"mend it, or try it in a process of its own; the last of them: {text}"
        )


def _failures_max(size: int | None) -> int:
    return SETUP_FAILURES_MAX * max(1, size or 1)
