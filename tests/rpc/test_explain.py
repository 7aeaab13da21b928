"""Good explanations over a real connection: their order, their figures recomputed from the bytes sent, their echoes."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from explainserve.rpc.tensors import encode
from explainserve.v1 import attribution_pb2, baseline_pb2, method_pb2, model_pb2, statistics_pb2, target_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.folder import LABELS, MEAN, STD, WEIGHTS, image_logits, training_mean
from rpc.loopback import (
    Array,
    Loopback,
    adaptive,
    array,
    element,
    every,
    label,
    maps,
    named,
    normal,
    relative_distance,
    request,
    steps,
)

X2 = normal(2, 4)
FINE = steps(64)
WHITE = (1.0 - MEAN) / STD


def images(count: int) -> Array:
    """Instances inside the value range, in MODEL space."""
    pixels = np.random.default_rng(7).random((count, 3, 6, 8))
    return ((pixels - MEAN[:, None, None]) / STD[:, None, None]).astype(np.float32)


def explain(stub: ExplainerServiceStub, model: str, inputs: dict[str, Array], **fields: Any) -> pb.ExplainResponse:
    return stub.Explain(request(model, inputs, **fields), timeout=60)


def places(response: pb.ExplainResponse) -> list[tuple[int, int, int]]:
    return [(a.instance_index, a.target_index, a.baseline_index) for a in response.attributions]


def plain_value(x: Array, index: int) -> float:
    return float(np.tanh(x.astype(np.float64) @ WEIGHTS["plain"])[index])


# Order


def test_results_are_ordered_by_instance_target_baseline(stub: ExplainerServiceStub) -> None:
    baselines = [every(zeros={}), every(constant={"values": [0.5]}), every(constant={"values": [-1.0]})]
    response = explain(stub, "plain", {"x": X2}, targets=[element(2), element(0)], baselines=baselines, methods=FINE)

    assert places(response) == [(i, t, b) for i in range(2) for t in range(2) for b in range(3)]
    for attribution in response.attributions:
        x, index = X2[attribution.instance_index], (2, 0)[attribution.target_index]
        x0 = np.full(4, (0.0, 0.5, -1.0)[attribution.baseline_index])
        assert list(attribution.target.index) == [index]
        assert attribution.instance_output_value == pytest.approx(plain_value(x, index), rel=1e-5)
        assert attribution.baseline_output_value == pytest.approx(plain_value(x0, index), rel=1e-5, abs=1e-7)
        assert abs(attribution.convergence_delta) < 1e-2


def test_targets_and_baselines_of_one_instance(stub: ExplainerServiceStub) -> None:
    """Each may name an instance; positions count those of its instance."""
    response = explain(
        stub,
        "plain",
        {"x": X2},
        targets=[element(0, instance_index=1), element(1), element(2, instance_index=0)],
        baselines=[every(zeros={}), {"every_input": {"constant": {"values": [1.0]}}, "instance_index": 1}],
        methods=steps(8),
    )

    targets = [(a.instance_index, a.target_index, a.target.request_target_index) for a in response.attributions]
    used = [(b.instance_index, b.baseline_index, b.request_baseline_index) for b in response.baselines]

    assert places(response) == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    assert targets == [(0, 0, 1), (0, 1, 2), (1, 0, 0), (1, 0, 0), (1, 1, 1), (1, 1, 1)]
    assert used == [(0, 0, 0), (1, 0, 0), (1, 1, 1)]


def test_instances_together_equal_each_alone(stub: ExplainerServiceStub) -> None:
    batch = images(3)
    together = maps(explain(stub, "image", {"image": batch}, methods=FINE))
    alone = [maps(explain(stub, "image", {"image": batch[i : i + 1]}, methods=FINE))[0] for i in range(3)]

    for a, b in zip(together, alone, strict=True):
        assert relative_distance(a, b) < 1e-5


# Targets


def test_default_target_baseline_and_method_are_the_models(stub: ExplainerServiceStub) -> None:
    (attribution,) = (response := explain(stub, "image", {"image": images(1)})).attributions
    (used,) = response.baselines

    assert (attribution.target.label, list(attribution.target.index)) == ("cat", [2])
    assert used.inputs[0].effective.data.name == "training_mean"
    assert used.inputs[0].sha256 == hashlib.sha256(training_mean().astype("<f4").tobytes()).hexdigest()
    assert response.provenance.effective_methods[0].integrated_gradients.quadrature == method_pb2.QUADRATURE_ADAPTIVE


def test_argmax_and_zeros_without_any_statement(stub: ExplainerServiceStub) -> None:
    (attribution,) = (response := explain(stub, "plain", {"x": X2[:1]})).attributions

    expected = int(np.argmax(X2[0] @ WEIGHTS["plain"]))
    assert (attribution.target.selection, list(attribution.target.index)) == ("argmax", [expected])
    assert response.baselines[0].inputs[0].effective.WhichOneof("kind") == "zeros"


def test_top_k_is_resolved_on_the_instance_and_held_fixed(stub: ExplainerServiceStub) -> None:
    """The baseline prefers other classes; the targets stay those of the instance."""
    batch = images(2)
    others = images(5)[4]
    response = explain(
        stub,
        "image",
        {"image": batch},
        targets=[{"top_k": {"count": 3}}],
        baselines=[every(tensor=encode(others))],
        methods=FINE,
    )

    for i in range(2):
        scores = image_logits(batch[i])
        expected = np.argsort(-scores)[:3]
        own = [a for a in response.attributions if a.instance_index == i]
        assert [a.target.index[0] for a in own] == expected.tolist()
        assert [a.target.label for a in own] == [LABELS[k] for k in expected]
        assert {a.target.selection for a in own} == {"top_k"}
        for a, k in zip(own, expected, strict=True):
            assert a.instance_output_value == pytest.approx(scores[k], rel=1e-4, abs=1e-6)
            assert a.baseline_output_value == pytest.approx(image_logits(others)[k], rel=1e-4, abs=1e-6)


def test_margin_is_the_difference_of_its_elements(stub: ExplainerServiceStub) -> None:
    margin = {"margin": {"positive": {"label": "dog"}, "negative": {"index": {"indices": [0]}}}}
    response = explain(stub, "image", {"image": images(1)}, targets=[margin, label("dog"), label("ant")], methods=FINE)
    difference, dog, ant = maps(response)
    resolved = response.attributions[0].target

    np.testing.assert_allclose(difference, dog - ant, atol=1e-6)
    assert (resolved.label, list(resolved.index), list(resolved.negative_index)) == ("dog - ant", [3], [0])
    assert response.attributions[0].instance_output_value == pytest.approx(
        response.attributions[1].instance_output_value - response.attributions[2].instance_output_value, abs=1e-6
    )


def test_weights_are_a_weighted_sum_of_elements(stub: ExplainerServiceStub) -> None:
    weights = np.array([0.5, 0.0, -2.0], np.float32)
    targets = [{"weights": encode(weights)}, element(0), element(2)]
    response = explain(stub, "plain", {"x": X2[:1]}, targets=targets, methods=FINE)
    weighted, first, last = maps(response)

    np.testing.assert_allclose(weighted, 0.5 * first - 2.0 * last, atol=1e-6)
    assert response.attributions[0].target.selection == "weights"
    assert not response.attributions[0].target.index


def test_region_of_a_segmentation_as_target(stub: ExplainerServiceStub) -> None:
    """A shorter path folds the remaining axes, as weights would; a pixel depends on its own pixel only."""
    ones = np.zeros((2, 4, 5), np.float32)
    ones[1] = 1
    x = {"x": normal(1, 3, 4, 5)}
    response = explain(
        stub,
        "segmentation",
        x,
        targets=[
            {"weights": encode(ones)},
            element(1, reduction="REDUCTION_SUM"),
            element(1, reduction="REDUCTION_MEAN"),
            element(1, 2, 3),
        ],
        methods=FINE,
    )
    weighted, summed, mean, pixel = maps(response)

    np.testing.assert_allclose(summed, weighted, rtol=1e-6)
    np.testing.assert_allclose(mean * 20, summed, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(pixel[:, 2, 3], summed[:, 2, 3], rtol=1e-5)
    assert np.count_nonzero(pixel) == 3
    reductions = [a.target.reduction for a in response.attributions]
    assert reductions == [
        target_pb2.REDUCTION_UNSPECIFIED,
        target_pb2.REDUCTION_SUM,
        target_pb2.REDUCTION_MEAN,
        target_pb2.REDUCTION_UNSPECIFIED,
    ]


def test_output_of_shape_batch_takes_the_empty_path(stub: ExplainerServiceStub) -> None:
    x = np.array([[0.1, 0.2, -0.1, 0.3]], np.float32)
    response = explain(stub, "scalar", {"x": x}, targets=[element(), {"argmax": {}}], methods=FINE)

    for attribution, values in zip(response.attributions, maps(response), strict=True):
        assert not attribution.target.index
        np.testing.assert_allclose(values, x[0] / x.sum() * np.tanh(x.sum()), rtol=1e-3)


def test_two_outputs_in_one_request(stub: ExplainerServiceStub) -> None:
    """Energy is the sum of squares, so its attribution from zero is x squared, elementwise."""
    targets = [element(0, output="y"), element(output="energy")]
    response = explain(stub, "multi_output", {"x": X2}, targets=targets, methods=FINE)

    for attribution, values in zip(response.attributions, maps(response), strict=True):
        if attribution.target.output == "energy":
            np.testing.assert_allclose(values, X2[attribution.instance_index] ** 2, rtol=1e-5)
    assert [joint.group for joint in response.joint] == ["all/y/OUTPUT", "all/energy/OUTPUT"]
    assert [list(joint.members) for joint in response.joint] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("score", "value"),
    [
        ("SCORE_OUTPUT", lambda z: z),
        ("SCORE_LOGIT", lambda z: z),
        ("SCORE_PROBABILITY", lambda z: np.exp(z) / np.exp(z).sum()),
        ("SCORE_LOG_PROBABILITY", lambda z: z - np.log(np.exp(z).sum())),
    ],
)
def test_values_are_in_the_unit_of_the_score(stub: ExplainerServiceStub, score: str, value: Any) -> None:
    x = images(1)
    targets = [element(1, score=score)]
    response = explain(stub, "image", {"image": x}, targets=targets, baselines=[every(gray={})], methods=FINE)
    (attribution,) = response.attributions
    gray = np.broadcast_to(((0.5 - MEAN) / STD)[:, None, None], x[0].shape)

    assert attribution.target.score == target_pb2.Score.Value(score)
    assert attribution.instance_output_value == pytest.approx(value(image_logits(x[0]))[1], rel=1e-5)
    assert attribution.baseline_output_value == pytest.approx(value(image_logits(gray))[1], rel=1e-5)
    change = attribution.instance_output_value - attribution.baseline_output_value
    assert attribution.attribution_sum == pytest.approx(change, abs=5e-3)


# Baselines


def test_noise_counts_are_expanded(stub: ExplainerServiceStub) -> None:
    noise = every(uniform_noise={"low": -1.0, "high": 1.0, "seed": 5, "count": 3})
    fields = {"baselines": [every(zeros={}), noise], "response_options": {"include_baseline_tensors": True}}
    response = explain(stub, "plain", {"x": X2[:1]}, targets=[element(0)], methods=steps(8), **fields)
    again = explain(stub, "plain", {"x": X2[:1]}, targets=[element(0)], methods=steps(8), **fields)
    zeros, *draws = response.baselines

    assert places(response) == [(0, 0, b) for b in range(4)]
    assert [(d.request_baseline_index, d.inputs[0].draw_index) for d in draws] == [(1, 0), (1, 1), (1, 2)]
    assert not array(zeros.inputs[0].tensor).any()
    for k, draw in enumerate(draws):
        values = array(draw.inputs[0].tensor)
        seed = np.random.SeedSequence([5, k, 0])
        expected = 2 * np.random.Generator(np.random.PCG64(seed)).random(4, np.float32).astype(np.float64) - 1
        np.testing.assert_array_equal(values, expected.astype(np.float32))
        assert draw.inputs[0].sha256 == hashlib.sha256(draw.inputs[0].tensor.data).hexdigest()
        echoed = draw.inputs[0].effective.uniform_noise
        assert (echoed.low, echoed.high, echoed.seed, echoed.count) == (-1.0, 1.0, 5, 3)
    assert len({draw.inputs[0].sha256 for draw in draws}) == 3
    for own, other in zip(maps(response), maps(again), strict=True):
        assert relative_distance(own, other) < 1e-5


@pytest.mark.parametrize(
    ("model", "x", "space", "ends"),
    [
        ("image", {"image": images(1)}, model_pb2.SPACE_PIXEL, (0.0, 255.0)),
        ("ranged", {"x": X2[:1]}, model_pb2.SPACE_MODEL, (-1.0, 1.0)),
    ],
)
def test_default_range_of_noise_is_echoed_and_makes_the_same_values_again(
    stub: ExplainerServiceStub, model: str, x: dict[str, Any], space: int, ends: tuple[float, float]
) -> None:
    fields = {"targets": [element(0)], "methods": steps(2)}
    (used,) = explain(stub, model, x, baselines=[every(uniform_noise={"seed": 3})], **fields).baselines
    again = baseline_pb2.Baseline(every_input=used.inputs[0].effective)
    (repeated,) = explain(stub, model, x, baselines=[again], **fields).baselines
    noise = used.inputs[0].effective.uniform_noise

    assert (used.inputs[0].effective.space, noise.low, noise.high, noise.seed, noise.count) == (space, *ends, 3, 1)
    assert noise.HasField("low")
    assert repeated.inputs[0].sha256 == used.inputs[0].sha256


def test_mean_over_baselines_is_the_mean_of_each(stub: ExplainerServiceStub) -> None:
    fields = {
        "targets": [element(0), element(1)],
        "baselines": [every(gaussian_noise={"std": 1.0, "count": 5}), every(zeros={})],
        "methods": steps(16),
    }
    each = explain(stub, "plain", {"x": X2}, **fields)
    folded = explain(stub, "plain", {"x": X2}, baseline_reduction="BASELINE_REDUCTION_MEAN", **fields)

    assert [(a.instance_index, a.target_index) for a in folded.attributions] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for k, attribution in enumerate(folded.attributions):
        parts = each.attributions[6 * k : 6 * k + 6]
        stack = np.stack(maps(each)[6 * k : 6 * k + 6]).astype(np.float64)
        assert not attribution.HasField("baseline_index")
        assert not attribution.HasField("score_path")
        np.testing.assert_allclose(array(attribution.inputs[0].tensor), stack.mean(0), atol=1e-6)
        np.testing.assert_allclose(array(attribution.inputs[0].spread), stack.std(0), atol=1e-6)
        assert attribution.baseline_output_value == pytest.approx(np.mean([p.baseline_output_value for p in parts]))
        assert attribution.attribution_sum == pytest.approx(np.mean([p.attribution_sum for p in parts]), abs=1e-6)
        assert attribution.step_count == 6 * 16
    assert len(folded.baselines) == 12
    assert not any(a.inputs[0].HasField("spread") for a in each.attributions)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (every(black={}), -MEAN / STD),
        (every(gray={}), (0.5 - MEAN) / STD),
        (every(white={}), WHITE),
        (every(zeros={}), np.zeros(3)),
        (every(zeros={}, space="SPACE_PIXEL"), -MEAN / STD),
        (every(constant={"values": [255.0]}, space="SPACE_PIXEL"), WHITE),
        (every(constant={"values": [0.0, 51.0, 102.0]}, space="SPACE_PIXEL"), (np.array([0, 0.2, 0.4]) - MEAN) / STD),
        (every(constant={"values": [1.0, 2.0, 3.0]}), np.array([1.0, 2.0, 3.0])),
        ({"inputs": {"image": {"white": {}}}}, WHITE),
        ({"every_input": {"white": {}}, "inputs": {"image": {"constant": {"values": [2.0]}}}}, np.full(3, 2.0)),
        (every(data={"name": "training_mean"}), np.full(3, 0.25)),
        (every(tensor=encode(np.full((3, 6, 8), 0.5, np.float32))), np.full(3, 0.5)),
        (every(tensor=encode(np.full((1, 3, 6, 8), 0.5))), np.full(3, 0.5)),
    ],
)
def test_baseline_in_model_space(stub: ExplainerServiceStub, baseline: dict[str, Any], expected: Array) -> None:
    response = explain(
        stub,
        "image",
        {"image": images(1)},
        baselines=[baseline],
        methods=steps(4),
        response_options={"include_baseline_tensors": True},
    )
    values = array(response.baselines[0].inputs[0].tensor)

    np.testing.assert_allclose(values, np.broadcast_to(expected[:, None, None], (3, 6, 8)), rtol=1e-6, atol=1e-7)


def test_baseline_tensor_per_instance(stub: ExplainerServiceStub) -> None:
    """The instance itself as baseline: every map is zero."""
    baselines = [every(tensor=encode(X2))]
    response = explain(stub, "plain", {"x": X2}, targets=[element(0)], baselines=baselines, methods=steps(4))

    assert not np.any(maps(response))
    assert [a.HasField("relative_convergence_delta") for a in response.attributions] == [False, False]
    assert [a.HasField("delta_over_abs_sum") for a in response.attributions] == [False, False]


# Several inputs


def test_completeness_spans_the_inputs(stub: ExplainerServiceStub) -> None:
    x, y = normal(1, 5), normal(1, 5, seed=1)
    (attribution,) = (response := explain(stub, "product", {"x": x, "y": y}, methods=FINE)).attributions

    assert [each.name for each in attribution.inputs] == ["x", "y"]
    np.testing.assert_allclose(maps(response, "x")[0], x[0] * y[0] / 2, rtol=1e-5)
    np.testing.assert_allclose(maps(response, "y")[0], x[0] * y[0] / 2, rtol=1e-5)
    assert attribution.attribution_sum == pytest.approx(float(x[0] @ y[0]), rel=1e-5)
    assert attribution.convergence_delta == pytest.approx(0, abs=1e-5)


def test_fixed_input_stays_and_gets_no_attribution(stub: ExplainerServiceStub) -> None:
    """With y held, F is linear in x: all of x * y is x's."""
    x, y = normal(1, 5), normal(1, 5, seed=1)
    response = explain(stub, "product", {"x": x, "y": y}, fixed_inputs=["y"], methods=FINE)
    (attribution,) = response.attributions

    np.testing.assert_allclose(array(attribution.inputs[0].tensor), x[0] * y[0], rtol=1e-5)
    assert [each.name for each in attribution.inputs] == ["x"]
    assert [spec.name for spec in response.inputs] == ["x"]
    assert [each.input for each in response.baselines[0].inputs] == ["x"]
    assert attribution.baseline_output_value == 0


