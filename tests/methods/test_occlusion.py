"""Occlusion against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, StopReason
from explainserve.methods import Occlusion
from methods.analytic import question_of, rounds, values_of

TOTAL = values_of(lambda rows: rows.sum(axis=1))
LINE = np.arange(1.0, 6.0)


def occluded(method: Occlusion, x: Any, start: Any = None, layout: str = "", **options: Any) -> Attribution:
    asked = question_of(TOTAL, {"x": x}, {"x": np.zeros_like(x) if start is None else start}, x=layout)
    found, plans = rounds(method.resolved(asked.subject), asked, TOTAL, **options)
    if not options:
        cost = method.resolved(asked.subject).cost(asked.subject)
        assert cost.min_forward_rows == cost.max_forward_rows == sum(plan.row_count for plan in plans)
    return found


@pytest.mark.parametrize(("aggregation", "expected"), [("sum", [3, 8, 12, 16, 9]), ("mean", [3, 4, 6, 8, 9])])
def test_windows_along_the_last_axis(aggregation: str, expected: list[float]) -> None:
    found = occluded(Occlusion((2,), (1,), aggregation), LINE)

    np.testing.assert_allclose(found.tensors["x"], expected)
    assert found.step_count == 4


def test_of_a_linear_function_by_single_elements() -> None:
    weights = np.array([2.0, -3.0, 0.5])
    function = values_of(lambda rows: rows @ weights + 7)
    asked = question_of(function, {"x": [1.0, 1.0, 4.0]}, {"x": [0.5, 0.0, 1.0]})

    found, _ = rounds(Occlusion((1,)), asked, function)
    np.testing.assert_allclose(found.tensors["x"], weights * [0.5, 1, 3], rtol=1e-6)


@pytest.mark.parametrize("layout", ["CHW", "HWC", "WCH"])
def test_windows_cover_all_channels_in_any_layout(layout: str) -> None:
    picture = np.random.default_rng(3).normal(size=(2, 7, 5))  # CHW
    order = ["CHW".index(letter) for letter in layout]
    (h, w), (dh, dw) = (3, 2), (2, 2)
    total, count = np.zeros((7, 5)), np.zeros((7, 5))
    for top in (0, 2, 4):
        for left in (0, 2, 3):
            place = slice(top, top + h), slice(left, left + w)
            total[place] += picture[:, *place].sum()
            count[place] += 1

    found = occluded(Occlusion((h, w), (dh, dw)), picture.transpose(order), layout=layout)
    expected = np.broadcast_to(total / count, (2, 7, 5)).transpose(order)
    np.testing.assert_allclose(found.tensors["x"], expected, rtol=1e-5)


def test_defaults_are_an_eighth_by_halves_and_are_stated() -> None:
    asked = question_of(TOTAL, {"x": np.ones((1, 40, 20))}, {"x": np.zeros((1, 40, 20))}, x="CHW")

    own = Occlusion().resolved(asked.subject)
    assert (own.window, own.stride) == ((5, 3), (3, 2))


def test_of_several_inputs_one_at_a_time_shows_a_window() -> None:
    x = {"picture": np.ones((4, 4)), "row": np.arange(3.0), "number": np.array(5.0)}
    asked = question_of(TOTAL, x, {name: np.zeros_like(v) for name, v in x.items()}, picture="HW")

    method = Occlusion((2, 2), (2, 2)).resolved(asked.subject)
    found, _ = rounds(method, asked, TOTAL)
    np.testing.assert_allclose(found.tensors["picture"], 4)
    np.testing.assert_allclose(found.tensors["row"], [0, 1, 2])
    np.testing.assert_allclose(found.tensors["number"], 5)
    assert found.step_count == method.cost(asked.subject).max_forward_rows == 4 + 3 + 1
    assert (method.window, method.stride) == ((2, 2), (2, 2))


def test_time_that_ends_leaves_the_windows_that_are_done(monkeypatch: Any) -> None:
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 2)
    found = occluded(Occlusion((1,)), LINE, final_after=2)

    np.testing.assert_allclose(found.tensors["x"], [1, 2, 3, 4, 0])
    assert (found.step_count, found.stop_reason) == (4, StopReason.TIME_BUDGET)


@pytest.mark.parametrize(
    ("options", "layout", "reason"),
    [
        ({"window": (6,)}, "", "OPTION_OUT_OF_RANGE"),
        ({"window": (0,)}, "", "OPTION_OUT_OF_RANGE"),
        ({"window": (2,), "stride": (3,)}, "", "OPTION_OUT_OF_RANGE"),
        ({"window": (2,), "stride": (0,)}, "", "OPTION_OUT_OF_RANGE"),
        ({"window": (2, 2)}, "", "WINDOW_MISMATCH"),
        ({"window": (2,), "stride": (1, 1)}, "", "WINDOW_MISMATCH"),
        ({"stride": (1,)}, "", "WINDOW_MISMATCH"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], layout: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        occluded(Occlusion(**options), LINE, layout=layout)
    assert refusal.value.reason == reason
