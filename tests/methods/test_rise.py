"""RISE against its definition and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Question, StopReason
from explainserve.methods import Rise
from explainserve.methods.rise import MasksPlan
from methods.analytic import Function, question_of, rounds, values_of

W, X, START = np.array([2.0, -3.0, 0.5]), np.array([1.0, 1.0, 4.0]), np.array([0.5, 0.0, 1.0])
LINEAR = values_of(lambda rows: rows @ W + 7)
TOTAL = values_of(lambda rows: rows.sum(axis=1))


def explain(method: Rise, function: Function, asked: Question, **options: Any) -> tuple[Attribution, list[MasksPlan]]:
    own = method.resolved(asked.subject)
    found, plans = rounds(own, asked, function, **options)
    assert options or own.cost(asked.subject).max_forward_rows == sum(plan.row_count for plan in plans)
    return found, plans  # type: ignore[return-value]


def table() -> Question:
    return question_of(LINEAR, {"x": X}, {"x": START})


def picture(height: int = 9, width: int = 16, layout: str = "CHW", channels: int = 2) -> Question:
    shape = tuple({"C": channels, "H": height, "W": width}[letter] for letter in layout)
    return question_of(TOTAL, {"x": np.ones(shape)}, {"x": np.zeros(shape)}, x=layout)


def test_of_a_linear_function_within_three_standard_errors() -> None:
    """E[f m_i] / p = F(x') + p sum_j w_j d_j + (1 - p) w_i d_i."""
    parts = W * (X - START)
    for keep in (0.5, 0.3):
        found, _ = explain(Rise(keep_probability=keep), LINEAR, table())
        expected = W @ START + 7 + keep * parts.sum() + (1 - keep) * parts

        assert (np.abs(found.tensors["x"] - expected) <= 3 * found.standard_errors["x"]).all()
        assert 0 < (found.map_error or 0) < 0.1


@pytest.mark.parametrize("layout", ["CHW", "HWC", "WCH"])
def test_masks_are_smooth_in_range_and_kept_as_often_as_asked(layout: str) -> None:
    asked = picture(layout=layout)
    _, plans = explain(Rise(sample_count=600, grid_size=4, keep_probability=0.25), TOTAL, asked)
    masks = np.stack([one.masks["x"] for plan in plans for one in plan.samples])
    masks = np.moveaxis(masks, 1 + layout.index("H"), 1).reshape(600, 9, 16)

    assert masks.min() == 0 and masks.max() == 1
    assert abs(masks.mean() - 0.25) < 0.02
    assert np.abs(np.diff(masks, axis=2)).max() <= 4 / 20 + 1e-6  # of one cell's extent in the enlarged grid
    assert len(np.unique(masks, axis=0)) > 500


def test_the_map_is_the_mean_of_weighted_masks() -> None:
    found, plans = explain(Rise(sample_count=50, grid_size=3, seed=5), TOTAL, picture())
    masks = np.stack([one.masks["x"] for plan in plans for one in plan.samples]).astype(np.float64)
    weighted = 2 * masks * 2 * masks.sum(axis=(1, 2, 3), keepdims=True)

    np.testing.assert_allclose(found.tensors["x"], np.broadcast_to(weighted.mean(axis=0), (2, 9, 16)), rtol=1e-5)
    error = weighted.std(axis=0, ddof=1) / np.sqrt(50)
    np.testing.assert_allclose(found.standard_errors["x"], np.broadcast_to(error, (2, 9, 16)), rtol=1e-5)


def test_masks_depend_on_the_seed_alone(monkeypatch: Any) -> None:
    def map_of(seed: int) -> Any:
        return explain(Rise(sample_count=60, seed=seed), TOTAL, picture())[0].tensors["x"]

    whole, other = map_of(1), map_of(2)
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 7)
    np.testing.assert_allclose(map_of(1), whole, rtol=1e-5)
    assert np.abs(other - whole).max() > 1


def test_several_inputs_are_masked_together() -> None:
    x = {"picture": np.ones((8, 8)), "row": np.ones(3)}
    asked = question_of(TOTAL, x, {name: np.zeros_like(v) for name, v in x.items()}, picture="HW")
    found, plans = explain(Rise(sample_count=40), TOTAL, asked)
    one = plans[0].samples[0]

    assert one.masks["picture"].shape == (8, 8) and set(one.masks["row"]) <= {0, 1}
    np.testing.assert_array_equal(one.moving["row"], one.masks["row"])
    assert found.tensors["row"].shape == (3,)


def test_the_grid_fits_small_inputs_and_is_stated() -> None:
    assert Rise().resolved(picture().subject).grid_size == 7
    assert Rise().resolved(picture(height=3).subject).grid_size == 3
    assert Rise().resolved(table().subject).grid_size is None


def test_time_that_ends_leaves_the_map_of_the_masks_that_are_done(monkeypatch: Any) -> None:
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 8)
    found, _ = explain(Rise(), LINEAR, table(), final_after=3)

    assert (found.step_count, found.stop_reason) == (24, StopReason.TIME_BUDGET)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sample_count": 1}, "SAMPLE_COUNT_OUT_OF_RANGE"),
        ({"sample_count": 0}, "SAMPLE_COUNT_OUT_OF_RANGE"),
        ({"seed": -1}, "SEED_OUT_OF_RANGE"),
        ({"keep_probability": 0.0}, "OPTION_OUT_OF_RANGE"),
        ({"keep_probability": 1.0}, "OPTION_OUT_OF_RANGE"),
        ({"keep_probability": float("nan")}, "OPTION_OUT_OF_RANGE"),
        ({"grid_size": 0}, "OPTION_OUT_OF_RANGE"),
        ({"grid_size": 10}, "OPTION_OUT_OF_RANGE"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        explain(Rise(**options), TOTAL, picture())
    assert refusal.value.reason == reason


def test_a_grid_without_axes_for_it_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        Rise(grid_size=3).resolved(table().subject)
    assert (refusal.value.reason, refusal.value.metadata["option"]) == ("OPTION_WITHOUT_EFFECT", "grid_size")
