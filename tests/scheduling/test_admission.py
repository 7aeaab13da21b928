"""Who is admitted, and what is told to those that are not."""

from __future__ import annotations

import pytest

from explainserve.errors import LONGEST_RETRY_SECONDS, SHORTEST_RETRY_SECONDS, QueueFull
from explainserve.scheduling import Request, Scheduler
from scheduling.fake_device import drain, evaluate, job


def refused(scheduler: Scheduler, rows: int) -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        scheduler.admit(Request(), rows)
    return caught.value


def timed(scheduler: Scheduler, rows: int, seconds: float) -> None:
    """The device evaluates so many rows, each batch in so many seconds."""
    request = Request()
    scheduler.admit(request, rows)
    scheduler.submit(job(rows, request=request), 0.0)
    while (batch := scheduler.next_batch(0.0)) is not None:
        scheduler.complete(batch, evaluate(batch), seconds)
    scheduler.release(request)


def test_full_queue_refuses_at_once_and_admits_again_later() -> None:
    scheduler = Scheduler(max_waiting_rows=10)
    first = Request()
    scheduler.admit(first, 9)
    scheduler.submit(job(8, request=first), 0.0)

    error = refused(scheduler, 2)

    assert error.reason == "QUEUE_FULL"
    assert error.metadata == {"bound": "rows", "reserved": "9", "needed": "2", "limit": "10"}
    drain(scheduler)
    scheduler.admit(Request(), 9)  # all but what the first may still bring
    refused(scheduler, 1)
    scheduler.release(first)
    scheduler.admit(Request(), 1)


def test_refused_request_reserves_nothing() -> None:
    scheduler = Scheduler(max_waiting_rows=10)

    refused(scheduler, 11)
    scheduler.admit(Request(), 10)


@pytest.mark.parametrize(("rows", "expected"), [(1, 0.5), (5, 2.5)])
def test_time_until_there_is_room_follows_from_the_speed_of_the_device(rows: int, expected: float) -> None:
    """Eight rows in four seconds: each row that must go first takes half a second."""
    scheduler = Scheduler(max_waiting_rows=100)
    timed(scheduler, 40, 4.0)
    scheduler.admit(Request(), 100)

    assert refused(scheduler, rows).retry_after_seconds == pytest.approx(expected)


def test_time_to_try_again_is_bounded() -> None:
    scheduler = Scheduler(max_waiting_rows=10**6)
    scheduler.admit(Request(), 10**6 - 8)
    unknown = refused(scheduler, 9).retry_after_seconds
    timed(scheduler, 8, 100.0)

    assert unknown == SHORTEST_RETRY_SECONDS
    assert refused(scheduler, 10**6).retry_after_seconds == LONGEST_RETRY_SECONDS


def test_speed_is_that_of_late() -> None:
    scheduler = Scheduler(max_waiting_rows=1000)
    timed(scheduler, 80, 40.0)
    timed(scheduler, 8 * 40, 1.0)
    scheduler.admit(Request(), 1000)

    error = refused(scheduler, 8)

    assert error.retry_after_seconds is not None and error.retry_after_seconds < 2
