"""Segments over a real connection: those of a client, those that the server finds, and what comes back of them."""

from __future__ import annotations

import pydoc
import threading
from typing import Any

import numpy as np
import pytest

from explainserve.rpc.tensors import encode
from explainserve.v1 import attribution_pb2, tensor_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.loopback import PATIENCE, array, element, every, normal, refusal, request

X = normal(1, 3, 6, 8)
IDS = np.array([[3, 1, 4, 1, 5, 0], [2, 6, 5, 3, 5, 1]])
PARTS: dict[str, Any] = {"include_parts": True}
LABELS = (np.arange(6)[:, None] // 3 * 2 + np.arange(8) // 4)[None]


def asked(*methods: Any, **fields: Any) -> pb.ExplainRequest:
    usual: dict[str, Any] = {"targets": [element(1), element(3)], "response_options": PARTS}
    return request("image", {"image": X}, methods=list(methods), **(usual | fields))


def labels_of(own: attribution_pb2.Attribution) -> Any:
    tensor = own.inputs[0].segments
    assert tensor.data_type == tensor_pb2.DATA_TYPE_INT32
    return np.frombuffer(tensor.data, "<i4").reshape(tuple(tensor.shape))


@pytest.mark.parametrize("name", ["feature_ablation", "kernel_shap", "shapley_value_sampling", "lime"])
def test_segments_of_a_client_are_followed_and_come_back(stub: ExplainerServiceStub, name: str) -> None:
    response = stub.Explain(asked({name: {"segments": {"image": encode(LABELS)}}}), timeout=60)

    assert len(response.attributions) == 2
    for own in response.attributions:
        np.testing.assert_array_equal(labels_of(own), LABELS)
        values = array(own.inputs[0].tensor)
        assert len(np.unique(values)) == 4
        for label in range(4):
            assert len(np.unique(values[:, LABELS[0] == label])) == 1


@pytest.mark.parametrize("name", ["kernel_shap", "shapley_value_sampling", "lime"])
def test_sampled_segments_have_standard_errors(stub: ExplainerServiceStub, name: str) -> None:
    method = {name: {"segmentation": "SEGMENTATION_GRID", "segment_count": 12, "sample_count": 60}}
    response = stub.Explain(asked(method, response_options={"include_standard_errors": True}), timeout=60)

    for own in response.attributions:
        values, errors = array(own.inputs[0].tensor), array(own.inputs[0].standard_error)
        assert (errors > 0).all()
        assert own.map_error == pytest.approx(np.linalg.norm(errors) / np.linalg.norm(values), rel=1e-4)


@pytest.mark.parametrize("name", ["feature_ablation", "kernel_shap", "shapley_value_sampling", "lime", "rise"])
def test_a_mean_over_baselines_has_what_its_parts_have(stub: ExplainerServiceStub, name: str) -> None:
    options = {} if name == "rise" else {"segmentation": "SEGMENTATION_GRID", "segment_count": 6}
    if name != "feature_ablation":
        options["sample_count"] = 30
    fields: dict[str, Any] = {
        "baselines": [every(zeros={}), every(constant={"values": [0.5]})],
        "response_options": {"include_standard_errors": True, **PARTS},
    }
    parts = stub.Explain(asked({name: options}, **fields), timeout=60).attributions
    means = stub.Explain(
        asked({name: options}, baseline_reduction="BASELINE_REDUCTION_MEAN", **fields), timeout=60
    ).attributions

    assert (len(parts), len(means)) == (4, 2)
    for own, first, second in zip(means, parts[::2], parts[1::2], strict=True):
        mean, one, other = (each.inputs[0] for each in (own, first, second))
        assert mean.segments == one.segments == other.segments
        assert mean.HasField("segments") == (name != "rise")
        assert mean.HasField("standard_error") == one.HasField("standard_error") == (name != "feature_ablation")
        if mean.HasField("standard_error"):
            expected = (array(one.standard_error) + array(other.standard_error)) / 2
            np.testing.assert_allclose(array(mean.standard_error), expected, rtol=1e-5)
        assert own.HasField("intercept") == first.HasField("intercept") == (name in {"lime", "kernel_shap"})
        assert not own.HasField("r_squared")
        assert own.intercept == pytest.approx((first.intercept + second.intercept) / 2)


def test_methods_over_equal_segments_share_rows(stub: ExplainerServiceStub) -> None:
    """All 14 sets of four segments hold those of ablation, and those of every order."""
    segments = {"segments": {"image": encode(LABELS)}}
    names = ("kernel_shap", "feature_ablation", "shapley_value_sampling")
    response = stub.Explain(asked(*({name: segments} for name in names)), timeout=60)

    assert response.provenance.row_count == 2 + 14
    maps = [array(own.inputs[0].tensor) for own in response.attributions]
    np.testing.assert_allclose(maps[0], maps[4], rtol=1e-4, atol=1e-6)  # of all 24 orders


@pytest.mark.parametrize("recipe", ["SLIC", "FELZENSZWALB"])
def test_segments_that_the_server_finds_come_back(stub: ExplainerServiceStub, recipe: str) -> None:
    pytest.importorskip("skimage")
    stripes = np.zeros_like(X)
    stripes[..., 4:] = 1
    method = {"lime": {"segmentation": f"SEGMENTATION_{recipe}", "sample_count": 40}}
    fields: dict[str, Any] = {"targets": [element(1), element(3)], "response_options": PARTS}
    response = stub.Explain(request("image", {"image": stripes}, methods=[method], **fields), timeout=60)

    first, second = (labels_of(one) for one in response.attributions)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (1, 6, 8)
    assert all(one.HasField("r_squared") and one.HasField("intercept") for one in response.attributions)


@pytest.mark.parametrize(
    ("method", "heavy"),
    [
        (
            {"lime": {"segmentation": "SEGMENTATION_FELZENSZWALB", "sample_count": 10}},
            "skimage.segmentation.felzenszwalb",
        ),
        ({"xrai": {"step_count": 2}}, "skimage.segmentation.felzenszwalb"),
        ({"xrai": {"step_count": 2}}, "explainserve.methods.xrai.regions"),
    ],
)
def test_other_requests_are_answered_while_segments_are_found(
    stub: ExplainerServiceStub, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], heavy: str
) -> None:
    """Neither the thread of the device nor that of the server waits for them."""
    pytest.importorskip("skimage")
    entered, gate, find = threading.Event(), threading.Event(), pydoc.locate(heavy)

    def held(*values: Any, **options: Any) -> Any:
        entered.set()
        assert gate.wait(PATIENCE), "nobody opened the gate"
        return find(*values, **options)

    monkeypatch.setattr(heavy, held)
    stripes = np.where(np.arange(8) < 4, np.zeros_like(X), 1)
    slow = stub.Explain.future(
        request("image", {"image": stripes}, targets=[element(1)], methods=[method]), timeout=PATIENCE
    )
    try:
        assert entered.wait(PATIENCE)
        quick = stub.Explain(
            request("image", {"image": X}, targets=[element(1)], methods=[{"gradient": {}}]), timeout=20
        )
        assert quick.provenance.backward_count == 1
        assert not slow.done()
    finally:
        gate.set()
    assert len(slow.result().attributions) == 1


