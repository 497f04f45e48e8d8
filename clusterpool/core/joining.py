"""Whether two processes may work together: the same protocol, clusterpool and minor version of Python.

Functions travel as byte code and values as pickles of classes of ours, and neither survives another version.
So a process that joins a node is refused at once, with both versions named, rather than later by an error of
unpickling.
"""

from __future__ import annotations

from clusterpool.core.cluster_view import NodeRecord
from clusterpool.core.messages import Hello, Message


class RegistrationRefused(Message, frozen=True):
    """Answer to RegisterProcess, or to a Hello: the node will not let this process join."""

    text: str


def mismatch(ours: Hello, theirs: Hello) -> str:
    """Why the two cannot work together, naming both; empty if they can."""
    if _numbers(ours) == _numbers(theirs):
        return ""
    return (
        f"{_describe(theirs)}, but {_describe(ours)}; they exchange functions and pickled values, so they "
        "need the same clusterpool and the same minor version of Python: use the same environment for both"
    )


def node_mismatch(ours: NodeRecord, theirs: NodeRecord) -> str:
    """Why a node that joins cannot work with one that is there, naming both; empty if it can."""
    is_same = (ours.python_version, ours.clusterpool_version) == (theirs.python_version, theirs.clusterpool_version)
    if is_same or _node_numbers(ours) == _node_numbers(theirs):
        return ""
    return (
        f"{_describe_node(theirs)} cannot join: {_describe_node(ours)}; the nodes of a cluster exchange functions and "
        "pickled values, so they need the same clusterpool and the same minor version of Python: use the same "
        "environment on all of them"
    )


def _node_numbers(record: NodeRecord) -> tuple[str, list[str]]:
    return record.clusterpool_version, record.python_version.split(".")[:2]


def _describe_node(record: NodeRecord) -> str:
    version = record.clusterpool_version or "of an unknown version"
    return (
        f"node {record.node_id} on {record.host_name or record.host} runs clusterpool {version} "
        f"on Python {record.python_version}"
    )


def _numbers(hello: Hello) -> tuple[int, str, list[str]]:
    return hello.protocol, hello.version, hello.python_version.split(".")[:2]


def _describe(hello: Hello) -> str:
    version = hello.version or "of an unknown version"
    return (
        f"{hello.kind} {hello.address.process_id} (pid {hello.pid}) runs clusterpool {version} "
        f"(protocol {hello.protocol}) on Python {hello.python_version}"
    )
