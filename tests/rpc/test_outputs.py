"""Outputs that are not classes, over a real connection, each against its closed form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from explainserve.rpc.tensors import encode
from explainserve.settings import Settings
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import target_pb2
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.loopback import (
    Array,
    Loopback,
    element,
    label,
    maps,
    named,
    normal,
    refusal,
    relative_distance,
    request,
    steps,
)
from rpc.output_models import (
    BOXES,
    CLASSES,
    HEIGHT,
    IMAGE,
    OBJECTS,
    WIDTH,
    box_score,
    box_score_gradient,
    corner_gradient,
    head_gradient,
    pixels,
    pixels_gradient,
    price,
    write_models,
)

X = normal(2, 4)
PIXELS = normal(2, 3, HEIGHT, WIDTH)
PICTURES = normal(2, *IMAGE)
DETECTORS = ("detector", "detector-of-one")
GRADIENT: list[dict[str, Any]] = [{"gradient": {}}]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExplainerServiceStub]:
    """A client of a server of these models alone."""
    models = write_models(tmp_path_factory.mktemp("outputs"))
    loopback = Loopback(Settings(models=models, thread_count=1, port=0, http_port=0))
    yield loopback.stub
    loopback.stop()


def explain(stub: ExplainerServiceStub, model: str, inputs: dict[str, Array], **fields: Any) -> pb.ExplainResponse:
    return stub.Explain(request(model, inputs, **fields), timeout=60)


@pytest.mark.parametrize(("model", "path"), [("regression", ()), ("regression-column", (0,))])
def test_a_regression_has_one_number(outputs: ExplainerServiceStub, model: str, path: tuple[int, ...]) -> None:
    response = explain(outputs, model, {"x": X}, targets=[element(*path)], methods=[*GRADIENT, *steps(64)])

    for own, tensor in zip(response.attributions, maps(response), strict=True):
        x = X[own.instance_index]
        assert own.instance_output_value == pytest.approx(price(x), rel=1e-5)
        if own.method_index == 0:
            assert relative_distance(tensor, head_gradient(x, "price", 0)) < 1e-5
        else:
            assert tensor.sum(dtype=np.float64) == pytest.approx(price(x) - price(0 * x), rel=1e-3)


@pytest.mark.parametrize("model", ["regression", "regression-column"])
def test_the_number_of_a_regression_is_explained_where_no_target_is_named(
    outputs: ExplainerServiceStub, model: str
) -> None:
    response = explain(outputs, model, {"x": X}, methods=GRADIENT)

    for x, tensor in zip(X, maps(response), strict=True):
        assert relative_distance(tensor, head_gradient(x, "price", 0)) < 1e-5


def test_both_heads_in_one_request(outputs: ExplainerServiceStub) -> None:
    """Each in its own unit: figures are pooled for each output by itself."""
    targets = [element(0, output="price"), label("castle", output="kinds"), element(0, output="kinds")]
    response = explain(outputs, "two-heads", {"x": X}, targets=targets, methods=GRADIENT)

    heads = [("price", 0), ("kinds", 2), ("kinds", 0)]
    assert [(own.target.output, own.target.index[0]) for own in response.attributions] == heads * 2
    for own, tensor in zip(response.attributions, maps(response), strict=True):
        expected = head_gradient(X[own.instance_index], *heads[own.target_index])
        assert relative_distance(tensor, expected) < 1e-5
    pooled = [{response.attributions[member].target.output for member in group.members} for group in response.joint]
    assert sorted(pooled, key=sorted) == [{"kinds"}, {"price"}]


def test_of_two_heads_one_has_to_be_named(outputs: ExplainerServiceStub) -> None:
    refused = refusal(lambda: explain(outputs, "two-heads", {"x": X}, targets=[element(0)]))

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "OUTPUT_REQUIRED")
    assert refused.metadata["outputs"] == "price, kinds"


def test_a_set_of_pixels_by_weights(outputs: ExplainerServiceStub) -> None:
    """The map is zero outside of the set, for each pixel of the model depends on its own place only."""
    weights = np.zeros((CLASSES, HEIGHT, WIDTH), np.float32)
    weights[1, 1:3, 2:5] = 1 / 6
    targets = [{"weights": encode(weights)}]
    response = explain(outputs, "segmentation", {"x": PIXELS}, targets=targets, methods=GRADIENT)

    for x, own, tensor in zip(PIXELS, response.attributions, maps(response), strict=True):
        assert own.instance_output_value == pytest.approx(pixels(x)[1, 1:3, 2:5].mean(), rel=1e-4)
        assert relative_distance(tensor, pixels_gradient(x, weights)) < 1e-5
        assert not tensor[:, weights[1] == 0].any()


@pytest.mark.parametrize(
    ("path", "reduction"),
    [
        ((1, 2, 3), target_pb2.REDUCTION_UNSPECIFIED),
        ((1,), target_pb2.REDUCTION_SUM),
        ((0, 2), target_pb2.REDUCTION_MEAN),
    ],
)
def test_a_set_of_pixels_by_index_path(outputs: ExplainerServiceStub, path: tuple[int, ...], reduction: Any) -> None:
    """One pixel, all of a class, a row of a class."""
    weights = np.zeros((CLASSES, HEIGHT, WIDTH))
    weights[path] = 1 / weights[path].size if reduction == target_pb2.REDUCTION_MEAN else 1
    targets = [element(*path, reduction=reduction)]
    response = explain(outputs, "segmentation", {"x": PIXELS}, targets=targets, methods=GRADIENT)

    for x, own, tensor in zip(PIXELS, response.attributions, maps(response), strict=True):
        assert own.instance_output_value == pytest.approx((weights * pixels(x)).sum(), rel=1e-4)
        assert relative_distance(tensor, pixels_gradient(x, weights)) < 1e-5


@pytest.mark.parametrize("model", DETECTORS)
def test_scores_and_corners_of_boxes_before_suppression(outputs: ExplainerServiceStub, model: str) -> None:
    targets = [element(2, 4, output="scores"), element(4, 1, output="boxes")]
    response = explain(outputs, model, {"image": PICTURES}, targets=targets, methods=GRADIENT)

    for own, tensor in zip(response.attributions, maps(response), strict=True):
        x = PICTURES[own.instance_index]
        if own.target_index == 0:
            assert own.instance_output_value == pytest.approx(box_score(x, 2, 4), rel=1e-5)
            assert relative_distance(tensor, box_score_gradient(x, 2, 4)) < 1e-5
        else:
            assert relative_distance(tensor, corner_gradient(4, 1)) < 1e-5


@pytest.mark.parametrize("model", DETECTORS)
@pytest.mark.parametrize("output", ["selected", "kept", "count"])
@pytest.mark.parametrize("method", [{"gradient": {}}, {"occlusion": {"window": [1]}}])
def test_targets_behind_suppression_are_refused_with_the_reason(
    outputs: ExplainerServiceStub, model: str, output: str, method: dict[str, Any]
) -> None:
    asked = {"targets": [element(0, output=output)], "methods": [method]}
    refused = refusal(lambda: explain(outputs, model, {"image": PICTURES}, **asked))

    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OUTPUT_SUPPRESSED")
    assert refused.metadata == {"output": output, "node": "suppression", "outputs": "boxes, scores"}
    assert "which boxes it keeps" in refused.message


def test_a_detector_serves_what_lies_before_suppression_and_names_the_rest(outputs: ExplainerServiceStub) -> None:
    model = outputs.GetModel(pb.GetModelRequest(model=named("detector"))).model
    shapes = {own.name: [axis.size for axis in own.axes][1:] for own in model.outputs}

    assert shapes == {"boxes": [BOXES, 4], "scores": [OBJECTS, BOXES]}
    assert [(own.name, own.node) for own in model.suppressed_outputs] == [
        (name, "suppression") for name in ("selected", "kept", "count")
    ]
    for own in model.suppressed_outputs:
        asked = {"targets": [element(0, output=own.name)], "methods": GRADIENT}
        assert own.reason in refusal(lambda a=asked: explain(outputs, "detector", {"image": PICTURES}, **a)).message


def test_a_detector_with_nothing_before_suppression_is_not_served(outputs: ExplainerServiceStub) -> None:
    models = {own.name: own for own in outputs.ListModels(pb.ListModelsRequest()).models}

    assert models["suppressed"].error_reason == "OUTPUT_SUPPRESSED"
    assert "explain a score before it" in models["suppressed"].reason
