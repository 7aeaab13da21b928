"""What ExplainStream adds to Explain: the newest round of each path for readers of any speed, and tensors in chunks."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import grpc

from explainserve.errors import InvalidRequest
from explainserve.explainer import Observer, Round
from explainserve.query import Place
from explainserve.v1 import attribution_pb2, tensor_pb2
from explainserve.v1 import explainer_service_pb2 as pb

DEFAULT_CHUNK_BYTES = 2**20
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 2**10, 2**21
"""Small enough for the 4 MiB that clients of gRPC accept by default, and for the event loop between two of them."""

_CHUNK_OVERHEAD = 64
"""Bytes of a message around the data of its chunk, at most."""

T = TypeVar("T")
Events = TypeVar("Events")


class NewestRounds:
    """Rounds on their way to one reader: of each path only the newest that was not read.

    So a slow reader holds up nothing, and no more than one round of each path is kept. Used on the event loop.
    """

    def __init__(self) -> None:
        self._unread: dict[Place, Round] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, latest: Round) -> None:
        """Takes a round, in the place of an unread one of its path: the path that waits longest is read first."""
        self._unread[latest.place] = latest
        self._changed.set()

    def close(self) -> None:
        """Ends the iteration once everything is read."""
        self._closed = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[Round]:
        while self._unread or not self._closed:
            if self._unread:
                yield self._unread.pop(next(iter(self._unread)))
            else:
                self._changed.clear()
                await self._changed.wait()


class Chunks:
    """Turns messages into events without the bytes of their tensors, and those into the chunks that follow.

    Events come serialized, each made when it is taken: so a reader that is slow has one of them waiting, and whoever
    takes them can do so beside the event loop.

    Args:
        wanted_bytes: largest data of a chunk as the client asks for it; 0 is the default.
        max_message_bytes: largest message of the server.

    Raises:
        InvalidRequest: CHUNK_BYTES_OUT_OF_RANGE.
    """

    def __init__(self, wanted_bytes: int, max_message_bytes: int) -> None:
        if wanted_bytes and not MIN_CHUNK_BYTES <= wanted_bytes <= MAX_CHUNK_BYTES:
            raise InvalidRequest(
                "CHUNK_BYTES_OUT_OF_RANGE",
                f"chunk_bytes {wanted_bytes} is not in [{MIN_CHUNK_BYTES}, {MAX_CHUNK_BYTES}]",
                chunk_bytes=wanted_bytes,
                min=MIN_CHUNK_BYTES,
                max=MAX_CHUNK_BYTES,
            )
        self._chunk_bytes = max(1, min(wanted_bytes or DEFAULT_CHUNK_BYTES, max_message_bytes - _CHUNK_OVERHEAD))
        self._keys = itertools.count()

    def round(self, progress: pb.Progress, partial: attribution_pb2.Attribution | None) -> Iterator[bytes]:
        """Events of one round of a path."""
        yield _event(progress=progress)
        if partial is not None:
            taken = self._taken(_tensors_of_map(partial))
            yield _event(partial=partial)
            yield from self._events(taken)

    def final(self, response: pb.ExplainResponse) -> Iterator[bytes]:
        """Events of the final response, which is not kept for them."""
        taken = self._taken(_tensors(response))
        return itertools.chain([_event(final=response)], self._events(taken))

    def _taken(self, tensors: Iterable[tensor_pb2.Tensor]) -> list[tuple[int, bytes]]:
        """Keys and bytes of the tensors, which keep the keys alone."""
        taken = []
        for tensor in tensors:
            tensor.chunk_key = next(self._keys)
            taken.append((tensor.chunk_key, tensor.data))
            tensor.ClearField("data")
        return taken

    def _events(self, taken: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
        for key, data in taken:
            for offset in range(0, len(data), self._chunk_bytes):
                piece = data[offset : offset + self._chunk_bytes]
                yield _event(chunk=pb.TensorChunk(chunk_key=key, offset=offset, data=piece))


async def watched(
    compute: Callable[[Observer], Coroutine[Any, Any, T]],
    events: Callable[[Round], Awaitable[Events]],
    send: Callable[[Events], Awaitable[None]],
) -> T:
    """What is computed; meanwhile sends the events of the newest round of each path, as fast as `send` gets on.

    A round that is being sent is not kept: it may hold all gradients of its path. Cancelling, or an error of any of
    them, drops the work that is left.
    """
    rounds = NewestRounds()
    computing = asyncio.create_task(compute(rounds.put))
    computing.add_done_callback(lambda _: rounds.close())
    try:
        async for latest in rounds:
            told = await events(latest)
            del latest
            await send(told)
        return await computing
    finally:
        computing.cancel()
        await asyncio.gather(computing, return_exceptions=True)


async def write(context: grpc.aio.ServicerContext[Any, Any], events: Iterator[bytes]) -> None:
    """Sends events as fast as the client reads; workers make them."""
    while (event := await asyncio.to_thread(next, events, None)) is not None:
        await context.write(event)


def _event(**kind: Any) -> bytes:
    return pb.ExplainStreamResponse(**kind).SerializeToString()


def _tensors(response: pb.ExplainResponse) -> Iterator[tensor_pb2.Tensor]:
    """All tensors with elements."""
    for attribution in response.attributions:
        yield from _tensors_of_map(attribution)
    for baseline in response.baselines:
        yield from (own.tensor for own in baseline.inputs if own.tensor.data)


def _tensors_of_map(attribution: attribution_pb2.Attribution) -> Iterator[tensor_pb2.Tensor]:
    for own in attribution.inputs:
        yield from (tensor for tensor in (own.tensor, own.spread) if tensor.data)
