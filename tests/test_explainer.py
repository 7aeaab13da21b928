"""The explainer: from a query to attributions, round by round, and what ends it early."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from closed_form import PATIENCE, ClosedForm, exact_attribution, served, value
from explainserve.baselines import BaselineSpec, Constant, GaussianNoise, Zeros
from explainserve.devices import Devices
from explainserve.engine import Engine
from explainserve.errors import DeadlineExceeded, EvaluationFailed, ExplainServeError, InvalidRequest, LimitExceeded
from explainserve.explainer import Answer, Explainer, Round
from explainserve.explanation import Instance, StopReason, Subject
from explainserve.methods import ExpectedGradients, IntegratedGradients
from explainserve.metrics import Metrics
from explainserve.plan import Differentiation
from explainserve.query import CONCURRENT_QUESTIONS, FIRST_ROUND_ARRAYS, MAX_SHARING_TARGETS, Query
from explainserve.scheduling import Scheduler
from explainserve.served_model import ServedModel
from explainserve.signature import MapSpec, Score, ScoreHead
from explainserve.targets import Argmax, Element, Margin, TargetSpec, TopK, Weights

X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
ZERO = BaselineSpec(Zeros())
ENDLESS = IntegratedGradients(tolerance=1e-12, completeness_tolerance=1e-12, max_step_count=512)


@pytest.fixture
def loaded() -> ClosedForm:
    return ClosedForm()


@pytest.fixture
def model(loaded: ClosedForm) -> ServedModel:
    return served(loaded, max_batch_rows=16)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(max_waiting_rows=100_000)


@pytest_asyncio.fixture
async def explainer(loaded: ClosedForm, scheduler: Scheduler) -> AsyncIterator[Explainer]:
    devices = on_one_device(scheduler)
    devices.start()
    yield Explainer(devices, max_request_rows=5000, max_request_bytes=100_000)
    loaded.gate.set()
    await asyncio.to_thread(devices.stop)


def on_one_device(scheduler: Scheduler) -> Devices:
    return Devices({"cpu": Engine(scheduler, Metrics(CollectorRegistry()))})


def target(*index: int, **fields: Any) -> TargetSpec:
    return TargetSpec("y", Score.OUTPUT, Element(index), **fields)


def query(model: ServedModel, x: np.ndarray[Any, Any] = X, **fields: Any) -> Query:
    usual: dict[str, Any] = {
        "targets": (target(0),),
        "baselines": (ZERO,),
        "methods": (IntegratedGradients(step_count=64),),
        "subject": Subject(maps={"x": MapSpec("x")}, shapes={"x": (3,)}),
    }
    return Query(model=model, instances=tuple(Instance({"x": row}, {}) for row in x), **{**usual, **fields})


async def explain(explainer: Explainer, asked: Query) -> Answer:
    return await explainer.explain(explainer.prepare(asked))


async def failure(coroutine: Any) -> ExplainServeError:
    with pytest.raises(ExplainServeError) as caught:
        await coroutine
    return caught.value


def soon(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_attributions_are_those_of_the_closed_form(explainer: Explainer, model: ServedModel) -> None:
    baselines = (ZERO, BaselineSpec(Constant((0.5,)), request_index=1))
    answer = await explain(
        explainer, query(model, targets=(target(1), target(0, request_index=1)), baselines=baselines)
    )

    places = [(e.place.instance, e.place.target, e.place.baseline) for e in answer.explanations]
    assert places == [(i, t, b) for i in range(2) for t in range(2) for b in range(2)]
    for own in answer.explanations:
        x0 = np.full(3, 0.5 * own.place.baseline)
        index = (1, 0)[own.place.target]
        expected = exact_attribution(X[own.place.instance], x0, index)
        np.testing.assert_allclose(own.attribution.tensors["x"], expected, rtol=2e-3, atol=1e-5)
        assert own.question.instance_output_value == pytest.approx(value(X[own.place.instance])[index], rel=1e-6)
        assert own.question.baseline_output_value == pytest.approx(value(x0)[index], rel=1e-6, abs=1e-9)
        assert own.attribution.stop_reason is StopReason.FIXED_STEPS


async def test_end_points_are_evaluated_once(explainer: Explainer, model: ServedModel, loaded: ClosedForm) -> None:
    """Two targets, the same baseline stated twice, and an instance that is that baseline: three distinct points."""
    x = np.concatenate([X, np.zeros((1, 3), np.float32)])
    baselines = (ZERO, BaselineSpec(Constant((0.0,)), request_index=1))
    asked = query(model, x, targets=(target(0), target(1)), baselines=baselines)
    prepared = explainer.prepare(asked)
    assert loaded.batches == []
    answer = await explainer.explain(prepared)

    assert loaded.forward_rows == prepared.cost.end_point_rows == answer.usage.forward_rows == 3
    assert loaded.gradient_rows == prepared.cost.max_gradient_rows == answer.usage.gradient_rows == 6 * 64
    assert loaded.backward_count == prepared.cost.max_backward_count == answer.usage.backward_count == 12 * 64
    assert answer.usage.saved_rows == (2 * 12 - 3) + 6 * 64


async def test_targets_of_one_path_share_its_rows(explainer: Explainer, model: ServedModel, loaded: ClosedForm) -> None:
    """Each as it would be alone; what is asked twice is computed once."""
    margin = TargetSpec("y", Score.OUTPUT, Margin(Element((0,)), Element((1,))))
    targets = (target(0), target(1), target(1), margin)
    answer = await explain(explainer, query(model, X[:1], targets=targets))

    assert (loaded.gradient_rows, loaded.backward_count) == (64, 3 * 64)
    alone = [(await explain(explainer, query(model, X[:1], targets=(one,)))).explanations[0] for one in targets]
    for found, own in zip(answer.explanations, alone, strict=True):
        np.testing.assert_allclose(found.attribution.tensors["x"], own.attribution.tensors["x"], rtol=1e-5)
        np.testing.assert_allclose(found.attribution.scores, own.attribution.scores, rtol=1e-6)


@pytest.mark.parametrize("budget", [None, 60.0])
async def test_adaptive_targets_share_what_is_the_same_for_them(
    explainer: Explainer, model: ServedModel, loaded: ClosedForm, budget: float | None
) -> None:
    """Where they diverge, each goes its own way: the rows of another target never change its choice."""
    method = IntegratedGradients(tolerance=0.003)
    targets = (target(0), target(1))
    ends = None if budget is None else soon(budget)
    prepared = explainer.prepare(query(model, 8 * X[:1], targets=targets, methods=(method,), budget_ends_at=ends))
    answer = await explainer.explain(prepared)
    rows = loaded.gradient_rows
    alone = [
        (await explain(explainer, query(model, 8 * X[:1], targets=(one,), methods=(method,)))).explanations[0]
        for one in targets
    ]

    for found, own in zip(answer.explanations, alone, strict=True):
        np.testing.assert_array_equal(found.attribution.alphas, own.attribution.alphas)
        np.testing.assert_allclose(found.attribution.tensors["x"], own.attribution.tensors["x"], rtol=1e-5)
        assert found.attribution.stop_reason is own.attribution.stop_reason
    steps = [own.attribution.step_count for own in alone]
    assert steps[0] != steps[1], "this instance should have the targets diverge"
    assert max(steps) <= rows < sum(steps)
    assert answer.usage.backward_count == sum(steps)
    assert answer.usage.saved_rows == sum(steps) - rows + 2
    assert prepared.cost.min_gradient_rows <= rows <= prepared.cost.max_gradient_rows


async def test_a_target_that_is_done_leaves_the_others_to_go_on(explainer: Explainer, model: ServedModel) -> None:
    """The second has no gradient, and is done after its first rounds."""
    nothing = TargetSpec("y", Score.OUTPUT, Margin(Element((0,)), Element((0,))))
    answer = await explain(explainer, query(model, X[:1], targets=(target(0), nothing), methods=(ENDLESS,)))
    first, second = (own.attribution for own in answer.explanations)

    assert first.step_count > second.step_count
    assert not second.tensors["x"].any()


@pytest.mark.parametrize("method", [IntegratedGradients(step_count=2), replace(ENDLESS, max_step_count=32)])
async def test_many_targets_go_in_several_groups(
    explainer: Explainer, model: ServedModel, loaded: ClosedForm, method: IntegratedGradients
) -> None:
    """More than may go together, and more than are in flight; no group waits for another for ever."""
    weights = np.random.default_rng(5).standard_normal((3 * CONCURRENT_QUESTIONS + 1, 2))
    targets = tuple(TargetSpec("y", Score.OUTPUT, Weights(own)) for own in weights)
    prepared = explainer.prepare(query(model, X[:1], targets=targets, methods=(method,)))
    answer = await asyncio.wait_for(explainer.explain(prepared), PATIENCE)

    assert len(answer.explanations) == len(targets)
    assert max(loaded.selector_counts) == MAX_SHARING_TARGETS
    assert prepared.cost.min_gradient_rows <= answer.usage.gradient_rows <= prepared.cost.max_gradient_rows
    assert prepared.cost.min_backward_count <= answer.usage.backward_count <= prepared.cost.max_backward_count


async def test_targets_share_rows_however_many_methods_are_asked(explainer: Explainer, model: ServedModel) -> None:
    """Methods without a point in common, each at the rows of one target."""
    weights = np.random.default_rng(6).standard_normal((MAX_SHARING_TARGETS, 2))
    targets = tuple(TargetSpec("y", Score.OUTPUT, Weights(own)) for own in weights)
    methods = tuple(IntegratedGradients(step_count=2**k) for k in range(6))
    prepared = explainer.prepare(query(model, X[:1], targets=targets, methods=methods))
    answer = await asyncio.wait_for(explainer.explain(prepared), PATIENCE)

    assert answer.usage.gradient_rows == prepared.cost.min_gradient_rows == prepared.cost.max_gradient_rows == 2**6 - 1
    assert answer.usage.backward_count == prepared.cost.max_backward_count == MAX_SHARING_TARGETS * (2**6 - 1)
    for own in answer.explanations:
        asked = query(model, X[:1], targets=(targets[own.place.target],), methods=(own.method,))
        (alone,) = (await explain(explainer, asked)).explanations
        np.testing.assert_allclose(own.attribution.tensors["x"], alone.attribution.tensors["x"], rtol=1e-5, atol=1e-7)


@given(
    instances=st.integers(1, 3),
    own_targets=st.lists(st.sampled_from([None, 0]), min_size=0, max_size=2),
    draws=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    step_count=st.integers(1, 5),
)
def test_cost_counts_questions(
    instances: int, own_targets: list[int | None], draws: list[int], step_count: int
) -> None:
    asked = query(
        served(ClosedForm()),
        np.random.default_rng(1).standard_normal((instances, 3)).astype(np.float32),
        targets=(target(0), *(target(1, instance_index=i) for i in own_targets)),
        baselines=tuple(BaselineSpec(GaussianNoise(0.0, 1.0, seed, count)) for seed, count in enumerate(draws)),
        methods=(IntegratedGradients(step_count=step_count),),
    )
    explainer = Explainer(on_one_device(Scheduler(1)), 10**6, 10**6)
    cost = explainer.cost(asked)
    target_counts = [1 + sum(own in (None, i) for own in own_targets) for i in range(instances)]

    assert cost.question_count == sum(target_counts) * sum(draws)
    assert cost.min_gradient_rows == cost.max_gradient_rows == instances * sum(draws) * step_count  # targets share them
    assert cost.max_backward_count == cost.question_count * step_count
    distinct_counts = [min(count, 2) for count in target_counts]
    assert cost.min_backward_count == sum(distinct_counts) * sum(draws) * step_count
    assert cost.end_point_rows == instances + sum(draws)  # instances share their draws
    assert asked.held_bytes == 12 * (cost.question_count + instances * sum(draws) + instances)


async def test_limits_refuse_before_baselines_are_made(
    explainer: Explainer, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: object) -> None:
        raise AssertionError("a baseline was made")

    monkeypatch.setattr(BaselineSpec, "baselines", made)
    noise = (BaselineSpec(GaussianNoise(0.0, 1.0, 0, 1000)),)
    few_steps = query(model, baselines=noise, methods=(IntegratedGradients(step_count=1),))

    with pytest.raises(LimitExceeded) as rows:
        explainer.prepare(query(model, baselines=noise))
    with pytest.raises(LimitExceeded) as memory:
        Explainer(explainer._devices, 10**6, 1000).prepare(few_steps)

    assert (rows.value.reason, rows.value.metadata["rows"]) == ("REQUEST_ROWS_EXCEEDED", "128000")
    assert (memory.value.reason, memory.value.metadata["bytes"]) == ("REQUEST_BYTES_EXCEEDED", "48024")


def test_refused_query_still_has_a_cost(model: ServedModel) -> None:
    tight = Explainer(on_one_device(Scheduler(1)), 10, 10**6)

    cost = tight.cost(query(model))

    assert (cost.question_count, cost.max_gradient_rows, cost.end_point_rows) == (2, 128, 4)


async def test_top_k_and_argmax_are_resolved_on_the_instance(explainer: Explainer, model: ServedModel) -> None:
    targets = (TargetSpec("", Score.OUTPUT, TopK(2)), TargetSpec("", Score.OUTPUT, Argmax(), request_index=1))
    answer = await explain(explainer, query(model, targets=targets))

    for i in range(2):
        ranked = np.argsort(-value(X[i])).tolist()
        own = [e for e in answer.explanations if e.place.instance == i]
        assert [e.question.target.index[0] for e in own] == [*ranked, ranked[0]]
        assert [e.question.target.request_index for e in own] == [0, 0, 1]


async def test_margin_is_linear_in_its_elements(explainer: Explainer, model: ServedModel) -> None:
    margin = TargetSpec("", Score.OUTPUT, Margin(Element((0,)), Element((1,))))
    answer = await explain(explainer, query(model, X[:1], targets=(margin, target(0), target(1))))
    difference, plus, minus = (e.attribution.tensors["x"] for e in answer.explanations)

    np.testing.assert_allclose(difference, plus - minus, atol=1e-6)


async def test_rounds_reuse_what_was_evaluated(explainer: Explainer, model: ServedModel, loaded: ClosedForm) -> None:
    answer = await explain(explainer, query(model, X[:1], methods=(replace(ENDLESS, max_step_count=64),)))
    (own,) = answer.explanations

    assert own.attribution.stop_reason is StopReason.MAX_STEPS
    assert loaded.gradient_rows == own.attribution.step_count == answer.usage.gradient_rows
    assert len(loaded.batches) > 2


async def test_questions_in_flight_are_bounded_and_all_are_answered(explainer: Explainer, model: ServedModel) -> None:
    noise = (BaselineSpec(GaussianNoise(0.0, 1.0, 0, 100)),)
    answer = await explain(
        explainer, query(model, X[:1], baselines=noise, methods=(IntegratedGradients(step_count=2),))
    )

    assert [e.place.baseline for e in answer.explanations] == list(range(100))


async def test_every_round_of_every_path_is_observed(explainer: Explainer, model: ServedModel) -> None:
    """On the event loop, also where targets share their rows; the last of a path is its answer."""
    told: list[Round] = []
    threads = set()

    def observe(latest: Round) -> None:
        told.append(latest)
        threads.add(threading.current_thread())

    asked = query(model, targets=(target(0), target(1)), methods=(replace(ENDLESS, max_step_count=64),))
    answer = await explainer.explain(explainer.prepare(asked), observe)

    assert threads == {threading.current_thread()}
    assert len({latest.place for latest in told}) == len(answer.explanations) == 4
    for own in answer.explanations:
        *earlier, last = [latest.explanation() for latest in told if latest.place == own.place]
        assert [one.attribution.step_count for one in earlier] == [8, 16, 24, 32, 48]
        assert {one.attribution.stop_reason for one in earlier} == {StopReason.UNFINISHED}
        assert last.attribution is own.attribution


async def test_the_end_of_a_time_budget_is_observed(
    explainer: Explainer, model: ServedModel, loaded: ClosedForm
) -> None:
    """The map before it and the answer are the same but for the reason."""
    told: list[Round] = []
    loaded.holds_after = 1
    asked = query(model, X[:1], methods=(ENDLESS,), budget_ends_at=soon(1.0))
    (own,) = (await explainer.explain(explainer.prepare(asked), told.append)).explanations

    before, last = (latest.explanation().attribution for latest in told)
    assert (before.stop_reason, last.stop_reason) == (StopReason.UNFINISHED, StopReason.TIME_BUDGET)
    assert (before.step_count, before.map_error) == (last.step_count, last.map_error)
    assert before.tensors["x"].tobytes() == last.tensors["x"].tobytes()
    assert last is own.attribution


# What ends it early


async def test_time_budget_ends_with_the_best_map(explainer: Explainer, model: ServedModel, loaded: ClosedForm) -> None:
    """The device is held after the first round; what it knows then is the answer."""
    loaded.holds_after = 1
    asked = query(model, X[:1], methods=(ENDLESS,), budget_ends_at=soon(1.0))
    answer = await explain(explainer, asked)
    (own,) = answer.explanations

    assert own.attribution.stop_reason is StopReason.TIME_BUDGET
    assert own.attribution.step_count == loaded.gradient_rows <= 16
    np.testing.assert_allclose(own.attribution.tensors["x"], exact_attribution(X[0], np.zeros(3), 0), rtol=0.1)


async def test_time_budget_gives_every_question_its_first_round_before_any_a_second(
    explainer: Explainer, model: ServedModel, loaded: ClosedForm
) -> None:
    """The device is held as soon as all first rounds are through; more questions than are in flight together."""
    count = CONCURRENT_QUESTIONS + 8
    loaded.holds_after = 8 * count
    noise = (BaselineSpec(GaussianNoise(0.0, 1.0, 0, count)),)
    method = replace(ENDLESS, max_step_count=64)
    answer = await explain(explainer, query(model, X[:1], baselines=noise, methods=(method,), budget_ends_at=soon(3.0)))

    assert [e.attribution.stop_reason for e in answer.explanations] == [StopReason.TIME_BUDGET] * count
    assert {e.attribution.step_count for e in answer.explanations} == {8}


async def test_sampled_methods_have_a_map_after_their_first_samples(
    explainer: Explainer, model: ServedModel, loaded: ClosedForm
) -> None:
    """The device is held after two rows of two hundred."""
    loaded.holds_after = 2
    asked = query(model, X[:1], methods=(ExpectedGradients(),), budget_ends_at=soon(1.0))
    (own,) = (await explain(explainer, asked)).explanations

    assert (own.attribution.stop_reason, own.attribution.step_count) == (StopReason.TIME_BUDGET, 2)
    assert own.attribution.map_error is not None


def test_first_rounds_of_a_time_budget_count_towards_memory(model: ServedModel) -> None:
    """They are kept together, where otherwise only those in flight are."""
    size = X[0].nbytes

    assert query(model).held_bytes == size * (2 + 2 + 2)  # inputs, baselines, maps
    assert query(model, budget_ends_at=1.0).held_bytes == size * (2 + 2 + 2 * (1 + FIRST_ROUND_ARRAYS))


async def test_admitted_request_is_never_refused_on_its_way(model: ServedModel, loaded: ClosedForm) -> None:
    """Between its rounds nothing of it waits, and yet nobody takes its place."""
    devices = on_one_device(Scheduler(max_waiting_rows=70))
    devices.start()
    explainer = Explainer(devices, max_request_rows=70, max_request_bytes=100_000)
    loaded.holds_after = 1
    method = replace(ENDLESS, max_step_count=64)
    first = asyncio.create_task(explain(explainer, query(model, X[:1], methods=(method,))))
    assert await asyncio.to_thread(loaded.entered.wait, PATIENCE)
    other = query(model, X[:1], methods=(IntegratedGradients(step_count=60),))

    refused = await failure(explain(explainer, other))
    loaded.gate.set()
    answer = await first

    assert refused.reason == "QUEUE_FULL"
    assert answer.explanations[0].attribution.step_count == 64
    assert (await explain(explainer, other)).explanations
    await asyncio.to_thread(devices.stop)


async def test_targets_are_resolved_beside_the_event_loop(
    explainer: Explainer, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranking many classes for many targets takes time that other requests need."""
    threads = []
    original = TargetSpec.resolve

    def resolve(self: TargetSpec, *arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return original(self, *arguments)

    monkeypatch.setattr(TargetSpec, "resolve", resolve)
    await explain(explainer, query(model))

    assert threads and threading.current_thread() not in threads


async def test_rows_of_an_ended_time_budget_are_dropped(
    explainer: Explainer, model: ServedModel, loaded: ClosedForm, scheduler: Scheduler
) -> None:
    loaded.holds_after = 1
    await explain(explainer, query(model, X[:1], methods=(ENDLESS,), budget_ends_at=soon(1.0)))

    assert scheduler.waiting_row_count == 0


@pytest.mark.parametrize("method", [ENDLESS, IntegratedGradients(step_count=8)])
async def test_time_budget_too_short_for_the_first_round(
    explainer: Explainer, model: ServedModel, loaded: ClosedForm, method: IntegratedGradients
) -> None:
    loaded.holds_after = 0
    failed = await failure(explain(explainer, query(model, methods=(method,), budget_ends_at=soon(0.05))))

    assert isinstance(failed, DeadlineExceeded)
    assert failed.reason == "TIME_BUDGET_TOO_SHORT"


async def test_time_budget_too_short_for_the_end_points(explainer: Explainer, model: ServedModel) -> None:
    failed = await failure(explain(explainer, query(model, budget_ends_at=soon(-1.0))))

    assert failed.reason == "TIME_BUDGET_TOO_SHORT"


async def test_first_error_ends_the_others_and_is_raised_alone(
    explainer: Explainer, model: ServedModel, loaded: ClosedForm, scheduler: Scheduler
) -> None:
    prepared = explainer.prepare(query(model, targets=(target(0), target(1))))
    original = loaded.evaluate

    def evaluate(rows: Any) -> Any:
        if rows.function.wrt:
            raise RuntimeError("no gradient today")
        return original(rows)

    loaded.evaluate = evaluate  # type: ignore[method-assign]
    failed = await failure(explainer.explain(prepared))

    assert isinstance(failed, EvaluationFailed)
    assert "no gradient today" in failed.message
    assert scheduler.waiting_row_count == 0


async def test_cancelling_drops_the_rows_that_wait(
    explainer: Explainer, model: ServedModel, loaded: ClosedForm, scheduler: Scheduler
) -> None:
    loaded.holds_after = 1
    running = asyncio.create_task(explain(explainer, query(model)))
    assert await asyncio.to_thread(loaded.entered.wait, PATIENCE)
    assert scheduler.waiting_row_count > 0

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert scheduler.waiting_row_count == 0


@pytest.mark.parametrize("method", [ENDLESS, IntegratedGradients(step_count=8)])
async def test_scores_that_are_not_finite_are_told(
    explainer: Explainer, model: ServedModel, loaded: ClosedForm, method: IntegratedGradients
) -> None:
    loaded.spoiled = float("nan")
    answer = await explain(explainer, query(model, X[:1], methods=(method,)))
    (own,) = answer.explanations

    assert own.attribution.stop_reason is StopReason.NON_FINITE
    assert own.attribution.map_error is None
    assert np.isnan(own.question.instance_output_value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"targets": (target(0, instance_index=0),)}, "INSTANCE_WITHOUT_TARGETS"),
        ({"baselines": (BaselineSpec(Zeros(), instance_index=1),)}, "INSTANCE_WITHOUT_BASELINES"),
    ],
)
async def test_every_instance_needs_a_target_and_a_baseline(
    explainer: Explainer, model: ServedModel, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        explainer.prepare(query(model, **fields))
    assert caught.value.reason == reason


async def test_outputs_by_function_and_instance(explainer: Explainer, model: ServedModel, loaded: ClosedForm) -> None:
    functions = [Differentiation("y", ScoreHead.IDENTITY)]
    instances = query(model).instances
    outputs = await explainer.outputs(model, instances, functions, query(model).request)

    np.testing.assert_allclose(np.stack(outputs.scores[functions[0]]), value(X), rtol=1e-6)
    assert (outputs.usage.forward_rows, outputs.usage.gradient_rows) == (2, 0)
    assert loaded.gradient_rows == 0
