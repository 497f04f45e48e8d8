"""What a cluster shall be made of: a cluster file (YAML), or the options of one node, checked before anything starts.

listen_host: 127.0.0.1        # where the control store and the nodes listen
control_store: {port: 0}      # or url:, and password_file:, of a server that runs already
head: {num_cpus: 2}
nodes:
  - {name: big, num_cpus: 4, resources: {ssd: 1}, labels: {zone: a}, port: 7101, count: 1}
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import msgspec

from clusterpool.cli.failures import WrongFile
from clusterpool.sizes import parse_size

# Names that the cluster itself gives amounts to.
_RESERVED_RESOURCES = {
    "CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory", "object_store_memory": "object_store_memory",
}  # fmt: skip
_NODES_MAX = 1000


class NodePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One node, or `count` equal ones. None: what the host has, shared by its nodes."""

    name: str = ""
    host: str = "localhost"
    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | str | None = None
    object_store_memory: int | str | None = None
    memory_limit: int | str | None = None
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    port: int = 0
    spill_folder: str | None = None
    count: int = 1


class ControlStorePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A server of the cluster's own at `port` (0: any free one), or one that runs already at `url`."""

    port: int = 0
    url: str | None = None
    password_file: str | None = None


class ClusterPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole cluster."""

    listen_host: str = "127.0.0.1"
    control_store: ControlStorePlan = ControlStorePlan()
    head: NodePlan = NodePlan()
    nodes: list[NodePlan] = []

    def all_nodes(self) -> list[NodePlan]:
        """The head, and each other node as often as its `count` says."""
        return [self.head, *(node for node in self.nodes for _ in range(node.count))]


def read_cluster_file(path: Path) -> ClusterPlan:
    """The cluster that a file describes.

    Raises: WrongFile, with the place in the file and what may stand there.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise WrongFile(f"the cluster file {path} cannot be read: {exc}") from exc
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise WrongFile(f"the cluster file {path} is not YAML: {exc}") from exc
    try:
        plan = msgspec.convert({} if found is None else _without_empty(found), ClusterPlan)
        check_plan(plan)
    except ValueError as exc:  # msgspec's ValidationError is one
        raise WrongFile(f"the cluster file {path} is wrong: {_explained(exc)}; docs/cli.md describes it") from exc
    folder = path.absolute().parent
    password_file = plan.control_store.password_file
    if password_file is not None:
        store = msgspec.structs.replace(plan.control_store, password_file=str(folder / password_file))
        plan = msgspec.structs.replace(plan, control_store=store)
    return plan


def _without_empty(found: Any) -> Any:
    """`nodes:` with nothing behind it, as when its lines are comments, is as if it were left out."""
    if isinstance(found, dict):
        return {name: _without_empty(value) for name, value in found.items() if value is not None}
    return [_without_empty(value) for value in found] if isinstance(found, list) else found


def check_plan(plan: ClusterPlan) -> None:
    """Raises: ValueError that names the place, as in `nodes[1].port: ...`."""
    store = plan.control_store
    if not plan.listen_host:
        raise ValueError("listen_host: an address of this machine is wanted")
    if store.url is not None and store.port:
        raise ValueError("control_store: give port for a server of the cluster's own, or url for one that runs already")
    if store.password_file is not None and store.url is None:
        raise ValueError(
            "control_store.password_file: it belongs to a url; the cluster's own server gets a new password"
        )
    _check_port("control_store.port", store.port)
    if plan.head.count != 1:
        raise ValueError(f"head.count: a cluster has one head, not {plan.head.count}")
    used_ports = {store.port} - {0}
    for place, node in [("head", plan.head), *((f"nodes[{i}]", node) for i, node in enumerate(plan.nodes))]:
        _check_node(place, node)
        if node.port in used_ports:
            raise ValueError(f"{place}.port: {node.port} is taken by another part of this cluster")
        used_ports |= {node.port} - {0}
    if len(plan.all_nodes()) > _NODES_MAX:
        raise ValueError(f"nodes: at most {_NODES_MAX} on one machine")


def _check_node(place: str, node: NodePlan) -> None:
    if node.host not in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
        raise ValueError(
            f"{place}.host: {node.host!r} is not this machine; nodes of other machines join by themselves: run "
            "`clusterpool start --address FILE` there, with the join file that `clusterpool up` wrote here"
        )
    if node.count < 1:
        raise ValueError(f"{place}.count: 1 or more, not {node.count}")
    if node.count > 1 and node.port:
        raise ValueError(f"{place}.port: {node.count} nodes cannot share port {node.port}; leave it out")
    _check_port(f"{place}.port", node.port)
    for name in ("num_cpus", "num_gpus"):
        _check_amount(f"{place}.{name}", getattr(node, name))
    for name in ("memory", "object_store_memory", "memory_limit"):
        size = getattr(node, name)
        try:
            parse_size(0 if size is None else size)
        except ValueError as exc:
            raise ValueError(f"{place}.{name}: {exc}") from exc
    for name, amount in node.resources.items():
        if name in _RESERVED_RESOURCES:
            raise ValueError(
                f"{place}.resources: say {_RESERVED_RESOURCES[name]}: rather than resources: {{{name}: ...}}"
            )
        if not name or name.startswith("node:"):
            raise ValueError(f"{place}.resources: {name!r} cannot be the name of a resource")
        _check_amount(f"{place}.resources.{name}", amount)


def _check_port(place: str, port: int) -> None:
    if not 0 <= port <= 65535:
        raise ValueError(f"{place}: a port is 0 (any free one) to 65535, not {port}")


def _check_amount(place: str, amount: float | None) -> None:
    if amount is not None and not 0 <= amount < float("inf"):
        raise ValueError(f"{place}: a number of 0 or more, not {amount}")


def _explained(exc: ValueError) -> str:
    """msgspec's text, with the place first and in the words of the file."""
    text = str(exc)
    match = re.fullmatch(r"(?s)(.*) - at `\$\.?(.*)`", text)
    if match:
        text = f"{match[2]}: {match[1]}"
    kinds: tuple[type[Any], ...] = (ClusterPlan, NodePlan, ControlStorePlan)
    if "unknown field" in text:
        is_top, is_store = match is None, match is not None and match[2] == "control_store"
        kind = kinds[0 if is_top else 2 if is_store else 1]
        text += f"; the fields here are {', '.join(kind.__struct_fields__)}"
    return text
