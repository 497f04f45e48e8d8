"""Semaphores that move to the control store while they are held, waited for and released."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterpool.client import api, current, semaphore
from clusterpool.client.semaphore import RECURSIVE_MUTEX, SEM_VALUE_MAX, Semaphore
from clusterpool.processes.thin_files import remove_thin_files, semaphore_path
from tests.client.carriers import FakeCoordination, FakeStore, runtime_of
from tests.waiting import wait_for

HOME = "n0123456789"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCoordination]:
    """The node of this process."""
    coordination = FakeCoordination(HOME, FakeStore())
    live_on(coordination, monkeypatch, tmp_path)
    yield coordination
    remove_thin_files(HOME)


def live_on(coordination: FakeCoordination, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    runtime = runtime_of(coordination, folder)
    monkeypatch.setattr(api, "runtime", lambda: runtime)
    monkeypatch.setattr(current, "get_if_any", lambda: runtime)


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start `function`; call what is returned for its result."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as exc:
            results.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(30)
        assert results, "it did not end within 30 s"
        return results[0]

    return wait


def lock() -> Semaphore:
    return Semaphore(1, 1, is_lock=True)


def thin_value(made: Semaphore) -> int:
    value: int = made._thin._get_value()
    return value


# --- thin


def test_a_thin_semaphore_asks_nobody(home: FakeCoordination) -> None:
    made = Semaphore(2, SEM_VALUE_MAX)
    assert [made.acquire(), made.acquire(), made.acquire(False), made.acquire(True, 0.01)] == [True, True, False, False]
    made.release()
    assert made.value() == 1
    assert made.acquire() and made.value() == 0
    made.release()
    assert (home.questions, home.store.acquires) == (0, 0)


def test_a_negative_timeout_does_not_wait(home: FakeCoordination) -> None:
    made = Semaphore(0, 1)
    started_s = time.monotonic()
    assert made.acquire(True, -1) is False
    assert time.monotonic() - started_s < 1


def test_too_many_releases_are_refused(home: FakeCoordination) -> None:
    made = lock()
    with pytest.raises(ValueError, match="too many times"):
        made.release()
    assert made.value() == 1


def test_only_the_thread_that_holds_a_recursive_lock_releases_it(home: FakeCoordination) -> None:
    made = Semaphore(1, 1, kind=RECURSIVE_MUTEX, is_lock=True)
    assert made.acquire() and made.acquire()
    assert isinstance(in_thread(made.release)(), AssertionError)
    assert in_thread(lambda: made.acquire(False))() is False
    assert made._count() == 2 and made._is_mine()
    made.release()
    made.release()
    with pytest.raises(AssertionError, match="not owned"):
        made.release()


def test_another_move_does_not_concern_it(home: FakeCoordination) -> None:
    made, other = lock(), lock()
    home.move_semaphore(other.name)
    for _ in range(3):
        made.acquire()
        made.release()
    assert home.questions == 1, "once for each change of the page"
    assert thin_value(made) == 1


# --- moving


def test_the_token_of_a_lock_that_moves_while_it_is_held_goes_to_the_store(home: FakeCoordination) -> None:
    made = lock()
    made.acquire()
    home.move_semaphore(made.name)
    assert made._is_mine() and made._count() == 1
    assert made.acquire(False) is False
    made.release()
    assert (home.store.tokens[made.name], thin_value(made)) == (1, 0)
    assert not made._is_mine() and made._count() == 0
    with pytest.raises(ValueError, match="too many times"):
        made.release()
    assert made.acquire() and made._is_mine() and made._count() == 1
    assert home.store.tokens[made.name] == 0
    made.release()
    assert (home.store.tokens[made.name], made.value()) == (1, 1)


def test_a_token_posted_by_one_thread_while_another_learns_of_the_move_is_not_left_behind(
    home: FakeCoordination,
) -> None:
    made = lock()
    made.acquire()
    home.move_semaphore(made.name)
    post = made._post

    def post_and_be_overtaken() -> None:
        post()
        assert made._looks_moved()  # as the other thread does, before this one has looked at the page

    made._post = post_and_be_overtaken
    made.release()
    assert (home.store.tokens[made.name], thin_value(made)) == (1, 0)


def test_a_waiter_of_before_the_move_gets_the_token_of_after(home: FakeCoordination) -> None:
    made = Semaphore(0, 5)
    waiting = in_thread(lambda: made.acquire(True, 10))
    # The thin waiter looks at the page at the end of its slice, or gets what is posted thin.
    home.move_semaphore(made.name)
    home.store.release(made.name, 5)
    assert waiting() is True
    assert home.store.tokens[made.name] == 0


def test_no_token_is_lost_or_doubled_among_threads_while_it_moves(home: FakeCoordination) -> None:
    made = Semaphore(3, 3)
    is_over = threading.Event()
    holders = [0]
    most = [0]
    uses = [0] * 6
    guard = threading.Lock()

    def use(user: int) -> bool:
        while not is_over.is_set():
            if made.acquire(True, 5):
                with guard:
                    holders[0] += 1
                    most[0] = max(most[0], holders[0])
                with guard:
                    holders[0] -= 1
                made.release()
                uses[user] += 1
        return True

    waits = [in_thread(lambda user=user: use(user)) for user in range(6)]
    wait_for(lambda: all(uses), "each has had a token")
    home.move_semaphore(made.name)
    before = list(uses)
    wait_for(lambda: all(uses[user] > before[user] for user in range(6)), "each has had one of after the move")
    is_over.set()
    assert all(wait() for wait in waits)
    assert most[0] <= 3
    assert home.store.tokens[made.name] + thin_value(made) == 3


def test_a_recursive_lock_that_moves_while_it_is_held_twice(home: FakeCoordination) -> None:
    made = Semaphore(1, 1, kind=RECURSIVE_MUTEX, is_lock=True)
    made.acquire()
    made.acquire()
    home.move_semaphore(made.name)
    made.release()
    assert made._is_mine() and home.store.tokens[made.name] == 0
    assert made.acquire(), "again, now that it is known to have moved"
    made.release()
    assert isinstance(in_thread(made.release)(), AssertionError)
    made.release()
    assert home.store.tokens[made.name] == 1
    # And once more, all in the store.
    assert made.acquire() and made.acquire() and made._count() == 2
    assert in_thread(lambda: made.acquire(False))() is False
    made.release()
    assert home.store.tokens[made.name] == 0
    made.release()
    assert home.store.tokens[made.name] == 1


def test_ctrl_c_at_a_release_does_not_make_its_thread_believe_that_it_holds_the_lock(
    home: FakeCoordination, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Semaphore(1, 1, kind=RECURSIVE_MUTEX, is_lock=True)
    home.move_semaphore(made.name)
    assert made.acquire()
    release = home.release

    def interrupted(*arguments: Any, **options: Any) -> None:
        release(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(home, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.release()
    monkeypatch.undo()
    home.store.tokens[made.name] -= 1  # another process has it now
    assert not made.acquire(False)


def test_a_try_asks_the_store_once(home: FakeCoordination) -> None:
    made = lock()
    home.move_semaphore(made.name)
    made.acquire()
    asked = home.store.acquires
    assert made.acquire(False) is False
    assert made.acquire(True, 0) is False
    assert home.store.acquires - asked == 2


# --- passing on


def test_two_copies_in_one_process_are_one_lock(home: FakeCoordination) -> None:
    made = lock()
    copy = pickle.loads(pickle.dumps(made))
    assert copy is made


@pytest.mark.parametrize("is_lock", [True, False])
def test_on_another_node_it_is_adopted(
    home: FakeCoordination, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_lock: bool
) -> None:
    made = Semaphore(1, 1, is_lock=is_lock)
    pickled = pickle.dumps(made)
    home.move_semaphore(made.name)
    elsewhere = FakeCoordination("n9876543210", home.store)
    live_on(elsewhere, monkeypatch, tmp_path)
    monkeypatch.setattr(semaphore, "_known", weakref.WeakValueDictionary())
    there = pickle.loads(pickled)
    assert elsewhere.adopted == [("lock" if is_lock else "guard", made.name, HOME, 1)]
    assert there.acquire() and there._is_mine()
    assert made.acquire(False) is False
    there.release()
    assert made.acquire(False) is True


def test_a_process_outside_of_any_cluster_uses_the_thin_one(
    home: FakeCoordination, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lock()
    pickled = pickle.dumps(made)
    monkeypatch.setattr(current, "get_if_any", lambda: None)
    monkeypatch.setattr(api, "runtime", lambda: pytest.fail("no cluster is needed"))
    monkeypatch.setattr(semaphore, "_known", weakref.WeakValueDictionary())
    there = pickle.loads(pickled)
    assert there is not made
    assert there.acquire() and not made.acquire(False)


def test_collected_it_is_removed_and_pickled_it_stays(home: FakeCoordination) -> None:
    private, pickled = lock(), lock()
    pickle.dumps(pickled)
    paths = [semaphore_path(HOME, made.name) for made in (private, pickled)]
    assert [path.exists() for path in paths] == [True, True]
    del private, pickled
    gc.collect()
    assert [path.exists() for path in paths] == [False, True]


def test_a_forked_child_holds_nothing_and_removes_nothing(home: FakeCoordination) -> None:
    made = Semaphore(1, 1, kind=RECURSIVE_MUTEX, is_lock=True)
    made.acquire()
    pid = os.fork()
    if pid == 0:
        is_right = not made._is_mine() and made._count() == 0 and made.acquire(False) is False
        del made
        gc.collect()
        os._exit(0 if is_right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert made._is_mine() and semaphore_path(HOME, made.name).exists()
