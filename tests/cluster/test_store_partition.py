"""A node that cannot reach the control store, though its peers can."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import clusterpool
from tests.cluster import clusters
from tests.cluster.clusters import Cluster, Counting, clusterpool_command, numbered_node_of_task
from tests.cluster.store_proxy import StoreProxy

pytestmark = pytest.mark.cluster

LIMIT_S = 30.0
# Longer than silence in the store takes to be a death, several times over.
APART_S = 12.0


@dataclass
class Apart:
    """A fourth node, whose way to the control store is a proxy."""

    node_id: str
    address: str
    folder: Path
    proxy: StoreProxy

    def log(self) -> str:
        return (self.folder / "logs" / "node.log").read_text()

    def wait_for_log(self, text: str) -> None:
        clusters.wait_for(lambda: text in self.log(), within_s=LIMIT_S, what=f"the log says {text!r}")


@pytest.fixture
def apart(mortal_nodes: Cluster, tmp_path: Path) -> Iterator[Apart]:
    join = json.loads((Path(os.environ["CLUSTERPOOL_HOME"]) / "join.json").read_text())
    port = int(re.search(r":(\d+)/0$", join["control_store_url"])[1])  # type: ignore[index]
    proxy = StoreProxy(port)
    join["control_store_url"] = f"redis://127.0.0.1:{proxy.port}/0"
    file = tmp_path / "apart.json"
    file.touch(0o600)
    file.write_text(json.dumps(join))
    done = clusterpool_command("start", "--address", str(file), "--num-cpus", "2", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    address = json.loads(done.stdout)["address"]
    folder = Path(address).parent
    yield Apart(folder.name.replace("-", "", 1), address, folder, proxy)
    proxy.resume()
    clusterpool_command("stop", "--node", folder.name.replace("-", "", 1))
    proxy.close()


def run_at(apart: Apart, text: str) -> subprocess.CompletedProcess[str]:
    """A driver of that node."""
    command = [sys.executable, "-c", textwrap.dedent(text)]
    environment = {**os.environ, "CLUSTERPOOL_ADDRESS": apart.address}
    return subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment)


def check_nobody_died(cluster: Cluster, apart: Apart, node_ids: set[str]) -> None:
    assert {node["node_id"] for node in clusterpool.nodes()} == node_ids
    for file in cluster.session_folder.glob("n-*/logs/node.log"):
        log = file.read_text()
        assert "taken for dead" not in log and f"node {apart.node_id} is gone" not in log


@pytest.mark.timeout(120)
def test_a_node_that_only_the_store_does_not_hear_works_on_through_a_peer(
    mortal_nodes: Cluster, apart: Apart, driver: None
) -> None:
    everybody = {*mortal_nodes.node_ids, apart.node_id}
    clusters.wait_for(lambda: len(clusterpool.nodes()) == 4, within_s=LIMIT_S, what="the fourth is known")
    there = clusterpool.remote(num_cpus=0, scheduling=f"node:{apart.node_id}")
    actor = there(Counting).options(name="before").remote()
    assert clusterpool.get(actor.add.remote(), timeout=LIMIT_S)[0] == 1
    with clusterpool.Pool(8) as pool:
        apart.proxy.stall()
        stalled_s = time.monotonic()
        nodes: set[str] = set()
        while time.monotonic() - stalled_s < APART_S:
            nodes |= {node_id for _, node_id in pool.map(numbered_node_of_task, range(40), chunksize=1)}
            clusterpool.get(actor.add.remote(), timeout=30)
        assert nodes == everybody
    apart.wait_for_log("the control store is reached through node")
    # A driver there finds names, makes actors and moves locks, all of which need the store.
    done = run_at(
        apart,
        f"""
        import clusterpool
        from clusterpool.multiprocessing import Lock
        here = clusterpool.init()
        class Box:
            def content(self): return clusterpool.node_id()
        lock = Lock()
        def locked():
            with lock:
                return "locked"
        box = clusterpool.remote(Box).options(name="box", num_cpus=0).remote()
        elsewhere = clusterpool.remote(num_cpus=0, scheduling="node:{mortal_nodes.second}")(locked)
        print(here["node_id"], clusterpool.get(clusterpool.get_actor("box").content.remote(), timeout=30))
        print(clusterpool.get(elsewhere.remote(), timeout=30), len(clusterpool.nodes()))
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == apart.node_id
    assert done.stdout.split()[2:] == ["locked", "4"]
    check_nobody_died(mortal_nodes, apart, everybody)
    apart.proxy.resume()
    apart.wait_for_log("the control store is reached directly again")
    again = there(Counting).options(name="after").remote()
    assert clusterpool.get(again.add.remote(), timeout=LIMIT_S)[0] == 1
    check_nobody_died(mortal_nodes, apart, everybody)


@pytest.mark.timeout(120)
def test_a_node_apart_survives_the_death_of_the_peer_that_helps_it(mortal_nodes: Cluster, apart: Apart) -> None:
    apart.proxy.stall()
    apart.wait_for_log(f"tried through node {mortal_nodes.head}")
    mortal_nodes.kill(mortal_nodes.head)
    killed_s = time.monotonic()
    program = """
        import clusterpool, time
        clusterpool.init()
        deadline_s = time.monotonic() + 30
        while len(clusterpool.nodes()) != 3:
            assert time.monotonic() < deadline_s, clusterpool.nodes()
            time.sleep(0.1)
        class Box:
            def content(self): return 5
        box = clusterpool.remote(Box).options(name="box", num_cpus=0).remote()
        print(clusterpool.get(box.content.remote(), timeout=40))
        """
    done = run_at(apart, program)
    assert (done.stdout, done.returncode) == ("5\n", 0), done.stderr
    assert time.monotonic() - killed_s < 40
    # Who names no node is led to one that lives, though the recorded one was the head.
    status = json.loads(clusterpool_command("status", "--json").stdout)
    living = {mortal_nodes.second, mortal_nodes.third, apart.node_id}
    assert {node["node_id"] for node in status["nodes"]} == living
    assert re.search(f"tried through node ({mortal_nodes.second}|{mortal_nodes.third})", apart.log())
    # The server's keeper died with the head: another node of the host has taken its place.
    record = mortal_nodes.session_folder / "store" / "control-store.json"
    pid = json.loads(record.read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    clusters.wait_for(
        lambda: json.loads(record.read_text())["pid"] != pid, within_s=LIMIT_S, what="the server is started again"
    )
    done = run_at(apart, program)
    assert (done.stdout, done.returncode) == ("5\n", 0), done.stderr
