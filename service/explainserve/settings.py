"""Every knob of the server, validated once. Each is a flag of `explainserve serve` and a variable
EXPLAINSERVE_<NAME>."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PositiveInt = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Device = Annotated[str, Field(pattern=r"^(openvino|(cpu|cuda|tensorrt)(:\d+)?)$")]

_MEMORY_PER_MESSAGE_BYTE = 16
"""Bytes of inputs, baselines and maps that one request may hold in memory, for each byte of the largest message."""


class Settings(BaseSettings):
    """Settings of one server process.

    Attributes:
        models: the model folder.
        host: address to listen on, for gRPC and HTTP.
        port: gRPC port; 0 picks a free one.
        http_port: port of metrics and liveness; 0 picks a free one.
        device: one or more of "cpu", "cpu:N", "cuda", "cuda:N", "tensorrt", "tensorrt:N" and "openvino", separated by
            spaces in the variable; "cuda" and "tensorrt" stand for all CUDA devices that there are.
        allow_device_fallback: evaluate on the CPU where the device is missing, instead of refusing models.
        thread_count: threads of one evaluation; 0 means all cores, shared by the devices "cpu:N".
        share_weights: hold the weights of an ONNX model once for all of its graphs, at some speed.
        max_batch_rows: most rows of one micro-batch where a model states no limit of its own.
        warm_up_seconds: time in which the fastest size of a model's micro-batches is found at load; 0 does without.
        max_step_count: cap of gradient evaluations of one path.
        max_request_rows: cap of rows of one request.
        max_request_parts: cap of each kind of part of one request: targets, baselines, regions, groups, selectors.
        max_waiting_rows: cap of rows that all admitted requests of one device together may still need.
        max_waiting_bytes: cap of memory that all admitted requests together may hold: inputs, baselines, maps, the
            gradients that paths keep, and messages until they are sent.
        max_message_bytes: largest request and reply.
        max_instances: cap of instances of one request.
        response_cache_bytes: memory for answers that are kept for equal requests; 0 keeps none.
        allow_model_control: whether clients may load and unload models.
        watchdog_seconds: time that any micro-batch may take before it is ended; 0 lets all take for ever.
        grace_seconds: time that running requests get on shutdown.
        default_timeout_seconds: limit of requests that come without a deadline.
        trial_seconds: time that a model file gets in the process that tries it first; 0 loads files without a trial.
        trial_memory_bytes: memory that a model file gets there.
        compile_seconds: time that compiling a model may take, where its model.toml asks for it; 0 compiles none.
        cache: folder for what can be found out again: gradient graphs, compiled code, and which files were tried; None
            keeps it as long as the process.
        log_format: "json" lines or "console" text.
    """

    model_config = SettingsConfigDict(env_prefix="EXPLAINSERVE_", frozen=True)

    models: Path = Path("models")
    host: str = "127.0.0.1"
    port: Port = 8001
    http_port: Port = 8002
    device: Annotated[tuple[Device, ...], Field(min_length=1), NoDecode] = ("cpu",)
    allow_device_fallback: bool = False
    thread_count: Annotated[int, Field(ge=0)] = 0
    share_weights: bool = False
    max_batch_rows: PositiveInt = 64
    warm_up_seconds: Annotated[float, Field(ge=0)] = 10.0
    max_step_count: PositiveInt = 512
    max_request_rows: PositiveInt = 65_536
    max_request_parts: PositiveInt = 4096
    max_waiting_rows: PositiveInt = 262_144
    max_waiting_bytes: PositiveInt = 4 * 1024 * 1024 * 1024
    max_message_bytes: PositiveInt = 64 * 1024 * 1024
    max_instances: PositiveInt = 256
    response_cache_bytes: Annotated[int, Field(ge=0)] = 0
    allow_model_control: bool = False
    watchdog_seconds: Annotated[float, Field(ge=0)] = 60.0
    grace_seconds: Annotated[float, Field(ge=0)] = 30.0
    default_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    trial_seconds: Annotated[float, Field(ge=0)] = 60.0
    trial_memory_bytes: PositiveInt = 4 * 1024 * 1024 * 1024
    compile_seconds: Annotated[float, Field(ge=0)] = 600.0
    cache: Path | None = None
    log_format: Literal["json", "console"] = "json"

    @field_validator("device", mode="before")
    @classmethod
    def _split(cls, stated: object) -> object:
        return tuple(stated.split()) if isinstance(stated, str) else stated

    @property
    def row_limit(self) -> int:
        """Most rows of one request: one that needs more than may wait would never be admitted."""
        return min(self.max_request_rows, self.max_waiting_rows)

    @property
    def byte_limit(self) -> int:
        """Most memory that is computed with for one request, likewise: half, for its messages need some as well."""
        return min(_MEMORY_PER_MESSAGE_BYTE * self.max_message_bytes, self.max_waiting_bytes // 2)
