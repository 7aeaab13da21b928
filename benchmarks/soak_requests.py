"""Random requests to whatever models a server has: every kind of target, baseline, rule and option of the contract.

A request is its number: the same seed, number and model folder give the same request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainserve.v1 import explainer_service_pb2 as pb
from explainserve_client import (
    AttributionSelector,
    Blur,
    Box,
    Constant,
    GaussianNoise,
    IntegratedGradients,
    Margin,
    ModelInfo,
    Target,
    TopK,
    UniformNoise,
)
from explainserve_client.inputs import Instances, fit
from explainserve_client.models import InputSpec, OutputSpec
from explainserve_client.requests import explain_request, predict_request

Random = np.random.Generator
Array = NDArray[Any]

LARGE_ELEMENTS = 10_000
"""Elements of an instance from which on a request asks for few rows."""

QUADRATURES = ("left", "right", "midpoint", "trapezoid", "gauss_legendre")
VIEWS = ("ELEMENTS", "CHANNEL_SUM", "CHANNEL_ABS_SUM", "CHANNEL_MAX_ABS")
SCORES = {
    "LOGITS": ("OUTPUT", "LOGIT", "PROBABILITY", "LOG_PROBABILITY"),
    "PROBABILITIES": ("OUTPUT", "PROBABILITY", "LOG_PROBABILITY"),
    "VALUES": ("OUTPUT",),
}
OMISSIONS = ("omit_tensors", "omit_statistics", "omit_joint_statistics", "omit_score_path", "omit_regions")


@dataclass(frozen=True)
class Drawn:
    """A random request: which RPC it is for, and the message."""

    number: int
    rpc: str
    request: Any

    def __str__(self) -> str:
        return f"request {self.number} ({self.rpc} of {self.model})"

    @property
    def model(self) -> str:
        """Name of the model that is asked."""
        asked = self.request.explain if self.rpc == "EstimateCost" else self.request
        return str(asked.model.named.name)


def draw(seed: int, number: int, models: Sequence[ModelInfo]) -> Drawn:
    """Mostly Explain; some Predict, EstimateCost and GetModel."""
    random = np.random.default_rng([seed, number])
    info = _any(random, models)
    rpc = str(random.choice(list(_MAKERS), p=[0.76, 0.12, 0.08, 0.04]))
    return Drawn(number, rpc, _MAKERS[rpc](random, info))


def _explain(random: Random, info: ModelInfo) -> pb.ExplainRequest:
    large = sum(_element_count(spec) for spec in info.inputs.values()) > LARGE_ELEMENTS
    count = 1 if large else int(random.integers(1, 4))
    targets = [_target(random, info) for _ in range(random.integers(1, 3 if large else 4))]
    baselines = [_baseline(random, info) for _ in range(random.integers(1, 3))]
    options: dict[str, Any] = {
        "method": _method(random, large),
        "targets": targets,
        "baselines": baselines,
        "baseline_reduction": _maybe(random, 0.2, "MEAN"),
        "regions": _maybe(random, 0.3, _regions(random, info)),
        "groups": _maybe(random, 0.2, {"first": [AttributionSelector(instance_index=0, target_index=0)]}),
        "views": _maybe(random, 0.3, list(random.choice(VIEWS, random.integers(1, 5), replace=False))) or (),
        "include_baseline_tensors": bool(random.random() < 0.2),
        "priority": int(random.integers(-10, 11)),
        **{name: bool(random.random() < 0.1) for name in OMISSIONS},
    }
    return explain_request(info, None, _instances(random, info, count), **options)


def _predict(random: Random, info: ModelInfo) -> pb.PredictRequest:
    tensors = bool(random.random() < 0.5)
    instances = _instances(random, info, int(random.integers(1, 5)))
    return predict_request(info, None, instances, top_k=3, score=None, outputs=(), include_tensors=tensors)


def _estimate_cost(random: Random, info: ModelInfo) -> pb.EstimateCostRequest:
    return pb.EstimateCostRequest(explain=_explain(random, info))


def _get_model(_random: Random, info: ModelInfo) -> pb.GetModelRequest:
    return pb.GetModelRequest(model={"named": {"name": info.name}})


_MAKERS: dict[str, Callable[[Random, ModelInfo], Any]] = {
    "Explain": _explain,
    "Predict": _predict,
    "EstimateCost": _estimate_cost,
    "GetModel": _get_model,
}


def _instances(random: Random, info: ModelInfo, count: int) -> Instances:
    return fit(
        {name: np.stack([_value(random, spec) for _ in range(count)]) for name, spec in info.inputs.items()}, info
    )


def _value(random: Random, spec: InputSpec) -> Array:
    shape = _shape(spec)
    if not spec.differentiable:
        return random.integers(0, 7, shape)
    return random.standard_normal(shape).astype(spec.dtype)


def _shape(spec: InputSpec | OutputSpec) -> tuple[int, ...]:
    """Of one instance."""
    return tuple(axis.size or 1 for axis in spec.axes[1:])


def _element_count(spec: InputSpec) -> int:
    return int(np.prod(_shape(spec), dtype=int))


def _method(random: Random, large: bool) -> IntegratedGradients | None:
    chance = random.random()
    if chance < 0.5:
        count = int(random.integers(2, 9 if large else 65))
        return IntegratedGradients(step_count=count, quadrature=str(random.choice(QUADRATURES)))
    if chance < 0.7:
        return None
    cap = 16 if large else int(random.choice([16, 24, 64, 128]))
    return IntegratedGradients(tolerance=float(random.choice([0.2, 0.05, 0.02])), max_step_count=cap)


def _target(random: Random, info: ModelInfo) -> Target:
    output = _any(random, list(info.outputs.values()))
    shape, score = _shape(output), str(random.choice(SCORES[output.kind]))
    path = tuple(int(random.integers(0, size)) for size in shape)
    selections: list[Any] = [path, np.asarray(random.standard_normal(shape), np.float32)]
    if len(shape) == 1:
        selections += ["argmax", TopK(min(2, *shape))]
    if len(shape) == 1 and shape[0] > 1:
        selections.append(Margin(path, ((path[0] + 1) % shape[0],)))
    if len(shape) > 1 and random.random() < 0.5:
        return Target(path[:1], output.name, score, str(random.choice(["SUM", "MEAN"])))
    return Target(_any(random, selections), output.name, score)


def _baseline(random: Random, info: ModelInfo) -> Any:
    moving = {name: spec for name, spec in info.inputs.items() if spec.differentiable}
    kinds: list[Any] = [
        "zeros",
        Constant(0.25),
        UniformNoise(-1.0, 1.0, int(random.integers(100)), 2),
        GaussianNoise(0.5, None, int(random.integers(100))),
        {name: _value(random, spec) for name, spec in moving.items()},
    ]
    if all(spec.layout for spec in moving.values()):
        kinds.append(Blur(1.5))
    if all(spec.preprocessing for spec in moving.values()):
        kinds += ["black", "gray", "white"]
    return _any(random, kinds)


def _regions(random: Random, info: ModelInfo) -> dict[str, Box] | None:
    """A box where exactly one input is an image."""
    images = [spec for spec in info.inputs.values() if spec.layout == "NCHW" and spec.differentiable]
    if len(images) != 1:
        return None
    height, width = _shape(images[0])[1:]
    x, y = int(random.integers(0, width)), int(random.integers(0, height))
    return {"corner": Box(x, y, width - x, height - y)}


def _any(random: Random, choices: Sequence[Any]) -> Any:
    return choices[int(random.integers(len(choices)))]


def _maybe(random: Random, chance: float, value: Any) -> Any:
    return value if random.random() < chance else None
