"""The table of `clusterpool status`, in terminals of all widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from clusterpool.cli.status import Target, render
from clusterpool.core.messages import NodePart

NODES = [
    NodePart(
        node_id=f"n000000000{number}",
        host="machine",
        alive=number != 2,
        is_head=number == 1,
        total={"CPU": 64.0, "memory": 2.0**35, "ssd": 2.0},
        available={"CPU": 1.5, "memory": 2.0**35, "ssd": 2.0},
        workers=120,
        queue_length=7,
        store_bytes=2**33,
        store_used_bytes=2**32,
        spilled_bytes=0,
        pid=1,
        address="192.168.100.100:46251",
        labels={"name": "[big]", "zone": "a"},
    )
    for number in (1, 2)
]


def shown(width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(render(Target("/s/n/node.sock", None), NODES, width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 130, 200])
def test_what_is_shown_is_shown_whole(width: int) -> None:
    text = shown(width)
    assert "…" not in text
    assert "n0000000001 [big]" in text
    assert "62.5/64" in text
    assert "alive, head" in text
    assert "silent" in text
    assert max(map(len, text.splitlines())) <= width


def test_a_wide_terminal_shows_all() -> None:
    assert all(part in shown(200) for part in ("192.168.100.100:46251", "ssd 0/2, zone=a", "4.0 GiB/8.0 GiB", "120"))


def test_a_usual_terminal_shows_the_store_and_the_workers() -> None:
    assert all(part in shown(80) for part in ("STORE", "WORKERS", "QUEUE"))
