"""What is too large is named, with its size (line 19 of the list of what others get wrong)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import clusterpool
import clusterpool.multiprocessing as mp


@pytest.mark.parametrize("make", [lambda: np.zeros(80_000_000, np.uint8), lambda: bytes(80_000_000)])
def test_an_argument_that_is_too_large_is_named_with_its_size(fresh: None, make: Callable[[], Any]) -> None:
    clusterpool.init(num_cpus=1, object_store_bytes=64 << 20)
    with mp.Pool(1) as pool:
        with pytest.raises(clusterpool.errors.ObjectTooLarge, match=r"of type (numpy\.ndarray|bytes) with 80\.0 MB"):
            pool.apply_async(len, (make(),)).get(20)
        assert pool.apply(abs, (-1,)) == 1
