"""Which model a request names."""

from __future__ import annotations

from explainserve.errors import InvalidRequest, Unimplemented
from explainserve.v1 import model_pb2


def model_name(reference: model_pb2.ModelRef) -> tuple[str, int | None]:
    """Name and version of a model; no version means the highest.

    Raises:
        InvalidRequest: no model is named (MODEL_REQUIRED), or its version is below 1 (VERSION_INVALID).
        Unimplemented: randomized and shifted models.
    """
    source = reference.WhichOneof("source")
    if source in ("randomized", "shifted"):
        raise Unimplemented("MODEL_SOURCE_UNIMPLEMENTED", f"{source} models are not built yet", source=source)
    return named_model(reference.named)


def named_model(message: model_pb2.NamedModel) -> tuple[str, int | None]:
    """Name and version; no version means the highest.

    Raises:
        InvalidRequest: no model is named (MODEL_REQUIRED), or its version is below 1 (VERSION_INVALID).
    """
    if not message.name:
        raise InvalidRequest("MODEL_REQUIRED", "the request names no model")
    if not message.HasField("version"):
        return message.name, None
    if message.version < 1:
        raise InvalidRequest("VERSION_INVALID", f"version {message.version} is below 1", version=message.version)
    return message.name, message.version
