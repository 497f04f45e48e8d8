"""Sizes as people write them."""

from __future__ import annotations

import pytest

from clusterpool.sizes import memory_amount, parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (0, 0),
        (17, 17),
        ("17", 17),
        ("17 B", 17),
        ("2k", 2048),
        ("2KB", 2000),
        ("2 KiB", 2048),
        ("1.5 GiB", 3 << 29),
        ("1.5gb", 1_500_000_000),
        ("1T", 1 << 40),
    ],
)
def test_a_number_with_a_unit(text: str | int, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3", "-1", "1 PiB", "12 lots", -1])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (300 << 20, "300 MiB"), (5 << 40, "5.0 TiB")],
)
def test_a_size_is_shown_in_the_unit_that_suits_it(size_bytes: int, text: str) -> None:
    assert show_size(size_bytes) == text


@pytest.mark.parametrize(("size_bytes", "text"), [(0, "0 MB"), (85_400_000, "85 MB"), (1_250_000_000, "1.2 GB")])
def test_amounts_of_memory_are_short(size_bytes: int, text: str) -> None:
    assert memory_amount(size_bytes) == text
