"""The control store over redis-py: `ControlStorePort` on a real Redis or Valkey server.

One thread uses it (each node has one for the store; the command line its main thread). What two writers
could race for is a Lua script (`scripts`); the rest are single commands or transactions.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from clusterpool.control_store import scripts
from clusterpool.control_store.actor_operations import ActorOperations
from clusterpool.control_store.address import (
    ANSWER_TIMEOUT_S,
    Route,
    check_url,
    errors_mapped,
    open_client,
    redacted,
    split_replicas_min,
)
from clusterpool.control_store.foreign_keys import kind_of, split_answer, type_of
from clusterpool.control_store.keys import Keys
from clusterpool.control_store.port import Event, EventsLost, package_digest
from clusterpool.control_store.records import encode_record
from clusterpool.control_store.scripts import Script, new_request
from clusterpool.control_store.unreadable import (
    OnUnreadable,
    log_unreadable,
    number_or_zero,
    read_nodes,
    skipped_if_unreadable,
    whole_number,
)
from clusterpool.core.cluster_view import NodeEntry, NodeLoad, NodeRecord, NodesSnapshot, SilenceReport, SilentNode
from clusterpool.core.membership import HeartbeatAnswer
from clusterpool.errors import NotConnected

# A server is slow for everybody while it copies one huge value, and a connection that breaks loses one
# chunk only.
CHUNK_BYTES = 4 << 20
# Packages are kept this long after the last use: long enough for any job to add a node, short enough to be
# bounded.
PACKAGE_TTL_S = 7 * 86400
REPLICA_WAIT_MS = 1000
# How often a store without replicas is asked whether it has one. Each change until then is a risk.
_ALONE_PERIOD_S = 2.0
logger = logging.getLogger(__name__)
_ANSWERS = {0: HeartbeatAnswer.FENCED, 1: HeartbeatAnswer.ACCEPTED, 2: HeartbeatAnswer.FORGOTTEN}


class ControlStore(ActorOperations):
    """Made by `connect`. `address` is fit for messages: it holds no password."""

    def __init__(self, client: Any, *, address: str, cluster_id: str, replicas_min: int = 0) -> None:
        self.address = address
        self.keys = Keys(cluster_id)
        self._client = client
        self._replicas_min = replicas_min
        self._needs_replicas = True  # else changes are acknowledged without replicas while there are none
        self._is_alone = False
        self._look_again_s = 0.0  # for replicas, while it is alone
        self._generation = ""  # of the store when this process registered its node
        self._server_run = ""  # changes when a server restarts or another takes over
        self._connection_id = 0  # of our connection, as the server counts
        self._is_server_new = False  # since the last read of events
        self.on_unreadable: OnUnreadable = log_unreadable  # told of what is left out because nobody can read it

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        cluster_id: str = "default",
        username: str | None = None,
        password: str | None = None,
        timeout_s: float = 5.0,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        replicas_min: int | None = None,
        route: Route | None = None,
    ) -> ControlStore:
        """Connect and check that the server answers, trying for `timeout_s`. For `url` see `address`.

        answer_timeout_s: how long one command may take before the server counts as not connected. route: asked at
            each new connection whether it is to go another way.

        replicas_min: changes are acknowledged only once so many replicas have them, so that a failover loses none;
            fewer that are there are not enough. None: as the address says; if it says nothing, one, where it is of
            sentinels and a replica is there.

        Raises: ValueError for a malformed address; NotConnected; AuthenticationFailed.
        """
        scheme = check_url(url)
        if replicas_min is None:
            _, replicas_min = split_replicas_min(url)
        store = cls(None, address=redacted(url), cluster_id=cluster_id, replicas_min=replicas_min or 0)
        if replicas_min is None and scheme.endswith("+sentinel"):
            store._replicas_min, store._needs_replicas = 1, False
        with errors_mapped(store.address):
            store._client = open_client(
                url,
                username=username,
                password=password,
                on_connect=store._connected,
                answer_timeout_s=answer_timeout_s,
                route=route,
            )
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                store.ping()
                return store
            except NotConnected:
                if time.monotonic() >= deadline_s:
                    store.close()
                    raise
                time.sleep(0.05)

    def ping(self) -> None:
        self._run("PING")

    def close(self) -> None:
        self._client.close()

    # Nodes

    def register_node(self, record: NodeRecord, registration: int = 0, *, above: int = 0) -> int:
        arguments = (record.node_id, encode_record(record), new_request(), registration, above)
        answer = self._change(scripts.REGISTER_NODE, self.keys.for_nodes(), *arguments)
        self._generation = _text(answer[1])
        return int(answer[0])

    def restore_node(self, record: NodeRecord, incarnation: int) -> bool:
        arguments = (record.node_id, encode_record(record), new_request(), incarnation, self._generation)
        is_accepted, generation = self._change(scripts.RESTORE_NODE, self.keys.for_nodes(), *arguments)
        if is_accepted:
            self._generation = _text(generation)
        return bool(is_accepted)

    def heartbeat(self, node_id: str, incarnation: int, load: NodeLoad) -> HeartbeatAnswer:
        arguments = (node_id, incarnation, encode_record(load), self._generation)
        return _ANSWERS[self._eval(scripts.HEARTBEAT, self.keys.for_nodes(), *arguments)]

    def declare_node_dead(self, node_id: str, incarnation: int, reason: str) -> bool:
        return self._end_node(node_id, incarnation, "node_died", reason)

    def remove_node(self, node_id: str, incarnation: int) -> bool:
        return self._end_node(node_id, incarnation, "node_left", "")

    def _end_node(self, node_id: str, incarnation: int, kind: str, reason: str) -> bool:
        arguments = (node_id, incarnation, kind, reason)
        return bool(self._change(scripts.END_NODE, self.keys.for_nodes(), *arguments))

    def list_nodes(self) -> NodesSnapshot:
        keys = self.keys
        hashes = [("HGETALL", key) for key in (keys.nodes, keys.node_incarnations, keys.node_loads)]
        beats = ("ZRANGE", keys.node_heartbeats, 0, -1, "WITHSCORES")
        commands = [("TIME",), ("GET", keys.event_number), ("GET", keys.generation), *hashes, beats]
        time_now, number, generation, records, incarnations, loads, scores = self._run_all(commands, at_once=True)
        heartbeats = dict(zip(scores[::2], map(float, scores[1::2]), strict=True))
        now_us = _microseconds(time_now)
        nodes = read_nodes(records, incarnations, heartbeats, loads, now_us=now_us, tell=self.on_unreadable)
        last_event_id = number_or_zero(number, "event_number", self.on_unreadable)
        return NodesSnapshot(nodes=nodes, last_event_id=last_event_id, generation=_text(generation or b""))

    def find_node(self, node_id: str) -> NodeEntry | None:
        keys, name = self.keys, node_id.encode(errors="backslashreplace")
        fields = [("HGET", key, name) for key in (keys.nodes, keys.node_incarnations)]
        commands = [("TIME",), *fields, ("ZSCORE", keys.node_heartbeats, name)]
        time_now, record, incarnation, beat = self._run_all(commands, at_once=True)
        if record is None or incarnation is None:
            return None
        beats = {name: float(beat)} if beat is not None else {}
        now_us = _microseconds(time_now)
        tell = self.on_unreadable
        nodes = read_nodes({name: record}, {name: incarnation}, beats, {}, now_us=now_us, tell=tell)
        return nodes[0] if nodes else None

    def silent_nodes(self, silence_s: float) -> SilenceReport:
        answer = self._eval(scripts.SILENT_NODES, self.keys.for_nodes(), round(silence_s * 1e6))
        now_us, silent = int(answer[0]), []
        for key, incarnation, beat in zip(answer[3::3], answer[4::3], answer[5::3], strict=True):
            with skipped_if_unreadable("node_heartbeats", key, self.on_unreadable):
                heartbeat_us = whole_number(beat)
                silence_s = (now_us - heartbeat_us) / 1e6
                silent.append(SilentNode(key.decode(), whole_number(incarnation), heartbeat_us, silence_s))
        return SilenceReport(silent, int(answer[1]), number_or_zero(answer[2], "incarnation", self.on_unreadable))

    # Jobs

    def register_job(self, job_id: str, record: bytes) -> None:
        self._change(scripts.REGISTER_JOB, self._with_events(self.keys.jobs), job_id, record)

    def finish_job(self, job_id: str, reason: str = "") -> bool:
        return bool(self._change(scripts.FINISH_JOB, self._with_events(self.keys.jobs), job_id, reason))

    def list_jobs(self) -> dict[str, bytes]:
        records = self._run("HGETALL", self.keys.jobs)
        jobs = {}
        for job_id in sorted(records):
            with skipped_if_unreadable("jobs", job_id, self.on_unreadable):
                jobs[job_id.decode()] = records[job_id]
        return jobs

    # Packages

    def put_package(self, digest: str, content: bytes) -> None:
        if digest != package_digest(content):
            raise ValueError(f"{digest!r} is not the SHA-256 of these {len(content)} bytes")
        if self.has_package(digest):
            return
        starts = range(0, len(content), CHUNK_BYTES)
        for number, start in enumerate(starts):
            chunk = content[start : start + CHUNK_BYTES]
            self._run("SET", self.keys.package_chunk(digest, number), chunk, "EX", PACKAGE_TTL_S)
        # Last, so that a package that can be found is complete.
        self._write("SET", self.keys.package(digest), f"{len(starts)} {len(content)}", "EX", PACKAGE_TTL_S)

    def has_package(self, digest: str) -> bool:
        count = self._chunks_count(digest)
        if count is None:
            return False
        keys = [self.keys.package_chunk(digest, number) for number in range(count)]
        keys.append(self.keys.package(digest))
        with errors_mapped(self.address), self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.expire(key, PACKAGE_TTL_S)
            # A server that evicts may have dropped a chunk; the package is then uploaded again.
            return all(pipeline.execute())

    def get_package(self, digest: str) -> bytes | None:
        if not self.has_package(digest):
            return None
        count = self._chunks_count(digest) or 0
        chunks = [self._run("GET", self.keys.package_chunk(digest, number)) for number in range(count)]
        content = b"".join(chunk or b"" for chunk in chunks)
        return content if package_digest(content) == digest else None

    def _chunks_count(self, digest: str) -> int | None:
        """None if there is no such package, or nobody can tell what it consists of: then it is uploaded again."""
        head = self._run("GET", self.keys.package(digest))
        if head is not None:
            with skipped_if_unreadable("packages", digest, self.on_unreadable):
                count, size_bytes = map(whole_number, head.split())
                if count != -(-size_bytes // CHUNK_BYTES):
                    raise ValueError(f"{count} chunks for {size_bytes} bytes")
                return count
        return None

    # Events

    def publish_event(self, kind: str, fields: Mapping[str, str]) -> int:
        pairs = [text for item in fields.items() for text in item]
        return int(self._change(scripts.PUBLISH_EVENT, self._with_events(), kind, *pairs))

    def read_events(self, after_id: int, *, block_ms: int = 0, count: int = 1000) -> list[Event]:
        # The connection must fail later than the wait ends.
        block_ms = min(block_ms, int(ANSWER_TIMEOUT_S * 500))
        block = ("BLOCK", block_ms) if block_ms > 0 else ()
        answer = self._run("XREAD", "COUNT", count, *block, "STREAMS", self.keys.events, f"{after_id}-0")
        if self._is_server_new:
            self._is_server_new = False
            raise EventsLost("another server answers, or the same one restarted: what it holds may be older")
        events = self._events(answer[0][1]) if answer else []
        if events and events[0].id != after_id + 1:
            events = self._without_foreign(events)
        if events and events[0].id != after_id + 1:
            raise EventsLost(f"the events {after_id + 1} to {events[0].id - 1} are no longer kept")
        if not events and (last_id := self.last_event_id()) < after_id:
            raise EventsLost(f"the store's last event is {last_id}, but {after_id} had been read: it lost some")
        return events

    def last_event_id(self) -> int:
        return number_or_zero(self._run("GET", self.keys.event_number), "event_number", self.on_unreadable)

    def _events(self, entries: Any) -> list[Event]:
        events: list[Event] = []
        for entry_id, pairs in entries:
            count = len(events)
            with skipped_if_unreadable("events", entry_id, self.on_unreadable):
                number, _, rest = entry_id.partition(b"-")
                if rest != b"0":
                    raise ValueError("its id is none of ours")
                texts = {name.decode(): value.decode() for name, value in fields_of(pairs).items()}
                events.append(Event(whole_number(number), texts.pop("kind"), texts))
            if len(events) == count:
                self.drop_entry(self.keys.events, entry_id)
        return events

    def _without_foreign(self, events: list[Event]) -> list[Event]:
        """Without those above the counter, which nobody of ours has published."""
        last_id = self.last_event_id()
        for event in events:
            if event.id > last_id:
                self.on_unreadable("events", f"{event.id}: the last one that was counted is {last_id}")
                self.drop_entry(self.keys.events, f"{event.id}-0".encode())
        return [event for event in events if event.id <= last_id]

    def drop_entry(self, stream: str, entry_id: bytes) -> None:
        """Remove from a stream what somebody else has put there: it would be read again and again."""
        self._eval(scripts.DROP_ENTRY, (stream,), entry_id)

    # Below: how commands reach the server

    def _with_events(self, *keys: str) -> tuple[str, ...]:
        return (self.keys.events, self.keys.event_number, *keys)

    def _run(self, *command: Any) -> Any:
        from redis.exceptions import ResponseError

        with errors_mapped(self.address):
            try:
                return self._client.execute_command(*_encoded(command))
            except ResponseError as exc:
                if not _is_foreign(exc):
                    raise
        self._drop_foreign([command])
        with errors_mapped(self.address):
            return self._client.execute_command(*_encoded(command))

    def _run_all(self, commands: Sequence[tuple[Any, ...]], *, at_once: bool) -> list[Any]:
        """The answers; at_once: nothing happens in between."""
        with errors_mapped(self.address):
            answers = self._run_pipeline(commands, at_once=at_once)
        foreign = [command for command, answer in zip(commands, answers, strict=True) if _is_foreign(answer)]
        if foreign:
            self._drop_foreign(foreign)
        with errors_mapped(self.address):
            if foreign:
                answers = self._run_pipeline(commands, at_once=at_once)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        return answers

    def _run_pipeline(self, commands: Sequence[tuple[Any, ...]], *, at_once: bool) -> list[Any]:
        with self._client.pipeline(transaction=at_once) as pipeline:
            for command in commands:
                pipeline.execute_command(*_encoded(command))
            answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

    def _drop_foreign(self, commands: Sequence[tuple[Any, ...]]) -> None:
        """These have failed because their keys are of other types than ours."""
        keys = [command[command.index("STREAMS") + 1 if command[0] == "XREAD" else 1] for command in commands]
        feed = [key for key in keys if key in (self.keys.events, self.keys.event_number)]
        if feed:
            # Readers must find a gap, or they would wait for what is gone: it begins anew with this.
            self.publish_event("feed_renewed", {})
            self._tell_dropped([(key, "key of another type") for key in feed])
        rest = [key for key in keys if key not in feed]
        self._eval(scripts.DROP_FOREIGN, tuple(rest), *map(type_of, rest))

    def _tell_dropped(self, keys: Sequence[tuple[str, str]]) -> None:
        for key, found in keys:
            text = f"was a {found} in the place of our {type_of(key)}, written by another program, and has been removed"
            self.on_unreadable(kind_of(key), f"{key} {text}")

    def _eval(self, script: Script, keys: tuple[str, ...], *arguments: Any) -> Any:
        from redis.exceptions import NoScriptError

        rest = _encoded((len(keys), *keys, *arguments))
        with errors_mapped(self.address):
            try:
                answer = self._client.execute_command("EVALSHA", script.sha1, *rest)
            except NoScriptError:  # a fresh server; this also teaches it the script
                answer = self._client.execute_command("EVAL", script.source, *rest)
        return self._without_dropped(answer)

    def _without_dropped(self, answer: Any) -> Any:
        answer, dropped = split_answer(answer)
        self._tell_dropped(dropped)
        return answer

    def _change(self, script: Script, keys: tuple[str, ...], *arguments: Any) -> Any:
        """Run a script whose effect must survive a failover."""
        if not self._waits_for_replicas():
            return self._eval(script, keys, *arguments)
        answer = self._run_durably("EVALSHA", script.sha1, len(keys), *keys, *arguments)
        if type(answer).__name__ == "NoScriptError":
            answer = self._run_durably("EVAL", script.source, len(keys), *keys, *arguments)
        return self._without_dropped(answer)

    def _write(self, *command: Any) -> None:
        """Run a single command whose effect must survive a failover."""
        if self._waits_for_replicas():
            self._run_durably(*command)
        else:
            self._run(*command)

    def _run_durably(self, *command: Any) -> Any:
        """Run the command and wait until enough replicas have it; a NoScriptError is returned.

        WAIT speaks of the writes of its own connection, so all three commands go in one pipeline, which
        redis-py sends again as a whole when the connection breaks. The write in the middle is for a command
        that, sent again, changes nothing: it stands behind the first attempt in what the replicas receive.
        """
        with errors_mapped(self.address), self._client.pipeline(transaction=False) as pipeline:
            pipeline.execute_command(*_encoded(command))
            pipeline.set(self.keys.replica_mark, "1")
            pipeline.execute_command("WAIT", self._replicas_min, REPLICA_WAIT_MS)
            answer, _, replicas = pipeline.execute(raise_on_error=False)
            for outcome in (answer, replicas):
                if isinstance(outcome, Exception) and type(outcome).__name__ != "NoScriptError":
                    raise outcome
        if replicas < self._replicas_min and self._waits_for_replicas(has_failed=True):
            raise NotConnected(
                f"the control store at {self.address} took the change, but only {replicas} of the "
                f"{self._replicas_min} replicas asked for confirmed it within {REPLICA_WAIT_MS} ms: check "
                "them"
            )
        return answer

    def _waits_for_replicas(self, *, has_failed: bool = False) -> bool:
        """Whether changes are to wait; has_failed: one did, in vain."""
        if self._needs_replicas:
            return self._replicas_min > 0
        now_s = time.monotonic()
        if has_failed or (self._is_alone and now_s >= self._look_again_s):
            self._look_again_s = now_s + _ALONE_PERIOD_S
            was_alone, self._is_alone = self._is_alone, self._online_replicas() < self._replicas_min
            if self._is_alone and not was_alone:
                logger.warning(
                    "the control store at %s has no replica: what it acknowledges from now on is lost if it is",
                    self.address,
                )
            elif was_alone and not self._is_alone:
                logger.warning("the control store at %s has a replica again: changes wait for it", self.address)
        return not self._is_alone

    def _online_replicas(self) -> int:
        facts = self._run("INFO", "replication")  # redis-py makes a dict of it
        return sum(1 for name, fact in facts.items() if name.startswith("slave") and "online" in str(fact))

    def _connected(self, connection: Any) -> None:
        """Note which server this is: the client reconnects silently, and a failover may lose events."""
        connection.send_command("INFO", "server", check_health=False)
        answer: bytes = connection.read_response()
        run = next((line for line in answer.decode().splitlines() if line.startswith("run_id:")), "")
        is_same_server = run == self._server_run
        self._is_server_new = self._is_server_new or (self._server_run != "" and not is_same_server)
        self._server_run = run
        from redis.exceptions import ResponseError

        # A user who may not do this much, or a server that has closed it already, does no harm.
        with contextlib.suppress(ResponseError):
            if is_same_server and self._connection_id:
                # A server that was only stopped would carry out what it was sent before we gave up on it: at the
                # latest now, before all that comes this way, never later.
                connection.send_command("CLIENT", "KILL", "ID", self._connection_id, check_health=False)
                connection.read_response()
        self._connection_id = 0
        with contextlib.suppress(ResponseError):
            connection.send_command("CLIENT", "ID", check_health=False)
            self._connection_id = int(connection.read_response())
        if not is_same_server:
            self._entered(connection, run)

    def _entered(self, connection: Any, run: str) -> None:
        """The first connection to this run of a server; nothing was sent to it yet."""


def _is_foreign(outcome: Any) -> bool:
    return isinstance(outcome, Exception) and "WRONGTYPE " in str(outcome)


def _encoded(command: tuple[Any, ...]) -> list[Any]:
    """The name of the command stays text, because redis-py shapes the answer by it."""
    # Whatever bytes the reason of a death may quote, it must be told.
    name, *words = command
    return [
        name,
        *(word.encode(errors="backslashreplace") if isinstance(word, str) else word for word in words),
    ]


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


def fields_of(pairs: Any) -> dict[bytes, bytes]:
    """Of an entry of a stream: redis-py makes a dict of them where it knows the command."""
    return pairs if isinstance(pairs, dict) else dict(zip(pairs[::2], pairs[1::2], strict=True))


def _microseconds(time_now: Any) -> int:
    """The answer to TIME, seconds and microseconds, as one number."""
    return int(time_now[0]) * 1_000_000 + int(time_now[1])
