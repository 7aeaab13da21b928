"""Metrics and liveness over HTTP: /metrics, /livez, /readyz."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class HttpServer:
    """A small threaded server for probes and scrapers.

    Args:
        host, port: where to listen; port 0 picks a free one.
        registry: what /metrics shows.
        alive, ready: whether /livez and /readyz answer 200.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        alive: Callable[[], bool],
        ready: Callable[[], bool],
    ) -> None:
        self._metrics = make_wsgi_app(registry)
        self._alive = alive
        self._ready = ready
        kind = _ThreadingServer6 if ":" in host else _ThreadingServer
        self._server = make_server(host, port, self._answer, kind, _QuietHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.server_port

    def start(self) -> None:
        """Starts to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stops to answer."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                exposition: Iterable[bytes] = self._metrics(environ, start_response)
                return exposition
            case "/livez" if self._alive():
                return _text(start_response, "200 OK", "alive\n")
            case "/livez":
                return _text(start_response, "503 Service Unavailable", "stuck\n")
            case "/readyz" if self._ready():
                return _text(start_response, "200 OK", "ready\n")
            case "/readyz":
                return _text(start_response, "503 Service Unavailable", "not ready\n")
            case _:
                return _text(start_response, "404 Not Found", "/metrics, /livez, /readyz\n")


def _text(start_response: StartResponse, status: str, body: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [body.encode()]


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _ThreadingServer6(_ThreadingServer):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Probes and scrapes are not worth a line each."""