def test_integer_input_stays(stub: ExplainerServiceStub) -> None:
    inputs = {"image": normal(2, 3, 4, 4), "ids": np.array([[0, 1, 2, 3, 4], [6, 6, 6, 6, 6]])}
    response = explain(stub, "multi_input", inputs, targets=[element(1)], methods=FINE)

    for attribution in response.attributions:
        assert [each.name for each in attribution.inputs] == ["image"]
        assert attribution.convergence_delta == pytest.approx(0, abs=1e-4)


# Response options


def test_options_leave_things_out(stub: ExplainerServiceStub) -> None:
    region = {"name": "left", "box": {"width": 4, "height": 6}}
    everything = request("image", {"image": images(1)}, regions=[region], methods=steps(8))
    whole = stub.Explain(everything, timeout=60).attributions[0]

    def without(**options: Any) -> pb.ExplainResponse:
        copy = pb.ExplainRequest()
        copy.CopyFrom(everything)
        copy.response_options.CopyFrom(pb.ResponseOptions(**options))
        return stub.Explain(copy, timeout=60)

    (own,) = whole.inputs
    assert own.HasField("tensor") and own.statistics and own.normalizations and own.regions
    assert whole.HasField("score_path")
    assert not without(omit_tensors=True).attributions[0].inputs[0].HasField("tensor")
    plain = without(omit_statistics=True).attributions[0].inputs[0]
    assert not plain.statistics and not plain.normalizations and plain.HasField("tensor")
    assert not without(omit_score_path=True).attributions[0].HasField("score_path")
    assert not without(omit_regions=True).attributions[0].inputs[0].regions
    assert not without(omit_joint_statistics=True).joint
    assert not without().baselines[0].inputs[0].HasField("tensor")


