"""How linear layers share relevance out among their inputs: the rules of layer-wise relevance propagation in torch.

`onnx_vjp.lrp` states their formulas and papers. Where it takes the transpose of a layer, autograd goes back through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from explainserve.backends.exported_linear import Function


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer z = f(a; w, b) of the rows that are evaluated.

    Attributes:
        rectified: `a` surely has no negative elements.
        ends: `a` where the inputs have their least and their greatest values; None where no rule asks for it.
    """

    function: Function
    a: Tensor
    w: Tensor
    b: Tensor | None
    rectified: bool
    ends: tuple[Tensor, Tensor] | None = None


Part = tuple[Tensor, Tensor, Tensor | None]
"""Modified input, weights and bias of a layer."""

Distribution = Callable[[Layer, Tensor, Tensor], Tensor]
"""From a layer, its output z and the relevance of that to the relevance of its input."""


def stabilized(z: Tensor, epsilon: float) -> Tensor:
    """z + epsilon sign(z), with sign 1 at zero."""
    return torch.where(z < 0, z - epsilon, z + epsilon)


def _shared_out(layer: Layer, relevance: Tensor, parts: Sequence[Part], epsilon: float) -> Tensor:
    """The relevance of a layer's output among its inputs in proportion to the contributions of all parts together."""
    leaves = [a.detach().requires_grad_() for a, _, _ in parts]
    with torch.enable_grad():
        each = [layer.function(a, w, b) for a, (_, w, b) in zip(leaves, parts, strict=True)]
        z = reduce(torch.add, each)
    s = relevance / stabilized(z.detach(), epsilon)
    slopes = torch.autograd.grad(z, leaves, s)
    return reduce(torch.add, [a.detach() * slope for a, slope in zip(leaves, slopes, strict=True)])


def _positive(value: Tensor) -> Tensor:
    return value.clamp(min=0)


def _negative(value: Tensor) -> Tensor:
    return value.clamp(max=0)


def _by_sign(layer: Layer, w: Tensor, b: Tensor | None, falling: Tensor) -> list[Part]:
    """Positive inputs with w and b, and, where there may be any, negative ones with the weights `falling`."""
    parts: list[Part] = [(_positive(layer.a), w, b)]
    return parts if layer.rectified else [*parts, (_negative(layer.a), falling, None)]


def _epsilon(epsilon: float) -> Distribution:
    return lambda layer, z, relevance: _shared_out(layer, relevance, [(layer.a, layer.w, layer.b)], epsilon)


def _gamma(gamma: float, epsilon: float) -> Distribution:
    def distribution(layer: Layer, z: Tensor, relevance: Tensor) -> Tensor:
        w, b = layer.w, layer.b
        raised, lowered = (w + gamma * part(w) for part in (_positive, _negative))
        bias, lowered_bias = (None if b is None else b + gamma * part(b) for part in (_positive, _negative))
        rising, falling = _by_sign(layer, raised, bias, lowered), _by_sign(layer, lowered, lowered_bias, raised)
        of_positive = _shared_out(layer, relevance * (z > 0), rising, epsilon)
        return of_positive + _shared_out(layer, relevance * (z < 0), falling, epsilon)

    return distribution


def _alpha_beta(alpha: float, epsilon: float) -> Distribution:
    def distribution(layer: Layer, z: Tensor, relevance: Tensor) -> Tensor:
        positive, negative = _positive(layer.w), _negative(layer.w)
        bias, lowered_bias = (None if layer.b is None else part(layer.b) for part in (_positive, _negative))
        shares = _shared_out(layer, relevance, _by_sign(layer, positive, bias, negative), epsilon)
        if alpha == 1:
            return shares
        inhibiting = _by_sign(layer, negative, lowered_bias, positive)
        return alpha * shares - (alpha - 1) * _shared_out(layer, relevance, inhibiting, epsilon)

    return distribution


def _flat(epsilon: float) -> Distribution:
    def distribution(layer: Layer, z: Tensor, relevance: Tensor) -> Tensor:
        ones = torch.ones_like(layer.a)
        return _shared_out(layer, relevance, [(ones, torch.ones_like(layer.w), None)], epsilon)

    return distribution


def _box(epsilon: float) -> Distribution:
    def distribution(layer: Layer, z: Tensor, relevance: Tensor) -> Tensor:
        assert layer.ends is not None, "the box rule was given no bounds. This is a bug."
        least, greatest = layer.ends
        parts: list[Part] = [(layer.a, layer.w, None), (-least, _positive(layer.w), None)]
        return _shared_out(layer, relevance, [*parts, (-greatest, _negative(layer.w), None)], epsilon)

    return distribution


@dataclass(frozen=True)
class LrpRules:
    """How relevance is distributed: in convolutions, in dense layers, and in those that no other is in front of.

    Attributes:
        epsilon: of what sums without weights.
        boxed: the rule of first layers takes what is in front of them at the bounds of the inputs.
    """

    dense: Distribution
    convolution: Distribution
    epsilon: float
    first: Distribution | None = None
    boxed: bool = False


def _everywhere(distribution: Distribution, epsilon: float) -> LrpRules:
    return LrpRules(distribution, distribution, epsilon)


EPSILON, GAMMA, ALPHA = 1e-6, 0.25, 2.0

LRP_RULES: Mapping[str, Callable[..., LrpRules]] = {
    "lrp_epsilon": lambda epsilon=EPSILON: _everywhere(_epsilon(epsilon), epsilon),
    "lrp_gamma": lambda epsilon=EPSILON, gamma=GAMMA: _everywhere(_gamma(gamma, epsilon), epsilon),
    "lrp_alpha_beta": lambda epsilon=EPSILON, alpha=ALPHA: _everywhere(_alpha_beta(alpha, epsilon), epsilon),
    "lrp_composite": lambda epsilon=EPSILON: LrpRules(
        _epsilon(epsilon), _alpha_beta(1, epsilon), epsilon, _flat(epsilon)
    ),
    "lrp_deep_taylor": lambda epsilon=EPSILON: LrpRules(
        _alpha_beta(1, epsilon), _alpha_beta(1, epsilon), epsilon, _box(epsilon), boxed=True
    ),
    "lrp_epsilon_gamma_box": lambda epsilon=EPSILON, gamma=GAMMA: LrpRules(
        _epsilon(epsilon), _gamma(gamma, epsilon), epsilon, _box(epsilon), boxed=True
    ),
}
"""By name, from the options of the rule."""

BOX_RULES = frozenset({"lrp_deep_taylor", "lrp_epsilon_gamma_box"})
"""Those among them that take the bounds of inputs."""
