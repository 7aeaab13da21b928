"""How methods that take rounds begin where time may end: small, and with what they give in the end unchanged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from explainserve.explanation import Question, StopReason
from explainserve.methods import (
    BlurIntegratedGradients,
    ExpectedGradients,
    FeatureAblation,
    KernelShap,
    Lime,
    Method,
    Occlusion,
    Rise,
    ShapleyValueSampling,
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
)
from methods.analytic import Function, question_of, rounds

RANDOM = np.random.default_rng(12)
SHAPE = (1, 6, 8)
MATRIX = RANDOM.standard_normal((48, 48)) / 7
X = RANDOM.standard_normal(SHAPE)

SAMPLED: list[tuple[Method, int]] = [
    (SmoothGrad(sample_count=40), 2),
    (SmoothGradSquared(sample_count=40), 2),
    (VarGrad(sample_count=40), 3),
    (ExpectedGradients(sample_count=41), 2),
    (Rise(sample_count=60), 2),
    (Lime(segmentation="grid", segment_count=12, sample_count=90), 13),
    (KernelShap(segment_count=12, sample_count=200), 48),
    (ShapleyValueSampling(segment_count=12, sample_count=9), 22),
]
"""With the rows that tell a standard error at least."""
CLOSED: list[tuple[Method, int]] = [
    (Occlusion((2, 2), (1, 1)), 8),
    (FeatureAblation(segment_count=12), 8),
    (BlurIntegratedGradients(step_count=30), 9),
]
"""With the rows of their first round; that of Blur-IG has the score at its start."""


def curved() -> Function:
    """The sum of tanh(A x)."""
    return Function(
        lambda rows: np.tanh(rows @ MATRIX).sum(axis=1), lambda rows: (1 - np.tanh(rows @ MATRIX) ** 2) @ MATRIX.T
    )


def asked_of(method: Method, *, anytime: bool) -> tuple[Method, Question]:
    own = replace(question_of(curved(), {"x": X}, {"x": 0 * X}, x="CHW"), anytime=anytime)
    return method.resolved(own.subject), own


@pytest.mark.parametrize(("method", "fewest"), SAMPLED + CLOSED)
def test_rounds_grow_from_a_small_first_one_where_time_may_end(method: Method, fewest: int) -> None:
    """No round is larger than all before it: what a cut loses is at most half of what was computed."""
    own, asked = asked_of(method, anytime=True)
    whole, at_once = rounds(*asked_of(method, anytime=False), curved())
    found, plans = rounds(own, asked, curved())
    rows = [plan.row_count for plan in plans]

    assert rows[0] == fewest
    assert all(own <= sum(rows[:number]) for number, own in enumerate(rows) if number)
    assert sum(rows) == sum(plan.row_count for plan in at_once)
    assert len(at_once) == 1
    assert (found.step_count, found.stop_reason) == (whole.step_count, whole.stop_reason)
    np.testing.assert_allclose(found.tensors["x"], whole.tensors["x"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("method", "fewest"), SAMPLED)
def test_the_first_round_has_a_map_that_tells_its_error(method: Method, fewest: int) -> None:
    found, _ = rounds(*asked_of(method, anytime=True), curved(), final_after=1)

    assert (found.step_count, found.stop_reason) == (fewest, StopReason.TIME_BUDGET)
    assert found.map_error is not None and found.map_error > 0
    assert found.standard_errors["x"].any()


def test_a_first_round_has_samples_of_every_baseline() -> None:
    method, asked = asked_of(ExpectedGradients(), anytime=True)
    (first, *_) = asked.baselines
    found, plans = rounds(method, replace(asked, baselines=(first,) * 3), curved(), final_after=1)

    assert plans[0].row_count == 6
    assert found.map_error is not None


def test_kernel_shap_cut_in_time_states_an_honest_error() -> None:
    """Every beginning has sets of each size: of small and large ones alone the map would be biased."""
    function, whole = curved(), rounds(*asked_of(KernelShap(segment_count=12), anytime=False), curved())[0].tensors["x"]
    errors = []
    for seed in range(20):
        cut, _ = rounds(*asked_of(KernelShap(segment_count=12, seed=seed), anytime=True), function, final_after=3)
        assert cut.map_error is not None
        errors.append((float(np.linalg.norm(cut.tensors["x"] - whole) / np.linalg.norm(whole)), cut.map_error))
    true, stated = np.sqrt(np.square(errors).mean(axis=0))

    assert 0.5 < stated / true < 2
