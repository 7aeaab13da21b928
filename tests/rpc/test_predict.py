"""Predictions over a real connection."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
import pytest

from explainserve.rpc import responses
from explainserve.rpc.servicer import Servicer
from explainserve.rpc.tensors import encode
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.folder import LABELS, WEIGHTS, image_logits
from rpc.loopback import Array, Loopback, array, named, normal, refusal


def request(model: str, inputs: Mapping[str, Array], **fields: Any) -> pb.PredictRequest:
    return pb.PredictRequest(model=named(model), inputs={k: encode(v) for k, v in inputs.items()}, **fields)


def predict(stub: ExplainerServiceStub, model: str, inputs: Mapping[str, Array], **fields: Any) -> pb.PredictResponse:
    return stub.Predict(request(model, inputs, **fields), timeout=60)


IMAGES = normal(3, 3, 6, 8)


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return np.asarray(e / e.sum())


@pytest.mark.parametrize(
    ("score", "value"),
    [
        ("SCORE_UNSPECIFIED", lambda z: z),
        ("SCORE_LOGIT", lambda z: z),
        ("SCORE_PROBABILITY", softmax),
        ("SCORE_LOG_PROBABILITY", lambda z: np.log(softmax(z))),
    ],
)
def test_highest_classes_with_labels(stub: ExplainerServiceStub, score: str, value: Any) -> None:
    response = predict(stub, "image", {"image": IMAGES}, top_k=3, score=score)

    assert [p.instance_index for p in response.predictions] == [0, 1, 2]
    for own, image in zip(response.predictions, IMAGES, strict=True):
        scores = value(image_logits(image))
        order = np.argsort(-scores)[:3]
        assert own.output == "logits"
        assert [c.index for c in own.classes] == order.tolist()
        assert [c.label for c in own.classes] == [LABELS[k] for k in order]
        np.testing.assert_allclose([c.score for c in own.classes], scores[order], rtol=1e-4, atol=1e-6)
        assert not own.HasField("tensor")


def test_number_of_classes_caps_top_k(stub: ExplainerServiceStub) -> None:
    """Five where nothing is stated."""
    default = predict(stub, "image", {"image": IMAGES[:1]})
    many = predict(stub, "two-digits", {"image": normal(1, 3, 64, 64)}, top_k=1000)
    five = predict(stub, "two-digits", {"image": normal(1, 3, 64, 64)})

    assert [len(r.predictions[0].classes) for r in (default, many, five)] == [4, 10, 5]


def test_outputs_are_all_or_those_asked_for(stub: ExplainerServiceStub) -> None:
    x = normal(2, 4)
    both = predict(stub, "multi_output", {"x": x}, include_tensors=True)
    one = predict(stub, "multi_output", {"x": x}, outputs=["energy"], include_tensors=True)

    assert [(p.instance_index, p.output) for p in both.predictions] == [
        (0, "y"),
        (0, "energy"),
        (1, "y"),
        (1, "energy"),
    ]
    for own, row in zip(one.predictions, x, strict=True):
        assert (own.output, own.classes[:]) == ("energy", [])
        assert array(own.tensor).shape == ()
        assert array(own.tensor) == pytest.approx((row**2).sum())


def test_output_with_pixels_has_a_tensor_and_no_ranking(stub: ExplainerServiceStub) -> None:
    x = normal(1, 3, 4, 5)
    (own,) = predict(stub, "segmentation", {"x": x}, include_tensors=True).predictions
    expected = np.tanh(np.einsum("kc,chw->khw", WEIGHTS["kernel"][:, :, 0, 0], x[0]))

    assert not own.classes
    np.testing.assert_allclose(array(own.tensor), expected, atol=1e-6)


def test_model_without_a_gradient_predicts(stub: ExplainerServiceStub) -> None:
    x = np.array([[[2.0, 1.0], [0.0, 3.0]]], np.float32)
    (own,) = predict(stub, "gap", {"x": x}, include_tensors=True).predictions

    np.testing.assert_array_equal(array(own.tensor), x[0])


def test_model_of_integers_predicts(stub: ExplainerServiceStub) -> None:
    response = predict(stub, "tokens", {"ids": np.array([[0, 6, 1, 2, 3]])}, include_tensors=True)

    np.testing.assert_array_equal(array(response.predictions[0].tensor), [0, 6, 1, 2, 3])


def test_static_batch_and_mixing_models_predict_each_row_alone(stub: ExplainerServiceStub) -> None:
    x = normal(3, 4)
    together = predict(stub, "static_batch", {"x": x}, include_tensors=True).predictions
    mixing = predict(stub, "batch_mixing", {"x": x}, include_tensors=True).predictions

    for k, own in enumerate(together):
        (alone,) = predict(stub, "static_batch", {"x": x[k : k + 1]}, include_tensors=True).predictions
        np.testing.assert_allclose(array(own.tensor), array(alone.tensor), rtol=1e-6)
    assert not any(array(own.tensor).any() for own in mixing)


def test_predictions_agree_with_explanations(stub: ExplainerServiceStub) -> None:
    x = normal(1, 4)
    (own,) = predict(stub, "plain", {"x": x}, top_k=1).predictions
    explained = stub.Explain(
        pb.ExplainRequest(model=named("plain"), inputs={"x": encode(x)}, targets=[{"argmax": {}}]), timeout=60
    )

    assert own.classes[0].index == explained.attributions[0].target.index[0]
    assert own.classes[0].score == pytest.approx(explained.attributions[0].instance_output_value, rel=1e-6)


def test_provenance_counts_forward_rows_only(stub: ExplainerServiceStub) -> None:
    own = predict(stub, "multi_output", {"x": normal(2, 4)}).provenance

    assert (own.row_count, own.forward_count, own.backward_count) == (4, 4, 0)
    assert not own.effective_methods


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (request("plain", {"x": normal(1, 5)}), "SHAPE_MISMATCH"),
        (request("plain", {"x": np.full((1, 4), np.nan, np.float32)}), "NON_FINITE_INPUT"),
        (request("plain", {"x": normal(0, 4)}), "EMPTY_BATCH"),
        (request("plain", {"x": normal(1, 4)}, top_k=-1), "TOP_K_OUT_OF_RANGE"),
        (request("plain", {"x": normal(1, 4)}, outputs=["z"]), "UNKNOWN_OUTPUT"),
        (request("plain", {"x": normal(1, 4)}, score="SCORE_PROBABILITY"), "SCORE_NOT_AVAILABLE"),
        (request("plain", {"x": normal(1, 4)}, score=77), "ENUM_UNKNOWN"),
        (pb.PredictRequest(), "MODEL_REQUIRED"),
    ],
)
def test_bad_request_is_refused(stub: ExplainerServiceStub, bad: pb.PredictRequest, reason: str) -> None:
    refused = refusal(lambda: stub.Predict(bad, timeout=60))

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert predict(stub, "plain", {"x": normal(1, 4)}).predictions


def test_tensors_above_the_message_limit_are_refused(serve: Any) -> None:
    small = serve(max_message_bytes=2**16)
    x = {"x": normal(16, 4)}

    refused = refusal(lambda: predict(small.stub, "wide", x, include_tensors=True))

    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REPLY_TOO_LARGE")
    assert refused.metadata["limit"] == str(2**16)
    assert 16 * 2048 * 4 < int(refused.metadata["reply_bytes"]) < 1.1 * 16 * 2048 * 4
    assert predict(small.stub, "wide", x).predictions


def test_classes_above_the_message_limit_are_refused_before_they_are_computed(serve: Any) -> None:
    small = serve(max_message_bytes=2**16)
    x = {"x": normal(4, 4)}

    refused = refusal(lambda: predict(small.stub, "wide", x, top_k=2048))

    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REPLY_TOO_LARGE")
    assert small.metric("explainserve_rows_total") == 0
    assert len(predict(small.stub, "wide", x, top_k=100).predictions[0].classes) == 100


@pytest.mark.parametrize("name", ["wide", "image"])
def test_reply_is_no_larger_than_it_counts(service: Loopback, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    inputs = {"x": normal(2, 4)} if name == "wide" else {"image": IMAGES}
    counted: list[int] = []
    monkeypatch.setattr(Servicer, "_admit_reply", lambda self, size: counted.append(size))
    answer = predict(service.stub, name, inputs, top_k=2048, include_tensors=True)

    assert sum(prediction.ByteSize() for prediction in answer.predictions) <= min(counted)


def test_replies_are_built_beside_the_event_loop(service: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranking many classes takes time that other requests need."""
    threads: list[str] = []
    original = responses.predict_response

    def recorded(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return original(*arguments, **options)

    monkeypatch.setattr(responses, "predict_response", recorded)
    predict(service.stub, "wide", {"x": normal(1, 4)})

    assert threads and "server" not in threads
