"""Several devices of one real server: requests are spread, answers are equal, one that hangs does not stop another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from explainserve import repository
from explainserve.backends.onnx_runtime import OnnxModel
from explainserve.plan import Rows
from explainserve.rpc.tensors import encode
from explainserve.served_model import ServedModel
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import model_pb2
from hostile_graphs import patient
from onnx_graphs import linear
from rpc.folder import write_plain
from rpc.loopback import PATIENCE, Loopback, element, maps, named, normal, refusal, relative_distance, steps, until
from rpc.loopback import request as explain_request

DEVICES = ("cpu:0", "cpu:1")
X = normal(1, 4)
ENDLESS = np.full((1, 4), 2.0**50, np.float32)


class Meeting:
    """Holds the first evaluation of each device until as many devices as there are evaluate at once."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.arrived: set[int] = set()

    def join(self) -> None:
        self.arrived.add(threading.get_ident())
        if len(self.arrived) == len(DEVICES):
            self.open.set()
        assert self.open.wait(PATIENCE), "the other device stands idle"


@pytest.fixture
def server(serve: Callable[..., Loopback], tmp_path: Path) -> Loopback:
    for name in ("plain", "pinned", "single", "elsewhere"):
        write_plain(tmp_path, name)
    (tmp_path / "pinned" / "model.toml").write_text('devices = ["cpu:1"]')
    (tmp_path / "single" / "model.toml").write_text("replicas = 1")
    (tmp_path / "elsewhere" / "model.toml").write_text('devices = ["cuda:9"]')
    return serve(models=tmp_path, device=DEVICES, warm_up_seconds=0)


