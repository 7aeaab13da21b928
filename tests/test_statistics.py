"""Every figure against a plain formula, and the promises of the contract: absent, joint, per view."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from explainserve import statistics as figures
from explainserve.statistics import (
    ABS_MASS_LEVELS,
    ABS_QUANTILE_PROBABILITIES,
    QUANTILE_PROBABILITIES,
    Statistics,
    View,
    delta_over_abs_sum,
    joint_range,
    pooled_statistics,
    reduce_to_view,
    relative_convergence_delta,
    statistics,
)
from explainserve.v1 import statistics_pb2

FINITE = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
ANY = st.floats(width=32, allow_subnormal=False)
CHANNEL_VIEWS = [View.CHANNEL_SUM, View.CHANNEL_ABS_SUM, View.CHANNEL_MAX_ABS]
PIXELS = hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)


SHAPES = hnp.array_shapes(max_dims=3, max_side=6)


def maps(elements=FINITE, shape=SHAPES):
    return hnp.arrays(np.float32, shape, elements=elements)


def close(expected: float, magnitude: float):
    """Equal but for the rounding of a sum whose terms have this total magnitude."""
    return pytest.approx(expected, rel=1e-12, abs=1e-13 * magnitude + 1e-300)


def first_reaching(values: np.ndarray, mass: float) -> float:
    """The threshold by its definition: add up the smallest |v| one by one."""
    ascending = sorted(abs(float(v)) for v in values.ravel())
    total = 0.0
    for value in ascending:
        total += value
    reached = 0.0
    for value in ascending:
        reached += value
        if reached >= mass * total:
            return value
    raise AssertionError("the last cumulative sum reaches the total")


@given(maps())
def test_figures_follow_their_formulas(tensor):
    v = reduce_to_view(tensor, View.ELEMENTS, None)
    got = statistics(v, View.ELEMENTS)
    size = float(np.abs(v).sum())

    assert got.element_count == got.finite_count == v.size
    assert (got.nan_count, got.infinite_count) == (0, 0)
    assert (got.positive_count, got.negative_count, got.zero_count) == ((v > 0).sum(), (v < 0).sum(), (v == 0).sum())
    assert (got.min, got.max, got.abs_max) == (v.min(), v.max(), np.abs(v).max())
    assert got.sum == v.sum()
    assert got.positive_sum == close(np.maximum(v, 0).sum(), size)
    assert got.negative_sum == close(np.minimum(v, 0).sum(), size)
    assert got.mean == close(math.fsum(v.ravel()) / v.size, size)
    assert got.std == close(math.sqrt(((v - v.mean()) ** 2).mean()), size)
    assert got.l1_norm == close(size, size)
    assert got.l2_norm == close(math.hypot(*v.ravel()), size)


@given(maps(), st.booleans())
def test_quantiles_are_numpys_to_the_bit(tensor, scaled):
    v = reduce_to_view(tensor, View.ELEMENTS, None) * (math.pi if scaled else 1)
    got = statistics(v, View.ELEMENTS)

    assert [q.probability for q in got.quantiles] == list(QUANTILE_PROBABILITIES)
    assert [q.value for q in got.quantiles] == np.quantile(v, QUANTILE_PROBABILITIES, method="linear").tolist()
    assert [q.probability for q in got.abs_quantiles] == list(ABS_QUANTILE_PROBABILITIES)
    assert [q.value for q in got.abs_quantiles] == np.quantile(
        np.abs(v), ABS_QUANTILE_PROBABILITIES, method="linear"
    ).tolist()


@pytest.mark.parametrize("exponent", [1, 5])
@pytest.mark.parametrize("view", View)
def test_quantiles_are_numpys_on_a_large_map(view, exponent):
    tensor = (np.random.default_rng(0).standard_normal((3, 96, 97)) ** exponent * 1e-9).astype(np.float32)
    v = reduce_to_view(tensor, view, 0)
    got = statistics(v, view)

    assert [q.value for q in got.quantiles] == np.quantile(v, QUANTILE_PROBABILITIES).tolist()
    assert [q.value for q in got.abs_quantiles] == np.quantile(np.abs(v), ABS_QUANTILE_PROBABILITIES).tolist()


@given(maps())
def test_mass_thresholds_follow_their_definition(tensor):
    v = reduce_to_view(tensor, View.ELEMENTS, None)
    got = statistics(v, View.ELEMENTS)

    assert {t.mass: t.value for t in got.abs_mass_thresholds} == {m: first_reaching(v, m) for m in ABS_MASS_LEVELS}


def test_mass_threshold_is_not_a_quantile():
    v = np.array([1.0] * 99 + [1000.0])
    got = statistics(v, View.ELEMENTS)

    assert got.abs_mass_threshold(0.98) == 1000
    assert got.abs_quantile(0.99) == pytest.approx(10.99, rel=1e-12)


@given(maps(), st.randoms(use_true_random=False))
def test_order_of_elements_does_not_matter(tensor, random):
    v = reduce_to_view(tensor, View.ELEMENTS, None).ravel()
    shuffled = v.copy()
    random.shuffle(shuffled)

    assert_same(statistics(shuffled, View.ELEMENTS), statistics(v, View.ELEMENTS))


@given(maps(), st.sampled_from([0.25, 2.0, -1.0, -8.0]))
def test_figures_scale_with_the_map(tensor, factor):
    v = reduce_to_view(tensor, View.ELEMENTS, None)
    one, scaled = statistics(v, View.ELEMENTS), statistics(v * factor, View.ELEMENTS)

    for name in ("abs_max", "std", "l1_norm", "l2_norm"):
        assert getattr(scaled, name) == close(abs(factor) * getattr(one, name), abs(factor) * one.l1_norm)
    assert scaled.sum == close(factor * one.sum, abs(factor) * one.l1_norm)
    assert (scaled.min, scaled.max) == tuple(sorted((factor * one.min, factor * one.max)))
    flipped = (one.positive_count, one.negative_count)[:: 1 if factor > 0 else -1]
    assert (scaled.positive_count, scaled.negative_count) == flipped


@given(maps(elements=ANY))
def test_non_finite_elements_are_counted_and_left_out(tensor):
    v = reduce_to_view(tensor, View.ELEMENTS, None).ravel()
    got = statistics(v, View.ELEMENTS)
    finite = statistics(v[np.isfinite(v)], View.ELEMENTS)

    assert got.element_count == v.size
    assert (got.nan_count, got.infinite_count) == (np.isnan(v).sum(), np.isinf(v).sum())
    assert got == dataclasses.replace(
        finite, element_count=got.element_count, nan_count=got.nan_count, infinite_count=got.infinite_count
    )


@pytest.mark.parametrize("v", [[], [np.nan], [np.inf, -np.inf, np.nan]])
def test_without_finite_elements_figures_are_absent(v):
    got = statistics(np.array(v, dtype=np.float64), View.CHANNEL_SUM)
    figure_names = {f.name for f in dataclasses.fields(Statistics)} - {"view", "element_count"}

    assert (got.nan_count, got.infinite_count) == (np.isnan(v).sum(), np.isinf(v).sum())
    for name in figure_names - {"nan_count", "infinite_count"}:
        value = getattr(got, name)
        assert value is None or value == () or (name.endswith("_count") and value == 0), name
    with pytest.raises(KeyError):
        got.quantile(0.5)


def test_every_figure_is_a_plain_number():
    got = statistics(np.array([1.0, -2.0, 0.0]), View.ELEMENTS)

    for field in dataclasses.fields(got):
        value = getattr(got, field.name)
        assert type(value) in {View, int, float, tuple}, field.name
    assert all(type(entry.value) is float for entry in got.quantiles + got.abs_quantiles + got.abs_mass_thresholds)


@given(st.lists(maps(elements=ANY), min_size=1, max_size=4))
def test_joint_figures_are_those_of_the_pooled_values(tensors):
    values = [reduce_to_view(tensor, View.ELEMENTS, None) for tensor in tensors]

    assert pooled_statistics(values, View.ELEMENTS) == statistics(
        np.concatenate([v.ravel() for v in values]), View.ELEMENTS
    )


@given(st.lists(maps(elements=ANY), min_size=1, max_size=3))
def test_joint_range_is_that_of_the_pooled_values(tensors):
    values = [reduce_to_view(tensor, View.ELEMENTS, None) for tensor in tensors]
    joint = joint_range([statistics(v, View.ELEMENTS) for v in values])
    pooled = pooled_statistics(values, View.ELEMENTS)

    assert (joint.min, joint.max, joint.abs_max) == (pooled.min, pooled.max, pooled.abs_max)


def test_pooling_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one map"):
        pooled_statistics([], View.ELEMENTS)


@given(maps(shape=PIXELS), st.integers(0, 2))
def test_views_reduce_over_channels(tensor, channel_axis):
    pixels = np.moveaxis(tensor.astype(np.float64), channel_axis, -1)
    expected = {
        View.CHANNEL_SUM: lambda channels: math.fsum(channels),
        View.CHANNEL_ABS_SUM: lambda channels: math.fsum(abs(c) for c in channels),
        View.CHANNEL_MAX_ABS: lambda channels: max(abs(c) for c in channels),
    }

    np.testing.assert_array_equal(reduce_to_view(tensor, View.ELEMENTS, channel_axis), tensor.astype(np.float64))
    for view, reduction in expected.items():
        got = reduce_to_view(tensor, view, channel_axis)
        assert got.dtype == np.float64 and got.shape == pixels.shape[:-1]
        np.testing.assert_allclose(got, np.apply_along_axis(reduction, -1, pixels), rtol=1e-12, atol=1e-8)


@given(maps(elements=ANY, shape=PIXELS), st.integers(0, 2), st.sampled_from(CHANNEL_VIEWS))
def test_one_non_finite_channel_makes_the_pixel_non_finite(tensor, channel_axis, view):
    got = reduce_to_view(tensor, view, channel_axis)

    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(tensor).all(axis=channel_axis))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pixel", [(np.inf, -np.inf), (np.nan, 1), (1, np.nan), (np.nan, np.inf), (-np.inf, 1)])
@pytest.mark.parametrize("view", CHANNEL_VIEWS)
def test_opposite_infinities_do_not_cancel(pixel, view):
    tensor = np.array([pixel, (1, 2)], dtype=np.float32)

    assert np.isfinite(reduce_to_view(tensor, view, 1)).tolist() == [False, True]


def test_sums_do_not_overflow_where_float32_would():
    largest = np.finfo(np.float32).max
    got = statistics(reduce_to_view(np.full((2, 3), largest, np.float32), View.CHANNEL_SUM, 0), View.CHANNEL_SUM)

    assert got.finite_count == 3
    assert got.sum == 6 * float(largest)
    assert got.max == 2 * float(largest)


def test_channel_view_needs_a_channel_axis():
    with pytest.raises(ValueError, match=r"CHANNEL_SUM needs a channel axis.*\(2, 2\)"):
        reduce_to_view(np.zeros((2, 2), np.float32), View.CHANNEL_SUM, None)


@pytest.mark.parametrize(
    ("delta", "of", "expected"),
    [
        (-0.5, 2.0, 0.25),
        (0.5, -2.0, 0.25),
        (0.0, 3.0, 0.0),
        (1.0, 0.0, None),
        (None, 1.0, None),
        (0.0, 0.0, None),
        (math.nan, 1.0, None),
        (1.0, math.nan, None),
        (1.0, math.inf, None),
        (1e300, 1e-300, None),
    ],
)
def test_relative_deltas_are_absent_where_undefined(delta, of, expected):
    assert relative_convergence_delta(delta, of) == expected
    assert delta_over_abs_sum(delta, of) == expected


@pytest.mark.parametrize(
    ("ours", "wire"),
    [
        (figures.Statistics, statistics_pb2.Statistics),
        (figures.Quantile, statistics_pb2.Quantile),
        (figures.AbsMassThreshold, statistics_pb2.AbsMassThreshold),
    ],
)
def test_dataclasses_mirror_the_wire(ours, wire):
    assert [field.name for field in dataclasses.fields(ours)] == [field.name for field in wire.DESCRIPTOR.fields]


def test_views_are_the_wires():
    assert {f"VIEW_{view.name}": view.value for view in View} | {"VIEW_UNSPECIFIED": 0} == dict(
        statistics_pb2.View.items()
    )


def assert_same(got: Statistics, expected: Statistics) -> None:
    """Equal figures, sums up to the rounding of another order."""
    size = expected.l1_norm or 0.0
    for field in dataclasses.fields(Statistics):
        value = getattr(expected, field.name)
        assert getattr(got, field.name) == (close(value, size) if isinstance(value, float) else value), field.name
