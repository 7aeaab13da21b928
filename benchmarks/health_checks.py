"""Health checks of a busy server beside those of a server that does nothing else, from processes of their own."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from numpy.typing import NDArray

EXPLAIN = "/explainserve.v1.ExplainerService/Explain"
_SPAWN = multiprocessing.get_context("spawn")
_PAUSE_SECONDS = 0.003
# Without it all channels of a process would share one connection.
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True, eq=False)
class Checks:
    """Round trips of health checks in seconds, in turn at both servers, and what the clients received meanwhile."""

    ours: NDArray[np.float64]
    bare: NDArray[np.float64]
    replies_per_second: float

    @property
    def ratio(self) -> float:
        """99th percentile of ours over that of the bare server."""
        return float(np.quantile(self.ours, 0.99) / np.quantile(self.bare, 0.99))


def checks(ours: str, bare: str, load: Load, seconds: float) -> Checks:
    """Checks the servers at two addresses in turn."""
    receiver, sender = _SPAWN.Pipe(duplex=False)
    before, started = load.replies, time.perf_counter()
    process = _SPAWN.Process(target=_check, args=((ours, bare), seconds, sender))
    process.start()
    found = receiver.recv()
    rate = (load.replies - before) / (time.perf_counter() - started)
    process.join()
    return Checks(*found, rate)


@dataclass(frozen=True, eq=False)
class Load:
    """Clients at work."""

    counter: Synchronized[int]

    @property
    def replies(self) -> int:
        """Received so far."""
        return self.counter.value


@contextmanager
def clients(address: str, request: bytes, count: int) -> Iterator[Load]:
    """`count` clients, each with a connection of its own, that repeat a request as soon as it is answered."""
    stop, counter = _SPAWN.Event(), _SPAWN.Value("q", 0)
    process = _SPAWN.Process(target=_request, args=(address, request, count, stop, counter))
    process.start()
    try:
        yield Load(counter)
    finally:
        stop.set()
        process.join()


@contextmanager
def bare_server() -> Iterator[str]:
    """The address of a grpc.aio server that has nothing but the health service, as grpc ships it."""
    own, other = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve_health, args=(other,))
    process.start()
    try:
        yield own.recv()
    finally:
        own.send(None)
        process.join()


def _serve_health(pipe: Connection) -> None:
    asyncio.run(_health_server(pipe))


async def _health_server(pipe: Connection) -> None:
    server, servicer = grpc.aio.server(), health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    pipe.send(f"127.0.0.1:{port}")
    await asyncio.to_thread(pipe.recv)
    await server.stop(None)


def _request(address: str, request: bytes, count: int, stop: Event, counter: Any) -> None:
    def repeat() -> None:
        with grpc.insecure_channel(address, _OWN_CONNECTION) as channel:
            explain = channel.unary_unary(EXPLAIN)  # bytes to bytes: reading the replies is not what is measured
            while not stop.is_set():
                explain(request)
                with counter.get_lock():
                    counter.value += 1

    threads = [threading.Thread(target=repeat) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _check(addresses: tuple[str, ...], seconds: float, sender: Connection) -> None:
    stubs = [health_pb2_grpc.HealthStub(grpc.insecure_channel(address, _OWN_CONNECTION)) for address in addresses]
    for stub in stubs:
        stub.Check(health_pb2.HealthCheckRequest())  # connects
    found: list[list[float]] = [[] for _ in stubs]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for stub, own in zip(stubs, found, strict=True):
            started = time.perf_counter()
            stub.Check(health_pb2.HealthCheckRequest())
            own.append(time.perf_counter() - started)
            time.sleep(_PAUSE_SECONDS)
    sender.send([np.array(own) for own in found])
