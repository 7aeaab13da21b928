"""Where messages are read and written: those of our own services by workers, a health check at once."""

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


def interceptor() -> ObservingInterceptor:
    return ObservingInterceptor(Metrics(CollectorRegistry()), structlog.stdlib.get_logger(), 1000)


async def threads_of(method: str) -> list[str]:
    """Names of the threads that read a message, answer it and write the reply."""
    threads: list[str] = []

    def noted(message: bytes) -> bytes:
        threads.append(threading.current_thread().name)
        return message

    async def answer(message: bytes, context: Any) -> bytes:
        return noted(message)

    async def continuation(details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(answer, noted, noted)

    handler: Any = await interceptor().intercept_service(continuation, Details(method))
    assert await handler.unary_unary(b"message", Context()) == b"message"
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
    read, answered, written = asyncio.run(threads_of(method))

    loop = threading.current_thread().name
    assert answered == loop
    assert (read != loop, written != loop) == (by_workers, by_workers)


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