def test_tokens_are_segments_of_their_embedding(stub: ExplainerServiceStub) -> None:
    tokens = np.arange(IDS.shape[1])[:, None]
    method = {"kernel_shap": {"segments": {"embedding": encode(tokens)}}}
    response = stub.Explain(
        request("words", {"ids": IDS}, targets=[element(0)], layers=["embedding"], methods=[method]), timeout=60
    )

    for own in response.attributions:
        values = array(own.inputs[0].tensor)
        assert np.ptp(values, axis=1).max() == 0
        assert own.attribution_sum == pytest.approx(
            own.instance_output_value - own.baseline_output_value, rel=1e-3, abs=1e-5
        )


def test_a_picture_without_parts_is_refused(stub: ExplainerServiceStub) -> None:
    pytest.importorskip("skimage")
    plain = request("image", {"image": np.ones_like(X)}, targets=[element(1)], methods=[{"lime": {}}])

    refused = refusal(lambda: stub.Explain(plain, timeout=60))
    assert (refused.reason, refused.metadata["count"]) == ("SEGMENT_COUNT_OUT_OF_RANGE", "1")


def test_the_method_that_has_too_few_segments_is_named(stub: ExplainerServiceStub) -> None:
    segments = {"segments": {"image": encode(np.zeros_like(LABELS))}}

    refused = refusal(lambda: stub.Explain(asked({"feature_ablation": segments}, {"lime": segments}), timeout=60))
    assert refused.reason == "SEGMENT_COUNT_OUT_OF_RANGE"
    assert refused.metadata.items() >= {"method": "Lime", "count": "1", "min": "2"}.items()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"occlusion": {"window": [7, 3]}}, "OPTION_OUT_OF_RANGE"),
        ({"occlusion": {"window": [3]}}, "WINDOW_MISMATCH"),
        ({"rise": {"sample_count": 0}}, "SAMPLE_COUNT_OUT_OF_RANGE"),
        ({"lime": {"segments": {"other": encode(LABELS)}}}, "SEGMENTS_INPUT_UNKNOWN"),
        ({"lime": {"segments": {"image": encode(LABELS[:, 1:])}}}, "SEGMENTS_SHAPE_MISMATCH"),
        ({"kernel_shap": {"segments": {"image": encode(-LABELS)}}}, "SEGMENTS_INVALID"),
        ({"kernel_shap": {"segments": {"image": encode(np.zeros_like(LABELS))}}}, "SEGMENT_COUNT_OUT_OF_RANGE"),
        ({"shapley_value_sampling": {"segmentation": "SEGMENTATION_SLIC"}}, "SEGMENTATION_UNSUITABLE"),
        (
            {"lime": {"segments": {"image": encode(LABELS)}, "segmentation": "SEGMENTATION_GRID"}},
            "SEGMENTS_CONFLICT",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(stub: ExplainerServiceStub, method: Any, reason: str) -> None:
    assert refusal(lambda: stub.Explain(asked(method), timeout=60)).reason == reason
