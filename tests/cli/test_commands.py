"""The commands on real clusters of one or two nodes: what they print, their exit codes, and what stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import answer_of, clusterpool_command
from tests.waiting import is_alive, wait_for

SMALL = ("--num-cpus", "1", "--object-store-memory", "64MiB")


@pytest.fixture
def one_node() -> Iterator[dict[str, Any]]:
    """A cluster of one node with one CPU."""
    started = answer_of("up", *SMALL, "--name", "only", "--label", "zone=a", "--resources", '{"ssd": 2}')
    yield started
    clusterpool_command("down")


def forge_join_file(started: dict[str, Any], folder: Path, **changes: str) -> Path:
    """That of the cluster with changes, and in the name of another: it must not be taken for the one that is here."""
    join = json.loads(Path(started["join_file"]).read_text())
    forged = folder / "join.json"
    forged.write_text(json.dumps({**join, **changes, "cluster_id": "00000000"}))
    forged.chmod(0o600)
    return forged


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("down",),
        ("stop",),
        ("run", __file__),
        ("run", "--patch", __file__),
        ("stop", "--node", "n0000000000"),
    ],
)
def test_without_a_cluster_commands_say_so_and_exit_with_3(arguments: tuple[str, ...]) -> None:
    done = clusterpool_command(*arguments)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("Error: no ")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("start",), "--head"),
        (("start", "--head", "--address", "x"), "--head"),
        (("start", "--address", "/nowhere/join.json"), "cannot be read"),
        (("up", "/nowhere/cluster.yaml"), "does not exist"),
        (("up", "--resources", "ssd"), "not JSON"),
        (("up", "--resources", '{"ssd": "many"}'), "names and numbers"),
        (("up", "--resources", '{"GPU": 1}'), "num_gpus"),
        (("up", "--num-cpus", "-1"), "--num-cpus: a number of 0 or more"),
        (("up", "--memory", "lots"), "--memory: a size"),
        (("up", "--label", "zone"), "NAME=VALUE"),
        (("up", "--port", "99999"), "99999"),
        (("run", "/nowhere.py"), "does not exist"),
        (("nonsense",), "No such command"),
    ],
)
def test_wrong_usage_starts_nothing_and_exits_with_2(arguments: tuple[str, ...], text: str) -> None:
    done = clusterpool_command(*arguments)
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_options_of_a_node_do_not_go_with_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("head: {}")
    done = clusterpool_command("up", file, "--num-cpus", "2")
    assert done.returncode == 2
    assert "belongs into the cluster file" in done.stderr


def test_a_cluster_from_up_to_down(one_node: dict[str, Any]) -> None:
    status = answer_of("status")
    assert status["cluster_id"] == one_node["cluster_id"]
    assert status["total"]["CPU"] == 1 and status["total"]["ssd"] == 2
    assert not any(name.startswith("node:") for name in status["total"])
    (node,) = status["nodes"]
    assert node["alive"] and node["is_head"] and node["store_bytes"] == 64 << 20
    shown = clusterpool_command("status")
    assert shown.returncode == 0
    assert f"{node['node_id']} only" in shown.stdout and "alive, head" in shown.stdout
    assert "ssd 0/2, zone=a" in shown.stdout
    assert node["labels"] == {"name": "only", "zone": "a"}
    again = clusterpool_command("up")
    assert again.returncode == 4
    assert "clusterpool down" in again.stderr
    ended = answer_of("down")
    assert ended == {
        "cluster_id": one_node["cluster_id"], "ended": [node["node_id"]], "killed": [], "remaining": [],
        "control_store_ended": True,
    }  # fmt: skip
    assert not is_alive(node["pid"])
    assert not Path(one_node["join_file"]).exists()
    assert clusterpool_command("down").returncode == 3


def test_of_two_starts_at_once_one_is_refused() -> None:
    command = [sys.executable, "-m", "clusterpool.cli", "up", *SMALL]
    starts = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        texts = [start.communicate(timeout=50)[1] for start in starts]
    finally:
        down = clusterpool_command("down")
    assert sorted(start.returncode for start in starts) == [0, 4], texts
    assert "runs on this host already" in "".join(texts)
    assert down.returncode == 0


def test_secrets_are_for_their_owner_alone(one_node: dict[str, Any]) -> None:
    session = Path(one_node["session_folder"])
    secrets = [session / "keys.json", session / "password", Path(one_node["join_file"]), *session.glob("store/*.conf")]
    assert len(secrets) == 4
    for path in [*secrets, *session.glob("n-*/node.json")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(session.stat().st_mode) == 0o700
    password = (session / "password").read_text()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                command_line = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            assert password.encode() not in command_line


def test_the_control_store_refuses_whoever_has_no_password(one_node: dict[str, Any]) -> None:
    import redis

    client = redis.Redis.from_url(one_node["control_store"])
    with pytest.raises(redis.exceptions.AuthenticationError):
        client.ping()
    client.close()


def test_a_program_joins_the_recorded_cluster(one_node: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import clusterpool\n"
        "print(clusterpool.init()['is_embedded'], sorted(clusterpool.cluster_resources()))\n"
        "with clusterpool.Pool(2) as pool:\n"
        "    print(pool.map(abs, [-1, -2]))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50)
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first.startswith("False") and "ssd" in first
    assert second == "[1, 2]"


def test_a_second_node_joins_and_stops(one_node: dict[str, Any]) -> None:
    joined = answer_of("start", "--address", one_node["join_file"], *SMALL, "--name", "second")
    assert joined["cluster_id"] == one_node["cluster_id"]
    (second,) = {node["node_id"] for node in joined["nodes"]} - {one_node["nodes"][0]["node_id"]}
    assert {node["node_id"] for node in answer_of("status")["nodes"]} >= {second}
    stopped = answer_of("stop", "--node", second)
    assert [report["ended"] for report in stopped] == [[second]]
    assert stopped[0]["control_store_ended"] is False
    wait_for(lambda: len(answer_of("status")["nodes"]) == 1, what="the head hears of it")


def test_stop_without_a_name_ends_the_cluster_that_is_only_here(one_node: dict[str, Any]) -> None:
    done = clusterpool_command("start", "--address", one_node["join_file"], *SMALL)
    assert re.match(f"Node n[0-9a-f]+ is part of cluster {one_node['cluster_id']}: 2 nodes, ", done.stdout)
    stopped = answer_of("stop")
    assert len(stopped[0]["ended"]) == 2
    assert stopped[0]["control_store_ended"] is True
    assert clusterpool_command("status").returncode == 3


def test_a_node_with_wrong_keys_of_the_store_is_refused(one_node: dict[str, Any], tmp_path: Path) -> None:
    forged = forge_join_file(one_node, tmp_path, control_store_password="wrong")
    done = clusterpool_command("start", "--address", forged, *SMALL)
    assert done.returncode == 1
    assert "refused our password" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(answer_of("status")["nodes"]) == 1


def test_a_node_of_a_cluster_that_is_not_there_says_so_soon(one_node: dict[str, Any], tmp_path: Path) -> None:
    forged = forge_join_file(one_node, tmp_path, control_store_url="redis://127.0.0.1:1/0")
    done = clusterpool_command("start", "--address", forged, *SMALL)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: the control store at redis://127.0.0.1:1/0 did not answer: ")
    assert "Traceback" not in done.stderr


def test_a_node_of_another_python_is_refused_and_both_are_named(one_node: dict[str, Any]) -> None:
    from clusterpool.control_store.store import ControlStore
    from clusterpool.core.cluster_view import NodeLoad, NodeRecord

    join = json.loads(Path(one_node["join_file"]).read_text())
    store = ControlStore.connect(
        join["control_store_url"], cluster_id=join["cluster_id"], password=join["control_store_password"]
    )
    # The node that starts below is the one of another Python, to this one that was there before it.
    old = NodeRecord("n0ld", "192.0.2.7", 7, "", {"CPU": 1.0}, host_name="attic", python_version="2.7.18")
    old_incarnation = store.register_node(old)
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(0.5):  # else it is taken for dead while the other one starts slowly
            store.heartbeat("n0ld", old_incarnation, NodeLoad(available={"CPU": 1.0}))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        done = clusterpool_command("start", "--address", one_node["join_file"], *SMALL)
    finally:
        is_over.set()
        beating.join()
        store.remove_node("n0ld", old_incarnation)
        store.close()
    assert done.returncode == 1
    for part in ("node n0ld on attic", "Python 2.7.18", f"Python {sys.version.split()[0]}", "cannot join"):
        assert part in done.stderr
    wait_for(lambda: len(answer_of("status")["nodes"]) == 1, what="the head has forgotten both")


def test_a_cluster_whose_head_was_killed_is_cleaned_up_by_the_next(one_node: dict[str, Any]) -> None:
    pid = one_node["nodes"][0]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(pid), what="it is dead")
    wait_for(lambda: clusterpool_command("status").returncode == 3, what="its lock is gone")
    done = clusterpool_command("status")
    assert "is recorded, but its node on this host has ended" in done.stderr
    started = answer_of("up", *SMALL)
    assert started["cluster_id"] != one_node["cluster_id"]
    assert not Path(one_node["session_folder"]).exists()
    assert answer_of("down")["control_store_ended"] is True


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("listen_host: 192.0.2.1\nhead: {num_cpus: 1, object_store_memory: 64MiB}\n")
    done = clusterpool_command("up", file)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: nothing can listen at '192.0.2.1'")
    assert clusterpool_command("status").returncode == 3  # the fixture of all tests looks for processes and files


def test_a_port_that_is_taken_is_named(one_node: dict[str, Any]) -> None:
    port = one_node["nodes"][0]["address"].rpartition(":")[2]
    done = clusterpool_command("start", "--address", one_node["join_file"], *SMALL, "--port", port)
    assert done.returncode == 1
    assert f"could not listen at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(answer_of("status")["nodes"]) == 1


def test_a_node_that_does_not_end_is_killed_and_told_of(
    one_node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clusterpool.cli import local_nodes
    from clusterpool.config import SessionPaths

    (node,) = local_nodes.living_nodes(SessionPaths(Path(one_node["session_folder"])))
    os.kill(node.identity.pid, signal.SIGSTOP)
    assert local_nodes.end_nodes([node], timeout_s=0.2) == [node]
    assert not is_alive(node.identity.pid)
    assert clusterpool_command("down").returncode == 0
