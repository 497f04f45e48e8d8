"""The progress bar of a call (`progress=True`): tqdm, imported only when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ProgressOption = bool | Mapping[str, Any]


def checked_progress(progress: Any) -> ProgressOption:
    """Raises: TypeError when `progress` is neither a bool nor a mapping of tqdm's options."""
    if not isinstance(progress, (bool, Mapping)):
        raise TypeError(f"progress must be True, False or a dict of tqdm's options, not {progress!r}")
    return progress


def new_progress_bar(progress: ProgressOption, *, total: int | None, name: str) -> Any | None:
    """A tqdm bar with `update(items)` and `close()`, or None when no bar is wanted."""
    if progress is False:
        return None
    from tqdm.auto import tqdm

    options: dict[str, Any] = {"total": total, "desc": name, "unit": "item"}
    if isinstance(progress, Mapping):
        options.update(progress)
    return tqdm(**options)
