"""The allocator and the store's index: the machines of tests/core, as long as was asked for."""

from __future__ import annotations

from tests.core.test_allocator import AllocatorMachine
from tests.core.test_store_random import StoreMachine
from tests.fuzz.searches import search


class LongAllocatorMachine(AllocatorMachine):
    """Settings belong to a class."""


class LongStoreMachine(StoreMachine):
    """Likewise."""


TestAllocator = LongAllocatorMachine.TestCase
TestAllocator.settings = search(20)
TestStore = LongStoreMachine.TestCase
TestStore.settings = search(20)
