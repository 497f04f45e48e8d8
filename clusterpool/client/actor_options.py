"""The options of an actor class: which there are, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clusterpool.client.remote_function import RESOURCE_OPTIONS

ACTOR_OPTIONS = (
    *RESOURCE_OPTIONS, "name", "namespace", "lifetime", "get_if_exists", "max_concurrency", "scheduling", "runtime_env",
    "max_restarts", "max_task_retries", "checkpoint_every", "checkpoint_period_s",
)  # fmt: skip


def check_actor_options(options: Mapping[str, Any]) -> None:
    """Raises: TypeError, ValueError."""
    if options.get("lifetime") not in (None, "detached"):
        raise ValueError(f"lifetime must be 'detached' or left out: {options['lifetime']!r}")
    for name, least in (
        ("max_concurrency", 1),
        ("max_restarts", -1),
        ("max_task_retries", -1),
        ("checkpoint_every", 1),
    ):
        value = options.get(name)
        if value is None:
            continue
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer: {value!r}")
        if value < least:
            raise ValueError(f"{name} must be {least} or more: {value}")
    period_s = options.get("checkpoint_period_s")
    if period_s is not None and not isinstance(period_s, (int, float)):
        raise TypeError(f"checkpoint_period_s must be a number of seconds: {period_s!r}")
    if period_s is not None and period_s < 0:
        raise ValueError(f"checkpoint_period_s must be 0 or more: {period_s}")
    for name in ("name", "namespace"):
        if not isinstance(options.get(name, ""), (str, type(None))):
            raise TypeError(f"{name} must be a string: {options[name]!r}")


def has_checkpoints(options: Mapping[str, Any]) -> bool:
    """Whether the actor's state is to survive its process."""
    return options.get("checkpoint_every") is not None or options.get("checkpoint_period_s") is not None


def check_whole(options: Mapping[str, Any]) -> None:
    """What only makes sense together, looked at when the actor is made: `.options()` may still have added some.

    Raises: ValueError.
    """
    for option in ("lifetime", "get_if_exists"):
        if options.get(option) and not options.get("name"):
            raise ValueError(f"{option}={options[option]!r} needs a name=, or nobody could ever find the actor")
    if has_checkpoints(options) and not options.get("max_restarts"):
        raise ValueError(
            "checkpoint_every= and checkpoint_period_s= need max_restarts=: an actor that is never started again has "
            "no use for its checkpoints"
        )
