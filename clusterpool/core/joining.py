"""Whether two processes may work together: the same protocol, clusterpool and minor version of Python.

Functions travel as byte code and values as pickles of classes of ours, and neither survives another version.
So a process that joins a node is refused at once, with both versions named, rather than later by an error of
unpickling.
"""

from __future__ import annotations

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


def _numbers(hello: Hello) -> tuple[int, str, list[str]]:
    return hello.protocol, hello.version, hello.python_version.split(".")[:2]


def _describe(hello: Hello) -> str:
    version = hello.version or "of an unknown version"
    return (
        f"{hello.kind} {hello.address.process_id} (pid {hello.pid}) runs clusterpool {version} "
        f"(protocol {hello.protocol}) on Python {hello.python_version}"
    )
