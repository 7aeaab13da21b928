"""The client under test, blocking and over asyncio, against a service that answers by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from client.fake_service import FakeService, captioner, start, two_digits
from explainserve_client import AsyncClient, Client, ModelInfo


class InThread:
    """A blocking client whose methods run in a thread, so that one test drives both clients."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._client, {"aclose": "close"}.get(name, name))

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await asyncio.to_thread(method, *args, **kwargs)

        return call


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def address(service: FakeService) -> Iterator[str]:
    server, address = start(service)
    yield address
    server.stop(None).wait()


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes a client of either kind, with the methods of the asyncio one."""

    def make(*args: Any, **kwargs: Any) -> Any:
        return AsyncClient(*args, **kwargs) if request.param == "asyncio" else InThread(Client(*args, **kwargs))

    return make


@pytest_asyncio.fixture
async def client(connect: Callable[..., Any], address: str) -> AsyncIterator[Any]:
    client = connect(address, timeout=10)
    yield client
    await client.aclose()


@pytest.fixture
def info() -> ModelInfo:
    """The signature of two-digits."""
    return ModelInfo.from_proto(two_digits())


@pytest.fixture
def several_inputs() -> ModelInfo:
    """The signature of the captioner."""
    return ModelInfo.from_proto(captioner())
