"""How an answer was computed, as a message."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata

import numpy as np
from google.protobuf.duration_pb2 import Duration

from explainserve import __version__
from explainserve.explainer import Usage
from explainserve.methods import Method
from explainserve.rpc.methods import write as write_method
from explainserve.served_model import ServedModel
from explainserve.v1 import attribution_pb2


def provenance(model: ServedModel, usage: Usage, methods: Sequence[Method]) -> attribution_pb2.Provenance:
    """How an answer was computed."""
    loaded = model.loaded
    return attribution_pb2.Provenance(
        model_name=model.name,
        model_version=model.version,
        model_sha256=model.sha256,
        backend=loaded.backend,
        gradient_mode=loaded.gradient_mode,
        gradient_rule=", ".join(dict.fromkeys(method.needs.rule for method in methods if method.needs.rule)),
        device=model.runs_on,
        execution=loaded.execution,
        execution_map_error=model.execution_map_error,
        precision=model.precision,
        noise_floor=noise_floor(model),
        precision_map_error=model.probe.precision_map_error,
        effective_methods=[write_method(method) for method in methods],
        row_count=usage.row_count,
        forward_count=usage.row_count,
        backward_count=usage.backward_count,
        saved_row_count=usage.saved_rows,
        server_version=__version__,
        library_versions={**_COMMON_VERSIONS, **loaded.library_versions},
        queue_duration=duration(usage.queue_seconds),
        compute_duration=duration(usage.compute_seconds),
    )


def set_serialize_duration(message: attribution_pb2.Provenance, seconds: float) -> None:
    """States the time for statistics and encoding, known only once they are done."""
    message.serialize_duration.CopyFrom(duration(seconds))


def duration(seconds: float) -> Duration:
    """Seconds as a message."""
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def noise_floor(model: ServedModel) -> float | None:
    """How far gradients of the model scatter by rounding, relative; None where it has none."""
    return model.probe.noise_floor if model.differentiable else None


_COMMON_VERSIONS = {
    "numpy": np.__version__,
    "python": platform.python_version(),
    "grpcio": metadata.version("grpcio"),
    "protobuf": metadata.version("protobuf"),
}
