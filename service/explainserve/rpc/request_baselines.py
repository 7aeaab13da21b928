"""The baselines of a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from explainserve import baselines as domain_baselines
from explainserve.errors import InvalidRequest
from explainserve.explanation import Subject
from explainserve.rpc.tensors import decode_floats
from explainserve.served_model import ServedModel
from explainserve.v1 import (
    baseline_pb2,
    model_pb2,
)


def baselines(
    messages: Sequence[baseline_pb2.Baseline], model: ServedModel, subject: Subject
) -> tuple[domain_baselines.BaselineSpec, ...]:
    """Those named, else the model's default."""
    if not messages:
        return (domain_baselines.BaselineSpec(model.default_baseline),)
    return tuple(_baseline(message, model, subject, position) for position, message in enumerate(messages))


def _baseline(
    message: baseline_pb2.Baseline, model: ServedModel, subject: Subject, position: int
) -> domain_baselines.BaselineSpec:
    for name in message.inputs:
        model.signature.input(name)
    layers = {name: _input_baseline(own) for name, own in message.layers.items()}
    domain_baselines.check_layers(layers, subject)
    every = _input_baseline(message.every_input) if message.HasField("every_input") else domain_baselines.Zeros()
    return domain_baselines.BaselineSpec(
        every_input=every,
        inputs={name: _input_baseline(own) for name, own in message.inputs.items()},
        layers=layers,
        instance_index=message.instance_index if message.HasField("instance_index") else None,
        request_index=position,
    )


def _input_baseline(message: baseline_pb2.InputBaseline) -> domain_baselines.InputBaseline:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("BASELINE_REQUIRED", "the baseline message names no kind")
    if message.space not in (model_pb2.SPACE_UNSPECIFIED, model_pb2.SPACE_MODEL, model_pb2.SPACE_PIXEL):
        raise InvalidRequest("ENUM_UNKNOWN", f"space {message.space} is unknown", field="space", value=message.space)
    return BASELINE_READERS[kind](getattr(message, kind), message.space == model_pb2.SPACE_PIXEL)


def _constant(message: baseline_pb2.ConstantBaseline, pixel_space: bool) -> domain_baselines.Constant:
    if not message.values or not all(math.isfinite(value) for value in message.values):
        raise InvalidRequest("BASELINE_NOT_FINITE", "a constant baseline needs at least one value, all finite")
    return domain_baselines.Constant(tuple(message.values), pixel_space)


def _blur(message: baseline_pb2.BlurBaseline, pixel_space: bool) -> domain_baselines.Blur:
    if not 0 < message.sigma <= 1000:
        raise InvalidRequest("BASELINE_SIGMA_OUT_OF_RANGE", f"blur sigma {message.sigma} is not in (0, 1000]")
    return domain_baselines.Blur(message.sigma)


def _uniform(message: baseline_pb2.UniformNoiseBaseline, pixel_space: bool) -> domain_baselines.UniformNoise:
    return domain_baselines.UniformNoise(
        low=_finite_or_none(message, "low"),
        high=_finite_or_none(message, "high"),
        seed=_seed(message.seed),
        count=_draw_count(message),
        pixel_space=pixel_space,
    )


def _gaussian(message: baseline_pb2.GaussianNoiseBaseline, pixel_space: bool) -> domain_baselines.GaussianNoise:
    if not (message.std > 0 and math.isfinite(message.std)):
        raise InvalidRequest("BASELINE_SIGMA_OUT_OF_RANGE", f"Gaussian noise needs a positive std, got {message.std}")
    return domain_baselines.GaussianNoise(
        mean=_finite_or_none(message, "mean"),
        std=message.std,
        seed=_seed(message.seed),
        count=_draw_count(message),
        pixel_space=pixel_space,
    )


BASELINE_READERS: dict[str, Callable[[Any, bool], domain_baselines.InputBaseline]] = {
    "zeros": lambda message, pixel_space: domain_baselines.Zeros(pixel_space),
    "constant": _constant,
    "black": lambda message, pixel_space: domain_baselines.NAMED["black"],
    "gray": lambda message, pixel_space: domain_baselines.NAMED["gray"],
    "white": lambda message, pixel_space: domain_baselines.NAMED["white"],
    "tensor": lambda message, pixel_space: domain_baselines.Given(decode_floats("baseline", message), pixel_space),
    "blur": _blur,
    "uniform_noise": _uniform,
    "gaussian_noise": _gaussian,
    "data": lambda message, pixel_space: domain_baselines.Data(message.name),
}
"""Reads a baseline's message, by the name of its field in InputBaseline."""


def _finite_or_none(message: Any, name: str) -> float | None:
    if not message.HasField(name):
        return None
    value = float(getattr(message, name))
    if not math.isfinite(value):
        raise InvalidRequest("BASELINE_NOT_FINITE", f"baseline {name} {value} is not finite", field=name)
    return value


def _seed(value: int) -> int:
    if value < 0:
        raise InvalidRequest("SEED_OUT_OF_RANGE", f"seed {value} is negative", seed=value)
    return value


def _draw_count(message: Any) -> int:
    count = int(message.count) if message.HasField("count") else 1
    if not 1 <= count <= 1024:
        raise InvalidRequest("BASELINE_COUNT_OUT_OF_RANGE", f"{count} draws are not in [1, 1024]", count=count)
    return count
