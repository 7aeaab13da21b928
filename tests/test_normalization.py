"""Recipes follow their table, are degenerate exactly where they must be, and say where zero lands."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from explainserve.normalization import NORMALIZATIONS, Normalization, NormalizationKind, apply, normalizations
from explainserve.statistics import Statistics, View, pooled_statistics, statistics
from explainserve.v1 import statistics_pb2

A, B = np.array([-1.0, 0.0, 2.0]), np.array([-4.0, 0.0, 1.0])
SYMMETRIC = (NormalizationKind.SYMMETRIC_ABS_MAX, NormalizationKind.SYMMETRIC_QUANTILE, NormalizationKind.ABS_MASS)
VALUES = hnp.arrays(
    np.float64,
    hnp.array_shapes(max_dims=2, max_side=8),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)


def recipe(kind: NormalizationKind, values: np.ndarray) -> Normalization:
    return {n.kind: n for n in normalizations(statistics(values, View.ELEMENTS))}[kind]


def mass_threshold(values: np.ndarray, mass: float) -> float:
    ascending = np.sort(np.abs(values), axis=None)
    reached = np.cumsum(ascending)
    return float(ascending[np.argmax(reached >= mass * reached[-1])])


PLAIN = {
    NormalizationKind.MIN_MAX: lambda v: (v.min(), v.max() - v.min(), 0, 1),
    NormalizationKind.QUANTILE_RANGE: lambda v: (
        np.quantile(v, 0.01),
        np.quantile(v, 0.99) - np.quantile(v, 0.01),
        0,
        1,
    ),
    NormalizationKind.POSITIVE_MAX: lambda v: (0, v.max(), 0, 1),
    NormalizationKind.SYMMETRIC_ABS_MAX: lambda v: (0, np.abs(v).max(), -1, 1),
    NormalizationKind.SYMMETRIC_QUANTILE: lambda v: (0, np.quantile(np.abs(v), 0.99), -1, 1),
    NormalizationKind.ABS_MASS: lambda v: (0, mass_threshold(v, 0.98), -1, 1),
}


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@given(values=VALUES)
def test_numbers_follow_the_table(kind, values):
    center, scale, lower, upper = PLAIN[kind](values)
    got = recipe(kind, values)

    assert got.degenerate == (scale == 0)
    assert (got.center, got.scale) == (center, 1.0 if scale == 0 else scale)
    assert (got.lower, got.upper) == (lower, upper)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@given(values=VALUES)
def test_display_follows_the_formula(kind, values):
    got = recipe(kind, values)

    displayed = apply(got, values)

    expected = np.minimum(np.maximum((values - got.center) / got.scale, got.lower), got.upper)
    np.testing.assert_array_equal(displayed, expected)
    assert apply(got, np.zeros(1)) == [got.zero_at]
    assert got.lower <= got.zero_at <= got.upper


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@given(values=VALUES, exponent=st.integers(-40, 40))
def test_display_does_not_depend_on_the_unit(kind, values, exponent):
    factor = 2.0**exponent

    one, other = recipe(kind, values), recipe(kind, values * factor)

    assume(not one.degenerate)
    np.testing.assert_allclose(apply(other, values * factor), apply(one, values), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", SYMMETRIC)
@given(values=VALUES)
def test_symmetric_recipes_show_zero_in_the_middle(kind, values):
    assert recipe(kind, values).zero_at == 0


def test_individual_scales_make_different_maps_alike():
    np.testing.assert_allclose(apply(recipe(NormalizationKind.MIN_MAX, A), A), [0, 1 / 3, 1])
    np.testing.assert_allclose(apply(recipe(NormalizationKind.MIN_MAX, B), B), [0, 0.8, 1])


def test_zero_lands_at_the_same_place_on_a_joint_scale():
    pooled = normalizations(pooled_statistics([A, B], View.ELEMENTS))
    joint = next(n for n in pooled if n.kind is NormalizationKind.MIN_MAX)

    assert (joint.center, joint.scale) == (-4, 6)
    assert joint.zero_at == pytest.approx(2 / 3)
    np.testing.assert_allclose(apply(joint, A), [0.5, 2 / 3, 1])
    np.testing.assert_allclose(apply(joint, B), [0, 2 / 3, 5 / 6])


@pytest.mark.parametrize("value", [0.0, 1.5, -1.5])
def test_constant_maps_are_degenerate_where_they_have_no_range(value):
    values = np.full((2, 3), value)
    got = {n.kind: n for n in normalizations(statistics(values, View.ELEMENTS))}

    ranges = {NormalizationKind.MIN_MAX, NormalizationKind.QUANTILE_RANGE}
    assert {kind for kind, n in got.items() if n.degenerate} == (ranges if value else set(NormalizationKind))
    for normalization in got.values():
        assert normalization.scale == 1 or not normalization.degenerate
        assert np.isfinite(apply(normalization, values)).all()


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_small_maps_are_legitimate(kind):
    got = recipe(kind, A * 1e-13)

    assert not got.degenerate
    np.testing.assert_allclose(apply(got, A * 1e-13), apply(recipe(kind, A), A))


def test_a_range_beyond_float64_is_degenerate():
    largest = float(np.finfo(np.float64).max)
    figures = dataclasses.replace(statistics(A, View.ELEMENTS), min=-largest, max=largest)

    got = next(n for n in normalizations(figures) if n.kind is NormalizationKind.MIN_MAX)

    assert got.degenerate
    assert got.scale == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_without_finite_elements_there_are_no_numbers(kind):
    values = np.array([np.nan, np.inf])
    got = recipe(kind, values)

    assert (got.center, got.scale, got.zero_at, got.degenerate) == (None, None, None, True)
    with pytest.raises(ValueError, match=f"{kind.name} of ELEMENTS has no numbers"):
        apply(got, values)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_non_finite_elements_do_not_disturb_the_others(kind):
    values = np.concatenate([A, [np.nan, np.inf, -np.inf]])
    got = recipe(kind, values)

    displayed = apply(got, values)

    assert got == recipe(kind, A)
    np.testing.assert_array_equal(displayed[:3], apply(got, A))
    np.testing.assert_array_equal(displayed[3:], [np.nan, got.upper, got.lower])


def test_an_outlier_sets_the_mass_threshold_but_not_the_quantile():
    values = np.array([1.0] * 99 + [1000.0])

    assert recipe(NormalizationKind.ABS_MASS, values).scale == 1000
    assert recipe(NormalizationKind.SYMMETRIC_QUANTILE, values).scale == pytest.approx(10.99)


@pytest.mark.parametrize("view", View)
def test_every_kind_comes_with_its_view_and_parameters(view):
    got = normalizations(statistics(A, view))
    parameters = {n.kind.name: (n.lower_probability, n.upper_probability, n.mass) for n in got}

    assert [n.kind for n in got] == list(NormalizationKind)
    assert {n.view for n in got} == {view}
    assert parameters == {
        "MIN_MAX": (None, None, None),
        "QUANTILE_RANGE": (0.01, 0.99, None),
        "POSITIVE_MAX": (None, None, None),
        "SYMMETRIC_ABS_MAX": (None, None, None),
        "SYMMETRIC_QUANTILE": (None, 0.99, None),
        "ABS_MASS": (None, None, 0.98),
    }


def test_numbers_are_plain_and_finite():
    for normalization in normalizations(statistics(A, View.ELEMENTS)):
        numbers = (normalization.center, normalization.scale, normalization.zero_at)
        assert all(type(number) is float and math.isfinite(number) for number in numbers)


def test_dataclass_and_kinds_mirror_the_wire():
    wire = [field.name for field in statistics_pb2.Normalization.DESCRIPTOR.fields]

    assert [field.name for field in dataclasses.fields(Normalization)] == wire
    assert set(NORMALIZATIONS) == set(NormalizationKind)
    assert {f"NORMALIZATION_KIND_{k.name}": k.value for k in NormalizationKind} | {
        "NORMALIZATION_KIND_UNSPECIFIED": 0
    } == dict(statistics_pb2.NormalizationKind.items())


def test_figures_without_the_needed_quantile_are_refused():
    without = dataclasses.replace(statistics(A, View.ELEMENTS), quantiles=())

    assert isinstance(without, Statistics)
    with pytest.raises(KeyError):
        normalizations(without)
