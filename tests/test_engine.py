"""The engine: the device thread, and how plans end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from closed_form import FORWARD, PATIENCE, WEIGHTS, ClosedForm, path, served, value
from explainserve.backends import Collect
from explainserve.engine import Engine
from explainserve.errors import (
    DeadlineExceeded,
    EvaluationFailed,
    ExplainServeError,
    QueueFull,
    ShuttingDown,
    Unsupported,
)
from explainserve.metrics import Metrics
from explainserve.plan import Plan, Rows, Segment, SegmentEvaluation
from explainserve.scheduling import Request, Scheduler
from explainserve.served_model import ServedModel
from explainserve.watchdog import HANGS, Watchdog


@pytest.fixture
def loaded() -> ClosedForm:
    return ClosedForm()


@pytest.fixture
def model(loaded: ClosedForm) -> ServedModel:
    return served(loaded)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest_asyncio.fixture
async def engine(loaded: ClosedForm, metrics: Metrics) -> AsyncIterator[Engine]:
    """With a queue of 100 rows; whatever a test holds is let go before the engine stops."""
    engine = Engine(Scheduler(max_waiting_rows=100), metrics)
    engine.start()
    yield engine
    loaded.gate.set()
    await asyncio.to_thread(engine.stop)


def plan(*segments: Segment) -> Plan:
    return Plan(segments)


async def entered(loaded: ClosedForm) -> None:
    """Waits until the device is at a batch that is held."""
    assert await asyncio.to_thread(loaded.entered.wait, PATIENCE)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


async def failure(coroutine: Any) -> ExplainServeError:
    with pytest.raises(ExplainServeError) as caught:
        await coroutine
    return caught.value


def hold(loaded: ClosedForm) -> None:
    loaded.holds_after = 0


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """Of all series with these labels."""
    found = [own for family in metrics.registry.collect() for own in family.samples if own.name == name]
    return sum(own.value for own in found if labels.items() <= own.labels.items())


async def test_rows_come_back_by_segment(engine: Engine, model: ServedModel) -> None:
    """Sums over pieces of a segment, in whatever batches they went."""
    long, short = path(11), path(1, index=1)
    evaluation, _ = await engine.evaluate(model, plan(long, short), Request())

    for segment, own, index in zip((long, short), evaluation.segments, (0, 1), strict=True):
        y = value(np.ones(3) * segment.alphas[:, None])
        expected = (segment.weights @ (1 - y[:, index] ** 2)) * WEIGHTS[:, index]
        np.testing.assert_allclose(own.scores, y[:, index], rtol=1e-6)
        np.testing.assert_allclose(own.gradient_sums["x"], expected, rtol=1e-6)


async def test_forward_rows_come_back_whole(engine: Engine, model: ServedModel) -> None:
    points = [np.full(3, k, np.float32) for k in range(9)]
    segments = [Segment({"x": p}, {"x": p}, {}, FORWARD, np.ones(1), np.zeros(1)) for p in points]
    evaluation, _ = await engine.evaluate(model, Plan(tuple(segments)), Request())

    for p, own in zip(points, evaluation.segments, strict=True):
        assert own.outputs is not None
        np.testing.assert_allclose(own.outputs[0], value(p), rtol=1e-6)


async def test_plans_share_batches_while_the_device_is_busy(
    engine: Engine, model: ServedModel, loaded: ClosedForm, metrics: Metrics
) -> None:
    hold(loaded)
    first = asyncio.create_task(engine.evaluate(model, plan(path(1)), Request()))
    await entered(loaded)
    others = [asyncio.create_task(engine.evaluate(model, plan(path(2, index=k)), Request())) for k in (0, 1)]
    await asyncio.sleep(0)

    loaded.gate.set()
    await asyncio.gather(first, *others)

    assert loaded.batches == [1, 4]
    assert sample(metrics, "explainserve_batch_rows_count", model="closed") == 2
    assert sample(metrics, "explainserve_batch_rows_sum", model="closed") == 5
    assert sample(metrics, "explainserve_rows_total", model="closed", kind="gradient") == 5


async def test_higher_priority_goes_first(engine: Engine, model: ServedModel, loaded: ClosedForm) -> None:
    hold(loaded)
    first = asyncio.create_task(engine.evaluate(model, plan(path(1)), Request()))
    await entered(loaded)
    usual = asyncio.create_task(engine.evaluate(model, plan(path(4)), Request()))
    await asyncio.sleep(0)
    urgent = asyncio.create_task(engine.evaluate(model, plan(path(4, offset=0.1)), Request(priority=1)))
    await asyncio.sleep(0)

    loaded.gate.set()
    await asyncio.gather(first, usual, urgent)
    shares = [sum(alpha in path(4).alphas for alpha in batch) for batch in loaded.seen[1:]]

    assert shares[0] <= shares[-1]
    assert shares[-1] > 0


@pytest.mark.parametrize("error", [ValueError("shapes\ndiffer"), KeyError()])
async def test_model_that_raises_fails_its_own_plans(
    engine: Engine, model: ServedModel, loaded: ClosedForm, error: Exception
) -> None:
    loaded.failure = error
    failed = await failure(engine.evaluate(model, plan(path(9)), Request()))

    assert isinstance(failed, EvaluationFailed)
    assert failed.reason == "MODEL_RAISED"
    assert type(error).__name__ in failed.message
    assert "\n" not in failed.message
    assert loaded.batches == [4]
    loaded.failure = None
    evaluation, _ = await engine.evaluate(model, plan(path(3)), Request())
    assert len(evaluation.segments[0].scores) == 3


class Picky(ClosedForm):
    """Raises for a batch that holds a certain row, or more rows than fit into its memory."""

    def __init__(self, bad_alpha: float | None = None, memory_rows: int = 100) -> None:
        super().__init__()
        self.bad_alpha = bad_alpha
        self.memory_rows = memory_rows

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        parts = super().evaluate(rows)
        if rows.row_count > self.memory_rows:
            raise EvaluationFailed("OUT_OF_MEMORY", "no memory is left")
        if self.bad_alpha in self.seen[-1]:
            raise ValueError("index out of range")
        return parts


async def test_bad_input_fails_only_its_sender(engine: Engine, metrics: Metrics) -> None:
    """Rows of three requests share a batch, one of them makes the model raise."""
    bad = path(2, offset=0.1)
    loaded = Picky(bad_alpha=bad.alphas[1])
    model = served(loaded, max_batch_rows=16)
    hold(loaded)
    first = asyncio.create_task(engine.evaluate(model, plan(path(1)), Request()))
    await entered(loaded)
    plans = [plan(path(3)), plan(bad), plan(path(5))]
    tasks = [asyncio.create_task(engine.evaluate(model, own, Request())) for own in plans]
    await asyncio.sleep(0)
    loaded.gate.set()

    await first
    good, failed, other = await asyncio.gather(*tasks, return_exceptions=True)

    assert isinstance(failed, EvaluationFailed) and failed.reason == "MODEL_RAISED"
    for answer, count in ((good, 3), (other, 5)):
        assert not isinstance(answer, BaseException)
        reference, _ = await engine.evaluate(model, plan(path(count)), Request())
        np.testing.assert_array_equal(answer[0].segments[0].scores, reference.segments[0].scores)
    assert sorted(loaded.batches[:5]) == [1, 2, 3, 5, 10]
    assert sample(metrics, "explainserve_failed_batches_total", model="closed", reason="MODEL_RAISED") == 2


async def test_too_little_memory_halves_the_batches_and_goes_on(
    engine: Engine, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = Picky(memory_rows=3)
    model = served(loaded, max_batch_rows=16)

    evaluation, _ = await engine.evaluate(model, plan(path(21)), Request())
    reference, _ = await engine.evaluate(served(ClosedForm(), "other", 3), plan(path(21)), Request())
    again = len(loaded.batches)
    await engine.evaluate(model, plan(path(8)), Request())

    np.testing.assert_array_equal(evaluation.segments[0].scores, reference.segments[0].scores)
    assert loaded.batches[:3] == [16, 8, 4]
    assert set(loaded.batches[3:again]) <= {1, 2}
    assert loaded.batches[again:] == [2, 2, 2, 2], "the limit is remembered"
    assert sample(metrics, "explainserve_failed_batches_total", model="closed", reason="OUT_OF_MEMORY") == 3
    told = [("closed", "cpu", 16, 8), ("closed", "cpu", 8, 4), ("closed", "cpu", 4, 2)]
    assert [record.args for record in caplog.records] == told


@pytest.mark.parametrize("error", [MemoryError(), EvaluationFailed("OUT_OF_MEMORY", "none is left")])
async def test_too_little_memory_for_one_row_fails_its_request(
    engine: Engine, model: ServedModel, loaded: ClosedForm, error: Exception
) -> None:
    loaded.failure = error
    failed = await failure(engine.evaluate(model, plan(path(9)), Request()))

    assert isinstance(failed, EvaluationFailed)
    assert failed.reason == "OUT_OF_MEMORY"
    assert loaded.batches == [4, 2, 1]


class Hanging(ClosedForm):
    """Never returns from a batch that holds a certain row, unless it can be ended and is."""

    def __init__(self, bad_alpha: float, *, can_be_ended: bool) -> None:
        super().__init__()
        self.bad_alpha = bad_alpha
        self.can_be_ended = can_be_ended
        self.ended = threading.Event()
        self.interruptions = 0

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        if any(self.bad_alpha in segment.alphas for segment in rows.segments):
            assert self.ended.wait(PATIENCE), "nobody ended it"
            self.ended.clear()
            raise RuntimeError("ended")
        return super().evaluate(rows)

    def interrupt(self) -> None:
        self.interruptions += 1
        if self.can_be_ended:
            self.ended.set()


BAD = path(2, offset=0.1)
"""Makes a model hang."""


@dataclass
class Watched:
    """An engine with a short-tempered watchdog, and what it told."""

    engine: Engine
    metrics: Metrics
    disowned: list[tuple[ServedModel, ExplainServeError]]


@pytest_asyncio.fixture
async def watched() -> AsyncIterator[Watched]:
    metrics, disowned = Metrics(CollectorRegistry()), []  # type: ignore[var-annotated]
    engine = Engine(Scheduler(1000), metrics, Watchdog(0.2), lambda *told: disowned.append(told))
    engine.start()
    yield Watched(engine, metrics, disowned)
    await asyncio.to_thread(engine.stop)


async def test_run_that_can_be_ended_fails_only_the_request_to_blame(watched: Watched) -> None:
    """It shared its batch with others, which are answered; the model is served on."""
    loaded = Hanging(BAD.alphas[1], can_be_ended=True)
    model = served(loaded, max_batch_rows=16)
    hold(loaded)
    first = asyncio.create_task(watched.engine.evaluate(model, plan(path(1)), Request()))
    await entered(loaded)
    plans = [plan(path(3)), plan(BAD), plan(path(5))]
    tasks = [asyncio.create_task(watched.engine.evaluate(model, own, Request())) for own in plans]
    await asyncio.sleep(0)
    loaded.gate.set()

    await first
    good, failed, other = await asyncio.gather(*tasks, return_exceptions=True)

    assert isinstance(failed, EvaluationFailed) and failed.reason == "MODEL_HANGS"
    assert not isinstance(good, BaseException) and not isinstance(other, BaseException)
    assert sample(watched.metrics, "explainserve_failed_batches_total", model="closed", reason="MODEL_HANGS") == 2
    assert not watched.disowned
    assert await watched.engine.evaluate(model, plan(path(2)), Request())


async def test_model_that_must_be_ended_again_and_again_is_disowned(watched: Watched) -> None:
    loaded = Hanging(BAD.alphas[1], can_be_ended=True)
    model = served(loaded)

    reasons = [(await failure(watched.engine.evaluate(model, plan(BAD), Request()))).reason for _ in range(HANGS + 2)]

    assert reasons == ["MODEL_HANGS"] * (HANGS + 2)
    assert loaded.interruptions == HANGS, "further requests are refused without a run"
    assert [(own, error.reason) for own, error in watched.disowned] == [(model, "MODEL_HANGS")]


async def test_others_go_on_when_a_run_cannot_be_ended(watched: Watched) -> None:
    """Its jobs fail, those that wait included; when it comes back at last, nobody takes what it brings."""
    loaded = Hanging(BAD.alphas[1], can_be_ended=False)
    model, other = served(loaded), served(ClosedForm(), "other")
    threads = device_thread_count()
    hung = asyncio.create_task(watched.engine.evaluate(model, plan(BAD), Request()))
    await until(lambda: watched.engine._run is not None)
    waiting = [asyncio.create_task(watched.engine.evaluate(m, plan(path(9)), Request())) for m in (model, other)]

    same, different = await asyncio.gather(*waiting, return_exceptions=True)

    assert (await failure(hung)).reason == "MODEL_HANGS"
    assert isinstance(same, EvaluationFailed) and same.reason == "MODEL_HANGS"
    assert not isinstance(different, BaseException)
    assert [own for own, _ in watched.disowned] == [model]
    assert (await failure(watched.engine.evaluate(model, plan(path(1)), Request()))).reason == "MODEL_HANGS"
    assert sample(watched.metrics, "explainserve_lost_threads") == 1
    assert device_thread_count() == threads + 1

    loaded.ended.set()
    await until(lambda: sample(watched.metrics, "explainserve_lost_threads") == 0)

    await until(lambda: device_thread_count() == threads)
    assert await watched.engine.evaluate(other, plan(path(5)), Request())


async def test_a_late_run_does_not_hit_the_next_one(watched: Watched, loaded: ClosedForm, model: ServedModel) -> None:
    """A run that comes back in time is not overdue, however long the engine idles afterwards."""
    await watched.engine.evaluate(model, plan(path(3)), Request())
    await asyncio.sleep(0.5)
    await watched.engine.evaluate(model, plan(path(3)), Request())

    assert sample(watched.metrics, "explainserve_lost_threads") == 0
    assert not watched.disowned


async def test_stop_leaves_a_run_that_cannot_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAST_BATCH_SECONDS", "INTERRUPTED_BATCH_SECONDS"):
        monkeypatch.setattr(f"explainserve.engine.{name}", 0.1)
    loaded = Hanging(BAD.alphas[1], can_be_ended=False)
    engine = Engine(Scheduler(1000), Metrics(CollectorRegistry()))
    engine.start()
    hung = asyncio.create_task(engine.evaluate(served(loaded), plan(BAD), Request()))
    await until(lambda: engine._run is not None)

    await asyncio.to_thread(engine.stop)

    assert isinstance(await failure(hung), ShuttingDown)
    assert loaded.interruptions == 1
    loaded.ended.set()


class Behind(ClosedForm):
    """Works behind the thread: evaluates what was submitted when it is collected, unless it holds up one or the other.

    Attributes:
        submitted: rows of each micro-batch that it was given.
        never_submits, never_returns: it gets stuck with a micro-batch that holds this row.
        raises: it refuses one that holds this row.
    """

    runs_ahead = True

    def __init__(self) -> None:
        super().__init__()
        self.submitted: list[int] = []
        self.asked = threading.Event()
        self.may_submit = threading.Event()
        self.may_submit.set()
        self.end = threading.Event()
        self.never_submits = self.never_returns = self.raises = -1.0

    def submit(self, rows: Rows) -> Collect:
        self.asked.set()
        assert self.may_submit.wait(PATIENCE)
        alphas = [alpha for segment in rows.segments for alpha in segment.alphas]
        if self.raises in alphas:
            raise ValueError("no such row")
        if self.never_submits in alphas:
            assert self.end.wait(PATIENCE)
        self.submitted.append(rows.row_count)

        def collect() -> tuple[SegmentEvaluation, ...]:
            if self.never_returns in alphas:
                assert self.end.wait(PATIENCE)
            return self.evaluate(rows)

        return collect


async def beside(engine: Engine, first: ServedModel, one: Plan, *others: tuple[ServedModel, Plan]) -> list[Any]:
    """Answers or errors of plans, of which all others wait when the first one is submitted."""
    loaded: Any = first.loaded
    loaded.may_submit.clear()
    tasks = [asyncio.create_task(engine.evaluate(first, one, Request()))]
    assert await asyncio.to_thread(loaded.asked.wait, PATIENCE)
    tasks += [asyncio.create_task(engine.evaluate(model, own, Request())) for model, own in others]
    await asyncio.sleep(0)
    loaded.may_submit.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def assert_answered(answer: Any, segment: Segment) -> None:
    (own,) = answer[0].segments
    np.testing.assert_allclose(own.scores, value(np.ones(3) * segment.alphas[:, None])[:, 0], rtol=1e-6)


async def test_the_next_full_batch_is_submitted_while_the_device_is_busy(engine: Engine) -> None:
    model = served(behind := Behind())
    hold(behind)
    answer = asyncio.create_task(engine.evaluate(model, plan(path(15)), Request()))
    await entered(behind)

    assert (behind.submitted, behind.batches) == ([4, 4], []), "and no further one"
    behind.gate.set()
    assert_answered(await answer, path(15))
    assert behind.submitted == behind.batches == [4, 4, 4, 3]


async def test_rows_that_fill_no_batch_wait_for_others(engine: Engine) -> None:
    model = served(behind := Behind())
    hold(behind)
    answer = asyncio.create_task(engine.evaluate(model, plan(path(7)), Request()))
    await entered(behind)
    more = asyncio.create_task(engine.evaluate(model, plan(path(1)), Request()))
    await asyncio.sleep(0)

    assert behind.submitted == [4]
    behind.gate.set()
    await asyncio.gather(answer, more)
    assert behind.submitted == [4, 4]


async def test_a_batch_that_cannot_be_submitted_fails_its_own_requests(engine: Engine) -> None:
    model = served(behind := Behind())
    bad = path(4, offset=0.1)
    behind.raises = bad.alphas[0]

    good, failed, other = await beside(engine, model, plan(path(4)), (model, plan(bad)), (model, plan(path(6))))

    assert_answered(good, path(4))
    assert_answered(other, path(6))
    assert isinstance(failed, EvaluationFailed) and failed.reason == "MODEL_RAISED"


async def test_a_batch_behind_one_that_hangs_is_run_by_the_next_thread(watched: Watched) -> None:
    hangs, waits = Behind(), Behind()
    hangs.never_returns = BAD.alphas[0]
    one, other = served(hangs, "hangs", 2), served(waits, "waits", 2)

    failed, good = await beside(watched.engine, one, plan(BAD), (other, plan(path(3))))

    assert waits.submitted[0] == 2, "by the thread that was lost"
    assert sorted(waits.submitted[1:]) == [1, 2]
    assert_answered(good, path(3))
    assert isinstance(failed, EvaluationFailed) and failed.reason == "MODEL_HANGS"
    assert [model for model, _ in watched.disowned] == [one]
    hangs.end.set()


async def test_a_batch_before_one_that_hangs_is_run_by_the_next_thread(watched: Watched) -> None:
    """The one that cannot even be submitted is to blame, not the one on the device."""
    waits, hangs = Behind(), Behind()
    hangs.never_submits = BAD.alphas[0]
    one, other = served(waits, "waits", 2), served(hangs, "hangs", 2)

    good, failed = await beside(watched.engine, one, plan(path(2)), (other, plan(BAD)))

    assert_answered(good, path(2))
    assert isinstance(failed, EvaluationFailed) and failed.reason == "MODEL_HANGS"
    assert [model for model, _ in watched.disowned] == [other]
    hangs.end.set()


async def test_own_errors_pass_as_they_are(engine: Engine, model: ServedModel, loaded: ClosedForm) -> None:
    loaded.failure = Unsupported("NOT_DIFFERENTIABLE", "no gradient")

    assert await failure(engine.evaluate(model, plan(path(1)), Request())) is loaded.failure


@pytest.mark.parametrize("parts", [(), (SegmentEvaluation(np.ones(7), {"x": np.ones((2, 2, 2))}),)])
async def test_backend_that_returns_nonsense_fails_its_own_plans(
    engine: Engine, model: ServedModel, loaded: ClosedForm, parts: tuple[SegmentEvaluation, ...]
) -> None:
    """The device thread survives it: there is only one."""
    other = served(Nonsense(parts), "nonsense")

    failed = await failure(engine.evaluate(other, plan(path(2)), Request()))
    evaluation, _ = await engine.evaluate(model, plan(path(3)), Request())

    assert failed.reason == "MODEL_RAISED"
    assert len(evaluation.segments[0].scores) == 3


class Nonsense(ClosedForm):
    def __init__(self, parts: tuple[SegmentEvaluation, ...]) -> None:
        super().__init__()
        self._parts = parts

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        return self._parts


async def test_cancelling_drops_the_rows_that_wait(
    engine: Engine, model: ServedModel, loaded: ClosedForm, metrics: Metrics
) -> None:
    hold(loaded)
    leaving = asyncio.create_task(engine.evaluate(model, plan(path(40)), Request()))
    await entered(loaded)
    staying = asyncio.create_task(engine.evaluate(model, plan(path(3)), Request()))
    await asyncio.sleep(0)

    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    loaded.gate.set()
    await staying

    assert loaded.batches == [4, 3]
    await until(lambda: sample(metrics, "explainserve_waiting_rows") == 0)


async def test_expired_plan_is_not_evaluated(engine: Engine, model: ServedModel, loaded: ClosedForm) -> None:
    failed = await failure(engine.evaluate(model, plan(path(5)), Request(expires_at=time.monotonic() - 1)))

    assert isinstance(failed, DeadlineExceeded)
    assert loaded.batches == []


async def test_plan_that_expires_on_the_way_loses_the_rest(
    engine: Engine, model: ServedModel, loaded: ClosedForm
) -> None:
    hold(loaded)
    running = asyncio.create_task(engine.evaluate(model, plan(path(9)), Request(expires_at=time.monotonic() + 0.05)))
    await entered(loaded)
    await asyncio.sleep(0.06)
    loaded.gate.set()

    assert isinstance(await failure(running), DeadlineExceeded)
    assert loaded.batches == [4]


async def test_full_queue_refuses_and_recovers(engine: Engine, model: ServedModel, loaded: ClosedForm) -> None:
    """Places are for requests: those that have one may use it in as many rounds as they like."""
    hold(loaded)
    request = Request()
    with engine.admitted(request, 100):
        with pytest.raises(QueueFull) as refused, engine.admitted(Request(), 1):
            pass
        waiting = [asyncio.create_task(engine.evaluate(model, plan(path(50)), request)) for _ in range(2)]
        await entered(loaded)
        with engine.admitted(Request(), 4):  # those that are on the device wait no longer
            pass
        loaded.gate.set()
        await asyncio.gather(*waiting)

    assert refused.value.metadata == {"bound": "rows", "reserved": "100", "needed": "1", "limit": "100"}
    with engine.admitted(Request(), 100):
        pass


async def test_failed_request_gives_its_place_back(engine: Engine, model: ServedModel, loaded: ClosedForm) -> None:
    loaded.failure = ValueError()
    request = Request()
    with pytest.raises(EvaluationFailed), engine.admitted(request, 100):
        await engine.evaluate(model, plan(path(60)), request)

    with engine.admitted(Request(), 100):
        pass


async def test_stop_ends_what_waits_and_refuses_what_comes(
    engine: Engine, model: ServedModel, loaded: ClosedForm
) -> None:
    threads = device_thread_count()
    hold(loaded)
    first = asyncio.create_task(engine.evaluate(model, plan(path(4)), Request()))
    await entered(loaded)
    waiting = asyncio.create_task(engine.evaluate(model, plan(path(8)), Request()))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
    await until(lambda: engine._stopping)
    loaded.gate.set()
    await stopping

    await first  # the batch on the device is finished
    assert isinstance(await failure(waiting), ShuttingDown)
    assert isinstance(await failure(engine.evaluate(model, plan(path(1)), Request())), ShuttingDown)
    assert loaded.batches == [4]
    assert device_thread_count() == threads - 1


def device_thread_count() -> int:
    return sum(thread.name == "device cpu" for thread in threading.enumerate())


async def test_time_on_the_device_counts_each_batch_once(
    engine: Engine, model: ServedModel, loaded: ClosedForm, metrics: Metrics
) -> None:
    """Two plans of one request that share their batches."""
    hold(loaded)
    other = asyncio.create_task(engine.evaluate(model, plan(path(1)), Request()))
    await entered(loaded)
    before = sample(metrics, "explainserve_compute_seconds_sum", model="closed")
    request = Request()
    plans = [asyncio.create_task(engine.evaluate(model, plan(path(4, index=k)), request)) for k in (0, 1)]
    await asyncio.sleep(0)
    loaded.gate.set()
    await asyncio.gather(other, *plans)
    total = sample(metrics, "explainserve_compute_seconds_sum", model="closed") - before

    assert 0 < request.compute_seconds < total
    assert sample(metrics, "explainserve_queue_seconds_count", model="closed") == 3
    assert all(task.result()[1] >= 0 for task in plans)
