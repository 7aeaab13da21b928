"""Figures as they are read, and recipes as they are applied: against the formulas of the contract."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from explainserve.v1 import explainer_service_pb2, statistics_pb2
from explainserve_client import (
    MissingEntryError,
    Normalization,
    PairRange,
    RequestValueError,
    Statistics,
    reduce_to_view,
)
from explainserve_client.results import explain_result
from explainserve_client.table import Table

FINITE = st.floats(-1e6, 1e6, width=32)
TENSORS = npst.arrays(np.float32, npst.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=FINITE)


def recipe(**numbers: object) -> Normalization:
    fields = {"kind": "MIN_MAX", "view": "ELEMENTS", "center": 0.0, "scale": 1.0, "lower": 0.0, "upper": 1.0}
    return Normalization(**{"zero_at": 0.0, **fields, **numbers})  # type: ignore[arg-type]


@given(tensor=TENSORS, axis=st.integers(0, 2))
def test_views_are_reductions_over_the_channel_axis(tensor: np.ndarray, axis: int) -> None:
    channels = [np.take(tensor, channel, axis).astype(np.float64) for channel in range(tensor.shape[axis])]

    np.testing.assert_array_equal(reduce_to_view(tensor, "ELEMENTS", axis), tensor)
    np.testing.assert_allclose(reduce_to_view(tensor, "CHANNEL_SUM", axis), sum(channels), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(reduce_to_view(tensor, "CHANNEL_ABS_SUM", axis), sum(map(np.abs, channels)), rtol=1e-12)
    largest = np.maximum.reduce([np.abs(channel) for channel in channels])
    np.testing.assert_array_equal(reduce_to_view(tensor, "CHANNEL_MAX_ABS", axis), largest)


@pytest.mark.parametrize("view", ["CHANNEL_SUM", "CHANNEL_ABS_SUM", "CHANNEL_MAX_ABS"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_non_finite_channel_makes_the_pixel_non_finite(view: str, bad: float) -> None:
    tensor = np.zeros((3, 2, 2), np.float32)
    tensor[1, 0, 0] = bad
    tensor[2, 0, 0] = -bad

    assert np.isfinite(reduce_to_view(tensor, view, 0)).tolist() == [[False, True], [True, True]]


def test_sums_are_in_float64() -> None:
    tensor = np.array([[1e8], [1.0], [-1e8]], np.float32)

    assert reduce_to_view(tensor, "CHANNEL_SUM", 0)[0] == 1.0


@given(tensor=TENSORS, center=FINITE, scale=st.floats(1e-3, 1e3), symmetric=st.booleans())
def test_apply_is_the_formula(tensor: np.ndarray, center: float, scale: float, symmetric: bool) -> None:
    lower = -1.0 if symmetric else 0.0
    found = recipe(center=center, scale=scale, lower=lower, view="CHANNEL_SUM", channel_axis=0, rank=3).apply(tensor)

    expected = (tensor.astype(np.float64).sum(axis=0) - center) / scale
    np.testing.assert_array_equal(found, np.minimum(np.maximum(expected, lower), 1.0))


def test_nan_stays_nan_and_infinity_is_clipped() -> None:
    found = recipe().apply(np.array([np.nan, np.inf, -np.inf, 0.5], np.float32))

    np.testing.assert_array_equal(found, [np.nan, 1.0, 0.0, 0.5])


def test_a_tiny_scale_does_not_warn() -> None:
    assert recipe(scale=5e-324).apply(np.array([1.0], np.float32)).tolist() == [1.0]


def test_a_view_that_was_already_reduced_is_refused() -> None:
    """Else a [height, width] map would silently be summed over its rows."""
    with pytest.raises(RequestValueError, match="raw tensor with 3 axes, not 2"):
        recipe(view="CHANNEL_SUM", channel_axis=0, rank=3).apply(np.zeros((4, 4)))


def test_a_channel_view_needs_a_channel_axis() -> None:
    with pytest.raises(RequestValueError, match="needs a channel axis"):
        recipe(view="CHANNEL_SUM").apply(np.zeros((4, 4)))


def test_an_unknown_view_lists_those_there_are() -> None:
    with pytest.raises(RequestValueError, match="ELEMENTS, CHANNEL_SUM"):
        reduce_to_view(np.zeros(3), "SUM", 0)


def test_a_recipe_without_numbers_is_refused() -> None:
    with pytest.raises(RequestValueError, match="no element was finite"):
        recipe(center=None, scale=None).apply(np.full(3, np.nan))


@pytest.mark.parametrize(
    ("numbers", "symmetric", "on_scale"),
    [
        ({"center": -1.0, "scale": 3.0}, False, True),
        ({"center": 1.0, "scale": 3.0}, False, False),
        ({"center": -3.0, "scale": 2.0}, False, False),
        ({"center": 0.0, "scale": 2.0, "lower": -1.0}, True, True),
        ({"center": 0.0, "scale": 2.0}, False, True),
        ({"center": 0.5, "scale": 2.0, "lower": -1.0}, False, True),
        ({"center": None, "scale": None}, False, False),
    ],
)
def test_where_zero_is(numbers: dict[str, float], symmetric: bool, on_scale: bool) -> None:
    found = recipe(**numbers)

    assert (found.symmetric, found.zero_on_scale) == (symmetric, on_scale)


@pytest.mark.parametrize(
    ("low", "high", "displayed", "zero_at", "symmetric"),
    [(-2, 2, [-1, -0.5, 0.5], 0, True), (-1, 3, [0, 0, 0.5], 0.25, False), (0, 2, [0, 0, 0.5], 0, False)],
)
def test_a_stated_scale(low: float, high: float, displayed: list[float], zero_at: float, symmetric: bool) -> None:
    found = Normalization.stated(low, high, "ELEMENTS")

    assert found.apply(np.array([-3.0, -1.0, 1.0])).tolist() == displayed
    assert (found.zero_at, found.symmetric, math.copysign(1, found.zero_at or 0.0)) == (zero_at, symmetric, 1)


@pytest.mark.parametrize("ends", [(1, 1), (2, 1), (math.nan, 1), (0, math.inf)])
def test_a_stated_scale_goes_up_and_is_finite(ends: tuple[float, float]) -> None:
    with pytest.raises(RequestValueError, match="a scale goes"):
        Normalization.stated(*ends, "ELEMENTS")


def test_absent_figures_are_none_and_zero_is_zero() -> None:
    found = Statistics.from_proto(
        statistics_pb2.Statistics(view=statistics_pb2.VIEW_ELEMENTS, element_count=4, nan_count=4, sum=0.0)
    )

    assert (found.view, found.element_count, found.nan_count, found.zero_count) == ("ELEMENTS", 4, 4, 0)
    assert (found.sum, found.min, found.std, found.l2_norm) == (0.0, None, None, None)


def test_every_figure_of_the_contract_is_read() -> None:
    message = statistics_pb2.Statistics(view=statistics_pb2.VIEW_CHANNEL_SUM)
    expected = {}
    scalars = [field for field in message.DESCRIPTOR.fields if field.message_type is None and field.name != "view"]
    for number, field in enumerate(scalars, start=1):
        expected[field.name] = number
        setattr(message, field.name, number)
    found = Statistics.from_proto(message)

    assert {name: getattr(found, name) for name in expected} == expected


def test_quantiles_are_looked_up_by_level() -> None:
    found = Statistics.from_proto(
        statistics_pb2.Statistics(
            quantiles=[statistics_pb2.Quantile(probability=0.3, value=1.5)],
            abs_quantiles=[statistics_pb2.Quantile(probability=0.99, value=2.5)],
            abs_mass_thresholds=[statistics_pb2.AbsMassThreshold(mass=0.98, value=3.5)],
        )
    )

    assert (found.quantile(0.1 + 0.2), found.abs_quantile(0.99), found.abs_mass_threshold(0.98)) == (1.5, 2.5, 3.5)
    with pytest.raises(KeyError, match=r"no quantile at 0.31; there are 0.3"):
        found.quantile(0.31)
    with pytest.raises(KeyError, match=r"no abs_mass_threshold at 0.5"):
        found.abs_mass_threshold(0.5)


def test_pair_ranges_are_found_in_either_order() -> None:
    pair = statistics_pb2.PairRange(first=0, second=1, input="image", view=statistics_pb2.VIEW_CHANNEL_SUM, min=-1)
    joint = statistics_pb2.JointStatistics(group="g", pairs=[pair])
    found = explain_result(explainer_service_pb2.ExplainResponse(joint=[joint]), {}, "id").joint["g"]

    assert found.pair(1, 0, "CHANNEL_SUM") == PairRange.from_proto(pair)
    assert (found.pair(0, 1, "CHANNEL_SUM").min, found.pair(0, 1, "CHANNEL_SUM").max) == (-1, None)
    with pytest.raises(MissingEntryError, match="pairwise=True"):
        found.pair(0, 2, "CHANNEL_SUM")


class TestTable:
    """Entries by name, whose failed look-ups say what there is."""

    table = Table("view", [("ELEMENTS", 1), ("CHANNEL_SUM", 2)])

    def test_it_is_a_read_only_mapping_in_order(self) -> None:
        assert dict(self.table) == {"ELEMENTS": 1, "CHANNEL_SUM": 2}
        assert list(self.table) == ["ELEMENTS", "CHANNEL_SUM"] and len(self.table) == 2
        assert "SUM" not in self.table and self.table.get("SUM") is None
        assert not hasattr(self.table, "__setitem__")

    def test_a_failed_look_up_lists_the_names(self) -> None:
        with pytest.raises(KeyError) as caught:
            self.table["SUM"]
        assert str(caught.value) == "no view 'SUM'; there are 'ELEMENTS', 'CHANNEL_SUM'"

    def test_only_one(self) -> None:
        assert Table("input", [("image", 5)]).only() == 5
        with pytest.raises(KeyError, match="not one view"):
            self.table.only()

    def test_it_survives_pickling(self) -> None:
        assert pickle.loads(pickle.dumps(self.table)) == self.table
