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

from clusterpool.config import NodeConfig
from clusterpool.control_store.actor_registry import ActorRegistry
from clusterpool.control_store.membership_calls import MembershipCalls, feed_events, feed_pause_s
from clusterpool.control_store.unreadable import rejection
from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.errors import STORE_CANNOT, ClusterpoolError, NotConnected
from clusterpool.node.store_route import NodeStoreRoute, OpenTunnel, StoreRelay

logger = logging.getLogger(__name__)

# How long an operation that somebody waits for is tried while the store is away: a restart, a failover or a pause of
# half a minute must be survived. Longer keeps a user waiting who could do something about it.
PATIENCE_S = 90.0
_RETRY_S = 0.5
# Commands of the membership, and operations, that change nothing.
_READS = frozenset({
    "ReadNodes", "ReadSilent", "FindNode", "get_actor", "find_actor", "load_calls", "adopt_orphans", "reconcile_jobs",
})  # fmt: skip
# Of the thread that sends the heartbeats: longer than a busy server takes, shorter than the others' suspicion.
_ANSWER_S = 2.0
_PROBE_ANSWER_S = 1.0
# That this node leaves is good to know, but not worth being killed for: a node that ends has five seconds for all.
_STOP_S = 2.5


class StoreThread:
    """Calls the control store for a node; answers are posted as events."""

    def __init__(
        self,
        config: NodeConfig,
        post: Callable[[Any], None],
        *,
        open_tunnel: OpenTunnel | None = None,
    ) -> None:
        self._config = config
        self.route = NodeStoreRoute(open_tunnel, self._probe) if open_tunnel is not None else None
        self.nodes_count = 1  # how many the cluster has; the shell says it
        self._relay: StoreRelay | None = None
        self._server: Any = None  # a StoreServer, where there is one to care for
        self._post = post
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._store: Any = None
        self._actors: Any = None
        self._is_stopping = False
        self._away_since_s: float | None = None
        self._has_refused = False  # when it failed last
        self._thread = threading.Thread(target=self._main, name="control-store", daemon=True)
        self._feed = threading.Thread(target=self._follow, name="change-feed", daemon=True)
        self._membership = MembershipCalls(config.node_id)
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
        self._queue.put((command, time.monotonic() + PATIENCE_S))

    def connect_another(self, store_class: Any = None) -> Any:
        """A connection for another thread of the node, once the control store has been reached here.

        Raises: NotConnected.
        """
        if not self._is_connected.wait(_RETRY_S):
            raise NotConnected("the control store could not be started or reached yet; the node's log says why")
        return self._connect_feed(store_class)

    def start_relay(self, folder: Path) -> None:
        """Let other nodes reach the store through this one. folder: of the node's listeners."""
        self._relay = StoreRelay(folder, self._connect_for_another)
        self._relay.start()

    def _connect_for_another(self) -> Any:
        from clusterpool.control_store.address import connect_to_server

        return connect_to_server(self._config.control_store_url or f"unix://{self._config.paths.valkey_socket}")

    def _probe(self) -> None:
        self._connect_feed(route=None, answer_timeout_s=_PROBE_ANSWER_S).close()

    def stop(self) -> None:
        """Finish what is queued, disconnect, and end the server that was started here."""
        self._is_stopping = True
        if self._relay is not None:
            self._relay.stop()
        if self._is_started:
            self._queue.put(None)
            self._thread.join(_STOP_S)
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.close()
        if self._server is not None:
            self._server.stop()

    # --- the calling thread

    def _main(self) -> None:
        failure = self._open()
        if not failure:
            self._actors = ActorRegistry(self._store, self._config.node_id, self._post)
            self._is_connected.set()
            if not self._config.is_embedded:
                self._feed.start()
        while (item := self._queue.get()) is not None:
            command, deadline_s = item
            if not failure:
                self._carry_out(command, deadline_s)
            elif isinstance(command, e.CallStore):
                self._post(e.StoreRaised(command.tag, "NotConnected", failure))

    def _open(self) -> str:
        """Connect, however long it takes; why there is no store, or nothing."""
        while not self._is_stopping:
            try:
                self._store = self._connect()
            except NotConnected as exc:
                self._is_away(exc)
                time.sleep(_RETRY_S)
            except Exception as exc:
                logger.exception("the control store could not be started or reached")
                if not self._config.is_embedded:
                    self._post(e.StopNode(f"it cannot use the control store: {exc}"))
                return f"the control store could not be started: {exc}"
            else:
                self._is_back()
                return ""
        return "the node ends"

    def _is_away(self, exc: ClusterpoolError) -> None:
        from clusterpool.control_store.address import had_no_answer, has_refused

        self._has_refused = has_refused(exc)
        if self.route is not None:
            if self._has_refused:
                self.route.worked()
            else:
                self.route.failed(had_no_answer=had_no_answer(exc))
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            logger.warning(
                "the control store is away (%s); what runs goes on, what needs the store waits up to %g s",
                exc, PATIENCE_S,
            )  # fmt: skip

    def _is_back(self, operation: str = "") -> None:
        if self.route is not None:
            self.route.worked()
        if self._has_refused and operation in _READS:
            return  # whoever refuses to write may read all the same
        self._has_refused = False
        if self._away_since_s is not None:
            logger.warning("the control store is back after %.1f s", time.monotonic() - self._away_since_s)
            self._away_since_s = None

    def _connect(self) -> Any:
        from clusterpool.control_store.store import ControlStore

        config = self._config
        from clusterpool.node.store_server import StoreServer

        if self._server is None and StoreServer.is_wanted(config):
            self._server = StoreServer(config)
            self._server.start()
        if config.control_store_url is None:
            self._server.wait_started()
        return self._connect_feed(ControlStore, answer_timeout_s=_ANSWER_S)

    def _carry_out(self, command: Any, deadline_s: float) -> None:
        if isinstance(command, e.CallStore):
            self._call(command, deadline_s)
            return
        try:
            event = self._membership.carry_out(self._store, command)
            self._membership.answered(event)
            self._is_back(type(command).__name__)
        except STORE_CANNOT as exc:
            self._is_away(exc)
            event = ms.StoreFailed(str(exc))
        except ClusterpoolError as exc:
            logger.warning("the control store refused %s: %s", type(command).__name__, exc)
            event = ms.StoreFailed(str(exc))
        except Exception as exc:  # this thread's end would be taken for the node's death
            logger.exception("control store: %s failed", type(command).__name__)
            event = ms.StoreFailed(str(exc))
        if event is not None:
            self._post(event)

    def _call(self, call: e.CallStore, deadline_s: float) -> None:
        while True:
            try:
                operation = getattr(self, f"_op_{call.operation}", None) or getattr(self._actors, call.operation)
                value = operation(**call.arguments)
                self._is_back(call.operation)
            except NotConnected as exc:
                self._is_away(exc)
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

    def _op_reconcile_jobs(self, running: list[str], is_for_all: bool) -> dict[str, str]:
        from clusterpool.control_store.job_registry import reconcile_jobs

        node_id = self._config.node_id
        return reconcile_jobs(self._store, node_id, running, is_for_all=is_for_all, tell=self._unreadable)

    # --- the change feed

    def _follow(self) -> None:
        from clusterpool.control_store.port import EventsLost

        last_id: int | None = None
        begun_s = 0.0
        store: Any = None
        while not self._is_stopping:
            try:
                if store is None:
                    store = self._connect_feed()
                if last_id is None:
                    last_id, begun_s = store.last_event_id(), time.monotonic()
                    self._post(ms.EventsMissed())
                events = store.read_events(last_id, block_ms=1000)
                for event in feed_events(events, self._unreadable):
                    self._post(event)
                if events:
                    last_id = events[-1].id
                    time.sleep(feed_pause_s(self.nodes_count))
            except EventsLost:
                last_id = None
                if time.monotonic() - begun_s < _RETRY_S:
                    time.sleep(_RETRY_S)  # lost again at once: somebody else writes to the stream
            except ClusterpoolError:
                time.sleep(_RETRY_S)
            except Exception:
                logger.exception("the change feed broke")
                store = None
                time.sleep(_RETRY_S)

    def _connect_feed(self, store_class: Any = None, **options: Any) -> Any:
        from clusterpool.control_store.store import ControlStore

        config = self._config
        url = config.control_store_url or f"unix://{config.paths.valkey_socket}"
        password = config.control_store_password()
        store = (store_class or ControlStore).connect(
            url, cluster_id=config.cluster_id, password=password, timeout_s=0, **{"route": self.route, **options}
        )
        store.on_unreadable = self._unreadable
        return store

    def _unreadable(self, kind: str, text: str) -> None:
        self._post(rejection(kind, text))
