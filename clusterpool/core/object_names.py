"""What objects are called in the stores."""

from __future__ import annotations


def object_id(owner_process_id: str, number: int, attempt: int = 1) -> str:
    """The name that an object has in every store: its owner and its number there.

    What a task makes when it is run again to rebuild a lost object has a name of its own: old copies cannot be mistaken
    for it.
    """
    return f"{owner_process_id}.{number}" if attempt == 1 else f"{owner_process_id}.{number}~{attempt}"
