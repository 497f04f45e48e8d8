"""A quarter of the crash matrix (cells.py): whoever is killed, and whenever, what was promised happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.cells import Cell, quarter
from tests.faults.crash import run_cell
from tests.faults.hosts import Hosts

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("cell", quarter(2), ids=str)
def test_what_was_promised_happens(cell: Cell, mended_hosts: Hosts, tmp_path: Path) -> None:
    run_cell(cell, mended_hosts, tmp_path)
