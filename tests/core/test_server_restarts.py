"""When the control store's server is started again."""

from __future__ import annotations

from clusterpool.core.server_restarts import (
    DELAY_AFTER_ALARM_S,
    DELAY_MAX_S,
    RESTARTS_MAX,
    STEADY_AFTER_S,
    RaiseAlarm,
    ServerEnded,
    ServerFailed,
    ServerReady,
    ServerRestarts,
    StartServer,
)

ENDED = ServerEnded("signal 9")


def test_a_server_that_worked_is_started_again_at_once() -> None:
    restarts = ServerRestarts()
    for round_ in range(3 * RESTARTS_MAX):
        now_s = round_ * 2 * STEADY_AFTER_S
        restarts.handle(ServerReady(), now_s)
        assert restarts.handle(ENDED, now_s + STEADY_AFTER_S) == [StartServer(0.0)]


def test_a_server_that_keeps_ending_waits_longer_each_time_and_then_somebody_is_told_once() -> None:
    restarts = ServerRestarts()
    delays_s = []
    for second in range(RESTARTS_MAX):
        restarts.handle(ServerReady(), second)
        [start] = restarts.handle(ENDED, second + 0.5)
        delays_s.append(start.after_s)
    assert delays_s == sorted(delays_s)
    assert delays_s[0] == 0.0 and 0 < delays_s[1] < 1 and delays_s[-1] == DELAY_MAX_S
    assert restarts.handle(ENDED, 100) == [RaiseAlarm("signal 9"), StartServer(DELAY_AFTER_ALARM_S)]
    assert restarts.handle(ServerFailed("port in use"), 101) == [StartServer(DELAY_AFTER_ALARM_S)]


def test_data_that_cannot_be_read_are_put_aside_and_data_that_can_are_not() -> None:
    restarts = ServerRestarts()
    restarts.handle(ServerReady(), 0)
    assert not restarts.handle(ENDED, 1)[0].sets_data_aside
    assert not restarts.handle(ServerFailed("port in use"), 1)[0].sets_data_aside
    assert restarts.handle(ServerFailed("bad file", is_data_unreadable=True), 1)[0].sets_data_aside
