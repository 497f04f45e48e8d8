"""A worker is forked once the packages of its job are unpacked, and the cache of packages stays bounded."""

from __future__ import annotations

import itertools
import json

import msgspec
import pytest

from clusterpool.core import environments as env
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core.cluster_view import NodeRecord
from clusterpool.core.messages import Address
from clusterpool.core.node import NodeMachine

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
DRIVER = Address("n1", "d1")


def fork(process_id: str, *digests: str, job_id: str = "j1") -> e.ForkWorker:
    return e.ForkWorker(process_id, job(json.dumps({"py_modules": list(digests)}), job_id), {}, "")


def job(runtime_env: str, job_id: str = "j1") -> m.JobPart:
    return m.JobPart(job_id, "default", "host", "/", [], "", {}, runtime_env, DRIVER)


def test_a_fork_waits_for_the_last_of_its_packages() -> None:
    environments = env.Environments()
    command = fork("w1", A, B)
    assert environments.admit(command) == [env.FetchPackage(A), env.FetchPackage(B)]
    assert environments.unpacked(env.PackageUnpacked(B, 1)) == []
    assert environments.unpacked(env.PackageUnpacked(A, 1)) == [command]
    assert environments.admit(command) == [command]


def test_a_package_is_fetched_once_for_all_that_wait() -> None:
    environments = env.Environments()
    first, second = fork("w1", A), fork("w2", A)
    assert environments.admit(first) == [env.FetchPackage(A)]
    assert environments.admit(second) == []
    assert environments.unpacked(env.PackageUnpacked(A, 1)) == [first, second]
    assert environments.admit(fork("w3", A)) == [fork("w3", A)]


def test_what_another_job_may_have_changed_is_looked_at_again() -> None:
    environments = env.Environments()
    environments.admit(fork("w1", A))
    environments.unpacked(env.PackageUnpacked(A, 1))
    environments.admit(fork("w1", A))
    second, third = fork("w2", A, job_id="j2"), fork("w3", A, job_id="j3")
    assert environments.admit(second) == [second], "the two jobs run at the same time: they share it"
    environments.worker_ended("w1")
    environments.worker_ended("w2")
    assert environments.admit(fork("w4", A, job_id="j2")) == [fork("w4", A, job_id="j2")], "what it wrote is there"
    environments.worker_ended("w4")
    assert environments.admit(third) == [env.FetchPackage(A)]
    assert environments.admit(fork("w5", A, job_id="j4")) == []
    assert environments.unpacked(env.PackageUnpacked(A, 1)) == [third, fork("w5", A, job_id="j4")]
    assert environments.admit(third) == [third]
    assert environments.admit(fork("w5", A, job_id="j4")) == [fork("w5", A, job_id="j4")]


def test_what_was_looked_at_for_nobody_is_not_looked_at_again() -> None:
    environments = env.Environments()
    environments.admit(fork("w1", A))
    environments.cancel("w1")
    assert environments.unpacked(env.PackageUnpacked(A, 1)) == []
    assert environments.admit(fork("w2", A, job_id="j2")) == [fork("w2", A, job_id="j2")]


def test_a_failed_package_fails_those_who_wait_and_is_tried_again() -> None:
    environments = env.Environments()
    environments.admit(fork("w1", A))
    environments.admit(fork("w2", B))
    assert environments.failed(env.PackageFailed(A, "gone")) == ["w1"]
    assert environments.admit(fork("w3", A)) == [env.FetchPackage(A)]


def test_the_package_used_longest_ago_goes_first() -> None:
    environments = env.Environments(bytes_max=25)
    for digest, process_id in ((A, "w1"), (B, "w2")):
        environments.admit(fork(process_id, digest))
        environments.unpacked(env.PackageUnpacked(digest, 10))
        environments.admit(fork(process_id, digest))
        environments.worker_ended(process_id)
    environments.admit(fork("w3", A))  # A is now the one used last
    environments.worker_ended("w3")
    environments.admit(fork("w4", C))
    assert environments.unpacked(env.PackageUnpacked(C, 10)) == [env.DropPackage(B), fork("w4", C)]
    assert environments.admit(fork("w5", B)) == [env.FetchPackage(B)]


def test_a_package_in_use_is_never_dropped() -> None:
    environments = env.Environments(bytes_max=5)
    environments.admit(fork("w1", A))
    environments.unpacked(env.PackageUnpacked(A, 10))
    assert environments.admit(fork("w1", A)) == [fork("w1", A)]
    environments.admit(fork("w2", B))
    assert environments.unpacked(env.PackageUnpacked(B, 10)) == [fork("w2", B)]  # A's worker lives
    environments.worker_ended("w1")
    environments.admit(fork("w3", C))
    assert env.DropPackage(A) in environments.unpacked(env.PackageUnpacked(C, 10))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"working_dir": "../../etc"}',
        '{"py_modules": ["' + "A" * 64 + '"]}',
        '{"pip": []}',
    ],
)
def test_a_malformed_environment_is_refused(text: str) -> None:
    with pytest.raises(msgspec.MsgspecError):
        env.parse_environment(text)


# --- within the node's machine


def machine() -> NodeMachine:
    record = NodeRecord("n1", "127.0.0.1", 0, "", {"CPU": 2.0})
    ids = (f"w{number}" for number in itertools.count(1))
    node = NodeMachine(record, arena_bytes=1 << 20, is_embedded=False, is_head=True, process_ids=ids)
    node.handle(e.ProcessJoined(DRIVER, "driver", 1, job(""), False), 0.0)
    return node


def request(node: NodeMachine, runtime_env: str, count: int = 1) -> list[object]:
    demand = m.WorkerDemand(m.WorkerKind.GROUP, {})
    message = m.RequestWorkers(7, count, demand, job(runtime_env))
    return node.handle(e.MessageArrived(DRIVER, message), 0.0)


def sent(commands: list[object], kind: type) -> list[object]:
    return [c.message for c in commands if isinstance(c, e.Send) and isinstance(c.message, kind)]


WITH_A = json.dumps({"working_dir": A})


def test_the_node_forks_only_when_the_package_is_unpacked() -> None:
    node = machine()
    assert request(node, WITH_A, 2) == [env.FetchPackage(A)]
    commands = node.handle(env.PackageUnpacked(A, 10), 1.0)
    assert [c.process_id for c in commands if isinstance(c, e.ForkWorker)] == ["w1", "w2"]


def test_the_request_fails_when_the_package_does() -> None:
    node = machine()
    request(node, WITH_A, 2)
    commands = node.handle(env.PackageFailed(A, "it is gone"), 1.0)
    failures = sent(commands, m.RequestFailed)
    assert [(f.request, f.count, f.kind) for f in failures] == [(7, 1, "environment")] * 2  # type: ignore[attr-defined]
    assert "it is gone" in failures[0].text  # type: ignore[attr-defined]
    assert not node.scheduler.workers and not node.scheduler.leases


def test_a_malformed_environment_fails_the_request() -> None:
    node = machine()
    failures = sent(request(node, '{"pip": []}'), m.RequestFailed)
    assert [f.kind for f in failures] == ["environment"]  # type: ignore[attr-defined]
    assert not node.scheduler.workers


def test_a_driver_leaves_at_once_while_its_workers_wait_for_a_package() -> None:
    node = machine()
    request(node, WITH_A)
    commands = node.handle(e.MessageArrived(DRIVER, m.LeaveNode()), 1.0)
    assert sent(commands, m.LeftNode)
    assert not any(isinstance(c, e.EndWorker) for c in commands), "there is no process to end"
    assert node.handle(env.PackageUnpacked(A, 10), 2.0) == []
