"""Metrics, logs, request ids, health, reflection, liveness and ports."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from explainserve import repository
from explainserve.errors import NotFound
from explainserve.metrics import Metrics
from explainserve.model_folder import ModelFolder
from explainserve.rpc.tensors import encode
from explainserve.served_model import ServedModel
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import model_pb2
from rpc.loopback import Loopback, adaptive, element, named, normal, refusal, request, steps, until

SERVICE = "explainserve.v1.ExplainerService"
PLAIN = request("plain", {"x": normal(1, 4)}, targets=[element(0)], methods=steps(20))


def count(service: Loopback, method: str, code: str) -> float:
    return service.metric("explainserve_requests_total", method=method, code=code)


# Metrics


def test_requests_are_counted_by_method_and_code(service: Loopback) -> None:
    wanted = [
        ("Explain", "OK"),
        ("Explain", "NOT_FOUND"),
        ("Predict", "INVALID_ARGUMENT"),
        ("Compare", "UNIMPLEMENTED"),
    ]
    before = [count(service, *each) for each in wanted]

    service.stub.Explain(PLAIN, timeout=60)
    refusal(lambda: service.stub.Explain(pb.ExplainRequest(model=named("nope")), timeout=60))
    refusal(lambda: service.stub.Predict(pb.PredictRequest(), timeout=60))
    refusal(lambda: next(iter(service.stub.Compare(pb.CompareRequest(), timeout=60))))

    assert [count(service, *each) for each in wanted] == [n + 1 for n in before]


def test_no_request_remains_active(service: Loopback) -> None:
    service.stub.Explain(PLAIN, timeout=60)

    until(lambda: service.metric("explainserve_active_requests") == 0)
    assert service.metric("explainserve_waiting_rows") == 0


def test_rows_and_batches_are_counted(service: Loopback) -> None:
    def figures() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array(
            [
                service.metric("explainserve_rows_total", model="plain", kind="gradient"),
                service.metric("explainserve_rows_total", model="plain", kind="forward"),
                service.metric("explainserve_batch_rows_sum", model="plain"),
                service.metric("explainserve_step_count_sum", model="plain", method="integrated_gradients"),
                service.metric("explainserve_attributions_total", model="plain", stop_reason="fixed_steps"),
            ]
        )

    before = figures()
    service.stub.Explain(PLAIN, timeout=60)

    np.testing.assert_array_equal(figures() - before, [20, 2, 22, 20, 1])


def test_seconds_are_observed(service: Loopback) -> None:
    names = {
        "explainserve_queue_seconds_count": {"model": "plain"},
        "explainserve_compute_seconds_count": {"model": "plain"},
        "explainserve_serialize_seconds_count": {"model": "plain"},
        "explainserve_request_seconds_count": {"method": "Explain"},
    }
    before = {name: service.metric(name, **labels) for name, labels in names.items()}

    service.stub.Explain(PLAIN, timeout=60)

    for name, labels in names.items():
        assert service.metric(name, **labels) > before[name], name


def test_convergence_and_map_error_are_observed(service: Loopback) -> None:
    def counts() -> tuple[float, float]:
        labels = {"model": "plain", "method": "integrated_gradients"}
        return (
            service.metric("explainserve_relative_convergence_delta_count", **labels),
            service.metric("explainserve_map_error_count", **labels),
        )

    before = counts()
    service.stub.Explain(PLAIN, timeout=60)
    fixed = counts()
    answer = service.stub.Explain(
        request("plain", {"x": normal(1, 4)}, targets=[element(0)], methods=adaptive()), timeout=60
    )

    assert fixed == (before[0] + 1, before[1])
    assert answer.attributions[0].HasField("map_error")
    assert counts() == (fixed[0] + 1, fixed[1] + 1)


def test_models_are_counted_by_state(service: Loopback) -> None:
    """As they are now: none still loads."""
    models = service.stub.ListModels(pb.ListModelsRequest(), timeout=60).models
    failed = sum(1 for model in models if model.reason)

    assert service.metric("explainserve_models", state="failed") == failed > 0
    assert service.metric("explainserve_models", state="ready") == len(models) - failed
    assert service.metric("explainserve_models", state="loading") == 0


def test_label_values_are_not_the_clients(service: Loopback) -> None:
    """A client cannot make the server keep a series for each name it thinks of."""
    send = service.channel.unary_unary("/explainserve.v1.ExplainerService/Invented")
    refusal(lambda: send(b"", timeout=60))
    refusal(lambda: service.stub.Explain(pb.ExplainRequest(model=named("invented-too")), timeout=60))

    exposition = service.http("/metrics")[1]

    assert "nvented" not in exposition


def test_every_instrument_is_documented() -> None:
    """docs/metrics.md lists each with its type, labels and meaning, in the order of the code."""
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\) *\| *", line.strip("|").strip()) for line in text.splitlines() if line.startswith("| `")]
    known = [
        (name.strip("`"), kind, tuple(re.findall("`([^`]+)`", labels)), meaning.replace("\\|", "|"))
        for name, kind, labels, meaning in rows
    ]
    metrics = Metrics(CollectorRegistry())
    instruments = [own for own in vars(metrics).values() if isinstance(own, MetricWrapperBase)]

    assert known == [
        (f"{own._name}_total" if own._type == "counter" else own._name, own._type, own._labelnames, own._documentation)
        for own in instruments
    ]
    assert {family.name for family in metrics.registry.collect()} == {own._name for own in instruments}


# Request ids and logs


def test_request_id_of_the_client_comes_back(service: Loopback) -> None:
    _, call = service.stub.Explain.with_call(PLAIN, timeout=60, metadata=[("x-request-id", "job-17:a.b_c")])

    assert [m.value for m in call.trailing_metadata() if m.key == "x-request-id"] == ["job-17:a.b_c"]
    until(lambda: any(line.get("request_id") == "job-17:a.b_c" for line in service.lines))


def test_request_id_comes_back_with_errors_too(service: Loopback) -> None:
    refused = refusal(
        lambda: service.stub.Explain(
            pb.ExplainRequest(model=named("nope")), timeout=60, metadata=[("x-request-id", "job-18")]
        )
    )

    assert refused.trailing["x-request-id"] == "job-18"
    until(lambda: any(line.get("request_id") == "job-18" for line in service.lines))
    (line,) = (line for line in service.lines if line.get("request_id") == "job-18")
    assert (line["method"], line["code"], line["reason"]) == ("Explain", "NOT_FOUND", "UNKNOWN_MODEL")


@pytest.mark.parametrize("sent", [None, "", "with space", "x" * 129, 'quote"'])
def test_request_id_is_made_where_the_client_has_none_or_an_odd_one(service: Loopback, sent: str | None) -> None:
    metadata = [] if sent is None else [("x-request-id", sent)]
    calls = [service.stub.Explain.with_call(PLAIN, timeout=60, metadata=metadata)[1] for _ in range(2)]
    made = [m.value for call in calls for m in call.trailing_metadata() if m.key == "x-request-id"]

    assert len(set(made)) == 2
    assert all(len(each) == 32 for each in made)


def test_one_line_for_each_request(service: Loopback) -> None:
    service.stub.Explain(PLAIN, timeout=60, metadata=[("x-request-id", "counted")])
    until(lambda: any(line.get("request_id") == "counted" for line in service.lines))
    (line,) = (line for line in service.lines if line.get("request_id") == "counted")

    assert (line["event"], line["level"], line["code"]) == ("rpc", "info", "OK")
    assert line["seconds"] > 0


def test_failed_models_are_logged_as_errors(service: Loopback) -> None:
    failed = [line for line in service.lines if line["event"] == "model" and line["level"] == "error"]

    assert {line["name"] for line in failed} == {"truncated", "versions", "no_file", "no_version"}
    assert all(line["reason"] for line in failed)


# Health, reflection, HTTP


@pytest.mark.parametrize("name", ["", SERVICE])
def test_health(service: Loopback, name: str) -> None:
    stub = health_pb2_grpc.HealthStub(service.channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)

    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service(service: Loopback) -> None:
    """It aborts by itself, outside of our errors; the interceptor counts that too."""
    stub = health_pb2_grpc.HealthStub(service.channel)
    before = count(service, "Check", "NOT_FOUND")

    refused = refusal(lambda: stub.Check(health_pb2.HealthCheckRequest(service="nope"), timeout=60))

    assert refused.code is grpc.StatusCode.NOT_FOUND
    assert count(service, "Check", "NOT_FOUND") == before + 1


def test_health_watch_tells_when_the_server_stops(serve: Callable[..., Loopback]) -> None:
    own = serve()
    watching = health_pb2_grpc.HealthStub(own.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=60)
    seen = [next(watching).status]

    own.submit(own.server.stop(5.0))
    seen.append(next(watching).status)
    watching.cancel()

    assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


def test_reflection_describes_every_service(service: Loopback) -> None:
    database = ProtoReflectionDescriptorDatabase(service.channel)

    assert set(database.get_services()) == {
        SERVICE,
        "explainserve.v1.ModelRepositoryService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    file = database.FindFileContainingSymbol(SERVICE)
    own = pb.DESCRIPTOR.services_by_name["ExplainerService"]
    assert [method.name for method in file.service[0].method] == [method.name for method in own.methods]


def test_http(service: Loopback) -> None:
    assert service.http("/livez") == (200, "alive\n")
    assert service.http("/readyz") == (200, "ready\n")
    assert service.http("/metrics")[0] == 200
    assert service.http("/nope")[0] == 404


# Ports


def test_second_server_on_one_grpc_port_fails(service: Loopback, serve: Callable[..., Loopback]) -> None:
    """And leaves nothing behind: its HTTP port is free again."""
    http_port = free_port()

    with pytest.raises(RuntimeError, match=str(service.server.port)):
        serve(port=service.server.port, http_port=http_port)

    with socket.create_server(("127.0.0.1", http_port)):
        pass
    assert service.stub.Explain(PLAIN, timeout=60).attributions


def test_second_server_on_one_http_port_fails(service: Loopback, serve: Callable[..., Loopback]) -> None:
    with pytest.raises(OSError, match="in use"):
        serve(http_port=service.server.http_port)

    assert service.http("/livez")[0] == 200


def test_server_without_a_model_folder_fails(serve: Callable[..., Loopback], tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        serve(models=tmp_path / "nope")

    assert caught.value.reason == "NO_MODELS_FOLDER"


def test_it_answers_while_models_load(
    serve: Callable[..., Loopback], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it is not ready, that a model still loads, and with the model that is loaded."""
    for name in ("plain", "product"):
        shutil.copytree(folder / name, tmp_path / name)
    gate, opened = threading.Event(), repository.open_model

    def open_model(found: ModelFolder, *arguments: Any) -> ServedModel:
        assert found.name == "plain" or gate.wait(60)
        return opened(found, *arguments)

    monkeypatch.setattr(repository, "open_model", open_model)
    own = serve(loaded=False, models=tmp_path)
    until(lambda: states(own) == {"plain": "READY", "product": "LOADING"})

    assert (health_of(own), own.http("/readyz")[0], own.http("/livez")[0]) == ("NOT_SERVING", 503, 200)
    assert own.stub.Explain(PLAIN, timeout=60).attributions
    waits = request("product", {"x": normal(1, 5), "y": normal(1, 5)})
    refused = refusal(lambda: own.stub.Explain(waits, timeout=60))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
    assert refused.retry_after_seconds is not None
    gate.set()
    own.loading.result(60)
    assert (health_of(own), own.http("/readyz")[0]) == ("SERVING", 200)
    assert own.stub.Explain(waits, timeout=60).attributions


def states(service: Loopback) -> dict[str, str]:
    """Of its models."""
    models = service.stub.ListModels(pb.ListModelsRequest(), timeout=60).models
    return {line.name: model_pb2.ModelState.Name(line.state).removeprefix("MODEL_STATE_") for line in models}


def health_of(service: Loopback) -> str:
    """What the health service says of the whole server."""
    answer = health_pb2_grpc.HealthStub(service.channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def test_server_of_an_empty_folder_answers(serve: Callable[..., Loopback], tmp_path: Path) -> None:
    own = serve(models=tmp_path)

    refused = refusal(
        lambda: own.stub.Predict(
            pb.PredictRequest(model=named("plain"), inputs={"x": encode(normal(1, 4))}), timeout=60
        )
    )

    assert own.stub.ListModels(pb.ListModelsRequest(), timeout=60).models == []
    assert (refused.reason, refused.metadata["models"]) == ("UNKNOWN_MODEL", "")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
