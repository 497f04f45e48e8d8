"""When a job is over on a node."""

from __future__ import annotations

from clusterpool.core.coordination_events import JobGone
from clusterpool.core.job_ends import JobEnds
from clusterpool.core.messages import Address

DRIVER, WORKER, ELSEWHERE = Address("n1", "d1"), Address("n1", "w1"), Address("n2", "d2")


def nobody(_: Address) -> bool:
    return False


def test_a_job_is_over_when_its_driver_and_its_last_worker_have_ended() -> None:
    jobs = JobEnds()
    jobs.seen(DRIVER, "j1")
    jobs.process_ended(WORKER)
    assert jobs.take_over(nobody) == []
    jobs.process_ended(DRIVER)
    assert jobs.take_over(lambda driver: driver == DRIVER) == []
    assert jobs.take_over(nobody) == [JobGone("j1")]
    assert jobs.take_over(nobody) == []


def test_the_jobs_of_a_lost_node_are_over() -> None:
    jobs = JobEnds()
    jobs.seen(DRIVER, "j1")
    jobs.seen(ELSEWHERE, "j2")
    jobs.node_lost("n2")
    assert jobs.take_over(nobody) == [JobGone("j2", home="n2")]


def test_a_job_that_only_seems_to_be_over_is_told_apart() -> None:
    jobs = JobEnds()
    jobs.seen(DRIVER, "j1")
    jobs.seen(ELSEWHERE, "j2")
    jobs.node_lost("n2", is_known=False)
    jobs.process_ended(DRIVER, is_known=False)
    jobs.process_ended(DRIVER)
    assert jobs.take_over(nobody) == [JobGone("j2", is_known=False, home="n2"), JobGone("j1")]


def test_a_driver_that_comes_back_with_its_node_has_not_ended() -> None:
    jobs = JobEnds()
    jobs.seen(ELSEWHERE, "j2")
    jobs.node_lost("n2")
    assert jobs.take_over(lambda _: True) == [], "its workers are being ended"
    jobs.seen(ELSEWHERE, "j2")
    assert jobs.take_over(nobody) == []
    jobs.node_lost("n2")
    assert jobs.take_over(nobody) == [JobGone("j2", home="n2")]


def test_a_driver_that_has_ended_for_certain_does_not_come_back() -> None:
    jobs = JobEnds()
    jobs.seen(ELSEWHERE, "j2")
    jobs.process_ended(ELSEWHERE)
    jobs.seen(ELSEWHERE, "j2")  # a request that was under way for long
    assert jobs.take_over(nobody) == [JobGone("j2")]


def test_a_driver_that_ended_before_its_node_was_lost_has_ended_for_certain() -> None:
    jobs = JobEnds()
    for number, is_lost_first in enumerate((True, False)):
        driver = Address("n2", f"d{number}")
        jobs.seen(driver, f"j{number}")
        if is_lost_first:
            jobs.node_lost("n2")
        jobs.process_ended(driver)
    jobs.node_lost("n2")
    jobs.node_lost("n2", is_known=False)
    assert jobs.take_over(nobody) == [JobGone("j0"), JobGone("j1")]