@pytest.fixture
def meeting(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> Meeting:
    meeting, evaluate = Meeting(), OnnxModel.evaluate

    def joined(loaded: OnnxModel, rows: Rows) -> Any:
        meeting.join()
        return evaluate(loaded, rows)

    monkeypatch.setattr(OnnxModel, "evaluate", joined)
    return meeting


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as callers:
        yield callers


def explain(server: Loopback, name: str = "plain") -> pb.ExplainResponse:
    asked = explain_request(name, {"x": X}, targets=[element(1)], methods=steps(100))
    response: pb.ExplainResponse = server.stub.Explain(asked, timeout=PATIENCE)
    return response


def predict(server: Loopback, name: str, x: np.ndarray = X) -> str:
    """The device that evaluated."""
    asked = pb.PredictRequest(model=named(name), inputs={"x": encode(x)})
    device: str = server.stub.Predict(asked, timeout=PATIENCE).provenance.device
    return device


def summaries(server: Loopback) -> dict[str, model_pb2.ModelSummary]:
    return {each.name: each for each in server.stub.ListModels(pb.ListModelsRequest(), timeout=PATIENCE).models}


def test_requests_are_spread_and_answers_are_equal(
    server: Loopback, meeting: Meeting, callers: ThreadPoolExecutor
) -> None:
    calls = [callers.submit(explain, server) for _ in DEVICES]
    answers = {answer.provenance.device: answer for answer in (call.result(PATIENCE) for call in calls)}

    assert set(answers) == set(DEVICES)
    (first,), (second,) = (maps(answers[name]) for name in DEVICES)
    assert relative_distance(first, second) < 1e-5
    for name in DEVICES:
        assert server.metric("explainserve_rows_total", model="plain", device=name, kind="gradient") == 100
        assert server.metric("explainserve_compute_seconds_count", model="plain", device=name) > 0


def test_models_say_where_they_are(server: Loopback) -> None:
    """Everywhere, or where their model.toml puts them."""
    listed = summaries(server)

    assert list(listed["plain"].devices) == list(DEVICES)
    assert list(listed["pinned"].devices) == ["cpu:1"]
    assert list(listed["single"].devices) == ["cpu:0"], "pinned lies on the other"
    assert listed["elsewhere"].error_reason == "NO_SUCH_DEVICE"
    asked = pb.GetModelRequest(model=named("pinned"))
    model = server.stub.GetModel(asked, timeout=PATIENCE).model
    assert (model.device, list(model.summary.devices)) == ("cpu:1", ["cpu:1"])
    assert {predict(server, "pinned"), explain(server, "pinned").provenance.device} == {"cpu:1"}
    (ready,) = (line for line in server.lines if line.get("name") == "plain" and line["state"] == "READY")
    assert ready["devices"] == list(DEVICES)


def test_what_was_found_on_each_device_is_told(
    serve: Callable[..., Loopback], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a request, which may go to any of them, is told what a micro-batch takes where it is most."""
    found = {"cpu:0": (4, 0.5, 1000), "cpu:1": (8, 0.25, 3000)}
    opened = repository.open_model

    def open_model(*arguments: Any) -> ServedModel:
        model = opened(*arguments)
        rows, seconds, peak = found[model.device]
        return replace(model, max_batch_rows=rows, seconds_per_row=seconds, micro_batch_bytes=peak)

    monkeypatch.setattr(repository, "open_model", open_model)
    write_plain(tmp_path, "plain")
    server = serve(models=tmp_path, device=DEVICES, warm_up_seconds=0)

    model = server.stub.GetModel(pb.GetModelRequest(model=named("plain")), timeout=PATIENCE).model
    told = {
        own.device: (own.max_batch_rows, own.row_duration.ToMilliseconds() / 1000, own.micro_batch_bytes)
        for own in model.replicas
    }
    assert told == found
    assert (model.device, model.max_batch_rows) == ("cpu:0", 4), "what stands beside them is of the first"
    asked = pb.EstimateCostRequest(explain=explain_request("plain", {"x": X}, targets=[element(1)]))
    assert server.stub.EstimateCost(asked, timeout=PATIENCE).micro_batch_bytes == 3000


def test_shutdown_finishes_the_requests_of_every_device(
    server: Loopback, meeting: Meeting, callers: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, join = threading.Event(), meeting.join

    def held() -> None:
        join()
        assert gate.wait(PATIENCE)

    monkeypatch.setattr(meeting, "join", held)
    calls = [callers.submit(explain, server) for _ in DEVICES]
    assert meeting.open.wait(PATIENCE), "both are at work"

    stopping = server.submit(server.server.stop(PATIENCE))
    until(lambda: server.http("/readyz")[0] == 503)
    gate.set()

    assert {call.result(PATIENCE).provenance.device for call in calls} == set(DEVICES)
    stopping.result(PATIENCE)


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """onnxruntime cannot end a run, as it cannot within one operator; every run is ended after the test."""
    asked: list[OnnxModel] = []
    end = OnnxModel.interrupt
    monkeypatch.setattr(OnnxModel, "interrupt", lambda loaded: asked.append(loaded))
    yield
    for loaded in asked:
        end(loaded)


@pytest.fixture
def hanging(serve: Callable[..., Loopback], tmp_path: Path) -> Callable[..., Loopback]:
    for name, proto in (("patient", patient()), ("plain", linear(np.ones((4, 3), np.float32)))):
        (tmp_path / name / "1").mkdir(parents=True)
        onnx.save(proto, tmp_path / name / "1" / "model.onnx")
    return lambda seconds: serve(models=tmp_path, device=DEVICES, watchdog_seconds=seconds, warm_up_seconds=0)


def busy(server: Loopback, device: str) -> bool:
    return server.server._devices._engines[device]._run is not None


def test_others_are_answered_while_a_device_hangs(
    hanging: Callable[..., Loopback], callers: ThreadPoolExecutor
) -> None:
    """Without a watchdog: whoever comes is sent to the other device."""
    server = hanging(0.0)
    hung: Future[str] = callers.submit(predict, server, "patient", ENDLESS)
    until(lambda: busy(server, "cpu:0"))

    assert [predict(server, name) for name in ("patient", "plain") * 3] == ["cpu:1"] * 6

    assert not hung.done()
    server.submit(server.server.stop(0.0)).result(PATIENCE)
    assert hung.exception(PATIENCE) is not None


@pytest.mark.usefixtures("stubborn")
def test_a_model_is_served_on_by_the_devices_on_which_it_did_not_hang(hanging: Callable[..., Loopback]) -> None:
    server = hanging(0.5)

    assert refusal(lambda: predict(server, "patient", ENDLESS)).reason == "MODEL_HANGS"

    until(lambda: list(summaries(server)["patient"].devices) == ["cpu:1"])
    assert summaries(server)["patient"].state == model_pb2.MODEL_STATE_READY
    assert predict(server, "patient") == "cpu:1"
    assert list(summaries(server)["plain"].devices) == list(DEVICES)
    assert server.metric("explainserve_lost_threads", device="cpu:0") == 1
    assert server.metric("explainserve_lost_threads", device="cpu:1") == 0

    assert refusal(lambda: predict(server, "patient", ENDLESS)).reason == "MODEL_HANGS"

    until(lambda: summaries(server)["patient"].error_reason == "MODEL_HANGS")
    assert predict(server, "plain") in DEVICES, "their other models are served on"
