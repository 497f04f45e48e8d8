"""The node's connection to the control store, in threads of its own: redis-py blocks, and importing it takes long.

One thread makes the calls, in order. In a cluster a second one, with a connection of its own, follows the change feed.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from clusterpool.config import NodeConfig
from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.errors import ClusterpoolError, NotConnected

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
_CONNECT_S = 10.0
_ADDRESS_FIELD = "actor"


class StoreThread:
    """Calls the control store for a node; answers are posted as events."""

    def __init__(self, config: NodeConfig, post: Callable[[Any], None]) -> None:
        self._config = config
        self._post = post
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._store: Any = None
        self._server: Any = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._main, name="control-store", daemon=True)
        self._feed = threading.Thread(target=self._follow, name="change-feed", daemon=True)
        self._is_started = False
        self._is_connected = threading.Event()

    @property
    def is_started(self) -> bool:
        """Whether the thread runs."""
        return self._is_started

    def start(self) -> None:
        """Start the server if the node has one of its own, and connect; in the background."""
        if not self._is_started:
            self._is_started = True
            self._thread.start()

    def put(self, command: Any) -> None:
        """Carry out a command of the machine (CallStore, or one of the membership's), in order."""
        self._queue.put(command)

    def connect_another(self, store_class: Any = None) -> Any:
        """A connection for another thread of the node, once the control store has been reached here.

        Raises: NotConnected.
        """
        if not self._is_connected.wait(_CONNECT_S):
            raise NotConnected("the control store could not be started or reached; the node's log says why")
        return self._connect_feed(store_class)

    def stop(self) -> None:
        """Finish what is queued, disconnect, and end the server that was started here."""
        self._is_stopping = True
        if self._is_started:
            self._queue.put(None)
            self._thread.join(5.0)
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.close()
        if self._server is not None:
            self._server.stop()

    # --- the calling thread

    def _main(self) -> None:
        if not self._open():
            return
        self._is_connected.set()
        if not self._config.is_embedded:
            self._feed.start()
        while True:
            command = self._queue.get()
            if command is None:
                return
            self._carry_out(command)

    def _open(self) -> bool:
        """Connect, however long it takes; whether there is a store."""
        has_warned = False
        while not self._is_stopping:
            try:
                self._store = self._connect()
            except NotConnected as exc:
                if not has_warned:
                    logger.warning("the control store does not answer yet: %s", exc)
                has_warned = True
                time.sleep(_RETRY_S)
            except Exception as exc:
                logger.exception("the control store could not be started or reached")
                if not self._config.is_embedded:
                    self._post(e.StopNode(f"it cannot use the control store: {exc}"))
                return False
            else:
                return True
        return False

    def _connect(self) -> Any:
        from clusterpool.control_store.store import ControlStore

        config = self._config
        if config.control_store_url is None:
            from clusterpool.control_store.server import ServerProcess

            folder = config.paths.folder / "store"
            # It must not outlive a node that is killed: nobody else has a use for it, and a sweep may never come.
            # (The tie is to this thread, which lives as long as the node does.)
            self._server = ServerProcess.start(
                folder, unix_socket_path=config.paths.valkey_socket, dies_with_parent=True
            )
            self._server.wait_ready()
            return ControlStore.connect(f"unix://{config.paths.valkey_socket}", cluster_id=config.cluster_id)
        password = None
        if config.control_store_password_file:
            password = Path(config.control_store_password_file).read_text().strip()
        return ControlStore.connect(config.control_store_url, cluster_id=config.cluster_id, password=password)

    def _carry_out(self, command: Any) -> None:
        if isinstance(command, e.CallStore):
            self._call(command)
            return
        try:
            event = self._membership(command)
        except NotConnected as exc:
            event = ms.StoreFailed(str(exc))
        except ClusterpoolError as exc:
            logger.warning("the control store refused %s: %s", type(command).__name__, exc)
            event = ms.StoreFailed(str(exc))
        except Exception as exc:  # this thread's end would be taken for the node's death
            logger.exception("control store: %s failed", type(command).__name__)
            event = ms.StoreFailed(str(exc))
        if event is not None:
            self._post(event)

    def _call(self, call: e.CallStore) -> None:
        deadline_s = time.monotonic() + 30.0
        while True:
            try:
                value = getattr(self, f"_op_{call.operation}")(**call.arguments)
            except NotConnected as exc:
                if time.monotonic() < deadline_s and not self._is_stopping:
                    time.sleep(_RETRY_S)
                    continue
                self._post(e.StoreRaised(call.tag, type(exc).__name__, str(exc)))
            except Exception as exc:
                if not isinstance(exc, ClusterpoolError):
                    logger.exception("control store: %s failed", call.operation)
                self._post(e.StoreRaised(call.tag, type(exc).__name__, str(exc)))
            else:
                self._post(e.StoreReturned(call.tag, value))
            return

    def _membership(self, command: Any) -> Any:
        store, node_id = self._store, self._config.node_id
        if isinstance(command, ms.RegisterNode):
            return ms.Registered(store.register_node(command.record))
        if isinstance(command, ms.RestoreNode):
            return ms.Restored(store.restore_node(command.record, command.incarnation))
        if isinstance(command, ms.SendHeartbeat):
            return ms.HeartbeatAnswered(
                store.heartbeat(node_id, command.incarnation, command.load), command.incarnation
            )
        if isinstance(command, ms.ReadNodes):
            return ms.NodesRead(store.list_nodes())
        if isinstance(command, ms.DeclareNodeDead):
            store.declare_node_dead(command.node_id, command.incarnation, command.reason)
            return None
        if isinstance(command, ms.RemoveNode):
            store.remove_node(node_id, command.incarnation)
            return None
        raise AssertionError(f"no such command of the membership: {command!r}")

    # --- operations of CallStore

    def _op_register_job(self, job: m.JobPart, pid: int) -> None:
        from clusterpool.control_store.records import JobRecord, encode_record

        record = JobRecord(
            job_id=job.job_id, node_id=self._config.node_id, process_id=job.owner.process_id, pid=pid,
            host_name=job.host, namespace=job.namespace, entry_point=job.main_path, started_s=time.time(),
        )  # fmt: skip
        self._store.register_job(job.job_id, encode_record(record))

    def _op_finish_job(self, job_id: str) -> None:
        self._store.finish_job(job_id)

    def _op_create_actor(self, actor: m.ActorPart) -> None:
        if actor.name:
            self._op_find_actor(actor.namespace, actor.name)  # frees the name if its holder's node is gone
        record = msgspec.json.encode(actor)
        self._store.create_actor(actor.actor_id, record, state=actor.state, name=actor.name, namespace=actor.namespace)

    def _op_update_actor(self, actor: m.ActorPart) -> None:
        address = ",".join(actor.address) if actor.address is not None else ""
        self._store.update_actor(actor.actor_id, (), actor.state, {"address": address, "text": actor.text})
        # A lone node does not follow the feed; in a cluster hearing it twice does no harm.
        self._post(e.ActorEventRead(actor.actor_id))

    def _op_find_actor(self, namespace: str, name: str) -> m.ActorPart | None:
        actor = _actor_of_entry(self._store.find_actor(namespace, name))
        if actor is None or actor.address is None or actor.address.node_id == self._config.node_id:
            return actor
        living = {node.record.node_id for node in self._store.list_nodes().nodes}
        if actor.address.node_id in living:
            return actor
        # Its creator would have reported its death, but has ended as well.
        text = f"its node {actor.address.node_id} is gone"
        self._store.update_actor(actor.actor_id, (), "dead", {"address": "", "text": text})
        return None

    def _op_get_actor(self, actor_id: str) -> m.ActorPart | None:
        return _actor_of_entry(self._store.get_actor(actor_id))

    # --- the change feed

    def _follow(self) -> None:
        from clusterpool.control_store.port import EventsLost

        last_id: int | None = None
        store: Any = None
        while not self._is_stopping:
            try:
                if store is None:
                    store = self._connect_feed()
                if last_id is None:
                    last_id = store.last_event_id()
                    self._post(ms.EventsMissed())
                for event in store.read_events(last_id, block_ms=1000):
                    last_id = event.id
                    self._feed_event(event)
            except EventsLost:
                last_id = None
            except ClusterpoolError:
                time.sleep(_RETRY_S)
            except Exception:
                logger.exception("the change feed broke")
                store = None
                time.sleep(_RETRY_S)

    def _connect_feed(self, store_class: Any = None) -> Any:
        from clusterpool.control_store.store import ControlStore

        config = self._config
        password = None
        if config.control_store_password_file:
            password = Path(config.control_store_password_file).read_text().strip()
        url = config.control_store_url or f"unix://{config.paths.valkey_socket}"
        return (store_class or ControlStore).connect(url, cluster_id=config.cluster_id, password=password)

    def _feed_event(self, event: Any) -> None:
        fields = event.fields
        if event.kind in ("node_joined", "node_left", "node_died"):
            incarnation = int(fields.get("incarnation", "0"))
            reason = fields.get("reason", "")
            self._post(ms.NodeEventRead(event.kind, fields.get("node_id", ""), incarnation, reason))
        elif event.kind in ("actor_changed", "actor_created"):
            self._post(e.ActorEventRead(fields.get("actor_id", "")))


def _actor_of_entry(entry: Any) -> m.ActorPart | None:
    if entry is None:
        return None
    actor = msgspec.json.decode(entry.record, type=m.ActorPart)
    address = entry.fields.get("address", "")
    where = m.Address(*address.split(",")) if address else None
    return msgspec.structs.replace(actor, state=entry.state, address=where, text=entry.fields.get("text", actor.text))
