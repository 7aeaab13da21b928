"""Where paths start: every spelling of a baseline.

    "zeros", "black", "gray", "white"    by name
    "random"                             seeded uniform noise over the value range, UniformNoise() with seed 0
    an array                             of one instance's shape, or with a leading batch axis
    Constant, Blur, UniformNoise, GaussianNoise, TensorBaseline, DataBaseline, Zeros
    {"image": "gray", "mask": array}     by input; zeros where unnamed
    Baseline(...)                        with an instance of its own
    [...]                                several

Black, gray and white are the low end, midpoint and high end of the input's value range; arrays are in MODEL space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from explainserve.v1 import baseline_pb2, model_pb2
from explainserve_client.errors import RequestTypeError, RequestValueError
from explainserve_client.models import InputSpec, ModelInfo
from explainserve_client.names import enum_value, short_name
from explainserve_client.tensors import Array, cast, to_array, to_tensor

_KEYWORDS = ("zeros", "black", "gray", "white", "random")


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zero in every element; in "PIXEL" space that is black."""

    space: str | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """One value, or one per channel, in `space` ("MODEL" by default, or "PIXEL": 0..255)."""

    values: float | Sequence[float]
    space: str | None = None


@dataclass(frozen=True, slots=True)
class Blur:
    """The instance blurred by a Gaussian of standard deviation `sigma` elements along its spatial axes."""

    sigma: float
    space: str | None = None


@dataclass(frozen=True, slots=True)
class UniformNoise:
    """Uniform noise in [low, high), both given or neither: then over the value range. Each of `count` draws is a
    baseline of its own."""

    low: float | None = None
    high: float | None = None
    seed: int = 0
    count: int | None = None
    space: str | None = None


@dataclass(frozen=True, slots=True)
class GaussianNoise:
    """Gaussian noise around `mean` (default: the instance itself); each of `count` draws is a baseline of its own."""

    std: float
    mean: float | None = None
    seed: int = 0
    count: int | None = None
    space: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TensorBaseline:
    """An array in `space`, of one instance's shape or with a leading batch axis."""

    values: Array
    space: str | None = None


@dataclass(frozen=True, slots=True)
class DataBaseline:
    """A baseline that the model's owner configured; `ModelInfo.data_baselines` lists the names."""

    name: str
    space: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """A baseline of all moving inputs together.

    Attributes:
        every_input: of each moving input that `inputs` does not name; None means zeros.
        inputs: by input name.
        instance_index: the instance it belongs to; None is every one.
        layers: of layers that are explained in the place of inputs, by name: "zeros", Constant or an array. A layer
            that is not named has its value at the baseline of the inputs.
    """

    every_input: Any = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    instance_index: int | None = None
    layers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class UsedInputBaseline:
    """A baseline of one input, or of one layer, as it was used.

    Attributes:
        kind: such as "gray" or "uniform_noise".
        space: "MODEL" or "PIXEL", or "UNSPECIFIED".
        parameters: every effective parameter, such as {"seed": 0, "low": 0.0, "high": 1.0}.
        sha256: of the float32 values.
        tensor: the values in MODEL space, where asked for.
        draw_index: draw of a noise baseline.
    """

    input: str
    kind: str
    space: str
    parameters: Mapping[str, Any]
    sha256: str
    tensor: Array | None
    draw_index: int

    def __repr__(self) -> str:
        parameters = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"<{self.kind} baseline of {self.input}({parameters})>"

    @classmethod
    def from_proto(cls, message: baseline_pb2.UsedInputBaseline) -> UsedInputBaseline:
        """Reads the message."""
        kind = message.effective.WhichOneof("kind")
        return cls(
            input=message.input,
            kind=kind or "",
            space=short_name(model_pb2.Space, message.effective.space),
            parameters=_parameters(message.effective, kind),
            sha256=message.sha256,
            tensor=to_array(message.tensor) if message.HasField("tensor") else None,
            draw_index=message.draw_index,
        )


@dataclass(frozen=True, slots=True)
class UsedBaseline:
    """A baseline as it was used for one instance.

    Attributes:
        baseline_index: position among the instance's baselines, after noise counts were expanded.
        request_baseline_index: position of the request's baseline this came from.
        inputs: per moving input.
        layers: per layer whose baseline was stated.
    """

    instance_index: int
    baseline_index: int
    request_baseline_index: int
    inputs: tuple[UsedInputBaseline, ...]
    layers: tuple[UsedInputBaseline, ...] = ()

    @classmethod
    def from_proto(cls, message: baseline_pb2.UsedBaseline) -> UsedBaseline:
        """Reads the message."""
        return cls(
            instance_index=message.instance_index,
            baseline_index=message.baseline_index,
            request_baseline_index=message.request_baseline_index,
            inputs=tuple(UsedInputBaseline.from_proto(line) for line in message.inputs),
            layers=tuple(UsedInputBaseline.from_proto(line) for line in message.layers),
        )


