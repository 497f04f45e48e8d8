"""docs/key-schema.md names every key, script and field that there is, for who reads a store with `redis-cli`."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType

import pytest

from clusterpool.control_store import actor_scripts, coordination_scripts, scripts
from clusterpool.control_store.keys import Keys
from clusterpool.control_store.records import JobRecord
from clusterpool.control_store.scripts import Script
from clusterpool.core.cluster_view import NodeLoad, NodeRecord
from clusterpool.core.node_messages import ActorPart

SCHEMA = (Path(__file__).parents[2] / "docs" / "key-schema.md").read_text()


@pytest.mark.parametrize("module", [scripts, actor_scripts, coordination_scripts], ids=lambda module: module.__name__)
def test_every_script_is_in_the_schema(module: ModuleType) -> None:
    names = [name for name, value in vars(module).items() if isinstance(value, Script)]
    assert names
    assert [name for name in names if f"| `{name}` |" not in SCHEMA and f"`{name}`." not in SCHEMA] == []


def test_every_key_is_in_the_schema() -> None:
    keys = Keys("c")
    names = {value for name, value in vars(keys).items() if name != "prefix"}
    for name, method in inspect.getmembers(keys, inspect.ismethod):
        if not name.startswith("_"):
            found = method(*["1"] * len(inspect.signature(method).parameters))
            names |= {found} if isinstance(found, str) else set(found)
    stems = {name.removeprefix(keys.prefix).partition(":")[0] for name in names}
    assert {"events", "actor", "carrier"} <= stems
    assert [stem for stem in stems if f"| `…{stem}` |" not in SCHEMA and f"| `…{stem}:<" not in SCHEMA] == []


@pytest.mark.parametrize("record", [NodeRecord, NodeLoad, JobRecord, ActorPart])
def test_every_field_of_a_record_is_in_the_schema(record: type) -> None:
    assert f"`{record.__name__}`" in SCHEMA
    assert [name for name in record.__struct_fields__ if f"`{name}`" not in SCHEMA] == []  # type: ignore[attr-defined]
