"""The baselines that were used, as messages."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from explainserve import baselines as domain_baselines
from explainserve.explainer import Answer
from explainserve.explanation import Baseline
from explainserve.rpc.tensors import encode
from explainserve.v1 import (
    baseline_pb2,
    model_pb2,
)


def used_baselines(answer: Answer, *, include_tensors: bool) -> list[baseline_pb2.UsedBaseline]:
    """What each baseline was, and with `include_tensors` its values."""
    used, signature, effective = [], answer.query.model.signature, domain_baselines.effective
    for instance_index, own in enumerate(answer.baselines):
        for baseline_index, baseline in enumerate(own):
            spec = answer.query.baselines[baseline.request_index]
            used.append(
                baseline_pb2.UsedBaseline(
                    instance_index=instance_index,
                    baseline_index=baseline_index,
                    request_baseline_index=baseline.request_index,
                    inputs=[
                        _used_input(
                            name, effective(spec.of(name), signature.input(name)), baseline, values, include_tensors
                        )
                        for name, values in baseline.moving.items()
                    ],
                    layers=[
                        _used_input(name, spec.layers[name], baseline, values, include_tensors)
                        for name, values in baseline.layers.items()
                    ],
                )
            )
    return used


def _used_input(
    name: str,
    kind: domain_baselines.InputBaseline,
    baseline: Baseline,
    values: NDArray[np.generic],
    include_tensor: bool,
) -> baseline_pb2.UsedInputBaseline:
    return baseline_pb2.UsedInputBaseline(
        input=name,
        effective=effective_baseline(kind),
        sha256=domain_baselines.digest(values),
        tensor=encode(values) if include_tensor else None,
        draw_index=baseline.draw_index,
    )


def effective_baseline(kind: domain_baselines.InputBaseline) -> baseline_pb2.InputBaseline:
    """The baseline of one input, with every parameter that was left to the server."""
    pixel_space = isinstance(kind, domain_baselines.Tone) or getattr(kind, "pixel_space", False)
    message = baseline_pb2.InputBaseline(space=model_pb2.SPACE_PIXEL if pixel_space else model_pb2.SPACE_MODEL)
    match kind:
        case domain_baselines.Zeros():
            message.zeros.SetInParent()
        case domain_baselines.Constant(numbers):
            message.constant.values.extend(numbers)
        case domain_baselines.Tone(level):
            getattr(message, {0.0: "black", 0.5: "gray", 1.0: "white"}[level]).SetInParent()
        case domain_baselines.Given():
            message.tensor.SetInParent()
        case domain_baselines.Blur(sigma):
            message.blur.sigma = sigma
        case domain_baselines.UniformNoise(low, high, seed, count):
            message.uniform_noise.CopyFrom(
                baseline_pb2.UniformNoiseBaseline(low=low, high=high, seed=seed, count=count)
            )
        case domain_baselines.GaussianNoise(mean, std, seed, count):
            message.gaussian_noise.CopyFrom(
                baseline_pb2.GaussianNoiseBaseline(mean=mean, std=std, seed=seed, count=count)
            )
        case domain_baselines.Data(name):
            message.data.name = name
    return message
