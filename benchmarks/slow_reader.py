"""A connection whose client reads slowly, or vanishes: a proxy on loopback between a gRPC channel and the server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

RECEIVE_BUFFER = 4096
"""Small, so that the server notices soon that nobody reads."""


@dataclass(eq=False)
class SlowReader:
    """Takes one connection and passes it on.

    Args:
        bytes_per_second: how fast answers are read.
    """

    server: tuple[str, int]
    bytes_per_second: float
    _listener: socket.socket = field(init=False)
    _sockets: list[socket.socket] = field(init=False, default_factory=list)
    _threads: list[threading.Thread] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._run(self._accept)

    @property
    def address(self) -> str:
        """What a channel connects to."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def vanish(self) -> None:
        """Cuts the connection in both directions at once, whatever is under way."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, name="slow reader", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            client, _ = self._listener.accept()
            self._sockets.append(client)
            server = socket.socket()
            self._sockets.append(server)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            server.connect(self.server)
            self._run(_pass_on, client, server, float("inf"))
            _pass_on(server, client, self.bytes_per_second)


def _pass_on(source: socket.socket, sink: socket.socket, bytes_per_second: float) -> None:
    with suppress(OSError):
        while data := source.recv(RECEIVE_BUFFER):
            sink.sendall(data)
            time.sleep(len(data) / bytes_per_second)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def reading_slowly(server: str, bytes_per_second: float) -> Iterator[SlowReader]:
    """A slow reader of the server at "HOST:PORT", which vanishes in the end."""
    host, _, port = server.rpartition(":")
    reader = SlowReader((host, int(port)), bytes_per_second)
    try:
        yield reader
    finally:
        reader.vanish()
