"""Several devices: which of them evaluates a request, and that none waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from closed_form import PATIENCE, ClosedForm, path, served
from explainserve.devices import Devices
from explainserve.engine import Engine
from explainserve.errors import EvaluationFailed, ExplainServeError, QueueFull
from explainserve.metrics import Metrics
from explainserve.plan import Plan
from explainserve.scheduling import Request, Scheduler
from explainserve.served_model import ServedModel
from explainserve.watchdog import Watchdog

NAMES = ("cpu:0", "cpu:1")


class Pair:
    """A model on two devices, with queues of 100 rows.

    Attributes:
        replicas: those that are served, by device.
        all: every one that ever was.
    """

    def __init__(self, watchdog_seconds: float = 0.0, max_batch_rows: int = 4) -> None:
        self.all = {name: served(ClosedForm(), max_batch_rows=max_batch_rows, device=name) for name in NAMES}
        self.replicas = dict(self.all)
        self.metrics = Metrics(CollectorRegistry())
        engines = {
            name: Engine(Scheduler(100), self.metrics, Watchdog(watchdog_seconds), self._lose, name) for name in NAMES
        }
        self.devices = Devices(engines, lambda model: tuple(self.replicas.values()))

    def loaded(self, name: str) -> ClosedForm:
        loaded = self.all[name].loaded
        assert isinstance(loaded, ClosedForm)
        return loaded

    def rows(self, name: str) -> float:
        found = self.metrics.registry.get_sample_value(
            "explainserve_rows_total", {"model": "closed", "device": name, "kind": "gradient"}
        )
        return found or 0.0

    @contextmanager
    def admitted(self, row_count: int) -> Iterator[str]:
        """A request for so many rows; the device that it was sent to."""
        with self.devices.admitted(self.all["cpu:0"], Request(), row_count) as replica:
            yield replica.device

    async def evaluated(self, row_count: int) -> str:
        """The device that evaluated so many rows."""
        request = Request()
        with self.devices.admitted(self.all["cpu:0"], request, row_count) as replica:
            await self.devices.evaluate(replica, Plan((path(row_count),)), request)
        return replica.device

    def _lose(self, model: ServedModel, error: ExplainServeError) -> None:
        del self.replicas[model.device]


async def running(pair: Pair) -> AsyncIterator[Pair]:
    """Whatever a test holds is let go before the devices stop."""
    pair.devices.start()
    yield pair
    for name in NAMES:
        pair.loaded(name).gate.set()
    await asyncio.to_thread(pair.devices.stop)


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[Pair]:
    async for each in running(Pair()):
        yield each


@pytest_asyncio.fixture
async def watched() -> AsyncIterator[Pair]:
    """With a short-tempered watchdog."""
    async for each in running(Pair(watchdog_seconds=0.2)):
        yield each


def hold(loaded: ClosedForm) -> None:
    loaded.holds_after = 0


async def entered(loaded: ClosedForm) -> None:
    assert await asyncio.to_thread(loaded.entered.wait, PATIENCE)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


def test_a_request_goes_where_the_fewest_rows_are_expected() -> None:
    """Before any row was timed."""
    pair = Pair()
    with (
        pair.admitted(10) as first,
        pair.admitted(30) as second,
        pair.admitted(5) as third,
        pair.admitted(20) as fourth,
    ):
        assert (first, second, third, fourth) == ("cpu:0", "cpu:1", "cpu:0", "cpu:0")
    with pair.admitted(1) as again:
        assert again == "cpu:0", "what requests did not need is given back"


async def test_a_request_goes_where_it_is_done_first(pair: Pair) -> None:
    """A device that takes long for a row is left to those that come when the other has much to do."""
    slow, fast = (pair.devices._engines[name] for name in NAMES)
    slow._conduct(pair.all["cpu:0"]).seconds_per_row = 1.0
    fast._conduct(pair.all["cpu:1"]).seconds_per_row = 0.1

    with pair.admitted(5) as first, pair.admitted(4) as second, pair.admitted(2) as third:
        assert (first, second) == ("cpu:1", "cpu:1"), "idle, the other would take longer"
        assert third == "cpu:1"
        with pair.admitted(70) as long, pair.admitted(1) as short:
            assert (long, short) == ("cpu:1", "cpu:0")


async def test_the_time_of_a_row_is_learned(pair: Pair) -> None:
    engine = pair.devices._engines["cpu:0"]
    assert engine.seconds_per_row(pair.all["cpu:0"]) == 0

    assert await pair.evaluated(3) == "cpu:0"

    assert engine.seconds_per_row(pair.all["cpu:0"]) > 0


def test_a_full_queue_sends_to_the_next_device_and_refuses_where_all_are_full() -> None:
    pair = Pair()
    with pair.admitted(90) as first, pair.admitted(95) as second:
        with pair.admitted(5) as third:  # cpu:0 has the fewest, and room for ten
            assert (first, second, third) == ("cpu:0", "cpu:1", "cpu:0")
        with pytest.raises(QueueFull) as refused, pair.admitted(20):
            pass
    assert refused.value.metadata["reserved"] == "90"


def test_a_device_that_is_full_though_it_would_be_done_first_is_passed_over() -> None:
    pair = Pair()
    fast = pair.devices._engines["cpu:1"]
    pair.devices._engines["cpu:0"]._conduct(pair.all["cpu:0"]).seconds_per_row = 1.0
    fast._conduct(pair.all["cpu:1"]).seconds_per_row = 0.001

    with pair.admitted(99) as first, pair.admitted(10) as second:
        assert (first, second) == ("cpu:1", "cpu:0")


async def test_devices_work_at_the_same_time(pair: Pair) -> None:
    for name in NAMES:
        hold(pair.loaded(name))
    tasks = [asyncio.create_task(pair.evaluated(8)) for _ in range(2)]
    for name in NAMES:
        await entered(pair.loaded(name))  # both at once

    for name in NAMES:
        pair.loaded(name).gate.set()

    assert sorted(await asyncio.gather(*tasks)) == list(NAMES)
    assert [pair.rows(name) for name in NAMES] == [8, 8]


async def test_a_device_that_stands_still_is_left_alone(pair: Pair) -> None:
    """Long before the watchdog looks at it: the longer its run takes, the more the other may have to do."""
    hold(pair.loaded("cpu:0"))
    stuck = asyncio.create_task(pair.evaluated(1))
    await entered(pair.loaded("cpu:0"))
    pair.devices._engines["cpu:1"]._conduct(pair.all["cpu:1"]).seconds_per_row = 0.001

    def sent_to(row_count: int) -> str:
        with pair.admitted(row_count) as device:
            return device

    await until(lambda: sent_to(50) == "cpu:1")

    pair.loaded("cpu:0").gate.set()
    assert await stuck == "cpu:0"


async def test_a_device_that_hangs_takes_its_own_requests_only(watched: Pair) -> None:
    """The other goes on meanwhile and afterwards; the thread of the first is replaced for other models."""
    hold(watched.loaded("cpu:0"))
    hung = asyncio.create_task(watched.evaluated(8))
    await entered(watched.loaded("cpu:0"))
    assert await watched.evaluated(8) == "cpu:1"

    with pytest.raises(EvaluationFailed) as failed:
        await hung

    assert failed.value.reason == "MODEL_HANGS"
    await until(lambda: list(watched.replicas) == ["cpu:1"])
    assert [await watched.evaluated(4) for _ in range(3)] == ["cpu:1"] * 3
    lost = {name: watched.metrics.lost_threads.labels(name)._value.get() for name in NAMES}
    assert lost == {"cpu:0": 1, "cpu:1": 0}
    other = served(ClosedForm(), "other", device="cpu:0")
    assert await watched.devices.evaluate(other, Plan((path(3),)), Request())


async def test_too_little_memory_makes_batches_smaller_on_one_device_only(pair: Pair) -> None:
    pair.loaded("cpu:0").failure = MemoryError()
    with pytest.raises(EvaluationFailed):
        await pair.evaluated(4)
    pair.loaded("cpu:0").failure = None

    with pair.admitted(50):  # so that one goes to each
        assert await pair.evaluated(4) == "cpu:1"
    assert await pair.evaluated(4) == "cpu:0"

    assert pair.loaded("cpu:0").batches == [4, 2, 1, 1, 1, 1, 1]
    assert pair.loaded("cpu:1").batches == [4]


async def test_stop_finishes_the_last_batch_of_each_device(pair: Pair) -> None:
    for name in NAMES:
        hold(pair.loaded(name))
    tasks = [asyncio.create_task(pair.evaluated(4)) for _ in range(2)]
    for name in NAMES:
        await entered(pair.loaded(name))

    stopping = asyncio.create_task(asyncio.to_thread(pair.devices.stop))
    await until(lambda: all(engine._stopping for engine in pair.devices._engines.values()))
    for name in reversed(NAMES):
        pair.loaded(name).gate.set()
    await stopping

    assert sorted(await asyncio.gather(*tasks)) == list(NAMES)