def test_only_the_views_asked_for(stub: ExplainerServiceStub) -> None:
    options = {"views": ["VIEW_CHANNEL_MAX_ABS", "VIEW_CHANNEL_ABS_SUM"]}
    response = explain(stub, "image", {"image": images(1)}, methods=steps(8), response_options=options)
    wanted = [statistics_pb2.VIEW_CHANNEL_MAX_ABS, statistics_pb2.VIEW_CHANNEL_ABS_SUM]

    for figures in (response.attributions[0].inputs[0].statistics, response.joint[0].inputs[0].statistics):
        assert [figure.view for figure in figures] == wanted


def test_input_without_channels_has_elements_only(stub: ExplainerServiceStub) -> None:
    response = explain(stub, "plain", {"x": X2[:1]}, methods=steps(8), response_options={"views": ["VIEW_CHANNEL_SUM"]})

    assert [s.view for s in response.attributions[0].inputs[0].statistics] == [statistics_pb2.VIEW_ELEMENTS]


# Figures


def view_of(values: Array, view: int) -> Array:
    v = values.astype(np.float64)
    return {
        statistics_pb2.VIEW_ELEMENTS: lambda: v,
        statistics_pb2.VIEW_CHANNEL_SUM: lambda: v.sum(0),
        statistics_pb2.VIEW_CHANNEL_ABS_SUM: lambda: np.abs(v).sum(0),
        statistics_pb2.VIEW_CHANNEL_MAX_ABS: lambda: np.abs(v).max(0),
    }[view]()


