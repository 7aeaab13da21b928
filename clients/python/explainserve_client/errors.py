"""Everything this client raises on purpose.

    ExplainServeError
    +- RequestValueError (also ValueError)      an argument has a value that cannot be sent
    +- RequestTypeError (also TypeError)        an argument has a type that cannot be sent
    +- ClientClosedError (also RuntimeError)    the client was used after it was closed
    +- MissingEntryError (also KeyError)        a result has no entry of that name; the message lists the names
    +- MalformedResponseError                   the server's answer contradicts itself
    +- ServerError                              the call failed; carries code, reason, metadata, request_id
       +- InvalidArgument
       +- NotFound
       +- FailedPrecondition
       +- ResourceExhausted
       +- DeadlineExceeded
       +- Cancelled
       +- Unimplemented
       +- Unavailable
       +- Internal

A status code without a class of its own (such as PERMISSION_DENIED of a proxy) is a plain `ServerError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

REQUEST_ID_KEY = "x-request-id"
_DETAILS_KEY = "grpc-status-details-bin"

Metadata = Iterable[tuple[str, str | bytes]]
Detail = TypeVar("Detail")


class ExplainServeError(Exception):
    """Root of all errors of this client."""


class RequestValueError(ExplainServeError, ValueError):
    """An argument has a value that cannot be sent. Raised before anything is sent."""


class RequestTypeError(ExplainServeError, TypeError):
    """An argument has a type that cannot be sent. Raised before anything is sent."""


class ClientClosedError(ExplainServeError, RuntimeError):
    """The client was used after it was closed."""


class MissingEntryError(ExplainServeError, KeyError):
    """A result has no entry of that name; the message lists the names that there are."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows the repr of its argument, which escapes the sentence


class MalformedResponseError(ExplainServeError):
    """The server's answer contradicts itself, such as a tensor whose bytes do not fill its shape."""


class ServerError(ExplainServeError):
    """The call failed.

    Attributes:
        message: the server's sentence.
        code: canonical status code, such as "INVALID_ARGUMENT".
        reason: UPPER_SNAKE reason of google.rpc.ErrorInfo, such as "INPUT_SHAPE_MISMATCH"; "" where there is none.
        metadata: names and values of google.rpc.ErrorInfo, such as which input, expected and actual.
        request_id: id of the request, as in the server's logs.
        retry_after_seconds: when the server expects to have room, or the model (google.rpc.RetryInfo); None where
            trying again is no help. The client never waits so long and tries again by itself: many that did would
            come back together.
    """

    def __init__(
        self,
        message: str,
        code: str,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message, code, reason, dict(metadata or {}), request_id, retry_after_seconds)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        reason = f" {self.reason}" if self.reason else ""
        return f"{self.code}{reason}: {self.message} (request {self.request_id or 'without id'})"


class InvalidArgument(ServerError):
    """The request is wrong whatever the state of the server: shape, dtype, byte count, NaN, target out of range."""


class NotFound(ServerError):
    """No such model, version or label."""


class FailedPrecondition(ServerError):
    """The model cannot do what was asked for; `reason` names the missing capability."""


class ResourceExhausted(ServerError):
    """The server is full (`retry_after_seconds` tells when to try again), or the request or its reply is above a cap
    (steps, rows, bytes)."""


class DeadlineExceeded(ServerError):
    """The call did not end within `timeout`, or not even the first round fitted into `time_budget`."""


class Cancelled(ServerError):
    """The call was cancelled."""


class Unimplemented(ServerError):
    """The server does not have this call or option yet; the message says what is missing."""


class Unavailable(ServerError):
    """The server cannot be reached, or stops, or the model still loads (`retry_after_seconds` tells when to try again);
    also after the retries."""


class Internal(ServerError):
    """The server failed; its logs have the request id."""


_CLASSES: dict[str, type[ServerError]] = {
    "INVALID_ARGUMENT": InvalidArgument,
    "NOT_FOUND": NotFound,
    "FAILED_PRECONDITION": FailedPrecondition,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "UNIMPLEMENTED": Unimplemented,
    "UNAVAILABLE": Unavailable,
    "INTERNAL": Internal,
}


def server_error(error: grpc.RpcError, request_id: str) -> ServerError:
    """Translates what grpc raised; `request_id` is used where the server sent none."""
    call: Any = error  # grpc raises the call itself, which its stubs do not say
    trailing = list(call.trailing_metadata() or ())
    code = call.code().name
    details = _details(trailing)
    info = _unpacked(details, error_details_pb2.ErrorInfo()) or error_details_pb2.ErrorInfo()
    retry = _unpacked(details, error_details_pb2.RetryInfo())
    return _CLASSES.get(code, ServerError)(
        call.details() or "",
        code,
        info.reason,
        dict(info.metadata),
        request_id_of(trailing) or request_id,
        retry.retry_delay.ToNanoseconds() / 1e9 if retry is not None else None,
    )


def request_id_of(trailing: Metadata | None) -> str:
    """The request id that the server sent in the trailing metadata, or ""."""
    return next((str(value) for key, value in trailing or () if key == REQUEST_ID_KEY), "")


def _details(trailing: Metadata) -> list[Any]:
    """Details of the rich status (google.rpc.Status), empty where a proxy or an old server sent none."""
    for key, value in trailing:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:  # the code and the sentence are still worth more than this failure
                return []
    return []


def _unpacked(details: Iterable[Any], message: Detail) -> Detail | None:
    """The message, filled from the detail of its type; None where there is none that can be read."""
    try:
        return message if any(detail.Unpack(message) for detail in details) else None
    except DecodeError:
        return None
