"""A model that hangs on a real server: others go on, and what is told of it is true."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from explainserve.backends.onnx_runtime import OnnxModel
from explainserve.rpc.tensors import encode
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import model_pb2
from explainserve.v1 import model_repository_service_pb2 as control_pb
from explainserve.v1.model_repository_service_pb2_grpc import ModelRepositoryServiceStub
from hostile_graphs import patient
from onnx_graphs import linear
from rpc.loopback import Loopback, named, normal, refusal, until

QUICK = np.zeros((1, 4), np.float32)
ENDLESS = np.full((1, 4), 2.0**50, np.float32)


@pytest.fixture
def server(serve: Callable[..., Loopback], tmp_path: Path) -> Iterator[Loopback]:
    """Serves a model that may hang and one that does not, with a short-tempered watchdog."""
    for name, proto in (("patient", patient()), ("plain", linear(np.ones((4, 3), np.float32)))):
        (tmp_path / name / "1").mkdir(parents=True)
        onnx.save(proto, tmp_path / name / "1" / "model.onnx")
    yield serve(models=tmp_path, watchdog_seconds=0.5, allow_model_control=True)


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """onnxruntime cannot end a run, as it cannot within one operator; every run is ended after the test."""
    asked: list[OnnxModel] = []
    end = OnnxModel.interrupt
    monkeypatch.setattr(OnnxModel, "interrupt", lambda loaded: asked.append(loaded))
    yield
    for loaded in asked:
        end(loaded)


def predict(server: Loopback, name: str, x: np.ndarray) -> pb.PredictResponse:
    request = pb.PredictRequest(model=named(name), inputs={"x": encode(x)})
    response: pb.PredictResponse = server.stub.Predict(request, timeout=60)
    return response


def states(server: Loopback) -> dict[str, tuple[str, str]]:
    listed = server.stub.ListModels(pb.ListModelsRequest(), timeout=60).models
    return {each.name: (model_pb2.ModelState.Name(each.state), each.error_reason) for each in listed}


def health(server: Loopback) -> int:
    check = server.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=StringValue.SerializeToString,
        response_deserializer=Int32Value.FromString,
    )
    answer: Int32Value = check(StringValue(), timeout=60)
    return answer.value


SERVING, NOT_SERVING = 1, 2


def test_endless_request_fails_alone(server: Loopback) -> None:
    refused = refusal(lambda: predict(server, "patient", ENDLESS))

    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "MODEL_HANGS")
    assert predict(server, "patient", QUICK).predictions
    assert states(server)["patient"] == ("MODEL_STATE_READY", "")
    assert server.metric("explainserve_lost_threads") == 0


@pytest.mark.usefixtures("stubborn")
def test_others_go_on_when_a_run_cannot_be_ended(server: Loopback) -> None:
    hung = threading.Thread(target=lambda: refusal(lambda: predict(server, "patient", ENDLESS)))
    hung.start()
    while hung.is_alive():
        assert health(server) == SERVING
    hung.join()

    assert predict(server, "plain", normal(2, 4)).predictions
    until(lambda: states(server)["patient"] == ("MODEL_STATE_FAILED", "MODEL_HANGS"))
    refused = refusal(lambda: predict(server, "patient", QUICK))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FAILED")
    assert refused.metadata["error_reason"] == "MODEL_HANGS"
    assert server.metric("explainserve_models", state="failed") == 1
    assert server.metric("explainserve_lost_threads") == 1
    assert (health(server), server.http("/readyz")[0], server.http("/livez")[0]) == (SERVING, 200, 200)


@pytest.mark.usefixtures("stubborn")
def test_server_whose_last_model_hangs_says_so_until_one_is_loaded(server: Loopback) -> None:
    control = ModelRepositoryServiceStub(server.channel)
    control.UnloadModel(control_pb.UnloadModelRequest(model={"name": "plain"}), timeout=60)

    refused = refusal(lambda: predict(server, "patient", ENDLESS))

    assert refused.reason == "MODEL_HANGS"
    until(lambda: health(server) == NOT_SERVING)
    assert (server.http("/readyz")[0], server.http("/livez")[0]) == (503, 503)
    control.LoadModel(control_pb.LoadModelRequest(model={"name": "patient"}), timeout=60)
    until(lambda: health(server) == SERVING)
    assert predict(server, "patient", QUICK).predictions
    assert (server.http("/readyz")[0], server.http("/livez")[0]) == (200, 200)
