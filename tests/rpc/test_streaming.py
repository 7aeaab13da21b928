"""Rounds on their way to one reader, without a server: what a reader of any speed gets, and what ends it."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from explainserve.explainer import Observer, Round
from explainserve.query import Place
from explainserve.rpc.streaming import NewestRounds, watched, write

Told = list[tuple[int, int]]


def a_round(path: int, number: int) -> Round:
    outcome: Any = number
    question: Any = None
    method: Any = None
    return Round(Place(0, 0, path, 0), method, question, outcome)


def numbers(rounds: list[Round]) -> Told:
    """(path, number) of each."""
    return [(latest.place.target, latest.outcome) for latest in rounds]  # type: ignore[misc]


async def itself(latest: Round) -> Round:
    """Stands for the events of a round."""
    return latest


async def test_a_reader_gets_the_newest_of_each_path_the_longest_waiting_first() -> None:
    rounds = NewestRounds()
    for path, number in [(0, 1), (1, 1), (0, 2), (2, 1), (1, 2), (0, 3)]:
        rounds.put(a_round(path, number))
    rounds.close()

    assert numbers([latest async for latest in rounds]) == [(0, 3), (1, 2), (2, 1)]


async def test_a_reader_that_keeps_up_gets_every_round() -> None:
    read: list[Round] = []

    async def compute(observe: Observer) -> str:
        for number in range(5):
            observe(a_round(0, number))
            while len(read) <= number:
                await asyncio.sleep(0)
        return "answer"

    async def tell(latest: Round) -> None:
        read.append(latest)

    assert await watched(compute, itself, tell) == "answer"
    assert numbers(read) == [(0, number) for number in range(5)]


async def test_a_slow_reader_does_not_hold_up_the_computation() -> None:
    computed, read = asyncio.Event(), []

    async def compute(observe: Observer) -> None:
        for number in range(100):
            observe(a_round(number % 2, number))
            await asyncio.sleep(0)
        computed.set()

    async def tell(latest: Round) -> None:
        read.append(latest)
        await computed.wait()

    await watched(compute, itself, tell)

    assert numbers(read) == [(0, 0), (1, 99), (0, 98)]


async def test_a_round_is_not_kept_while_its_events_are_sent() -> None:
    """It may hold all gradients of its path, which are not counted any more when the computation is over."""
    kept: list[weakref.ref[Round]] = []
    alive: list[bool] = []

    async def compute(observe: Observer) -> None:
        first = a_round(0, 0)
        kept.append(weakref.ref(first))
        observe(first)

    async def events(latest: Round) -> int:
        return 1

    async def send(count: int) -> None:
        gc.collect()
        alive.append(kept[0]() is not None)

    await watched(compute, events, send)

    assert alive == [False]


async def test_events_are_made_by_workers() -> None:
    """Those of large maps take milliseconds that other requests need."""
    written: list[bytes] = []
    makers: list[threading.Thread] = []

    def events() -> Iterator[bytes]:
        for event in (b"progress", b"final"):
            makers.append(threading.current_thread())
            yield event

    class Context:
        async def write(self, event: bytes) -> None:
            written.append(event)

    context: Any = Context()
    await write(context, events())

    assert written == [b"progress", b"final"]
    assert threading.current_thread() not in makers


async def test_what_the_computation_raises_comes_out() -> None:
    async def compute(observe: Observer) -> None:
        observe(a_round(0, 0))
        raise ValueError("no gradient today")

    async def tell(latest: Round) -> None:
        pass

    with pytest.raises(ValueError, match="no gradient today"):
        await watched(compute, itself, tell)


async def test_a_reader_that_is_gone_ends_the_computation() -> None:
    """It is over when `watched` is, so that no row outlives its stream."""
    ended = []

    async def compute(observe: Observer) -> None:
        observe(a_round(0, 0))
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def tell(latest: Round) -> None:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await watched(compute, itself, tell)

    assert ended == [True]


async def test_cancelling_ends_the_computation() -> None:
    running, ended = asyncio.Event(), []

    async def compute(observe: Observer) -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def tell(latest: Round) -> None:
        pass

    watching = asyncio.create_task(watched(compute, itself, tell))
    await running.wait()
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching

    assert ended == [True]