def check_statistics(figures: statistics_pb2.Statistics, pooled: Array) -> None:
    """Every figure, recomputed in numpy."""
    v = pooled.reshape(-1)
    magnitude = np.sort(np.abs(v))
    mass = np.cumsum(magnitude)
    exact = {
        "element_count": v.size,
        "finite_count": v.size,
        "nan_count": 0,
        "infinite_count": 0,
        "positive_count": int((v > 0).sum()),
        "negative_count": int((v < 0).sum()),
        "zero_count": int((v == 0).sum()),
        "min": v.min(),
        "max": v.max(),
        "abs_max": magnitude[-1],
    }
    close = {
        "sum": v.sum(),
        "positive_sum": v[v > 0].sum(),
        "negative_sum": v[v < 0].sum(),
        "mean": v.mean(),
        "std": v.std(),
        "l1_norm": magnitude.sum(),
        "l2_norm": np.linalg.norm(v),
    }
    assert {name: getattr(figures, name) for name in exact} == exact
    for name, value in close.items():
        assert getattr(figures, name) == pytest.approx(value, rel=1e-12, abs=1e-15), name
    for own, values in ((figures.quantiles, v), (figures.abs_quantiles, magnitude)):
        np.testing.assert_array_equal([q.value for q in own], np.quantile(values, [q.probability for q in own]))
    for threshold in figures.abs_mass_thresholds:
        assert threshold.value == magnitude[np.argmax(mass >= threshold.mass * mass[-1])]


