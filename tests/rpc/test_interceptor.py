"""Where messages are read and written: by workers, and small ones, such as a health check, at once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
import structlog
from prometheus_client import CollectorRegistry

from explainserve.metrics import Metrics
from explainserve.rpc.interceptor import ObservingInterceptor


class Details:
    """Of a call."""

    def __init__(self, method: str) -> None:
        self.method = method


class Context:
    """Of a call without metadata."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def set_trailing_metadata(self, metadata: object) -> None:
        pass


LARGE = b"m" * (1 << 17)


def interceptor() -> ObservingInterceptor:
    return ObservingInterceptor(Metrics(CollectorRegistry()), structlog.stdlib.get_logger(), 1 << 20)


async def threads_of(method: str, data: bytes) -> list[str]:
    """Names of the threads that read a message, answer it and write the reply."""
    threads: list[str] = []

    def note() -> None:
        threads.append(threading.current_thread().name)

    def read(data: bytes) -> str:
        note()
        return data.decode()

    async def answer(message: str, context: Any) -> str:
        note()
        return message

    def write(message: str) -> bytes:
        note()
        return message.encode()

    async def continuation(details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(answer, read, write)

    handler: Any = await interceptor().intercept_service(continuation, Details(method))
    assert await handler.unary_unary(data, Context()) == data
    return threads


@pytest.mark.parametrize(
    ("method", "by_workers"),
    [
        ("/explainserve.v1.ExplainerService/Explain", True),
        ("/explainserve.v1.ModelRepositoryService/LoadModel", True),
        ("/grpc.health.v1.Health/Check", False),
    ],
)
def test_only_messages_of_our_own_services_wait_for_a_worker(method: str, by_workers: bool) -> None:
    read, answered, written = asyncio.run(threads_of(method, LARGE))

    loop = threading.current_thread().name
    assert answered == loop
    assert (read != loop, written != loop) == (by_workers, by_workers)


def test_a_small_message_is_read_at_once() -> None:
    """A worker's turn would take longer; how large the reply is nobody knows before it is written."""
    read, _, written = asyncio.run(threads_of("/explainserve.v1.ExplainerService/Explain", b"small"))

    loop = threading.current_thread().name
    assert (read == loop, written == loop) == (True, False)


def test_a_reply_that_its_handler_wrote_goes_out_as_it_is() -> None:
    async def answer(message: bytes, context: Any) -> bytes:
        return b"written"

    async def continuation(details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(answer, bytes, bytes.upper)

    async def reply() -> bytes:
        details = Details("/explainserve.v1.ExplainerService/Explain")
        handler: Any = await interceptor().intercept_service(continuation, details)
        written: bytes = await handler.unary_unary(b"", Context())
        return written

    assert asyncio.run(reply()) == b"written"


def test_our_streams_write_bytes() -> None:
    """gRPC would serialize their messages on the event loop."""

    async def answer(message: bytes, context: Any) -> None:
        await context.write(b"event")

    async def continuation(details: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(answer, bytes, bytes.upper)

    details = Details("/explainserve.v1.ExplainerService/ExplainStream")
    handler: Any = asyncio.run(interceptor().intercept_service(continuation, details))

    assert handler.unary_stream is not None
    assert handler.response_serializer is None
