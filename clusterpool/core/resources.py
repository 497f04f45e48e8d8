"""Amounts of CPU, GPU, memory and whatever else a cluster's users name.

Counted in ten-thousandths, as integers, so that a tenth of a GPU ten times is a whole one. GPUs are also assigned by
index: whole ones to one lease each, fractions of one packed onto as few as possible.
"""

from __future__ import annotations

from collections.abc import Mapping

UNIT = 10_000

Amounts = dict[str, int]


def to_amounts(resources: Mapping[str, float]) -> Amounts:
    """Fixed-point amounts of what was given as numbers; zeros are left out.

    Raises: ValueError for a negative amount.
    """
    amounts: Amounts = {}
    for name, value in resources.items():
        if value < 0:
            raise ValueError(f"an amount of {name} cannot be negative: {value}")
        amount = round(value * UNIT)
        if amount:
            amounts[name] = amount
    return amounts


def to_numbers(amounts: Mapping[str, int]) -> dict[str, float]:
    """The amounts as people write them."""
    return {name: amount / UNIT for name, amount in amounts.items()}


class ResourcePool:
    """What one node has, and what of it is free. Free amounts may be negative while lent CPUs come back."""

    def __init__(self, total: Mapping[str, float]) -> None:
        self.total = to_amounts(total)
        self.free = dict(self.total)
        self._gpu_free = [UNIT] * (self.total.get("GPU", 0) // UNIT)

    def could_ever_fit(self, demand: Amounts) -> bool:
        """Whether the node, all idle, would have enough."""
        return all(self.total.get(name, 0) >= amount for name, amount in demand.items())

    def fits(self, demand: Amounts) -> bool:
        """Whether there is enough right now."""
        if any(self.free.get(name, 0) < amount for name, amount in demand.items()):
            return False
        return "GPU" not in demand or self._choose_gpus(demand["GPU"]) is not None

    def take(self, demand: Amounts) -> list[int]:
        """Take what `fits` said is there; the indices of the GPUs."""
        for name, amount in demand.items():
            self.free[name] = self.free.get(name, 0) - amount
        gpu_ids = self._choose_gpus(demand.get("GPU", 0)) or []
        for gpu_id in gpu_ids:
            self._gpu_free[gpu_id] -= min(demand["GPU"], UNIT)
        return gpu_ids

    def give_back(self, demand: Amounts, gpu_ids: list[int]) -> None:
        """The reverse of `take`."""
        for name, amount in demand.items():
            self.free[name] += amount
        for gpu_id in gpu_ids:
            self._gpu_free[gpu_id] += min(demand["GPU"], UNIT)

    def _choose_gpus(self, amount: int) -> list[int] | None:
        if amount <= 0:
            return []
        if amount < UNIT:
            # The fullest that still has room: whole ones stay whole for those who need them.
            fitting = [index for index, free in enumerate(self._gpu_free) if free >= amount]
            return [min(fitting, key=lambda index: self._gpu_free[index])] if fitting else None
        whole = [index for index, free in enumerate(self._gpu_free) if free == UNIT]
        count = -(-amount // UNIT)
        return whole[:count] if len(whole) >= count else None