ALL_VIEWS = {"views": [1, 2, 3, 4]}


def test_statistics_are_those_of_the_bytes_sent(stub: ExplainerServiceStub) -> None:
    response = explain(stub, "image", {"image": images(2)}, methods=FINE, response_options=ALL_VIEWS)

    for attribution, values in zip(response.attributions, maps(response), strict=True):
        figures = attribution.inputs[0].statistics
        assert len(figures) == 4
        for own in figures:
            check_statistics(own, view_of(values, own.view))
        change = attribution.instance_output_value - attribution.baseline_output_value
        delta = values.sum(dtype=np.float64) - change
        assert attribution.attribution_sum == pytest.approx(values.sum(dtype=np.float64), rel=1e-12)
        assert attribution.convergence_delta == pytest.approx(delta, abs=1e-12)
        assert attribution.relative_convergence_delta == pytest.approx(abs(delta / change), rel=1e-6)
        assert attribution.delta_over_abs_sum == pytest.approx(
            abs(delta) / np.abs(values).sum(dtype=np.float64), rel=1e-6
        )


def test_joint_figures_are_those_of_the_pooled_tensors(stub: ExplainerServiceStub) -> None:
    groups = [{"name": "second", "selectors": [{"target_index": 1}, {"instance_index": 0}], "pairwise": True}]
    response = explain(
        stub,
        "image",
        {"image": images(2)},
        targets=[label("ant"), label("bee")],
        methods=steps(16),
        groups=groups,
        response_options=ALL_VIEWS,
    )
    values = maps(response)
    everything, second = response.joint

    assert (everything.group, list(everything.members), list(everything.pairs)) == ("all", [0, 1, 2, 3], [])
    assert (second.group, list(second.members)) == ("second", [0, 1, 3])
    for joint in (everything, second):
        (own,) = joint.inputs
        for figures in own.statistics:
            pooled = np.concatenate([view_of(values[k], figures.view).reshape(-1) for k in joint.members])
            check_statistics(figures, pooled)
    assert len(second.pairs) == 3 * 4
    for pair in second.pairs:
        both = np.stack([view_of(values[pair.first], pair.view), view_of(values[pair.second], pair.view)])
        assert (pair.min, pair.max, pair.abs_max) == (both.min(), both.max(), np.abs(both).max())


def test_recipes_hold_numbers_and_the_tensor_stays_raw(stub: ExplainerServiceStub) -> None:
    (attribution,) = (response := explain(stub, "image", {"image": images(1)}, methods=FINE)).attributions
    values = maps(response)[0].astype(np.float64)
    kind = statistics_pb2.NORMALIZATION_KIND_MIN_MAX
    (recipe,) = (
        r for r in attribution.inputs[0].normalizations if r.kind == kind and r.view == statistics_pb2.VIEW_CHANNEL_SUM
    )
    summed = values.sum(0)

    assert attribution.applied_normalization == attribution_pb2.APPLIED_NORMALIZATION_NONE
    assert (recipe.center, recipe.scale) == (summed.min(), summed.max() - summed.min())
    assert recipe.zero_at == pytest.approx(-summed.min() / (summed.max() - summed.min()))
    assert not recipe.degenerate


