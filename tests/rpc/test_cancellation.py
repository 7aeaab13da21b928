"""Requests that end early: clients that leave, deadlines, time budgets, and a server that is told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from explainserve.backends.onnx_runtime import OnnxModel
from explainserve.plan import Rows, SegmentEvaluation
from explainserve.v1 import attribution_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.loopback import PATIENCE, Loopback, adaptive, element, normal, of_error, refusal, request, steps, until

X = normal(1, 4)
LONG = request("slow", {"x": X}, targets=[element(0)], methods=steps(512))
"""Some seconds on one thread."""

SHORT = request("slow", {"x": X}, targets=[element(0)], methods=steps(2))


@pytest.fixture(autouse=True)
def warm(service: Loopback) -> Iterator[None]:
    """Gradient graphs are built at the first request; afterwards nothing runs or waits, and requests are answered."""
    service.stub.Explain(SHORT, timeout=60)
    yield
    until(lambda: idle(service))
    assert service.stub.Explain(SHORT, timeout=60).attributions


def idle(service: Loopback) -> bool:
    return not service.metric("explainserve_waiting_rows") and not service.metric("explainserve_active_requests")


def evaluated(service: Loopback) -> float:
    return service.metric("explainserve_rows_total", model="slow", kind="gradient")


def test_client_that_leaves_takes_its_rows_along(service: Loopback) -> None:
    before = evaluated(service)
    call = service.stub.Explain.future(LONG, timeout=60)
    until(lambda: evaluated(service) > before)
    assert service.metric("explainserve_waiting_rows") > 0

    call.cancel()
    until(lambda: idle(service))

    assert service.stub.Explain(SHORT, timeout=60).attributions
    assert evaluated(service) - before < 512
    assert service.metric("explainserve_requests_total", method="Explain", code="CANCELLED") >= 1


def test_rows_of_a_client_that_leaves_are_gone_before_the_next_batch(
    service: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is held at the first batch: what waits is dropped meanwhile, and nothing comes after it."""
    at_work, gate, batches = threading.Event(), threading.Event(), []
    evaluate = OnnxModel.evaluate

    def held(model: OnnxModel, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        batches.append(rows.row_count)
        at_work.set()
        assert gate.wait(PATIENCE)
        return evaluate(model, rows)

    monkeypatch.setattr(OnnxModel, "evaluate", held)
    call = service.stub.Explain.future(LONG, timeout=60)
    assert at_work.wait(PATIENCE)

    call.cancel()
    until(lambda: idle(service))
    gate.set()
    until(lambda: service.metric("explainserve_reserved_bytes") == 0)

    assert len(batches) == 1


def test_connection_that_breaks_takes_its_rows_along(service: Loopback) -> None:
    before = evaluated(service)
    with grpc.insecure_channel(service.address) as channel:
        call = ExplainerServiceStub(channel).Explain.future(LONG, timeout=60)
        until(lambda: evaluated(service) > before)

    until(lambda: idle(service))

    assert call.cancelled() or call.code() is grpc.StatusCode.CANCELLED
    assert evaluated(service) - before < 512


def test_others_go_on_when_one_leaves(service: Loopback) -> None:
    """Two requests in turns on one device; the one that stays gets its whole answer."""
    staying = service.stub.Explain.future(
        request("slow", {"x": X}, targets=[element(1)], methods=steps(40)), timeout=60
    )
    leaving = service.stub.Explain.future(LONG, timeout=60)
    until(lambda: service.metric("explainserve_active_requests", method="Explain") == 2)

    leaving.cancel()

    assert staying.result().attributions[0].step_count == 40


def test_deadline_drops_the_rows(service: Loopback) -> None:
    """Hard: no partial map, and nothing goes on behind it."""
    before = evaluated(service)
    late = service.metric("explainserve_requests_total", method="Explain", code="DEADLINE_EXCEEDED")

    refused = refusal(lambda: service.stub.Explain(LONG, timeout=0.3))
    until(lambda: idle(service))

    assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert evaluated(service) - before < 512
    assert service.metric("explainserve_requests_total", method="Explain", code="DEADLINE_EXCEEDED") == late + 1


def test_default_limit_of_requests_without_a_deadline(serve: Callable[..., Loopback]) -> None:
    """The server's own limit says why; the client set none."""
    hasty = serve(default_timeout_seconds=0.3)

    refused = refusal(lambda: hasty.stub.Explain(LONG))

    assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


def endless(**fields: Any) -> pb.ExplainRequest:
    """An adaptive request that refines for seconds."""
    strict = adaptive(tolerance=1e-7, completeness_tolerance=1e-7, max_step_count=512)
    return request("slow", {"x": X}, targets=[element(0)], methods=strict, **fields)


def test_time_budget_too_short_for_the_first_round(service: Loopback) -> None:
    refused = refusal(lambda: service.stub.Explain(endless(time_budget={"nanos": 1_000_000}), timeout=60))

    assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "TIME_BUDGET_TOO_SHORT")


