"""Activations, and those that other operators of onnxruntime end in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, composition, rule
from explainserve.onnx_vjp.rules.elementwise import gelu_erf_slope, gelu_tanh_slope, swish_slope

DOMAIN = "com.microsoft"


@rule("Gelu", domain=DOMAIN)
def gelu(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, gelu_erf_slope(op, node.inputs[0])),)


@rule("BiasGelu", domain=DOMAIN, broadcasts=True)
def bias_gelu(op: Emitter, node: Node, g: str) -> Gradients:
    dx = op.Mul(g, gelu_erf_slope(op, op.Add(*node.inputs)))
    return dx, dx


@rule("FastGelu", domain=DOMAIN, broadcasts=True)
def fast_gelu(op: Emitter, node: Node, g: str) -> Gradients:
    """The approximation with tanh, of the sum of x and an optional bias."""
    dx = op.Mul(g, gelu_tanh_slope(op, op.Add(*node.inputs) if node.input(1) else node.inputs[0]))
    return [dx] * len(node.inputs)


@rule("QuickGelu", domain=DOMAIN)
def quick_gelu(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, swish_slope(op, node, node.attribute("alpha", 1.702))),)


@composition("ScaledSiLU", domain=DOMAIN)
def scaled_silu(op: Emitter, node: Node) -> Sequence[str]:
    x, scale = node.inputs[0], node.input(1)
    return (silu(op, op.Mul(x, op.cast_like(scale, x) if scale else node.attribute("alpha", 1.0))),)


@composition("BiasSplitGelu", domain=DOMAIN)
def bias_split_gelu(op: Emitter, node: Node) -> Sequence[str]:
    """The left half times the Gelu of the right half."""
    left, right = op.emit("Split", op.Add(*node.inputs), outputs=2, axis=-1, num_outputs=2)
    return (op.Mul(left, op.emit("Gelu", right, domain=DOMAIN)[0]),)


@composition("GemmFastGelu", domain=DOMAIN)
def gemm_fast_gelu(op: Emitter, node: Node) -> Sequence[str]:
    product = op.MatMul(*node.inputs[:2])
    return op.emit("FastGelu", product, node.input(2), domain=DOMAIN)


def silu(op: Emitter, x: str) -> str:
    """x sigmoid(x)."""
    return op.Mul(x, op.Sigmoid(x))


# What a fused activation is, given its parameters in the order in which they are written.
_ACTIVATIONS: dict[str, Callable[[Emitter, str, Sequence[float]], str]] = {
    "": lambda op, x, p: x,
    "Affine": lambda op, x, p: op.Add(op.Mul(x, _at(p, 0, 1.0)), _at(p, 1, 0.0)),
    "Clip": lambda op, x, p: op.Clip(x, _at(p, 0, 0.0), _at(p, 1, 0.0)),
    "Elu": lambda op, x, p: op.Elu(x, alpha=_at(p, 0, 1.0)),
    "HardSigmoid": lambda op, x, p: op.HardSigmoid(x, alpha=_at(p, 0, 0.2), beta=_at(p, 1, 0.5)),
    "HardSwish": lambda op, x, p: op.HardSwish(x),
    "LeakyRelu": lambda op, x, p: op.LeakyRelu(x, alpha=_at(p, 0, 0.01)),
    "Relu": lambda op, x, p: op.Relu(x),
    "Selu": lambda op, x, p: op.Selu(x, alpha=_at(p, 0, 1.67326), gamma=_at(p, 1, 1.0507)),
    "Sigmoid": lambda op, x, p: op.Sigmoid(x),
    "Softplus": lambda op, x, p: op.Softplus(x),
    "Softsign": lambda op, x, p: op.Softsign(x),
    "Tanh": lambda op, x, p: op.Tanh(x),
    "ThresholdedRelu": lambda op, x, p: op.ThresholdedRelu(x, alpha=_at(p, 0, 1.0)),
}


def activated(op: Emitter, x: str, name: str, parameters: Sequence[float]) -> str:
    """`x` under the activation that a fused operator names."""
    if name not in _ACTIVATIONS:
        raise Refusal(f"the activation '{name}' is not known", "save the model without fused activations")
    return _ACTIVATIONS[name](op, x, parameters)


def _at(parameters: Sequence[float], index: int, default: float) -> float:
    return float(parameters[index]) if index < len(parameters) else default
