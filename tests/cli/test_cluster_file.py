"""A cluster file is checked as a whole before anything starts, and what is wrong is named by its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterpool.cli.cluster_file import ClusterPlan, read_cluster_file
from clusterpool.cli.failures import ExitCode, WrongFile


def read(folder: Path, text: str) -> ClusterPlan:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return read_cluster_file(file)


def test_an_empty_file_is_a_head_alone(tmp_path: Path) -> None:
    plan = read(tmp_path, "")
    assert [node.num_cpus for node in plan.all_nodes()] == [None]
    assert plan.listen_host == "127.0.0.1"


def test_what_has_nothing_behind_it_is_as_if_left_out(tmp_path: Path) -> None:
    text = "control_store:\nhead: {num_cpus: 2, resources: , memory: }\nnodes:\n# - {num_cpus: 4}\n"
    assert read(tmp_path, text) == read(tmp_path, "head: {num_cpus: 2}")


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    plan = read(
        tmp_path,
        """
        listen_host: 127.0.0.1
        control_store: {port: 7000}
        head: {num_cpus: 2, num_gpus: 0, memory: 4GiB, object_store_memory: 512MiB, port: 7001}
        nodes:
          - {name: big, host: localhost, num_cpus: 4, resources: {ssd: 0.5}, labels: {zone: a}, spill_folder: /tmp/x}
          - {num_cpus: 1, count: 3}
        """,
    )
    assert [node.num_cpus for node in plan.all_nodes()] == [2, 4, 1, 1, 1]
    assert plan.nodes[0].resources == {"ssd": 0.5}
    assert plan.head.memory == "4GiB"


def test_a_password_file_is_looked_for_beside_the_cluster_file(tmp_path: Path) -> None:
    plan = read(tmp_path, "control_store: {url: 'redis://h:1/0', password_file: secret}")
    assert plan.control_store.password_file == str(tmp_path / "secret")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("head: {num_cpus: two}", "head.num_cpus: "),
        ("head: {num_cpus: -1}", "head.num_cpus: a number of 0 or more, not -1"),
        ("head: {num_cpus: .inf}", "head.num_cpus: "),
        ("head: {cpus: 2}", "unknown field `cpus`; the fields here are name, host, num_cpus"),
        ("hed: {}", "unknown field `hed`; the fields here are listen_host, control_store, head, nodes"),
        ("control_store: {prot: 1}", "unknown field `prot`; the fields here are port, url"),
        ("head: {memory: 4 lots}", "head.memory: a size is a number of bytes"),
        ("head: {port: 70000}", "head.port: a port is 0"),
        ("head: {count: 2}", "head.count: a cluster has one head"),
        ("nodes: [{count: 0}]", "nodes[0].count: 1 or more"),
        ("nodes: [{}, {count: 2, port: 7}]", "nodes[1].port: 2 nodes cannot share port 7"),
        ("nodes: [{port: 7}, {port: 7}]", "nodes[1].port: 7 is taken by another part"),
        ("nodes: {num_cpus: 2}", "nodes: "),
        ("nodes: [{host: elsewhere.example}]", "nodes[0].host: 'elsewhere.example' is not this machine"),
        ("head: {resources: {CPU: 2}}", "head.resources: say num_cpus"),
        ("head: {resources: {ssd: -2}}", "head.resources.ssd: a number of 0 or more"),
        ("head: {labels: {zone: 1}}", "head.labels"),
        ("control_store: {url: 'redis://h', port: 2}", "control_store: give port"),
        ("control_store: {password_file: x}", "control_store.password_file: it belongs to a url"),
        ("[1, 2]", "is wrong: Expected `object`, got `array`"),
        ("head: [", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(WrongFile) as caught:
        read(tmp_path, text)
    assert place in str(caught.value)
    assert "cluster.yaml" in str(caught.value)
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongFile, match=r"nowhere\.yaml cannot be read"):
        read_cluster_file(tmp_path / "nowhere.yaml")
