"""Channels and calls: the only pairs of functions that differ between the blocking and the asyncio client."""

from __future__ import annotations

import json
import math
import time
import uuid
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from grpc import aio

from explainserve_client.errors import REQUEST_ID_KEY, request_id_of, server_error

Request = TypeVar("Request")
Response = TypeVar("Response")
ChannelOptions = list[tuple[str, Any]]

# Only UNAVAILABLE is safe to try again: whatever else comes back, the server has seen the request and said no.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "explainserve.v1.ExplainerService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_HEALTH_STATES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


@dataclass(frozen=True, slots=True)
class CallContext:
    """Deadline on the monotonic clock (None: no limit) and id, shared by all messages of one call of the client."""

    deadline: float | None
    request_id: str

    @classmethod
    def starting_now(cls, timeout: float | None, request_id: str | None) -> CallContext:
        """`timeout` in seconds, None or infinity for no limit; an id is made up where none is given."""
        limited = timeout is not None and timeout != math.inf
        deadline = time.monotonic() + timeout if limited and timeout is not None else None
        return cls(deadline, request_id or uuid.uuid4().hex)

    @property
    def timeout(self) -> float | None:
        """Seconds that are left."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every message carries."""
        return ((REQUEST_ID_KEY, self.request_id),)


def open_channel(target: str, credentials: grpc.ChannelCredentials | None, max_message_bytes: int) -> grpc.Channel:
    """A blocking channel; connects when first used."""
    options = _channel_options(max_message_bytes)
    if credentials is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)


def open_async_channel(target: str, credentials: grpc.ChannelCredentials | None, max_message_bytes: int) -> aio.Channel:
    """A channel of the running event loop; connects when first used."""
    options = _channel_options(max_message_bytes)
    if credentials is None:
        return aio.insecure_channel(target, options=options)
    return aio.secure_channel(target, credentials, options=options)


def send(
    method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request, context: CallContext
) -> tuple[Response, str]:
    """The response and the request id that the server used.

    Raises:
        ServerError: the call failed.
    """
    try:
        response, call = method.with_call(request, timeout=context.timeout, metadata=context.metadata)
    except grpc.RpcError as error:
        raise server_error(error, context.request_id) from error
    return response, request_id_of(call.trailing_metadata()) or context.request_id


async def send_async(
    method: aio.UnaryUnaryMultiCallable[Request, Response], request: Request, context: CallContext
) -> tuple[Response, str]:
    """The response and the request id that the server used; cancelling the task cancels the call.

    Raises:
        ServerError: the call failed.
    """
    call = method(request, timeout=context.timeout, metadata=aio.Metadata(*context.metadata))
    try:
        response = await call
        trailing = await call.trailing_metadata()
    except grpc.RpcError as error:
        raise server_error(error, context.request_id) from error
    return response, request_id_of(trailing) or context.request_id


def open_stream(
    method: grpc.UnaryStreamMultiCallable[Request, Response], request: Request, context: CallContext
) -> Any:
    """A call whose responses are iterated; they raise grpc.RpcError."""
    return method(request, timeout=context.timeout, metadata=context.metadata)


def open_async_stream(
    method: aio.UnaryStreamMultiCallable[Request, Response], request: Request, context: CallContext
) -> Any:
    """A call whose responses are iterated; they raise grpc.RpcError."""
    return method(request, timeout=context.timeout, metadata=aio.Metadata(*context.metadata))


def health_check(channel: Any) -> Any:
    """The call grpc.health.v1.Health/Check.

    Its messages hold one field each, a string and an enum, so the well-known wrappers are the same bytes and no further
    package is needed.
    """
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=StringValue.SerializeToString,
        response_deserializer=Int32Value.FromString,
    )


def health_state(response: Int32Value) -> str:
    """Name of the serving status."""
    return _HEALTH_STATES[response.value] if 0 <= response.value < len(_HEALTH_STATES) else "UNKNOWN"


def _channel_options(max_message_bytes: int) -> ChannelOptions:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        # A message that overflows this buffer (256 KiB unless told) is never retried, and one image is more than that.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
    ]
