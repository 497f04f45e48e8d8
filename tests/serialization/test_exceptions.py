"""Exceptions arrive as their own type with their arguments and the remote text, whatever they hold."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from clusterpool import errors
from clusterpool.serialization import exceptions, functions
from clusterpool.serialization.exceptions import RemoteTraceback, dump_exception, load_exception


class Fussy(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, code: int, *, why: str) -> None:
        super().__init__(f"{code}: {why}")
        self.code = code


class Doubling(Exception):
    """Can be made again from its arguments, but says another thing then."""

    def __init__(self, message: str) -> None:
        super().__init__("failed: " + message)


class Holding(Exception):
    """Holds what no other process can have."""

    def __init__(self, text: str) -> None:
        super().__init__(text, threading.Lock())
        self.lock = threading.Lock()
        self.hint = "kept"


class Unloadable(ValueError):
    """Pickles, and then fails to load."""

    def __reduce__(self) -> Any:
        return _explode, ()


class NotEvenItself(LookupError):
    """Refuses to be made at all without its own constructor."""

    def __new__(cls, *args: Any, key: str) -> Any:
        return super().__new__(cls, *args)

    def __init__(self, *, key: str) -> None:
        super().__init__(f"no {key}")

    def __reduce__(self) -> Any:
        raise TypeError("never")


class Slotted(Exception):
    __slots__ = ("code",)

    def __init__(self, *, code: int) -> None:
        super().__init__("slotted")
        self.code = code


class Talkative(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def _explode() -> None:
    raise RuntimeError("boom")


def sent(exc: BaseException) -> BaseException:
    """As it arrives after it was raised in a task."""
    try:
        raise exc
    except BaseException as raised:
        return load_exception(dump_exception(raised, node_id="n12", pid=345, task_name="train"))


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("bad", 3),
        KeyError("key"),
        OSError(2, "No such file", "/x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        StopIteration(5),
        SystemExit(3),
        KeyboardInterrupt(),
        ValueError(float("nan")),
        ValueError(np.zeros(3)),
        Fussy(3, why="no"),
        Doubling("disk"),
        Slotted(code=7),
        errors.SerializationFailed("text", reason="why", value_repr="what"),
        errors.WorkerDied("gone"),
        subprocess.CalledProcessError(2, ["ls"]),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_type_arguments_and_attributes_are_kept(exc: BaseException) -> None:
    arrived = sent(exc)
    assert type(arrived) is type(exc)
    assert repr(arrived.args) == repr(exc.args)
    assert str(arrived) == str(exc)
    for name in ("code", "errno", "filename", "value", "returncode", "cmd", "reason", "value_repr", "start"):
        assert getattr(arrived, name, None) == getattr(exc, name, None)
    assert type(arrived.__cause__) is RemoteTraceback


def test_the_cause_is_the_remote_traceback_with_node_and_process() -> None:
    def inner() -> None:
        raise KeyError("first")

    try:
        try:
            inner()
        except KeyError as first:
            raise ValueError("second") from first
    except ValueError as exc:
        arrived = load_exception(dump_exception(exc, node_id="n12", pid=345, task_name="train"))
    text = str(arrived.__cause__)
    assert text.startswith('\n"""\nTraceback (most recent call last)') and text.endswith('\n"""')
    for part in ("in inner", "KeyError: 'first'", "direct cause", "second", "345", "n12", "train"):
        assert part in text
    assert arrived.__cause__.tb == text  # type: ignore[union-attr]
    assert arrived.__suppress_context__


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes are newer")
@pytest.mark.parametrize("exc", [ValueError("x"), Fussy(1, why="y"), Holding("z"), Unloadable("u")])
def test_notes_are_kept(exc: BaseException) -> None:
    exc.add_note("look here")  # type: ignore[attr-defined]
    assert sent(exc).__notes__ == ["look here"]  # type: ignore[attr-defined]


def test_what_cannot_be_pickled_is_left_out_and_the_rest_kept() -> None:
    arrived = sent(Holding("text"))
    assert type(arrived) is Holding
    assert arrived.args[0] == "text" and "lock" in arrived.args[1]
    assert arrived.hint == "kept" and not hasattr(arrived, "lock")


def test_an_exception_that_holds_a_socket_arrives() -> None:
    with socket.socket() as held:
        arrived = sent(ConnectionError("lost", held))
    assert type(arrived) is ConnectionError and arrived.args[0] == "lost"


def test_an_exception_whose_own_pickle_explodes_is_put_together_from_its_parts() -> None:
    arrived = sent(Unloadable("text", 1))
    assert type(arrived) is Unloadable and arrived.args == ("text", 1)


class Exiting(Exception):
    def __reduce__(self) -> Any:
        sys.exit("in __reduce__")


class ExitingLater(Exception):
    def __reduce__(self) -> Any:
        return sys.exit, ("in the unpickling",)


@pytest.mark.parametrize("kind", [Exiting, ExitingLater])
def test_an_exception_that_exits_while_it_is_pickled_or_loaded_ends_nobody(kind: type[Exception]) -> None:
    assert type(sent(kind(1))).__name__ == kind.__name__


def test_a_stand_in_keeps_name_text_and_base_and_can_be_pickled_on() -> None:
    arrived = sent(NotEvenItself(key="k"))
    for copy in (arrived, pickle.loads(pickle.dumps(arrived)), sent(arrived)):
        assert isinstance(copy, LookupError)
        assert type(copy).__name__ == "NotEvenItself"
        assert str(copy) == "no k"


def test_a_class_that_the_receiver_lacks_becomes_a_stand_in_of_its_nearest_base(tmp_path: Any) -> None:
    (tmp_path / "only_there.py").write_text(
        "class Base(OSError): pass\nclass Special(Base):\n    def __init__(self, a): super().__init__(f'no {a}')\n"
    )
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {sys.path!r}[0]]; sys.path += {sys.path!r}\n"
        "import only_there\n"
        "from clusterpool.serialization.exceptions import dump_exception\n"
        "exc = only_there.Special('disk')\n"
        "sys.stdout.buffer.write(dump_exception(exc, node_id='n1', pid=2, task_name=''))"
    )
    payload = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    arrived = load_exception(payload)
    assert isinstance(arrived, OSError)
    assert type(arrived).__qualname__ == "Special" and type(arrived).__module__ == "only_there"
    assert str(arrived) == "no disk"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="groups are newer")
def test_groups_keep_their_members_even_those_that_do_not_pickle() -> None:
    group = ExceptionGroup("many", [ValueError(1), Fussy(2, why="w"), Holding("h")])
    arrived = sent(group)
    assert type(arrived) is type(group)
    assert [type(one) for one in arrived.exceptions] == [ValueError, Fussy, Holding]  # type: ignore[attr-defined]


def test_an_exception_without_a_text_and_one_with_broken_text_arrive() -> None:
    assert type(sent(Talkative("x"))) is Talkative
    arrived = sent(ValueError("file \udcff"))
    assert arrived.args == ("file \udcff",)


def test_frames_of_the_worker_itself_are_left_out() -> None:
    def task() -> None:
        raise ValueError("x")

    namespace: dict[str, Any] = {}
    filename = exceptions._PACKAGE_FOLDER + "/worker/loop.py"
    exec(compile("def run(task):\n    task()", filename, "exec"), namespace)
    try:
        namespace["run"](task)
    except ValueError as exc:
        assert exc.__traceback__ is not None
        exc.__traceback__ = exc.__traceback__.tb_next  # as caught in the worker: its own frame is the outermost
        text = str(load_exception(dump_exception(exc, node_id="n", pid=1, task_name="")).__cause__)
    assert "in task" in text and "loop.py" not in text


def test_bytes_that_are_no_exception_are_a_protocol_error() -> None:
    with pytest.raises(errors.ProtocolError):
        load_exception(b"garbage")


def test_an_unpicklable_result_says_why_and_survives_pickling() -> None:
    error = exceptions.unpicklable_result(threading.Lock(), TypeError("cannot pickle '_thread.lock' object"))
    for copy in (error, pickle.loads(pickle.dumps(error)), sent(error)):
        assert isinstance(copy, errors.SerializationFailed)
        assert "cannot pickle" in copy.reason and "lock" in copy.value_repr and "lock" in str(copy)


def test_load_failures_are_explained_with_module_and_node() -> None:
    with pytest.raises(ModuleNotFoundError) as missing:
        import no_such_module_at_all  # noqa: F401
    explained = functions.explain_load_failure(missing.value, "n9")
    assert isinstance(explained, errors.VersionMismatch)
    assert "no_such_module_at_all" in str(explained) and "n9" in str(explained)
    other = KeyError("x")
    assert functions.explain_load_failure(other, "n9") is other
