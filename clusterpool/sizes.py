"""Sizes in bytes as people write and read them: `512MiB`, `1.5 GB`."""

from __future__ import annotations

import re

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_FACTOR_BY_UNIT = {"": 1, "B": 1} | {
    unit: base**power
    for power, letter in enumerate("KMGT", start=1)
    for unit, base in ((f"{letter}B", 1000), (f"{letter}IB", 1024), (letter, 1024))
}


def parse_size(text: str | int) -> int:
    """Bytes: a whole number, or a number with a unit (MB is a million bytes, MiB and M are 1024 * 1024).

    Raises: ValueError.
    """
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size cannot be negative: {text}")
        return text
    match = _PATTERN.fullmatch(text)
    factor = _FACTOR_BY_UNIT.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"a size is a number of bytes or one with a unit, as 512MiB or 1.5GB: {text!r}")
    return int(float(match[1]) * factor)


def show_size(size_bytes: float) -> str:
    """The size in the unit that suits it, as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 100 else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def memory_amount(size_bytes: float) -> str:
    """As messages about memory say it: `1.2 GB`, `85 MB`."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
