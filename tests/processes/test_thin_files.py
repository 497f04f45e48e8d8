"""The files of semaphores and cells go with their job, with their node, and after kill -9 with the next start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterpool.config import NodeConfig, SessionPaths
from clusterpool.ids import new_node_id, new_session_id
from clusterpool.processes.session_folder import make_node_folder
from clusterpool.processes.sweep import sweep_stale_sessions
from clusterpool.processes.thin_files import cell_path, remove_thin_files, semaphore_name, semaphore_path

ARENA = Path("/dev/shm/arena")


@pytest.fixture
def node_id() -> Iterator[str]:
    node_id = new_node_id()
    yield node_id
    remove_thin_files(node_id)


def make_semaphore(node_id: str, name: str) -> Path:
    from _multiprocessing import SemLock  # type: ignore[import-not-found]

    SemLock(1, 1, 1, semaphore_name(node_id, name), False)
    return semaphore_path(node_id, name)


def test_a_semaphore_lies_where_it_is_looked_for(node_id: str) -> None:
    path = make_semaphore(node_id, "j1-d1-1")
    assert path.exists()
    remove_thin_files(node_id)
    assert not path.exists()


def test_only_what_belongs_to_the_job_is_removed(node_id: str) -> None:
    ended = [make_semaphore(node_id, "j1-d1-1"), cell_path(ARENA, node_id, "j1-d1-2")]
    others = [make_semaphore(node_id, "j12-d1-1"), cell_path(ARENA, node_id, "j2-d1-2")]
    for path in (ended[1], others[1]):
        path.touch()
    remove_thin_files(node_id, "j1")
    assert [path.exists() for path in ended] == [False, False]
    assert [path.exists() for path in others] == [True, True]


def test_cells_beside_an_arena_elsewhere_are_removed(node_id: str, tmp_path: Path) -> None:
    path = cell_path(tmp_path / "arena", node_id, "j1-d1-1")
    path.touch()
    remove_thin_files(node_id, folders=[tmp_path, tmp_path / "gone"])
    assert not path.exists()


def test_the_sweep_removes_those_of_dead_nodes_only(node_id: str) -> None:
    session = SessionPaths.in_base(new_session_id())
    config = NodeConfig(session_folder=str(session.folder), node_id=node_id, cluster_id="c1")
    lock = make_node_folder(config)
    semaphore, cell = make_semaphore(node_id, "j1-d1-1"), cell_path(ARENA, node_id, "j1-d1-2")
    cell.touch()
    sweep_stale_sessions([session.folder.parent])
    assert semaphore.exists() and cell.exists()
    lock.close()  # as after kill -9
    sweep_stale_sessions([session.folder.parent])
    assert not semaphore.exists() and not cell.exists()