def test_regions_are_sums_of_the_tensor(stub: ExplainerServiceStub) -> None:
    mask = np.zeros((6, 8), np.bool_)
    mask[1, 2:7] = True
    regions = [
        {"name": "box", "box": {"x": 2, "y": 1, "width": 3, "height": 4}},
        {"name": "mask", "mask": encode(mask)},
        {"name": "first only", "box": {"width": 8, "height": 6}, "instance_index": 0},
    ]
    response = explain(stub, "image", {"image": images(2)}, methods=steps(16), regions=regions)

    for attribution, values in zip(response.attributions, maps(response), strict=True):
        v = values.astype(np.float64)
        cut = {"box": v[:, 1:5, 2:5], "mask": v[:, mask], "first only": v}
        sums = {(r.name, r.view): r for r in attribution.inputs[0].regions}
        names = list(cut)[: 3 if attribution.instance_index == 0 else 2]
        assert list(sums) == [(n, view) for n in names for view in (1, 2)]
        for name in names:
            own = sums[name, statistics_pb2.VIEW_ELEMENTS]
            assert own.element_count == own.finite_count == cut[name].size
            assert own.sum == pytest.approx(cut[name].sum(), abs=1e-12)
            assert own.positive_sum == pytest.approx(cut[name][cut[name] > 0].sum(), abs=1e-12)
            assert own.share == pytest.approx(cut[name].sum() / v.sum(), rel=1e-9)
            by_pixel = sums[name, statistics_pb2.VIEW_CHANNEL_SUM]
            assert by_pixel.sum == pytest.approx(own.sum, abs=1e-12)
            assert by_pixel.element_count * 3 == own.element_count


@pytest.mark.parametrize("method", [FINE, adaptive(), steps(9, quadrature="QUADRATURE_TRAPEZOID"), steps(1)])
def test_score_path_runs_from_baseline_to_instance(stub: ExplainerServiceStub, method: list[dict[str, Any]]) -> None:
    x = images(1)
    (attribution,) = explain(stub, "image", {"image": x}, baselines=[every(gray={})], methods=method).attributions
    alphas, scores = np.array(attribution.score_path.alphas), np.array(attribution.score_path.scores)
    gray = np.broadcast_to(((0.5 - MEAN) / STD)[:, None, None], x[0].shape)

    assert alphas[0] == 0 and alphas[-1] == 1
    assert (np.diff(alphas) > 0).all()
    assert scores[0] == attribution.baseline_output_value
    assert scores[-1] == attribution.instance_output_value
    expected = [image_logits((1 - a) * gray + a * x[0])[2] for a in alphas]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


