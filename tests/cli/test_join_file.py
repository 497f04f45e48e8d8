"""The join file holds secrets: it is written for its owner alone, and refused when others may read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clusterpool.cli.failures import WrongFile
from clusterpool.cli.join_file import JoinFile, join_file_path, read_join_file, remove_join_file, write_join_file
from clusterpool.node.cluster_keys import ClusterKeys


@pytest.fixture
def join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JoinFile:
    monkeypatch.setenv("CLUSTERPOOL_HOME", str(tmp_path / "home"))
    return JoinFile.make("0123abcd", "redis://127.0.0.1:1/0", "secret", ClusterKeys.generate())


def test_what_was_written_is_read_and_nobody_else_may(join: JoinFile) -> None:
    path = write_join_file(join)
    assert path == join_file_path()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert read_join_file(path) == join


def test_a_file_that_others_may_read_is_refused(join: JoinFile) -> None:
    path = write_join_file(join)
    path.chmod(0o640)
    with pytest.raises(WrongFile, match=r"mode 0640.*chmod 600"):
        read_join_file(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 99),
        ("cluster_id", "../../etc"),
        ("keys", "{}"),
        ("keys", '{"server": ["a", "b"], "client": ["c", "d"]}'),
        ("more", 1),
    ],
)
def test_another_content_is_refused(join: JoinFile, key: str, value: object) -> None:
    path = write_join_file(join)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(WrongFile, match="no join file of this version"):
        read_join_file(path)


def test_a_file_that_is_not_there_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(WrongFile, match="clusterpool up"):
        read_join_file(tmp_path / "join.json")


def test_only_the_file_of_the_cluster_that_ended_is_removed(join: JoinFile) -> None:
    path = write_join_file(join)
    remove_join_file("another0")
    assert path.exists()
    remove_join_file(join.cluster_id)
    assert not path.exists()
    remove_join_file(join.cluster_id)
