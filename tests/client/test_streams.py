"""Streams of both clients: which events come out, how pieces become tensors, and what ends them."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from client.fake_service import (
    FakeService,
    explain_response,
    in_pieces,
    maps,
    refuse,
    stream_responses,
    tensor,
)
from explainserve.v1 import baseline_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve_client import (
    AsyncClient,
    Attribution,
    Client,
    ExplainResult,
    InvalidArgument,
    MalformedResponseError,
    Progress,
    RequestValueError,
    Unavailable,
)

IMAGE = np.zeros((1, 64, 64), np.float32)


async def events(client: Any, *args: Any, **options: Any) -> list[Any]:
    """All events of a stream of either client."""
    stream = client.explain_stream(*args, **options)
    if inspect.isasyncgen(stream):
        return [event async for event in stream]
    return await asyncio.to_thread(list, await stream)


@pytest.mark.parametrize("size", [1, 1000, 5000, 16384, 10**6])
async def test_events_are_typed_and_end_with_the_result(client: Any, service: FakeService, size: int) -> None:
    service.answers["ExplainStream"] = lambda request, context: stream_responses(max(size, 100))
    first, partial, second, result = await events(client, "two-digits", IMAGE, partial_maps=True)

    assert [type(event) for event in (first, partial, second, result)] == [
        Progress,
        Attribution,
        Progress,
        ExplainResult,
    ]
    assert (first.step_count, first.map_error, first.convergence_delta, first.finished) == (8, 1 / 8, None, False)
    assert (first.position.target_index, first.path_count, first.max_step_count) == (1, 2, 64)
    assert (second.stop_reason, second.finished) == ("CONVERGED", True)
    assert partial.stop_reason == "UNFINISHED"
    np.testing.assert_array_equal(partial.tensor, maps()[1])
    assert partial.normalization("MIN_MAX", "CHANNEL_SUM").apply(partial.tensor).shape == (64, 64)
    alone = await client.explain("two-digits", IMAGE)
    for own, expected in zip(result.attributions, alone.attributions, strict=True):
        np.testing.assert_array_equal(own.tensor, expected.tensor)
        assert own.statistics["CHANNEL_SUM"].max == expected.statistics["CHANNEL_SUM"].max
    assert result.request_id == service.calls[1][2]["x-request-id"]


async def test_the_request_is_that_of_explain(client: Any, service: FakeService) -> None:
    options: dict[str, Any] = {"targets": [3], "baselines": "gray", "version": 2, "time_budget": 0.5, "priority": 1}
    await client.explain("two-digits", IMAGE, **options)
    await events(client, "two-digits", IMAGE, partial_maps=True, **options)
    await events(client, "two-digits", IMAGE)

    (alone,), (asked, bare) = service.requests("Explain"), service.requests("ExplainStream")
    assert asked.explain == alone
    assert (asked.include_partial_maps, bare.include_partial_maps) == (True, False)


async def test_every_tensor_may_come_in_pieces(client: Any, service: FakeService) -> None:
    """Spreads and baselines too."""
    response = explain_response()
    del response.attributions[1:]
    del response.joint[:]
    response.attributions[0].inputs[0].spread.CopyFrom(tensor(maps()[1]))
    used = baseline_pb2.UsedInputBaseline(input="image", tensor=tensor(maps()[0] * 2))
    response.baselines.add(inputs=[used])
    final = pb.ExplainStreamResponse(final=response)
    own = final.final.attributions[0].inputs[0]
    tensors = [own.tensor, own.spread, final.final.baselines[0].inputs[0].tensor]
    messages = in_pieces(final, tensors, 4000, 0)
    service.answers["ExplainStream"] = lambda request, context: messages

    (result,) = await events(client, "two-digits", IMAGE)

    np.testing.assert_array_equal(result.attributions[0].inputs["image"].spread, maps()[1])
    np.testing.assert_array_equal(result.baselines[0].inputs[0].tensor, maps()[0] * 2)


def without(position: int) -> list[pb.ExplainStreamResponse]:
    messages = stream_responses()
    del messages[position]
    return messages


def swapped() -> list[pb.ExplainStreamResponse]:
    messages = stream_responses()
    messages[2], messages[3] = messages[3], messages[2]
    return messages


BROKEN: dict[str, Callable[[], list[pb.ExplainStreamResponse]]] = {
    "a piece is missing": lambda: without(2),
    "the last piece is missing": lambda: without(5),
    "pieces are swapped": swapped,
    "the end is missing": lambda: stream_responses()[:-1],
    "no result": lambda: stream_responses()[:1],
    "nothing": list,
    "a piece of nothing": lambda: [pb.ExplainStreamResponse(chunk=pb.TensorChunk(data=b"1234"))],
    "a piece too long": lambda: [
        stream_responses()[1],
        pb.ExplainStreamResponse(chunk=pb.TensorChunk(data=bytes(4 * maps()[1].size + 4))),
    ],
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_stream_that_contradicts_itself_is_told(client: Any, service: FakeService, case: str) -> None:
    service.answers["ExplainStream"] = lambda request, context: BROKEN[case]()

    with pytest.raises(MalformedResponseError):
        await events(client, "two-digits", IMAGE)


async def test_an_event_of_a_newer_server_is_passed_over(client: Any, service: FakeService) -> None:
    service.answers["ExplainStream"] = lambda request, context: [pb.ExplainStreamResponse(), *stream_responses()]

    assert len(await events(client, "two-digits", IMAGE)) == 4


async def test_an_error_in_the_middle_is_raised_with_its_reason(client: Any, service: FakeService) -> None:
    def explain(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield stream_responses()[0]
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "REGION_OUT_OF_BOUNDS", "too far", {"region": "left"})

    service.answers["ExplainStream"] = explain
    with pytest.raises(InvalidArgument) as refused:
        await events(client, "two-digits", IMAGE, request_id="mine")

    assert (refused.value.reason, refused.value.request_id) == ("REGION_OUT_OF_BOUNDS", "mine")
    await client.model("two-digits")


async def test_what_cannot_be_sent_is_told_at_the_first_event(client: Any, service: FakeService) -> None:
    with pytest.raises(RequestValueError):
        await events(client, "two-digits", IMAGE, time_budget=-1)

    assert service.requests("ExplainStream") == []


async def test_the_signature_is_fetched_again_after_an_error(client: Any, service: FakeService) -> None:
    def explain(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "SHAPE_MISMATCH", "another shape", {})
        yield

    service.answers["ExplainStream"] = explain
    for _ in range(2):
        with pytest.raises(InvalidArgument):
            await events(client, "two-digits", IMAGE)

    assert len(service.requests("GetModel")) == 2


@pytest.fixture
def endless(service: FakeService) -> threading.Event:
    """The stream goes on until its reader leaves; set when it has."""
    ended = threading.Event()

    def explain(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(ended.set)
        yield stream_responses()[0]
        ended.wait(10)

    service.answers["ExplainStream"] = explain
    return ended


async def test_closing_cancels_the_call(address: str, endless: threading.Event) -> None:
    async with AsyncClient(address) as client:
        stream = client.explain_stream("two-digits", IMAGE, timeout=9)
        assert isinstance(await anext(stream), Progress)
        await stream.aclose()

        assert await asyncio.to_thread(endless.wait, 5)


def test_closing_a_blocking_stream_cancels_the_call(address: str, endless: threading.Event) -> None:
    with Client(address) as client:
        stream = client.explain_stream("two-digits", IMAGE, timeout=9)
        assert isinstance(next(stream), Progress)
        stream.close()

        assert endless.wait(5)


def test_leaving_the_loop_cancels_the_call(address: str, endless: threading.Event) -> None:
    with Client(address) as client:
        for _ in client.explain_stream("two-digits", IMAGE, timeout=9):
            break
        gc.collect()

        assert endless.wait(5)


async def test_cancelling_the_task_cancels_the_call(address: str, endless: threading.Event) -> None:
    async with AsyncClient(address) as client:
        running = asyncio.create_task(events(client, "two-digits", IMAGE, timeout=9))
        await asyncio.sleep(0.2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

        assert await asyncio.to_thread(endless.wait, 5)


async def test_a_server_that_cannot_be_reached(connect: Callable[..., Any]) -> None:
    client = connect("127.0.0.1:1", timeout=5)

    with pytest.raises(Unavailable):
        await events(client, "two-digits", IMAGE)
    await client.aclose()