# Echoes


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ([], {"quadrature": 6, "tolerance": 0.05, "completeness_tolerance": 0.05, "max_step_count": 128}),
        (adaptive(tolerance=0.2), {"quadrature": 6, "tolerance": 0.2, "max_step_count": 128}),
        (steps(8), {"quadrature": 3, "step_count": 8}),
        (steps(8, quadrature="QUADRATURE_GAUSS_LEGENDRE"), {"quadrature": 5, "step_count": 8}),
    ],
)
def test_effective_parameters_are_echoed(
    stub: ExplainerServiceStub, methods: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    response = explain(stub, "plain", {"x": X2[:1]}, methods=methods)
    (method,) = response.provenance.effective_methods
    own = method.integrated_gradients

    assert {name: getattr(own, name) for name in expected} == expected
    fixed = own.quadrature != method_pb2.QUADRATURE_ADAPTIVE
    assert own.HasField("step_count") == fixed
    assert own.HasField("tolerance") == own.HasField("max_step_count") == (not fixed)


def test_default_method_stays_below_a_models_own_cap(stub: ExplainerServiceStub) -> None:
    response = explain(stub, "capped", {"x": X2[:1]}, targets=[element(0)])

    assert response.provenance.effective_methods[0].integrated_gradients.max_step_count == 24
    assert response.attributions[0].step_count <= 24


def test_defaults_of_a_method_within_another_stay_below_a_models_own_cap(stub: ExplainerServiceStub) -> None:
    tunnel = [{"smooth_grad": {"base": {"integrated_gradients": {}}, "sample_count": 2}}]
    response = explain(stub, "capped", {"x": X2[:1]}, targets=[element(0)], methods=tunnel)

    assert response.provenance.effective_methods[0].smooth_grad.base.integrated_gradients.max_step_count == 24


def test_provenance_says_who_answered(stub: ExplainerServiceStub, folder: Any) -> None:
    response = explain(stub, "versions", {"x": X2[:1]}, targets=[element(0)], methods=steps(4))
    own = response.provenance
    file = (folder / "versions" / "10" / "model.onnx").read_bytes()

    assert (own.model_name, own.model_version) == ("versions", 10)
    assert own.model_sha256 == hashlib.sha256(file).hexdigest()
    assert (own.backend, own.gradient_mode, own.device) == ("onnxruntime", "gradient_graph", "cpu")
    assert (own.gradient_rule, own.precision) == ("standard", "float32")
    assert {"onnxruntime", "numpy", "grpcio", "protobuf"} <= set(own.library_versions)
    assert own.server_version


def test_version_that_is_asked_for(stub: ExplainerServiceStub) -> None:
    response = stub.Explain(
        pb.ExplainRequest(
            model=named("versions", 2), inputs={"x": encode(X2[:1])}, targets=[element(0)], methods=steps(4)
        ),
        timeout=60,
    )

    assert response.provenance.model_version == 2


def test_inputs_say_how_they_are_laid_out(stub: ExplainerServiceStub) -> None:
    (spec,) = (response := explain(stub, "image", {"image": images(1)}, methods=steps(4))).inputs
    (own,) = response.attributions[0].inputs

    assert (spec.layout, spec.channel_order, spec.channel_axis) == ("NCHW", "RGB", 1)
    assert (own.layout, own.channel_axis, list(own.tensor.shape)) == ("CHW", 0, [3, 6, 8])
    assert list(spec.preprocessing.mean) == MEAN.tolist()
    assert (spec.value_range.low, spec.value_range.high) == (0, 1)


# Cautions


def cautions(response: pb.ExplainResponse) -> set[str]:
    """Names of the first map's cautions."""
    kinds = [caution.kind for caution in response.attributions[0].cautions]
    return {attribution_pb2.CautionKind.Name(kind).removeprefix("CAUTION_KIND_") for kind in kinds}


@pytest.mark.parametrize(
    ("model", "name", "inside", "outside"),
    [
        ("image", "image", images(1), images(1) + 5),
        ("ranged", "x", np.array([[-1, 1, 0, 0.5]], np.float32), np.array([[0, 0, 0, 1.5]], np.float32)),
    ],
)
def test_values_outside_the_range_are_accepted_and_noted(
    stub: ExplainerServiceStub, model: str, name: str, inside: Array, outside: Array
) -> None:
    """Whether or not the model states channels, a mean and a standard deviation."""
    fields: dict[str, Any] = {"targets": [element(0)], "methods": steps(8)}
    noted = explain(stub, model, {name: outside}, **fields)

    assert "OUT_OF_RANGE_INPUT" not in cautions(explain(stub, model, {name: inside}, **fields))
    assert "OUT_OF_RANGE_INPUT" in cautions(noted)
    (text,) = (c.text for c in noted.attributions[0].cautions if c.kind == 8)
    assert name in text


def test_cautions_of_a_response(stub: ExplainerServiceStub) -> None:
    one = explain(stub, "plain", {"x": X2[:1]}, targets=[element(0)], methods=steps(4))
    two = explain(stub, "plain", {"x": X2}, targets=[element(0)], methods=steps(4))
    joint = attribution_pb2.CAUTION_KIND_JOINT_SCALE_ONLY

    assert {c.kind for c in two.cautions} - {c.kind for c in one.cautions} == {joint}
    assert all(c.text for c in two.cautions)


def test_map_that_did_not_converge_says_so(stub: ExplainerServiceStub) -> None:
    strict = adaptive(tolerance=1e-9, completeness_tolerance=1e-9, max_step_count=16)
    response = explain(stub, "image", {"image": images(1)}, methods=strict)

    assert response.attributions[0].stop_reason == attribution_pb2.STOP_REASON_MAX_STEPS
    assert response.attributions[0].step_count <= 16
    assert response.attributions[0].HasField("map_error")
    assert "NOT_CONVERGED" in cautions(response)


def test_rows_of_a_mixing_model_are_alone(stub: ExplainerServiceStub) -> None:
    response = explain(stub, "batch_mixing", {"x": X2}, targets=[element(0)], methods=steps(4))

    assert "ROW_BY_ROW" in cautions(response)
    assert not np.any(maps(response))  # alone, a row is its own mean


def test_non_finite_map_is_sent_as_it_is(stub: ExplainerServiceStub) -> None:
    """Square roots of negative values: the map says NaN, figures that do not exist are absent."""
    x = np.array([[1.0, -1.0, 4.0, 9.0]], np.float32)
    weights = {"weights": encode(np.ones(4, np.float32))}
    (attribution,) = (response := explain(stub, "root", {"x": x}, targets=[weights], methods=FINE)).attributions
    values = maps(response)[0]
    (figures,) = attribution.inputs[0].statistics

    assert attribution.stop_reason == attribution_pb2.STOP_REASON_NON_FINITE
    assert np.isnan(values[1]) and np.isfinite(values[[0, 2, 3]]).all()
    assert (figures.nan_count, figures.finite_count, figures.element_count) == (1, 3, 4)
    assert figures.sum == pytest.approx(values[[0, 2, 3]].sum(dtype=np.float64))
    assert not attribution.HasField("convergence_delta")
    assert not attribution.HasField("relative_convergence_delta")
    assert not attribution.HasField("map_error")


def test_flat_steps_do_not_converge_to_the_change(stub: ExplainerServiceStub) -> None:
    """A step function has a gradient of zero and a change of one: more points do not help."""
    response = explain(stub, "step", {"x": np.ones((1, 4), np.float32)}, targets=[element(0)])
    (attribution,) = response.attributions

    assert attribution.stop_reason == attribution_pb2.STOP_REASON_NON_CONVERGENT
    assert (attribution.attribution_sum, attribution.convergence_delta) == (0, -1)
    assert attribution.relative_convergence_delta == 1
    assert not attribution.HasField("delta_over_abs_sum")
    assert "NOT_CONVERGED" in cautions(response)


def test_negligible_change_is_noted(stub: ExplainerServiceStub) -> None:
    same = explain(stub, "scalar", {"x": np.array([[1, -1, 2, -2]], np.float32)}, methods=steps(4))
    other = explain(stub, "scalar", {"x": np.array([[1, -1, 2, 0]], np.float32)}, methods=steps(4))

    assert "NEGLIGIBLE_CHANGE" in cautions(same)
    assert "NEGLIGIBLE_CHANGE" not in cautions(other)


def test_fixed_steps_that_miss_the_change_are_noted(stub: ExplainerServiceStub) -> None:
    """A step function has a gradient of zero and a change of one; a linear one is complete with any number of steps."""
    flat = explain(stub, "step", {"x": np.ones((1, 4), np.float32)}, targets=[element(0)], methods=steps(4))
    whole = explain(stub, "static_batch", {"x": X2[:1]}, targets=[element(1)], methods=steps(4))

    assert "INCOMPLETE" in cautions(flat)
    assert "INCOMPLETE" not in cautions(whole)


def test_constant_baseline_is_noted(stub: ExplainerServiceStub) -> None:
    noise = [every(gaussian_noise={"std": 1.0, "mean": 0.0})]

    assert "BLIND_TO_BASELINE" in cautions(explain(stub, "plain", {"x": X2[:1]}, methods=steps(4)))
    assert "BLIND_TO_BASELINE" not in cautions(explain(stub, "plain", {"x": X2[:1]}, baselines=noise, methods=steps(4)))


def test_static_batch_is_explained_instance_by_instance(stub: ExplainerServiceStub) -> None:
    """The file takes one row at a time; a linear model's map has no error at any step count."""
    together = maps(explain(stub, "static_batch", {"x": X2}, targets=[element(1)], methods=steps(3)))
    plain = [maps(explain(stub, "static_batch", {"x": x[None]}, targets=[element(1)], methods=steps(1)))[0] for x in X2]

    np.testing.assert_allclose(together, plain, rtol=1e-5)


def test_time_on_the_device_is_no_longer_than_its_batches(service: Loopback) -> None:
    """Questions of one request share batches, and each batch counts once."""
    before = service.metric("explainserve_compute_seconds_sum", model="image")
    noise = [every(uniform_noise={"count": 20})]
    own = explain(service.stub, "image", {"image": images(2)}, baselines=noise, methods=steps(3)).provenance
    after = service.metric("explainserve_compute_seconds_sum", model="image")

    assert 0 < own.compute_duration.ToNanoseconds() <= (after - before) * 1e9 * (1 + 1e-6)


def test_real_model_with_its_defaults(stub: ExplainerServiceStub) -> None:
    """Adaptive, on a trained network: within the tolerances that it says it reached."""
    x = normal(1, 3, 64, 64)
    response = explain(stub, "two-digits", {"image": x}, targets=[{"top_k": {"count": 2}}], baselines=[every(gray={})])

    for attribution in response.attributions:
        change = attribution.instance_output_value - attribution.baseline_output_value
        floor = 0.02 * np.abs(array(attribution.inputs[0].tensor)).sum(dtype=np.float64)
        assert attribution.stop_reason == attribution_pb2.STOP_REASON_CONVERGED
        assert attribution.map_error <= 0.05
        assert abs(attribution.convergence_delta) <= 0.05 * max(abs(change), floor) * (1 + 1e-6)


# Many at once


def test_maps_alone_equal_maps_under_mixed_load(service: Loopback) -> None:
    """Fixed rules agree to 1e-5 whoever shares their micro-batches, and requests do share them."""
    stub = service.stub
    batch = images(4)
    requests = [
        request("image", {"image": batch[i : i + 1]}, targets=[label(name)], baselines=[baseline], methods=steps(n))
        for i in range(4)
        for name, baseline, n in (
            ("ant", every(gray={}), 7),
            ("bee", every(zeros={}), 33),
            ("cat", every(uniform_noise={"count": 2}), 5),
        )
    ]
    adaptive_one = request("image", {"image": batch[:1]}, targets=[label("dog", score="SCORE_PROBABILITY")])
    other = request("plain", {"x": X2}, targets=[element(0)], methods=steps(50))

    def batch_count() -> float:
        return service.metric("explainserve_batch_rows_count", model="image")

    start = batch_count()
    alone = [maps(stub.Explain(each, timeout=60)) for each in requests]
    adaptive_alone = maps(stub.Explain(adaptive_one, timeout=60))[0]
    end = batch_count()

    running: list[Future[pb.ExplainResponse]] = [
        stub.Explain.future(each, timeout=60) for _ in range(3) for each in (*requests, adaptive_one, other)
    ]
    answers = [call.result() for call in running]

    for k, answer in enumerate(answers):
        own = k % (len(requests) + 2)
        if own < len(requests):
            for a, b in zip(maps(answer), alone[own], strict=True):
                assert relative_distance(a, b) < 1e-5
        elif own == len(requests):
            error = answer.attributions[0].map_error
            assert relative_distance(maps(answer)[0], adaptive_alone) < max(1e-5, error)
    assert batch_count() - end < 3 * (end - start)
