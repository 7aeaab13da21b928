"""Errors become gRPC status codes here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from explainserve import errors

DOMAIN = "explainserve"
MAX_DETAIL_BYTES = 4096
"""Details are cut to this: trailing metadata above 8 KiB can reach clients as RESOURCE_EXHAUSTED, details travel in
base64, and the message travels beside them once more, with three characters for each byte outside of ASCII."""

_MAX_MESSAGE_BYTES = 768
_MAX_VALUE_BYTES = 1024

CODES: dict[type[errors.ExplainServeError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Unsupported: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.LimitExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotReady: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.ShuttingDown: grpc.StatusCode.UNAVAILABLE,
    errors.EvaluationFailed: grpc.StatusCode.INTERNAL,
    errors.ModelRefused: grpc.StatusCode.FAILED_PRECONDITION,
}


def code(error: Exception) -> grpc.StatusCode:
    """The status code of an error; INTERNAL for anything that was not raised on purpose."""
    return CODES.get(type(error), grpc.StatusCode.INTERNAL)  # type: ignore[arg-type]


def status(error: Exception) -> grpc.Status:
    """The rich status of an error: code, message, google.rpc.ErrorInfo with reason and metadata, and
    google.rpc.RetryInfo where trying again later may help."""
    if isinstance(error, errors.ExplainServeError):
        return _status(code(error), error.message, error.reason, error.metadata, error.retry_after_seconds)
    return _status(grpc.StatusCode.INTERNAL, "an internal error; see the server's log", "INTERNAL", {})


def _status(
    code: grpc.StatusCode,
    message: str,
    reason: str,
    metadata: Mapping[str, str],
    retry_after_seconds: float | None = None,
) -> grpc.Status:
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    for name, value in metadata.items():
        info.metadata[name] = _cut(value, _MAX_VALUE_BYTES)
    retry = [] if retry_after_seconds is None else [_retry_info(retry_after_seconds)]
    answer = _packed(code, message, [info, *retry])
    while answer.ByteSize() > MAX_DETAIL_BYTES:
        info.metadata.pop(max(info.metadata, key=lambda name: len(info.metadata[name].encode())))
        answer = _packed(code, message, [info, *retry])
    rich: grpc.Status = rpc_status.to_status(answer)
    return rich


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromNanoseconds(round(seconds * 1e9))
    return info


def _packed(code: grpc.StatusCode, message: str, details: Sequence[Message]) -> status_pb2.Status:
    answer = status_pb2.Status(code=code.value[0], message=_cut(message, _MAX_MESSAGE_BYTES))
    for detail in details:
        answer.details.add().Pack(detail)
    return answer


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8, whole characters."""
    encoded = text.encode(errors="backslashreplace")  # names of files may hold what is no character
    return encoded.decode() if len(encoded) <= limit else encoded[: limit - 3].decode(errors="ignore") + "…"
