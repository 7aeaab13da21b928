"""Figures of an answer: folding over baselines, regions, groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from explainserve.errors import InvalidRequest
from explainserve.explainer import Answer, Explanation, Usage
from explainserve.explanation import Attribution, Baseline, Fit, Instance, Question, StopReason, Subject, Target
from explainserve.figures import (
    Entry,
    FigureOptions,
    Group,
    Region,
    Selector,
    check_regions,
    entries,
    input_figures,
    joint_figures,
)
from explainserve.methods import IntegratedGradients
from explainserve.plan import Selector as ScoreSelector
from explainserve.query import Place
from explainserve.regions import Box
from explainserve.signature import Axis, InputSpec, MapSpec, OutputSpec, Score, ScoreHead, Signature
from explainserve.statistics import View

SHAPE = (2, 3, 4)
FLOAT = np.dtype(np.float32)
IMAGE = InputSpec("image", FLOAT, (Axis("batch"), *(Axis("", n) for n in SHAPE)), layout="NCHW")
VECTOR = InputSpec("vector", FLOAT, (Axis("batch"), Axis("", 5)))
SIGNATURE = Signature((IMAGE, VECTOR), (OutputSpec("y", FLOAT, (Axis("batch"), Axis("", 3))),))
MAPS = {spec.name: spec.map_spec for spec in SIGNATURE.inputs}
SUBJECT = Subject(MAPS, {"image": SHAPE, "vector": (5,)})


def target(output: str = "y", score: Score = Score.OUTPUT) -> Target:
    return Target(output, score, ScoreHead.IDENTITY, ScoreSelector(np.array([0]), np.ones(1, np.float32)))


def explanation(
    place: tuple[int, int, int],
    image: np.ndarray[Any, Any],
    *,
    map_error: float | None = None,
    stop_reason: StopReason = StopReason.FIXED_STEPS,
    own_target: Target | None = None,
    baseline_value: float = 0.0,
    step_count: int = 1,
) -> Explanation:
    tensors = {"image": image.astype(np.float32), "vector": np.zeros(5, np.float32)}
    attribution = Attribution(tensors, step_count, stop_reason, map_error, np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    question = Question(SUBJECT, Instance({}, {}), own_target or target(), Baseline({}), 1.0, baseline_value)
    return Explanation(Place(0, *place), IntegratedGradients(), question, attribution)


def answer(*explanations: Explanation) -> Answer:
    """Only what figures look at."""
    return Answer(None, explanations, (), Usage())  # type: ignore[arg-type]


def random(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(SHAPE)


def maps(*targets: Target) -> list[Entry]:
    return entries(answer(*(explanation((0, t, 0), random(t), own_target=own) for t, own in enumerate(targets))), False)


def refused(call: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        call()
    return caught.value


# Folding


def test_folding_groups_by_instance_and_target() -> None:
    explanations = [
        explanation((i, t, b), random(i + 2 * t + 4 * b), baseline_value=b, step_count=b + 1)
        for i in range(2)
        for t in range(2)
        for b in range(3)
    ]
    folded = entries(answer(*explanations), True)

    assert [(e.instance_index, e.target_index, e.baseline_index) for e in folded] == [
        (0, 0, None),
        (0, 1, None),
        (1, 0, None),
        (1, 1, None),
    ]
    for k, entry in enumerate(folded):
        stack = np.stack([e.attribution.tensors["image"] for e in explanations[3 * k : 3 * k + 3]]).astype(np.float64)
        np.testing.assert_allclose(entry.tensors["image"], stack.mean(0), rtol=1e-6)
        np.testing.assert_allclose(entry.spread["image"], stack.std(0), rtol=1e-6)
        assert entry.tensors["image"].dtype == entry.spread["image"].dtype == np.float32
        assert (entry.baseline_output_value, entry.output_change, entry.step_count) == (1.0, 0.0, 6)
        assert entry.folded


def sampled(baseline: int, standard_errors: dict[str, Any], fit: Fit | None) -> Explanation:
    """Of one baseline, by a method that draws samples."""
    own = explanation((0, 0, baseline), random(baseline))
    return replace(own, attribution=replace(own.attribution, standard_errors=standard_errors, fit=fit))


def test_mean_of_parts_without_standard_errors_or_fits_has_none() -> None:
    known = {"image": np.abs(random(7)).astype(np.float32)}
    (entry,) = entries(answer(sampled(0, known, Fit(0.9, 2.0)), sampled(1, {}, None)), True)

    assert not entry.attribution.standard_errors
    assert entry.attribution.fit is None


@given(scale=st.floats(-2, 2))
def test_standard_error_of_a_mean_bounds_the_real_one(scale: float) -> None:
    """Samples of the second baseline follow those of the first; their mean is off by no more than is told."""
    drawn = [
        np.random.default_rng(1).standard_normal((50, *SHAPE)),
        np.random.default_rng(2).standard_normal((50, 1, 1, 1)),
    ]
    samples = [drawn[0], scale * drawn[0] + drawn[1]]
    told = [{"image": own.std(axis=0, ddof=1).astype(np.float32)} for own in samples]
    (entry,) = entries(answer(*(sampled(b, own, Fit(0.5, b)) for b, own in enumerate(told))), True)
    real = np.mean(samples, axis=0).std(axis=0, ddof=1)

    assert (real <= entry.attribution.standard_errors["image"] * (1 + 1e-5)).all()
    assert entry.attribution.fit == Fit(None, 0.5)


def test_mean_of_one_is_itself_without_spread() -> None:
    own = explanation((0, 0, 0), random(1), map_error=0.25)
    (entry,) = entries(answer(own), True)

    np.testing.assert_array_equal(entry.tensors["image"], own.attribution.tensors["image"])
    assert not entry.spread["image"].any()
    assert entry.map_error == pytest.approx(0.25)


@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=5), size=st.floats(0.001, 0.5))
def test_error_of_a_mean_bounds_the_real_one(seeds: list[int], size: float) -> None:
    """Each part is off by a known distance; the mean is off by no more than its map error says."""
    exact = [random(seed) for seed in seeds]
    parts = []
    for b, true in enumerate(exact):
        found = (true + size * random(1000 + seeds[b])).astype(np.float32)
        error = np.linalg.norm(found - true) / np.linalg.norm(found)
        parts.append(explanation((0, 0, b), found, map_error=float(error)))
    (entry,) = entries(answer(*parts), True)
    real = np.linalg.norm(entry.tensors["image"] - np.mean(exact, axis=0)) / np.linalg.norm(entry.tensors["image"])

    assert entry.map_error is not None
    assert real <= entry.map_error * (1 + 1e-4)


def test_mean_has_no_error_where_a_part_has_none() -> None:
    parts = explanation((0, 0, 0), random(1), map_error=0.1), explanation((0, 0, 1), random(2))

    assert entries(answer(*parts), True)[0].map_error is None


def test_mean_of_zero_has_no_relative_error() -> None:
    parts = explanation((0, 0, 0), random(1), map_error=0.1), explanation((0, 0, 1), -random(1), map_error=0.1)

    assert entries(answer(*parts), True)[0].map_error is None


@pytest.mark.parametrize(
    "worst", [reason for reason in StopReason if reason not in (StopReason.CONVERGED, StopReason.FIXED_STEPS)]
)
def test_mean_stops_for_its_worst_reason(worst: StopReason) -> None:
    parts = [
        explanation((0, 0, b), random(b), stop_reason=reason)
        for b, reason in enumerate((StopReason.CONVERGED, worst, StopReason.CONVERGED))
    ]

    assert entries(answer(*parts), True)[0].stop_reason is worst


# Figures of one map


def test_views_default_to_what_the_input_has() -> None:
    assert FigureOptions().views_of(IMAGE) == (View.ELEMENTS, View.CHANNEL_SUM)
    assert FigureOptions().views_of(VECTOR) == (View.ELEMENTS,)
    assert FigureOptions(views=(View.CHANNEL_MAX_ABS,)).views_of(IMAGE) == (View.CHANNEL_MAX_ABS,)
    assert FigureOptions(views=(View.CHANNEL_MAX_ABS,)).views_of(VECTOR) == (View.ELEMENTS,)


def test_figures_of_one_map() -> None:
    (entry,) = maps(target())
    regions = check_regions([Region("left", Box(0, 0, 2, 3))], SUBJECT)
    figures = input_figures(entry, IMAGE, FigureOptions(), regions)
    none = input_figures(entry, IMAGE, FigureOptions(statistics=False, regions=False), regions)

    assert [own.statistics.view for own in figures.views] == [View.ELEMENTS, View.CHANNEL_SUM]
    assert [len(own.normalizations) for own in figures.views] == [6, 6]
    assert figures.regions[0].sum == pytest.approx(entry.tensors["image"][:, :, :2].sum(dtype=np.float64))
    assert (none.views, none.regions) == ((), ())


def test_region_of_one_instance_only() -> None:
    first, second = entries(answer(explanation((0, 0, 0), random(0)), explanation((1, 0, 0), random(1))), False)
    regions = check_regions([Region("r", Box(0, 0, 1, 1), instance_index=1)], SUBJECT)

    assert input_figures(first, IMAGE, FigureOptions(), regions).regions == ()
    assert {r.name for r in input_figures(second, IMAGE, FigureOptions(), regions).regions} == {"r"}


# Regions


def test_box_belongs_to_the_only_input_with_space() -> None:
    (region,) = check_regions([Region("r", Box(0, 0, 4, 3))], SUBJECT)

    assert region.input == "image"


def test_mask_needs_the_name_of_its_input_where_several_fit() -> None:
    mask = np.ones(5, np.bool_)

    assert refused(lambda: check_regions([Region("r", mask)], SUBJECT)).reason == "REGION_INPUT_REQUIRED"
    (region,) = check_regions([Region("r", mask, "vector")], SUBJECT)
    assert region.input == "vector"


def test_region_names_are_unique_per_input_and_instance() -> None:
    box, mask = Box(0, 0, 1, 1), np.ones(5, np.bool_)
    apart = [Region("r", box, instance_index=0), Region("r", box, instance_index=1), Region("r", mask, "vector")]

    assert len(check_regions(apart, SUBJECT)) == 3
    twice = [Region("r", box), Region("r", box, "image")]
    assert refused(lambda: check_regions(twice, SUBJECT)).reason == "REGION_NAME_REPEATED"


class Compared(str):
    """A name that counts how often it is compared."""

    count = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Compared.count += 1
        return str.__eq__(self, other)


def test_names_of_many_regions_are_not_compared_each_with_each() -> None:
    check_regions([Region(Compared(k), Box(0, 0, 1, 1), "image") for k in range(500)], SUBJECT)

    assert Compared.count < 5000


def test_input_that_is_not_explained_has_no_regions() -> None:
    error = refused(lambda: check_regions([Region("r", Box(0, 0, 1, 1), "image")], Subject(MAPS, {"vector": (5,)})))

    assert (error.reason, error.metadata["input"]) == ("REGION_INPUT_REQUIRED", "image")


# Groups


def test_default_group_holds_all_of_one_unit() -> None:
    (joint,) = joint_figures(maps(target(), target()), FigureOptions(), [])

    assert (joint.group, joint.members, joint.pairs) == ("all", (0, 1), ())
    assert set(joint.inputs) == {"image", "vector"}
    assert joint.inputs["image"][0].statistics.element_count == 2 * 24
    assert joint.inputs["vector"][0].statistics.zero_count == 10


def test_a_group_of_one_map_has_the_figures_of_the_map() -> None:
    """Not computed twice."""
    (entry,) = own = maps(target())
    (joint,) = joint_figures(own, FigureOptions(), [])

    for name, views in joint.inputs.items():
        for alone, together in zip(input_figures(entry, MAPS[name], FigureOptions(), ()).views, views, strict=True):
            assert together is alone


@pytest.mark.parametrize("flat_first", [False, True])
def test_a_view_is_pooled_over_the_maps_that_have_it(flat_first: bool) -> None:
    """A method may lay its map of an image out without channels: it has no sum over them."""
    image, flat = maps(target(), target())
    flat = replace(
        flat,
        maps={**MAPS, "image": MapSpec("image", layout="HW")},
        tensors={**flat.tensors, "image": np.full(SHAPE[1:], 9.0, np.float32)},
    )
    both = [flat, image] if flat_first else [image, flat]
    (joint,) = joint_figures(both, FigureOptions(), [])
    (pairwise,) = joint_figures(both, FigureOptions(joint=False), [Group("both", (Selector(),), pairwise=True)])
    pooled = {own.statistics.view: own.statistics for own in joint.inputs["image"]}

    assert pooled[View.ELEMENTS].element_count == 24 + 12
    assert pooled[View.ELEMENTS].max == 9
    assert pooled[View.CHANNEL_SUM] == image.figures("image", View.CHANNEL_SUM).statistics
    assert {(pair.input, pair.view) for pair in pairwise.pairs} == {
        ("image", View.ELEMENTS),
        ("vector", View.ELEMENTS),
    }


def test_default_group_is_split_by_output_and_score() -> None:
    mixed = maps(target(), target(score=Score.PROBABILITY), target(), target("z"))
    joint = joint_figures(mixed, FigureOptions(), [])

    assert {figures.group: figures.members for figures in joint} == {
        "all/y/OUTPUT": (0, 2),
        "all/y/PROBABILITY": (1,),
        "all/z/OUTPUT": (3,),
    }


def test_left_out_default_group_leaves_named_ones() -> None:
    group = Group("first", (Selector(target_index=0),))
    joint = joint_figures(maps(target(), target()), FigureOptions(joint=False), [group])

    assert [(figures.group, figures.members) for figures in joint] == [("first", (0,))]


def test_group_is_the_union_of_its_selectors_in_order() -> None:
    places = [(i, t, b) for i in range(2) for t in range(2) for b in range(2)]
    all_maps = entries(answer(*(explanation(place, random(k)) for k, place in enumerate(places))), False)
    group = Group("g", (Selector(instance_index=1, target_index=1), Selector(baseline_index=0, target_index=0)))
    joint = joint_figures(all_maps, FigureOptions(joint=False), [group])

    assert joint[0].members == (0, 4, 6, 7)


def test_pairs_have_the_range_of_both() -> None:
    three = maps(target(), target(), target())
    group = Group("g", (Selector(),), pairwise=True)
    (joint,) = joint_figures(three, FigureOptions(joint=False, views=(View.ELEMENTS,)), [group])
    pairs = [pair for pair in joint.pairs if pair.input == "image"]

    assert [(pair.first, pair.second) for pair in pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair in pairs:
        both = np.stack([three[pair.first].tensors["image"], three[pair.second].tensors["image"]])
        assert (pair.range.min, pair.range.max) == (both.min(), both.max())
        assert pair.range.abs_max == np.abs(both).max()


@pytest.mark.parametrize(
    ("selector", "reason"),
    [
        (Selector(target_index=9), "EMPTY_GROUP"),
        (Selector(method_index=1), "EMPTY_GROUP"),
        (Selector(), "INCOMMENSURABLE_GROUP"),
    ],
)
def test_group_that_makes_no_sense_is_refused(selector: Selector, reason: str) -> None:
    mixed = maps(target(), target(score=Score.PROBABILITY))
    error = refused(lambda: joint_figures(mixed, FigureOptions(), [Group("g", (selector,))]))

    assert (error.reason, error.metadata["group"]) == (reason, "g")


def test_folded_maps_belong_to_no_baseline() -> None:
    folded = entries(answer(explanation((0, 0, 0), random(0)), explanation((0, 0, 1), random(1))), True)
    for position in (0, -1):
        group = Group("g", (Selector(baseline_index=position),))
        assert refused(lambda g=group: joint_figures(folded, FigureOptions(), [g])).reason == "EMPTY_GROUP"