def baseline_messages(baselines: Any, info: ModelInfo, fixed_inputs: Sequence[str]) -> list[baseline_pb2.Baseline]:
    """The messages of a request; None leaves the choice to the server."""
    if baselines is None:
        return []
    several = baselines if isinstance(baselines, list) else [baselines]
    if not several:
        raise RequestValueError("baselines is an empty list; leave it out for the model's default")
    return [_baseline_message(baseline, info, fixed_inputs) for baseline in several]


def _baseline_message(baseline: Any, info: ModelInfo, fixed_inputs: Sequence[str]) -> baseline_pb2.Baseline:
    stated = baseline
    if isinstance(baseline, Mapping):
        stated = Baseline(inputs=baseline)
    elif not isinstance(baseline, Baseline):
        stated = Baseline(every_input=baseline)
    inputs = {name: _input_message(kind, _spec(info, name)) for name, kind in stated.inputs.items()}
    layers = {name: _input_message(kind, None) for name, kind in stated.layers.items()}
    message = baseline_pb2.Baseline(inputs=inputs, instance_index=stated.instance_index, layers=layers)
    if stated.every_input is not None:
        rest = [spec for spec in _moving(info, fixed_inputs) if spec.name not in inputs]
        message.every_input.CopyFrom(_every_input_message(stated.every_input, rest))
    return message


def _every_input_message(kind: Any, inputs: list[InputSpec]) -> baseline_pb2.InputBaseline:
    if isinstance(kind, (np.ndarray, TensorBaseline)) and len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs) or "none"
        raise RequestValueError(f"a baseline array needs the name of its input, as {{name: array}}; there are {names}")
    return _input_message(kind, inputs[0] if len(inputs) == 1 else None)


def _moving(info: ModelInfo, fixed_inputs: Sequence[str]) -> list[InputSpec]:
    """Inputs that move; where none can, all (an integer baseline of token ids)."""
    free = [spec for spec in info.inputs.values() if spec.name not in fixed_inputs]
    return [spec for spec in free if spec.differentiable] or free


def _spec(info: ModelInfo, name: str) -> InputSpec:
    if name not in info.inputs:
        raise RequestValueError(f"baseline for {name!r}, but the model's inputs are {', '.join(info.inputs)}")
    return info.inputs[name]


def _input_message(kind: Any, spec: InputSpec | None) -> baseline_pb2.InputBaseline:
    if isinstance(kind, str):
        return _keyword_message(kind, spec)
    if isinstance(kind, np.ndarray):
        kind = TensorBaseline(kind)
    message = baseline_pb2.InputBaseline()
    space = getattr(kind, "space", None)
    if space is not None:
        message.space = enum_value(model_pb2.Space, space)
    _fill(message, kind, spec)
    return message


def _keyword_message(keyword: str, spec: InputSpec | None) -> baseline_pb2.InputBaseline:
    if keyword not in _KEYWORDS:
        raise RequestValueError(
            f"no baseline {keyword!r}; there are {', '.join(_KEYWORDS)}, typed ones, and DataBaseline(name)"
        )
    if keyword == "random":
        return _input_message(UniformNoise(), spec)
    message = baseline_pb2.InputBaseline()
    getattr(message, keyword).SetInParent()
    return message


def _fill(message: baseline_pb2.InputBaseline, kind: Any, spec: InputSpec | None) -> None:
    if isinstance(kind, Zeros):
        message.zeros.SetInParent()
    elif isinstance(kind, Constant):
        message.constant.values.extend(np.atleast_1d(np.asarray(kind.values, np.float64)).tolist())
        message.constant.SetInParent()
    elif isinstance(kind, Blur):
        message.blur.sigma = kind.sigma
    elif isinstance(kind, UniformNoise):
        noise = baseline_pb2.UniformNoiseBaseline(low=kind.low, high=kind.high, seed=kind.seed, count=kind.count)
        message.uniform_noise.CopyFrom(noise)
    elif isinstance(kind, GaussianNoise):
        gaussian = baseline_pb2.GaussianNoiseBaseline(mean=kind.mean, std=kind.std, seed=kind.seed, count=kind.count)
        message.gaussian_noise.CopyFrom(gaussian)
    elif isinstance(kind, TensorBaseline):
        dtype = "float32" if spec is None else spec.dtype
        message.tensor.CopyFrom(to_tensor(cast(np.asarray(kind.values), dtype, "baseline"), dtype))
    elif isinstance(kind, DataBaseline):
        message.data.name = kind.name
    else:
        raise RequestTypeError(
            f"{kind!r} is no baseline: use {', '.join(_KEYWORDS)}, an array, a dict by input, or a typed baseline"
        )


def _parameters(effective: baseline_pb2.InputBaseline, kind: str | None) -> dict[str, Any]:
    """Scalar fields of the kind, as the server filled them in; the values of a tensor are left out there."""
    if kind is None or kind == "tensor":
        return {}
    chosen = getattr(effective, kind)
    names = [
        stated.name for stated in chosen.DESCRIPTOR.fields if not stated.has_presence or chosen.HasField(stated.name)
    ]
    return {name: _plain(getattr(chosen, name)) for name in names}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else tuple(value)
