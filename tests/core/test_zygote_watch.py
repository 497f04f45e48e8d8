"""When the process that forks workers is taken for stuck."""

from __future__ import annotations

from clusterpool.core.zygote_watch import PROBE_TICKS, STUCK_TICKS, Finding, ZygoteWatch


def looks(watch: ZygoteWatch, ticks: int, *, is_asked: bool = True, heard: int = 7) -> list[Finding]:
    return [watch.look(is_asked=is_asked, heard=heard) for _ in range(ticks)]


def test_who_is_not_asked_may_be_silent() -> None:
    assert set(looks(ZygoteWatch(), 10 * STUCK_TICKS, is_asked=False)) == {Finding.FINE}


def test_who_answers_nothing_is_probed_once_and_then_stuck() -> None:
    watch = ZygoteWatch()
    assert watch.look(is_asked=True, heard=7) is Finding.FINE  # it has been heard since the last look
    found = looks(watch, STUCK_TICKS)
    assert found.index(Finding.PROBE_DUE) == PROBE_TICKS - 1
    assert found.count(Finding.PROBE_DUE) == 1
    assert found.index(Finding.STUCK) == STUCK_TICKS - 1


def test_whatever_is_heard_begins_the_silence_anew() -> None:
    watch = ZygoteWatch()
    for heard in range(1, 10):
        assert Finding.STUCK not in looks(watch, STUCK_TICKS, heard=heard)
    assert watch.look(is_asked=False, heard=9) is Finding.FINE
    assert Finding.STUCK not in looks(watch, STUCK_TICKS - 1, heard=9)
