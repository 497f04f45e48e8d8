"""What users say of resources, looked at where they say it: what no node could read must not be sent to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def checked_amounts(resources: Any) -> dict[str, float]:
    """Amounts by name; none for None.

    Raises: TypeError, ValueError.
    """
    if resources is None:
        return {}
    if not isinstance(resources, Mapping):
        raise TypeError(f"resources must be a dict of names and amounts, such as {{'GPU': 1}}: {resources!r}")
    return {checked_name(name): checked_amount(name, amount) for name, amount in resources.items()}


def checked_other_amounts(resources: Any) -> dict[str, float]:
    """The same, where CPU, GPU and memory have arguments of their own.

    Raises: TypeError, ValueError.
    """
    amounts = checked_amounts(resources)
    for name in ("CPU", "GPU", "memory"):
        if name in amounts:
            raise ValueError(f"give {name} as num_cpus=, num_gpus= or memory=, not in resources=")
    return amounts


def checked_name(name: Any) -> str:
    """The name of a resource.

    Raises: TypeError, ValueError.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a resource must be a string: {name!r}")
    if not name:
        raise ValueError("the name of a resource must not be empty")
    return name


def checked_amount(name: str, amount: Any) -> float:
    """An amount of the resource.

    Raises: TypeError, ValueError.
    """
    if not isinstance(amount, (int, float)):
        raise TypeError(f"an amount of {name} must be a number, not {amount!r}")
    if not 0 <= amount < float("inf"):
        raise ValueError(f"an amount of {name} must be a number of 0 or more: {amount}")
    return float(amount)
