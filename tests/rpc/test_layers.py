"""Layers that are explained in the place of inputs, over a real connection."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from explainserve.rpc.tensors import encode
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import statistics_pb2
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.loopback import array, element, every, named, normal, refusal, relative_distance, request, steps

IDS = np.array([[3, 1, 4, 1, 5, 0], [2, 6, 5, 3, 5, 1]])
IMAGE = normal(2, 3, 6, 8)


@pytest.fixture(scope="module")
def weights(folder: Any) -> dict[str, Any]:
    model = onnx.load(folder / "words" / "1" / "model.onnx")
    return {own.name: numpy_helper.to_array(own).astype(np.float64) for own in model.graph.initializer}


def explain(stub: ExplainerServiceStub, **fields: Any) -> pb.ExplainResponse:
    usual: dict[str, Any] = {"targets": [element(2)], "layers": ["embedding"]}
    return stub.Explain(request("words", {"ids": IDS}, **(usual | fields)), timeout=60)


def test_the_gradient_of_an_embedding(stub: ExplainerServiceStub, weights: dict[str, Any]) -> None:
    response = explain(stub, methods=[{"gradient": {}}])

    for ids, own in zip(IDS, response.attributions, strict=True):
        bent = np.tanh(weights["e"][ids])
        hidden = np.tanh(bent.mean(axis=0) @ weights["w"])
        expected = (1 - bent**2) / len(ids) * ((1 - hidden**2) * weights["v"][:, 2] @ weights["w"].T)
        assert [line.name for line in own.inputs] == ["embedding"]
        assert relative_distance(array(own.inputs[0].tensor), expected) < 1e-5


def test_a_path_over_an_embedding_starts_at_that_of_the_pad_token(
    stub: ExplainerServiceStub, weights: dict[str, Any]
) -> None:
    pad = [{"inputs": {"ids": {"constant": {"values": [6]}}}}]
    for own in explain(stub, methods=steps(64), baselines=pad).attributions:
        hidden = np.tanh(np.tanh(weights["e"][6]) @ weights["w"])
        assert own.baseline_output_value == pytest.approx(hidden @ weights["v"][:, 2], rel=1e-5)
        assert abs(own.relative_convergence_delta) < 1e-3
        padded = IDS[own.instance_index] == 6
        assert not array(own.inputs[0].tensor)[padded].any()


def test_sums_over_channels_are_per_token(stub: ExplainerServiceStub) -> None:
    own = explain(stub, methods=steps(4)).attributions[0]
    figure = next(f for f in own.inputs[0].statistics if f.view == statistics_pb2.VIEW_CHANNEL_SUM)

    assert (own.inputs[0].layout, own.inputs[0].channel_axis) == ("TC", 1)
    assert figure.element_count == IDS.shape[1]
    assert figure.max == pytest.approx(array(own.inputs[0].tensor).astype(np.float64).sum(axis=1).max())


def test_targets_share_passes_and_cost_is_what_was_estimated(stub: ExplainerServiceStub) -> None:
    asked = request("words", {"ids": IDS}, targets=[element(0), element(2)], layers=["embedding"], methods=steps(5))
    cost = stub.EstimateCost(pb.EstimateCostRequest(explain=asked))
    own = stub.Explain(asked, timeout=60).provenance

    assert cost.min_row_count == cost.max_row_count == own.row_count == 3 + 4 + 2 * 5
    assert own.backward_count == cost.max_backward_count == 2 * 2 * 5


def test_a_layer_of_an_image_network_is_explained_like_an_input(stub: ExplainerServiceStub) -> None:
    """What follows is linear in the layer, so that its attributions are exact."""
    asked = request("rectified", {"image": IMAGE}, targets=[element(1)], layers=["f"], methods=steps(1))
    for own in stub.Explain(asked, timeout=60).attributions:
        assert array(own.inputs[0].tensor).shape == (5, 3, 4)
        assert own.attribution_sum == pytest.approx(own.instance_output_value - own.baseline_output_value, rel=1e-4)


def test_a_path_over_an_embedding_starts_where_the_request_states(
    stub: ExplainerServiceStub, weights: dict[str, Any]
) -> None:
    """Zeros, a constant and a tensor of the layer itself; the response tells which."""
    values = normal(IDS.shape[1], 4)
    stated: list[dict[str, Any]] = [{"zeros": {}}, {"constant": {"values": [0.5]}}, {"tensor": encode(values)}]
    baselines = [{"layers": {"embedding": own}} for own in stated]
    response = explain(
        stub, methods=steps(64), baselines=baselines, response_options={"include_baseline_tensors": True}
    )
    starts = [np.zeros_like(values), np.full_like(values, 0.5), values]

    for own in response.attributions:
        hidden = np.tanh(np.tanh(starts[own.baseline_index].astype(np.float64)).mean(axis=0) @ weights["w"])
        assert own.baseline_output_value == pytest.approx(hidden @ weights["v"][:, 2], rel=1e-5, abs=1e-6)
        assert own.attribution_sum == pytest.approx(own.instance_output_value - own.baseline_output_value, abs=1e-3)
    for used in response.baselines:
        (line,) = used.layers
        assert (line.input, line.effective.WhichOneof("kind")) == ("embedding", next(iter(stated[used.baseline_index])))
        np.testing.assert_array_equal(array(line.tensor), starts[used.baseline_index])


def test_rows_of_stated_layers_are_what_was_estimated(stub: ExplainerServiceStub) -> None:
    baselines = [{"layers": {"embedding": own}} for own in ({"zeros": {}}, {"constant": {"values": [0.5]}})]
    asked = request(
        "words", {"ids": IDS}, targets=[element(2)], layers=["embedding"], methods=steps(5), baselines=baselines
    )
    cost = stub.EstimateCost(pb.EstimateCostRequest(explain=asked))

    assert cost.min_row_count == cost.max_row_count == stub.Explain(asked, timeout=60).provenance.row_count


@pytest.mark.parametrize(
    ("layer", "kind", "reason"),
    [
        ("bent", {"zeros": {}}, "LAYER_NOT_EXPLAINED"),
        ("embedding", {"blur": {"sigma": 1.0}}, "LAYER_BASELINE_UNSUITABLE"),
        ("embedding", {"zeros": {}, "space": "SPACE_PIXEL"}, "LAYER_BASELINE_UNSUITABLE"),
        ("embedding", {"constant": {"values": [1.0, 2.0, 3.0]}}, "BASELINE_CHANNEL_MISMATCH"),
        ("embedding", {"tensor": encode(np.zeros((5, 4), np.float32))}, "BASELINE_SHAPE_MISMATCH"),
    ],
)
def test_baselines_that_do_not_fit_a_layer_are_refused(
    stub: ExplainerServiceStub, layer: str, kind: dict[str, Any], reason: str
) -> None:
    refused = refusal(lambda: explain(stub, methods=steps(4), baselines=[{"layers": {layer: kind}}]))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


@pytest.mark.parametrize(
    ("model", "inputs", "layers", "reason"),
    [
        ("words", {"ids": IDS}, ["nothing"], "UNKNOWN_LAYER"),
        ("rectified", {"image": IMAGE}, ["c", "d"], "LAYERS_NOT_CUT"),
    ],
)
def test_layers_that_do_not_fit_are_refused(
    stub: ExplainerServiceStub, model: str, inputs: dict[str, Any], layers: list[str], reason: str
) -> None:
    refused = refusal(lambda: stub.Explain(request(model, inputs, layers=layers, targets=[element(0)]), timeout=60))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


def test_without_layers_token_ids_are_refused_with_the_names_of_layers(stub: ExplainerServiceStub) -> None:
    refused = refusal(lambda: stub.Explain(request("words", {"ids": IDS}, targets=[element(0)]), timeout=60))
    assert refused.reason == "NO_DIFFERENTIABLE_INPUT"
    assert "embedding" in refused.metadata["layers"]
    assert stub.GetModel(pb.GetModelRequest(model=named("words"))).model.layers


def test_an_embedding_baseline_of_zeros_is_that_of_token_zero(stub: ExplainerServiceStub) -> None:
    zeros, stated = (
        explain(stub, methods=steps(4), baselines=[own])
        for own in (every(zeros={}), {"inputs": {"ids": {"constant": {"values": [0]}}}})
    )
    for own, other in zip(zeros.attributions, stated.attributions, strict=True):
        assert relative_distance(array(own.inputs[0].tensor), array(other.inputs[0].tensor)) < 1e-5
