"""The memory of a request against what is really allocated while it is answered."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from closed_form import WEIGHTS, ClosedForm, served, value
from explainserve.baselines import BaselineSpec, Constant
from explainserve.devices import Devices
from explainserve.engine import Engine
from explainserve.explainer import Explainer
from explainserve.explanation import Instance, Subject
from explainserve.methods import IntegratedGradients
from explainserve.metrics import Metrics
from explainserve.plan import Segment, SegmentEvaluation
from explainserve.query import CONCURRENT_QUESTIONS, Query
from explainserve.scheduling import Scheduler
from explainserve.served_model import ServedModel
from explainserve.signature import Axis, InputSpec, MapSpec, Score, Signature
from explainserve.targets import Element, TargetSpec

SIZE = 60_000
"""Elements of an input: its arrays outweigh all else."""
INPUT_BYTES = 4 * SIZE
LIMIT = 10**10
FIXED = IntegratedGradients(step_count=64)
ENDLESS = IntegratedGradients(tolerance=1e-9, completeness_tolerance=1e-9, max_step_count=128)


class Wide(ClosedForm):
    """y = tanh(40 means @ WEIGHTS), of the means of three parts of x: steep, so that paths take many rounds."""

    signature = Signature(
        (InputSpec("x", np.dtype(np.float32), (Axis("batch"), Axis("", SIZE))),), ClosedForm.signature.outputs
    )

    def _parts(self, segment: Segment) -> Iterator[SegmentEvaluation]:
        start, end = (side["x"].reshape(3, -1).mean(axis=1, dtype=np.float64) for side in (segment.start, segment.end))
        alphas = segment.alphas[:, None]
        y = value(40 * ((1 - alphas) * start + alphas * end))
        if not segment.selectors:
            yield SegmentEvaluation(np.empty(0), outputs=y.astype(np.float32))
        for selector in segment.selectors:
            weights = np.zeros(2)
            np.add.at(weights, selector.indices, selector.weights)
            gradient = segment.weights @ (((1 - y**2) * weights) @ WEIGHTS.T)
            yield SegmentEvaluation(y @ weights, {"x": np.repeat(gradient.astype(np.float32), SIZE // 3)})


@pytest_asyncio.fixture
async def devices() -> AsyncIterator[Devices]:
    devices = Devices({"cpu": Engine(Scheduler(max_waiting_rows=10**6), Metrics(CollectorRegistry()))})
    devices.start()
    yield devices
    await asyncio.to_thread(devices.stop)


@pytest.fixture
def model() -> ServedModel:
    return served(Wide(), max_batch_rows=8)


def query(model: ServedModel, method: IntegratedGradients, baseline_count: int, target_count: int = 1) -> Query:
    x = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    return Query(
        model=model,
        instances=(Instance({"x": x}, {}),),
        targets=tuple(TargetSpec("y", Score.OUTPUT, Element((k,)), request_index=k) for k in range(target_count)),
        baselines=tuple(BaselineSpec(Constant((k / 100,)), request_index=k) for k in range(baseline_count)),
        methods=(method,),
        subject=Subject(maps={"x": MapSpec("x")}, shapes={"x": (SIZE,)}),
    )


async def measured(explainer: Explainer, asked: Query) -> int:
    """Most bytes at once that answering allocates, its input included."""
    gc.collect()
    tracemalloc.start()
    try:
        await explainer.explain(explainer.prepare(asked))
        return tracemalloc.get_traced_memory()[1] + INPUT_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("method", "baseline_count", "target_count"),
    [
        (FIXED, 1, 1),
        (FIXED, 50, 1),
        (ENDLESS, 1, 1),
        pytest.param(ENDLESS, 16, 1, marks=pytest.mark.slow),
        pytest.param(ENDLESS, 12, 2, marks=pytest.mark.slow),
        pytest.param(IntegratedGradients(), 40, 1, marks=pytest.mark.slow),
    ],
)
async def test_a_request_takes_what_was_stated_at_most(
    devices: Devices, model: ServedModel, method: IntegratedGradients, baseline_count: int, target_count: int
) -> None:
    """And not so much less that the figure would say nothing."""
    explainer = Explainer(devices, max_request_rows=10**6, max_request_bytes=LIMIT)
    asked = query(model, method, baseline_count, target_count)
    stated = explainer.cost(asked).host_bytes
    found = await measured(explainer, asked)

    assert stated / 8 < found <= stated


@pytest.mark.slow
async def test_paths_wait_for_each_other_where_memory_is_short(devices: Devices, model: ServedModel) -> None:
    """An eighth of the memory that all of them together could take."""
    asked = query(model, replace(ENDLESS, max_step_count=48), 24, target_count=2)
    limit = asked.held_bytes + 4 * asked.case_bytes
    roomy, narrow = (Explainer(devices, 10**6, max_request_bytes=size) for size in (LIMIT, limit))
    all_at_once, in_turn = roomy.cost(asked), narrow.cost(asked)

    assert (all_at_once.case_count, in_turn.case_count) == (CONCURRENT_QUESTIONS, 4)
    assert in_turn.host_bytes < limit + in_turn.score_bytes + 1
    assert await measured(narrow, asked) <= in_turn.host_bytes < await measured(roomy, asked)


async def test_one_path_always_fits_beside_what_is_held(devices: Devices, model: ServedModel) -> None:
    asked = query(model, ENDLESS, 3)
    explainer = Explainer(devices, 10**6, max_request_bytes=asked.held_bytes)

    assert explainer.cost(asked).case_count == 1
    answer = await explainer.explain(explainer.prepare(asked))
    assert len(answer.explanations) == 3
