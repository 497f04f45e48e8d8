"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.engine import check_nothing_left


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test that leaves an object, here or in the store."""
    yield
    check_nothing_left()