def test_fixed_rule_that_does_not_fit_into_its_time_budget(service: Loopback) -> None:
    bad = pb.ExplainRequest()
    bad.CopyFrom(LONG)
    bad.time_budget.nanos = 200_000_000

    refused = refusal(lambda: service.stub.Explain(bad, timeout=60))

    assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "TIME_BUDGET_TOO_SHORT")


def test_time_budget_ends_with_the_best_map(service: Loopback) -> None:
    """Enough for the first round, not for all."""
    (own,) = service.stub.Explain(endless(time_budget={"nanos": 700_000_000}), timeout=60).attributions

    assert own.stop_reason == attribution_pb2.STOP_REASON_TIME_BUDGET
    assert 0 < own.step_count < 512
    assert own.HasField("map_error")
    assert attribution_pb2.CAUTION_KIND_NOT_CONVERGED in {caution.kind for caution in own.cautions}


def test_time_budget_that_is_not_needed_changes_nothing(service: Loopback) -> None:
    fields: dict[str, Any] = {"targets": [element(0)]}
    free = service.stub.Explain(request("plain", {"x": X}, **fields), timeout=60)
    limited = service.stub.Explain(request("plain", {"x": X}, time_budget={"seconds": 60}, **fields), timeout=60)

    assert limited.attributions[0].stop_reason == free.attributions[0].stop_reason
    assert limited.attributions[0].step_count == free.attributions[0].step_count


def test_priority_goes_first(service: Loopback) -> None:
    """The later request of higher priority overtakes: most rows of the first are still waiting when it is answered."""
    before = evaluated(service)
    first = service.stub.Explain.future(LONG, timeout=60)
    until(lambda: evaluated(service) > before)
    urgent = request("slow", {"x": X}, targets=[element(1)], methods=steps(30), priority=5)

    service.stub.Explain(urgent, timeout=60)
    rest = service.metric("explainserve_waiting_rows")
    first.cancel()

    assert rest > 300


def test_stop_lets_running_requests_finish_and_refuses_new_ones(serve: Callable[..., Loopback]) -> None:
    own = serve()
    own.stub.Explain(SHORT, timeout=60)
    running = own.stub.Explain.future(request("slow", {"x": X}, targets=[element(0)], methods=steps(100)), timeout=60)
    until(lambda: own.metric("explainserve_active_requests", method="Explain") == 1)

    stopping = own.submit(own.server.stop(30.0))
    until(lambda: own.http("/readyz")[0] == 503)
    until(lambda: refuses(own))

    assert running.result().attributions[0].step_count == 100
    stopping.result(60)


def test_stop_ends_what_outlives_the_grace_period(serve: Callable[..., Loopback]) -> None:
    others = len(device_threads())
    own = serve()
    own.stub.Explain(SHORT, timeout=60)
    running = own.stub.Explain.future(LONG, timeout=60)
    until(lambda: own.metric("explainserve_active_requests", method="Explain") == 1)

    own.submit(own.server.stop(0.2)).result(30)

    error = running.exception()
    assert of_error(error).code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert len(device_threads()) == others


def device_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "device"]


def refuses(loopback: Loopback) -> bool:
    try:
        loopback.stub.Explain(SHORT, timeout=60)
    except grpc.RpcError as error:
        assert of_error(error).code is grpc.StatusCode.UNAVAILABLE
        return True
    return False
