"""ExplainStream: what comes in which order, that it ends as Explain does, and readers that are slow or leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from explainserve.v1 import attribution_pb2, tensor_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.bad_requests import CASES
from rpc.loopback import (
    Loopback,
    adaptive,
    array,
    element,
    every,
    maps,
    normal,
    of_error,
    refusal,
    relative_distance,
    request,
    steps,
    until,
)

X = normal(1, 4)
IMAGE = normal(2, 3, 6, 8)
STRICT = adaptive(tolerance=1e-7, completeness_tolerance=1e-7, max_step_count=512)
Key = tuple[int, int, int]


@dataclass
class Streamed:
    """A whole stream, its tensors put together as the contract says.

    Attributes:
        kinds: of all events, in order.
        chunks: (key, offset, size), in order.
    """

    kinds: list[str] = field(default_factory=list)
    progress: list[pb.Progress] = field(default_factory=list)
    partial: list[attribution_pb2.Attribution] = field(default_factory=list)
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    final: pb.ExplainResponse = field(default_factory=pb.ExplainResponse)

    def of_path(self, place: Key) -> list[pb.Progress]:
        return [progress for progress in self.progress if place_of(progress) == place]


def place_of(message: Any) -> Key:
    """Of a Progress or an Attribution."""
    where = message.position if isinstance(message, pb.Progress) else message
    return where.instance_index, where.target_index, where.baseline_index


def tensors(message: pb.ExplainResponse | attribution_pb2.Attribution) -> Iterable[tensor_pb2.Tensor]:
    """Those that are there."""
    attributions = [message] if isinstance(message, attribution_pb2.Attribution) else message.attributions
    for own in itertools.chain.from_iterable(attribution.inputs for attribution in attributions):
        yield from (getattr(own, name) for name in ("tensor", "spread") if own.HasField(name))
    for used in [] if isinstance(message, attribution_pb2.Attribution) else message.baselines:
        yield from (own.tensor for own in used.inputs if own.HasField("tensor"))


def read(events: Iterable[pb.ExplainStreamResponse]) -> Streamed:
    """Chunks follow the message that they belong to, ascending and without gaps; nothing is missing."""
    streamed = Streamed()
    awaited: list[tensor_pb2.Tensor] = []
    for event in events:
        kind = str(event.WhichOneof("event"))
        streamed.kinds.append(kind)
        if kind == "chunk":
            assert event.chunk.chunk_key == awaited[0].chunk_key
            assert event.chunk.offset == len(awaited[0].data)
            awaited[0].data += event.chunk.data
            streamed.chunks.append((event.chunk.chunk_key, event.chunk.offset, len(event.chunk.data)))
            if len(awaited[0].data) == np.prod(awaited[0].shape) * 4:
                awaited.pop(0)
            continue
        assert awaited == []
        if kind == "progress":
            streamed.progress.append(event.progress)
            continue
        message = event.partial if kind == "partial" else event.final
        awaited = list(tensors(message))
        assert all(tensor.HasField("chunk_key") and not tensor.data for tensor in awaited)
        if kind == "partial":
            streamed.partial.append(event.partial)
        else:
            streamed.final = event.final
    assert awaited == []
    return streamed


def stream(stub: ExplainerServiceStub, explain: pb.ExplainRequest, **fields: Any) -> Streamed:
    """Every event of a request."""
    return read(stub.ExplainStream(pb.ExplainStreamRequest(explain=explain, **fields), timeout=60))


def without_times(response: pb.ExplainResponse) -> pb.ExplainResponse:
    """What two computations of one request have in common, bit for bit."""
    same = pb.ExplainResponse()
    same.CopyFrom(response)
    for name in ("queue_duration", "compute_duration", "serialize_duration"):
        same.provenance.ClearField(name)
    for tensor in tensors(same):
        tensor.ClearField("chunk_key")
    return same


FOLDED = request(
    "image",
    {"image": IMAGE},
    baselines=[every(gaussian_noise={"std": 1.0, "count": 3})],
    baseline_reduction="BASELINE_REDUCTION_MEAN",
    response_options={"include_baseline_tensors": True},
)
"""Six paths, two maps."""

REQUESTS: dict[str, pb.ExplainRequest] = {
    "adaptive": request("image", {"image": IMAGE[:1]}, targets=[{"top_k": {"count": 2}}], baselines=[every(zeros={})]),
    "fixed": request("image", {"image": IMAGE[:1]}, methods=steps(20)),
    "several inputs": request("product", {"x": normal(1, 5), "y": normal(1, 5)}, methods=steps(4)),
    "no tensors": request("image", {"image": IMAGE[:1]}, response_options={"omit_tensors": True}),
}
"""Targets of one path: their rows form the same micro-batches each time."""


@pytest.mark.parametrize("name", REQUESTS)
def test_it_ends_with_what_explain_gives(stub: ExplainerServiceStub, name: str) -> None:
    """Bit for bit, on a server that does nothing else."""
    streamed = stream(stub, REQUESTS[name], include_partial_maps=True)
    alone = stub.Explain(REQUESTS[name], timeout=60)

    assert without_times(streamed.final) == without_times(alone)
    assert streamed.kinds.count("final") == 1
    assert set(streamed.kinds[streamed.kinds.index("final") + 1 :]) <= {"chunk"}


def test_every_tensor_of_a_response_comes_in_chunks(stub: ExplainerServiceStub) -> None:
    """Maps, spreads and baselines; maps of several paths agree as those of any two requests."""
    streamed, alone = stream(stub, FOLDED), stub.Explain(FOLDED, timeout=60)
    own, expected = list(tensors(streamed.final)), list(tensors(alone))

    assert len(own) == len(expected) == 2 * 2 + 2 * 3
    assert all(relative_distance(array(a), array(b)) < 1e-5 for a, b in zip(own, expected, strict=True))
    assert {place.baseline_index for place in streamed.final.baselines} == {0, 1, 2}


def test_every_round_of_a_path_is_told_in_order(stub: ExplainerServiceStub) -> None:
    """Steps ascend, the errors are there, and each path ends once, with the reason of its final map."""
    streamed = stream(stub, request("image", {"image": IMAGE}, targets=[{"top_k": {"count": 2}}], methods=STRICT))
    paths = {place_of(own): own for own in streamed.final.attributions}

    assert set(streamed.kinds) == {"progress", "final", "chunk"}
    assert {place_of(progress) for progress in streamed.progress} == set(paths)
    for place, own in paths.items():
        *earlier, last = streamed.of_path(place)
        counts = [progress.step_count for progress in (*earlier, last)]
        assert counts == sorted(set(counts))
        assert {progress.stop_reason for progress in earlier} == {attribution_pb2.STOP_REASON_UNFINISHED}
        assert all(progress.HasField("map_error") for progress in earlier)
        assert (last.stop_reason, last.step_count, last.map_error) == (own.stop_reason, own.step_count, own.map_error)
        assert last.convergence_delta == own.convergence_delta
        assert {(progress.max_step_count, progress.path_count) for progress in streamed.progress} == {(512, 4)}


def test_partial_maps_are_what_explain_would_give_there(stub: ExplainerServiceStub) -> None:
    """A map after n steps is the one of a request that may take no more than n."""
    options: dict[str, Any] = {"targets": [element(0)]}
    limits = {"tolerance": 1e-7, "completeness_tolerance": 1e-7, "max_step_count": 48}
    streamed = stream(stub, request("slow", {"x": X}, methods=adaptive(**limits), **options), include_partial_maps=True)

    *earlier, last = streamed.partial
    assert len(earlier) >= 2
    for own in earlier:
        assert own.stop_reason == attribution_pb2.STOP_REASON_UNFINISHED
        assert attribution_pb2.CAUTION_KIND_NOT_CONVERGED in {caution.kind for caution in own.cautions}
        assert own.inputs[0].statistics and own.inputs[0].normalizations
    for own in earlier[1:]:  # the adaptive rule takes at least 16
        shorter = adaptive(**{**limits, "max_step_count": own.step_count})
        (alone,) = stub.Explain(request("slow", {"x": X}, methods=shorter, **options), timeout=60).attributions
        assert (own.step_count, own.map_error) == (alone.step_count, alone.map_error)
        assert own.inputs[0].tensor.data == alone.inputs[0].tensor.data
        assert own.inputs[0].statistics == alone.inputs[0].statistics
        assert own.score_path == alone.score_path
    (final,) = streamed.final.attributions
    assert last.inputs[0].tensor.data == final.inputs[0].tensor.data
    assert (last.stop_reason, last.cautions) == (final.stop_reason, final.cautions)


def test_partial_maps_of_folded_baselines_are_of_each(stub: ExplainerServiceStub) -> None:
    streamed = stream(stub, FOLDED, include_partial_maps=True)

    assert {place_of(own) for own in streamed.partial} == {(i, 0, b) for i in range(2) for b in range(3)}
    assert all(not own.inputs[0].HasField("spread") for own in streamed.partial)
    assert {own.HasField("baseline_index") for own in streamed.final.attributions} == {False}


def test_response_options_hold_for_partial_maps(stub: ExplainerServiceStub) -> None:
    streamed = stream(stub, REQUESTS["no tensors"], include_partial_maps=True)

    assert streamed.partial and streamed.chunks == []
    assert not any(list(tensors(own)) for own in streamed.partial)


@pytest.mark.parametrize("chunk_bytes", [1024, 5000, 0])
def test_chunks_are_as_large_as_asked_for(stub: ExplainerServiceStub, chunk_bytes: int) -> None:
    """`read` checks their order; a map of 49,152 bytes is cut into equal pieces and a rest."""
    asked = request("two-digits", {"image": normal(2, 3, 64, 64)}, methods=steps(2))
    streamed = stream(stub, asked, include_partial_maps=True, chunk_bytes=chunk_bytes)
    whole = 3 * 64 * 64 * 4
    size = min(chunk_bytes or whole, whole)

    assert len({key for key, *_ in streamed.chunks}) == len(streamed.partial) + 2 == 4
    assert [length for key, _, length in streamed.chunks if key == 0] == [size] * (whole // size) + (
        [whole % size] if whole % size else []
    )


@pytest.mark.parametrize("chunk_bytes", [-1, 1, 1023, 2**21 + 1])
def test_absurd_chunks_are_refused(stub: ExplainerServiceStub, chunk_bytes: int) -> None:
    refused = refusal(lambda: stream(stub, REQUESTS["fixed"], chunk_bytes=chunk_bytes))

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CHUNK_BYTES_OUT_OF_RANGE")


def test_a_reply_may_exceed_the_message_limit(service: Loopback) -> None:
    """3 MB of maps through a server whose messages have at most 2 MiB, chunks as large as it sends them."""
    draws = [every(uniform_noise={"count": 4, "low": -1.0, "high": 1.0})]
    large = request("two-digits", {"image": normal(16, 3, 64, 64)}, methods=steps(1), baselines=draws)

    refused = refusal(lambda: service.stub.Explain(large, timeout=60))
    streamed = stream(service.stub, large, chunk_bytes=2**21)

    assert refused.reason == "REPLY_TOO_LARGE"
    assert len(maps(streamed.final)) == 64
    one = pb.ExplainRequest()
    one.CopyFrom(large)
    one.baselines[0].every_input.uniform_noise.count = 1
    for own, alone in zip(maps(streamed.final)[::4], maps(service.stub.Explain(one, timeout=60)), strict=True):
        assert relative_distance(own, alone) < 1e-5


def test_figures_above_the_message_limit_are_refused(stub: ExplainerServiceStub) -> None:
    """What is no tensor travels in one message."""
    many = request("wide", {"x": normal(16, 4)}, targets=[element(k) for k in range(50)], methods=steps(1))

    refused = refusal(lambda: stream(stub, many))

    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REPLY_TOO_LARGE")


@pytest.mark.parametrize("name", CASES)
def test_bad_requests_are_refused_as_explain_refuses_them(stub: ExplainerServiceStub, name: str) -> None:
    case = CASES[name]

    refused = refusal(lambda: stream(stub, case.request))

    assert (refused.code, refused.reason) == (case.code, case.reason)
    assert case.metadata.items() <= refused.metadata.items()
    assert refused.trailing["x-request-id"]


def test_a_kept_response_ends_the_stream_at_once(serve: Callable[..., Loopback]) -> None:
    keeping = serve(response_cache_bytes=2**20)
    first, second = (stream(keeping.stub, REQUESTS["adaptive"]) for _ in range(2))

    assert second.final.provenance.from_cache and not first.final.provenance.from_cache
    assert "progress" in first.kinds and set(second.kinds) == {"final", "chunk"}
    assert [own.tobytes() for own in maps(second.final)] == [own.tobytes() for own in maps(first.final)]


# What ends it early


def endless(**fields: Any) -> pb.ExplainRequest:
    """Refines for seconds, in many rounds."""
    return request("slow", {"x": X}, targets=[element(0)], methods=STRICT, **fields)


def idle(service: Loopback) -> bool:
    return not service.metric("explainserve_waiting_rows") and not service.metric("explainserve_active_requests")


def evaluated(service: Loopback, model: str = "slow") -> float:
    return service.metric("explainserve_rows_total", model=model, kind="gradient")


def test_a_satisfied_client_takes_its_rows_along(service: Loopback) -> None:
    """It leaves after the second round; the rows that wait are dropped, and the others go on."""
    before = evaluated(service)
    call = service.stub.ExplainStream(pb.ExplainStreamRequest(explain=endless()), timeout=60)
    second = next(event for event in call if event.progress.step_count > 8)

    call.cancel()
    until(lambda: idle(service))

    assert second.progress.stop_reason == attribution_pb2.STOP_REASON_UNFINISHED
    assert evaluated(service) - before < 512
    assert service.metric("explainserve_requests_total", method="ExplainStream", code="CANCELLED") >= 1
    assert stream(service.stub, REQUESTS["fixed"]).final.attributions


def test_time_budget_ends_with_the_best_map_and_its_error(service: Loopback) -> None:
    streamed = stream(service.stub, endless(time_budget={"nanos": 900_000_000}), include_partial_maps=True)
    (own,) = streamed.final.attributions

    assert own.stop_reason == attribution_pb2.STOP_REASON_TIME_BUDGET
    assert (streamed.progress[-1].stop_reason, streamed.progress[-1].map_error) == (own.stop_reason, own.map_error)
    assert streamed.partial[-1].inputs[0].tensor.data == own.inputs[0].tensor.data
    assert 0 < own.step_count < 512
    assert own.map_error > 0
    until(lambda: idle(service))


def test_the_deadline_is_hard(service: Loopback) -> None:
    """Progress until then, no final map, and nothing goes on behind it."""
    before = evaluated(service)
    call = service.stub.ExplainStream(pb.ExplainStreamRequest(explain=endless()), timeout=1.0)
    kinds = []

    with pytest.raises(grpc.RpcError) as failed:
        kinds += [event.WhichOneof("event") for event in call]
    until(lambda: idle(service))

    assert of_error(failed.value).code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "final" not in kinds
    assert evaluated(service) - before < 512


def test_a_model_that_raises_ends_the_stream(stub: ExplainerServiceStub) -> None:
    bad = request(
        "multi_input", {"image": normal(1, 3, 4, 4), "ids": np.full((1, 5), 10**6, np.int64)}, targets=[element(0)]
    )

    refused = refusal(lambda: stream(stub, bad))

    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "MODEL_RAISED")


# Slow readers

HEAVY = request(
    "two-digits",
    {"image": normal(16, 3, 64, 64)},
    methods=steps(1),
    baselines=[every(uniform_noise={"count": 10, "low": -1.0, "high": 1.0})],
    response_options={"omit_statistics": True, "omit_joint_statistics": True},
)
"""160 maps, 8 MB, and with partial maps twice that: more than the connection takes without a reader."""


def test_a_slow_reader_holds_up_nobody(service: Loopback) -> None:
    """It reads nothing until all is computed and others were answered, and then gets everything that it should."""
    before = evaluated(service, "two-digits")
    call = service.stub.ExplainStream(pb.ExplainStreamRequest(explain=HEAVY, include_partial_maps=True), timeout=60)
    until(lambda: evaluated(service, "two-digits") == before + 160)

    assert stream(service.stub, REQUESTS["fixed"]).final.attributions
    assert service.metric("explainserve_active_requests", method="ExplainStream") == 1
    streamed = read(call)

    assert len(streamed.progress) == len(streamed.partial) == len(streamed.final.attributions) == 160
    partial = {place_of(own): own.inputs[0].tensor.data for own in streamed.partial}
    assert all(partial[place_of(own)] == own.inputs[0].tensor.data for own in streamed.final.attributions)


def test_a_reader_that_stands_still_is_left_at_the_limit(folder: Path, serve: Callable[..., Loopback]) -> None:
    """Without a deadline of its own the server's limit holds; what was computed for it is not kept for ever."""
    hasty = serve(models=folder, default_timeout_seconds=3.0)
    call = hasty.stub.ExplainStream(pb.ExplainStreamRequest(explain=HEAVY, include_partial_maps=True))
    until(lambda: hasty.metric("explainserve_requests_total", method="ExplainStream", code="DEADLINE_EXCEEDED") == 1)

    with pytest.raises(grpc.RpcError) as failed:
        list(call)

    assert idle(hasty)
    assert of_error(failed.value).reason == "DEADLINE_EXCEEDED"


def test_what_is_not_read_yet_counts_as_memory(service: Loopback, folder: Path, serve: Callable[..., Loopback]) -> None:
    """A reader that stands still takes others' place in the end, and gives it back when it reads on."""
    message = pb.ExplainStreamRequest(explain=HEAVY)
    needed = service.stub.EstimateCost(pb.EstimateCostRequest(explain=HEAVY), timeout=60).max_host_bytes
    small = serve(models=folder, max_waiting_bytes=64 * 2**20)
    call = small.stub.ExplainStream(message, timeout=60)
    until(lambda: evaluated(small, "two-digits") == 160)
    until(lambda: small.metric("explainserve_reserved_bytes") < needed)  # but for the messages all is given back

    assert small.metric("explainserve_reserved_bytes") > 160 * 3 * 64 * 64 * 4
    with pytest.raises(grpc.RpcError) as refused:
        list(small.stub.ExplainStream(message, timeout=60))
    assert of_error(refused.value).reason == "QUEUE_FULL"
    assert len(read(call).final.attributions) == 160
    until(lambda: small.metric("explainserve_reserved_bytes") == 0)
    assert len(stream(small.stub, HEAVY).final.attributions) == 160
