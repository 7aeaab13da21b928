"""What bad input gets: a code, a reason and metadata, and a server that goes on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explainserve.rpc.reply_size import ReplySize
from explainserve.rpc.tensors import encode
from explainserve.settings import Settings
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.bad_requests import CASES, EXHAUSTED, INTERNAL, INVALID, UNIMPLEMENTED, X, box, image, plain, plain_input
from rpc.conftest import LIMITS
from rpc.loopback import (
    Loopback,
    adaptive,
    element,
    every,
    label,
    named,
    normal,
    refusal,
    request,
    steps,
    until,
)


@pytest.fixture(autouse=True)
def server_goes_on(stub: ExplainerServiceStub) -> Iterator[None]:
    """After every test a good request is answered."""
    yield
    answer = stub.Explain(request("plain", {"x": X}, targets=[element(0)], methods=steps(4)), timeout=60)
    assert len(answer.attributions) == 1


@pytest.mark.parametrize("name", CASES)
def test_bad_request_is_refused_with_its_reason(stub: ExplainerServiceStub, name: str) -> None:
    case = CASES[name]

    refused = refusal(lambda: stub.Explain(case.request, timeout=60))

    assert (refused.code, refused.reason) == (case.code, case.reason), refused.message
    assert case.metadata.items() <= refused.metadata.items()
    assert refused.message


KNOWN_BEFOREHAND = ("region", "baseline", "method", "input", "group")


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(KNOWN_BEFOREHAND)])
def test_bad_request_is_refused_before_it_is_computed(service: Loopback, name: str) -> None:
    """Nothing that can be known beforehand costs a row."""
    before = service.metric("explainserve_rows_total")

    refusal(lambda: service.stub.Explain(CASES[name].request, timeout=60))

    assert service.metric("explainserve_rows_total") == before


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith((*KNOWN_BEFOREHAND, "model"))])
def test_estimate_refuses_what_explain_refuses(stub: ExplainerServiceStub, name: str) -> None:
    case = CASES[name]

    refused = refusal(lambda: stub.EstimateCost(pb.EstimateCostRequest(explain=case.request), timeout=60))

    assert (refused.code, refused.reason) == (case.code, case.reason)


def test_model_that_raises_fails_its_own_request(stub: ExplainerServiceStub) -> None:
    """An index beyond the embedding passes every check and fails inside the model."""
    bad = request(
        "multi_input",
        {"image": normal(1, 3, 4, 4), "ids": np.full((1, 5), 10**6, np.int64)},
        targets=[element(0)],
    )

    refused = refusal(lambda: stub.Explain(bad, timeout=60))

    assert (refused.code, refused.reason) == (INTERNAL, "MODEL_RAISED")


def test_request_above_the_message_limit(service: Loopback) -> None:
    large = plain_input(normal(3 * 2**16, 4))
    counted = {"method": "Explain", "code": "RESOURCE_EXHAUSTED"}
    before = service.metric("explainserve_requests_total", **counted)

    refused = refusal(lambda: service.stub.Explain(large, timeout=60, metadata=[("x-request-id", "too-large")]))

    assert (refused.code, refused.reason) == (EXHAUSTED, "MESSAGE_TOO_LARGE")
    assert refused.metadata == {"size": str(large.ByteSize()), "limit": str(2 * 1024 * 1024)}
    assert refused.trailing["x-request-id"] == "too-large"
    until(lambda: service.metric("explainserve_requests_total", **counted) == before + 1)


def test_request_far_above_the_message_limit_is_not_read(stub: ExplainerServiceStub) -> None:
    refused = refusal(lambda: stub.Explain(plain_input(normal(3 * 2**18, 4)), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "")


PART = {"name": "p", "selectors": [{}] * 50}
PARTS = {
    "targets": {"targets": [element(0)] * 101},
    "baselines": {"baselines": [every(zeros={})] * 101},
    "regions": {"regions": [{"name": "p"}] * 101},
    "groups": {"groups": [{"name": "p"}] * 101},
    "selectors": {"groups": [PART, PART, {"name": "p", "selectors": [{}]}]},
}


@pytest.fixture(scope="module")
def few_parts(few_models: Path) -> Iterator[Loopback]:
    loopback = Loopback(Settings(models=few_models, **{**LIMITS, "max_request_parts": 100}))
    yield loopback
    loopback.stop()


@pytest.mark.parametrize("part", PARTS)
def test_too_many_parts_are_refused_before_one_is_looked_at(few_parts: Loopback, part: str) -> None:
    """Not even the missing input is noticed."""
    refused = refusal(lambda: few_parts.stub.Explain(request("plain", {}, **PARTS[part]), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "TOO_MANY_PARTS")
    assert refused.metadata == {"part": part, "count": "101", "limit": "100"}


def noisy(count: int, **fields: Any) -> pb.ExplainRequest:
    return image(baselines=[every(uniform_noise={"count": count})], **fields)


def test_reply_above_the_message_limit_is_refused_before_it_is_computed(service: Loopback) -> None:
    before = service.metric("explainserve_rows_total", model="image")

    refused = refusal(lambda: service.stub.Explain(noisy(1000, methods=steps(1)), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "REPLY_TOO_LARGE")
    assert int(refused.metadata["reply_bytes"]) > int(refused.metadata["limit"]) == 2 * 1024 * 1024
    assert "ExplainStream" in refused.message
    assert service.metric("explainserve_rows_total", model="image") == before


def test_pairs_count_towards_the_reply(service: Loopback) -> None:
    """Maps leave everything out; 150 of them have 11175 pairs, each in two views."""
    before = service.metric("explainserve_rows_total", model="image")
    groups = [{"name": f"g{k}", "selectors": [{}], "pairwise": True} for k in range(2)]
    left_out = {"omit_tensors": True, "omit_statistics": True, "omit_score_path": True}
    many = noisy(150, methods=steps(1), groups=groups, response_options=left_out)

    refused = refusal(lambda: service.stub.Explain(many, timeout=60))
    alone = pb.ExplainRequest()
    alone.CopyFrom(many)
    alone.ClearField("groups")

    assert (refused.code, refused.reason) == (EXHAUSTED, "REPLY_TOO_LARGE")
    assert service.metric("explainserve_rows_total", model="image") == before
    assert len(service.stub.Explain(alone, timeout=60).attributions) == 150


def test_reply_that_is_larger_than_estimated_is_refused_with_its_size(
    service: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explainserve.rpc.responses.reply_size", lambda *_: ReplySize(0, 0))
    counted = {"method": "Explain", "code": "RESOURCE_EXHAUSTED"}
    before = service.metric("explainserve_requests_total", **counted)

    refused = refusal(lambda: service.stub.Explain(noisy(1000, methods=steps(1)), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "REPLY_TOO_LARGE")
    assert int(refused.metadata["reply_bytes"]) > int(refused.metadata["limit"]) == 2 * 1024 * 1024
    until(lambda: service.metric("explainserve_requests_total", **counted) == before + 1)


def test_too_many_rows_are_refused_before_they_are_computed(service: Loopback) -> None:
    before = service.metric("explainserve_rows_total", model="image")

    refused = refusal(lambda: service.stub.Explain(noisy(100, methods=steps(512)), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "REQUEST_ROWS_EXCEEDED")
    assert int(refused.metadata["rows"]) >= 51_200
    assert refused.metadata["limit"] == "20000"
    assert service.metric("explainserve_rows_total", model="image") == before


def test_memory_of_one_request_is_bounded(stub: ExplainerServiceStub) -> None:
    """A small request can ask for baselines and maps of many times its size, even where the reply leaves them out."""
    pixels = np.zeros((4, 3, 64, 64), np.float32)
    greedy = request(
        "two-digits",
        {"image": pixels},
        baselines=[every(uniform_noise={"count": 1024})],
        methods=steps(1),
        baseline_reduction="BASELINE_REDUCTION_MEAN",
        response_options={"omit_tensors": True},
    )

    refused = refusal(lambda: stub.Explain(greedy, timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "REQUEST_BYTES_EXCEEDED")
    assert refused.metadata["bytes"] == str(4 * (1 + 1024 * 2) * pixels[0].nbytes)


def test_request_that_the_queue_can_never_hold_is_no_matter_of_trying_again(serve: Callable[..., Loopback]) -> None:
    small = serve(max_waiting_rows=40)
    large = plain(methods=steps(39))

    refused = refusal(lambda: small.stub.Explain(large, timeout=60))
    expected = small.stub.EstimateCost(pb.EstimateCostRequest(explain=large), timeout=60)

    assert (refused.code, refused.reason) == (EXHAUSTED, "REQUEST_ROWS_EXCEEDED")
    assert refused.metadata == {"rows": "41", "limit": "40"}
    assert refused.retry_after_seconds is None
    assert (expected.max_row_count, expected.row_limit) == (41, 40)
    assert small.stub.Explain(plain(methods=steps(38)), timeout=60).attributions


def test_full_queue_refuses_at_once_and_never_those_it_admitted(serve: Callable[..., Loopback]) -> None:
    """Rounds of one request come and go; its place is kept for all of them until it ends."""
    small = serve(max_waiting_rows=522)
    strict = adaptive(tolerance=1e-7, completeness_tolerance=1e-7, max_step_count=512)
    first = small.stub.Explain.future(request("slow", {"x": X}, targets=[element(0)], methods=strict), timeout=60)
    until(lambda: small.metric("explainserve_rows_total", model="slow", kind="gradient") > 0)

    refused = refusal(lambda: small.stub.Explain(plain(methods=steps(512)), timeout=60))
    predicted = small.stub.Predict(pb.PredictRequest(model=named("plain"), inputs={"x": encode(X)}), timeout=60)

    assert (refused.code, refused.reason) == (EXHAUSTED, "QUEUE_FULL")
    assert refused.metadata.items() >= {"bound": "rows", "needed": "514", "limit": "522"}.items()
    assert refused.retry_after_seconds is not None and 0.1 <= refused.retry_after_seconds <= 60
    assert predicted.predictions
    assert first.result().attributions[0].step_count == 512
    assert small.stub.Explain(plain(methods=steps(512)), timeout=60).attributions


def test_memory_of_all_requests_is_bounded_too(service: Loopback, serve: Callable[..., Loopback]) -> None:
    """As much as there is: whoever comes beside it is refused, and admitted after it."""
    slow = request("slow", {"x": X}, targets=[element(0)], methods=adaptive(tolerance=1e-9, max_step_count=256))
    needed = service.stub.EstimateCost(pb.EstimateCostRequest(explain=slow), timeout=60).max_host_bytes
    small = serve(max_waiting_bytes=needed)
    first = small.stub.Explain.future(slow, timeout=60)
    until(lambda: small.metric("explainserve_reserved_bytes") == needed)

    refused = refusal(lambda: small.stub.Explain(plain(methods=steps(2)), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "QUEUE_FULL")
    expected = {"bound": "bytes", "reserved": str(needed), "limit": str(needed)}
    assert refused.metadata.items() >= expected.items()
    assert refused.retry_after_seconds is not None
    assert first.result().attributions
    until(lambda: small.metric("explainserve_reserved_bytes") == 0)
    assert small.stub.Explain(plain(methods=steps(2)), timeout=60).attributions


def test_request_that_memory_can_never_hold_is_no_matter_of_trying_again(
    service: Loopback, serve: Callable[..., Loopback]
) -> None:
    """With the gradients of its path, and its messages; what it holds otherwise would fit."""
    wide = plain(methods=adaptive(max_step_count=512))
    expected = service.stub.EstimateCost(pb.EstimateCostRequest(explain=wide), timeout=60)
    small = serve(max_waiting_bytes=expected.max_host_bytes - 1)

    refused = refusal(lambda: small.stub.Explain(wide, timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "REQUEST_BYTES_EXCEEDED")
    limit = expected.max_host_bytes - 1
    assert refused.metadata == {"bytes": str(expected.max_host_bytes), "limit": str(limit)}
    assert refused.retry_after_seconds is None
    assert small.stub.EstimateCost(pb.EstimateCostRequest(explain=wide), timeout=60).max_host_bytes_limit == limit
    assert small.stub.Explain(plain(methods=steps(2)), timeout=60).attributions


def test_bytes_that_are_no_message(service: Loopback) -> None:
    send = service.channel.unary_unary("/explainserve.v1.ExplainerService/Explain")

    refused = refusal(lambda: send(b"\xff\xfe not protobuf", timeout=60))

    assert (refused.code, refused.reason) == (INVALID, "MESSAGE_MALFORMED")
    assert service.metric("explainserve_requests_total", method="Explain", code="INVALID_ARGUMENT") > 0


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", bytes(range(256)) * 64, b"PRI * HT"])
def test_garbage_on_the_port(service: Loopback, garbage: bytes) -> None:
    """The connection may be closed on us; the server may not."""
    with socket.create_connection(("127.0.0.1", service.server.port), timeout=10) as connection, suppress(OSError):
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)

    assert service.stub.ListModels(pb.ListModelsRequest(), timeout=60).models


def test_unknown_method_of_a_known_service(service: Loopback) -> None:
    send = service.channel.unary_unary("/explainserve.v1.ExplainerService/Predetermine")

    assert refusal(lambda: send(b"", timeout=60)).code is UNIMPLEMENTED


ABSURD = {
    "long": "n" * 60_000,
    "wide": "\N{SNOWMAN}" * 20_000,
    "wider": "\N{PILE OF POO}" * 15_000,
    "control": "\x00\x01\r\n" * 10_000,
}


@pytest.mark.parametrize("name", ABSURD)
def test_details_stay_small_whatever_is_named(stub: ExplainerServiceStub, name: str) -> None:
    """Trailing metadata above 8 KiB would reach the client as RESOURCE_EXHAUSTED."""
    text = ABSURD[name]
    cases = {
        "UNKNOWN_MODEL": pb.ExplainRequest(model=named(text)),
        "UNKNOWN_INPUT": request("plain", {text: X}),
        "UNKNOWN_LABEL": image(targets=[label(text)]),
        "UNKNOWN_OUTPUT": plain(targets=[element(0, output=text)]),
        "REGION_OUT_OF_BOUNDS": image(regions=[{**box(0, 0, 99, 99), "name": text}]),
        "EMPTY_GROUP": plain(groups=[{"name": text}]),
    }
    for reason, bad in cases.items():
        refused = refusal(lambda bad=bad: stub.Explain(bad, timeout=60))  # type: ignore[misc]

        assert refused.reason == reason
        assert len(refused.trailing["grpc-status-details-bin"]) <= 4096
