"""What every RPC gets: a request id, error translation, metrics and one log line.

Our own instead of OpenTelemetry's, whose interceptors misreport status codes on asyncio servers.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from explainserve.errors import ExplainServeError, InvalidRequest, LimitExceeded
from explainserve.metrics import Metrics
from explainserve.rpc import status

REQUEST_ID_KEY = "x-request-id"
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_OWN_SERVICES = "/explainserve."
"""Their messages may be large: workers write them, and read those that are not small. Those of others are small, and a
health check must not wait until a worker is free.
"""

_SMALL_MESSAGE_BYTES = 1 << 16
"""Up to here reading a message takes less than the turn of a worker that would do it."""

Deserializer = Callable[[bytes], Any]
Serializer = Callable[[Any], bytes]

Conversion = Callable[..., Awaitable[Any]]
"""Calls a function with an argument, here or in a worker."""

Handler = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]


class ObservingInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the unary RPCs of all services and the server streams of our own, which are coroutines that call
    `context.write` with bytes: gRPC itself would serialize their messages on the event loop.

    Args:
        metrics: instruments to feed.
        log: logger of finished RPCs.
        max_message_bytes: largest request and largest reply of a unary RPC. gRPC itself refuses without a reason.
    """

    def __init__(self, metrics: Metrics, log: structlog.stdlib.BoundLogger, max_message_bytes: int) -> None:
        self._metrics = metrics
        self._log = log
        self._max_message_bytes = max_message_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of an RPC."""
        handler = await continuation(details)
        if handler is None:
            return handler
        method = details.method.rsplit("/", 1)[-1]
        own = details.method.startswith(_OWN_SERVICES)
        convert: Conversion = asyncio.to_thread if own else _at_once
        if handler.unary_unary is not None:
            whole = self._serialized(handler.unary_unary, handler.response_serializer, convert)
            answer = self._observed(method, handler.request_deserializer, whole, convert)
            return grpc.unary_unary_rpc_method_handler(answer)
        if handler.unary_stream is not None and own:
            answer = self._observed(method, handler.request_deserializer, handler.unary_stream, convert)
            return grpc.unary_stream_rpc_method_handler(answer)
        return handler

    def _serialized(self, handler: Any, serialize: Serializer | None, convert: Conversion) -> Handler:
        """Writes the reply itself, unless its handler did: grpc would refuse a large one without a reason, after it was
        logged as OK."""

        async def serialized(message: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            reply = await handler(message, context)
            data = reply if serialize is None or isinstance(reply, bytes) else await convert(serialize, reply)
            size, limit = len(data), self._max_message_bytes
            if size > limit:
                text = f"the reply has {size} bytes, the limit is {limit}"
                raise LimitExceeded("REPLY_TOO_LARGE", text, reply_bytes=size, limit=limit)
            return data

        return serialized

    async def _message(self, deserialize: Deserializer | None, data: bytes, convert: Conversion) -> Any:
        size, limit = len(data), self._max_message_bytes
        if size > limit:
            text = f"the request has {size} bytes, the limit is {limit}"
            raise LimitExceeded("MESSAGE_TOO_LARGE", text, size=size, limit=limit)
        read = _at_once if size <= _SMALL_MESSAGE_BYTES else convert
        try:
            return data if deserialize is None else await read(deserialize, data)
        except DecodeError as error:
            raise InvalidRequest("MESSAGE_MALFORMED", f"the bytes are no message of this method: {error}") from error

    def _observed(self, method: str, deserialize: Deserializer | None, handler: Any, convert: Conversion) -> Handler:
        """Reads the message itself: grpc would answer a malformed or large one without a reason, and unseen."""

        async def observed(message: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            identifier = _request_id(context)
            structlog.contextvars.bind_contextvars(request_id=identifier)
            context.set_trailing_metadata(((REQUEST_ID_KEY, identifier),))
            finish = functools.partial(self._finish, method, time.monotonic())
            with self._metrics.active_requests.labels(method).track_inprogress():
                try:
                    reply = await handler(await self._message(deserialize, message, convert), context)
                except asyncio.CancelledError:
                    finish(_cancelled_code(context))
                    raise
                except grpc.aio.AbortError:
                    finish(context.code())
                    raise
                except Exception as error:
                    finish(status.code(error), error)
                    refused = status.status(error)
                else:
                    finish(grpc.StatusCode.OK)
                    return reply
            # Here, where nothing holds the error and its frames any more: it waits for the reader of a stream.
            await context.abort_with_status(_with_request_id(refused, identifier))

        return observed

    def _finish(self, method: str, started: float, code: grpc.StatusCode, error: Exception | None = None) -> None:
        seconds = time.monotonic() - started
        self._metrics.requests.labels(method, code.name).inc()
        self._metrics.request_seconds.labels(method).observe(seconds)
        fields: dict[str, Any] = {"method": method, "code": code.name, "seconds": round(seconds, 6)}
        if isinstance(error, ExplainServeError):
            self._log.info("rpc", **fields, reason=error.reason, message=error.message)
        elif error is not None:
            self._log.error("rpc", **fields, exc_info=error)
        else:
            self._log.info("rpc", **fields)


async def _at_once(function: Callable[[Any], Any], argument: Any) -> Any:
    return function(argument)


class _StatusWithId(grpc.Status):
    """A status whose trailing metadata also carries the request id."""

    def __init__(self, base: grpc.Status, identifier: str) -> None:
        self.code = base.code
        self.details = base.details
        self.trailing_metadata = (*(base.trailing_metadata or ()), (REQUEST_ID_KEY, identifier))


def _with_request_id(base: grpc.Status, identifier: str) -> grpc.Status:
    return _StatusWithId(base, identifier)


def _request_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The client's own id where it is a short token, a new one otherwise."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _ACCEPTED_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


def _cancelled_code(context: grpc.aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    """grpc.aio cancels the handler both when the client leaves and when its deadline passes."""
    remaining = context.time_remaining()
    return grpc.StatusCode.DEADLINE_EXCEEDED if remaining is not None and remaining <= 0 else grpc.StatusCode.CANCELLED
