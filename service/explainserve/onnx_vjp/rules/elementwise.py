"""Functions of one tensor, element by element: dx = g f'(x)."""

from __future__ import annotations

from functools import reduce
from math import pi, sqrt

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, rule


@rule("Identity")
def identity(op: Emitter, node: Node, g: str) -> Gradients:
    return (g,)


@rule("Dropout")
def dropout(op: Emitter, node: Node, g: str) -> Gradients:
    """The identity; in training y = x mask / (1 - ratio), with the mask that this very pass has drawn."""
    if not op.graph.is_random(node.proto):
        return g, None, None
    training, ratio = node.inputs[2], op.cast_like(node.input(1) or op.array(np.array(0.5, np.float32)), g)
    scaled = op.Where(training, op.Div(g, op.Sub(1, ratio)), g)
    return op.Mul(scaled, op.mask(op.output(node, 1), g)), None, None


@rule("Neg")
def neg(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Neg(g),)


@rule("Abs")
def absolute(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, op.Sign(node.inputs[0])),)


@rule("Reciprocal")
def reciprocal(op: Emitter, node: Node, g: str) -> Gradients:
    y = node.outputs[0]
    return (op.Mul(g, op.Neg(op.Mul(y, y))),)


@rule("Sqrt")
def sqrt_(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Div(op.Mul(g, 0.5), node.outputs[0]),)


@rule("Exp")
def exp(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, node.outputs[0]),)


@rule("Log")
def log(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Div(g, node.inputs[0]),)


@rule("Sin")
def sin(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, op.Cos(node.inputs[0])),)


@rule("Cos")
def cos(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Neg(op.Mul(g, op.Sin(node.inputs[0]))),)


@rule("Tan")
def tan(op: Emitter, node: Node, g: str) -> Gradients:
    y = node.outputs[0]
    return (op.Mul(g, op.Add(op.Mul(y, y), 1)),)


@rule("Asin")
def asin(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Div(g, op.Sqrt(_one_less_square(op, node.inputs[0]))),)


@rule("Acos")
def acos(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Neg(op.Div(g, op.Sqrt(_one_less_square(op, node.inputs[0])))),)


def _one_less_square(op: Emitter, x: str) -> str:
    """1 - x^2 as (1 - x) (1 + x), which keeps its digits beside 1."""
    return op.Mul(op.Sub(1, x), op.Add(x, 1))


@rule("Atan")
def atan(op: Emitter, node: Node, g: str) -> Gradients:
    """1 + x^2 as m (1/m + x^2/m) with m = max(|x|, 1), since the square may be too large a number."""
    x = node.inputs[0]
    m = op.Max(op.Abs(x), 1)
    return (op.Div(op.Div(g, m), op.Add(op.Reciprocal(m), op.Mul(x, op.Div(x, m)))),)


@rule("Sinh")
def sinh(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, op.Cosh(node.inputs[0])),)


@rule("Cosh")
def cosh(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, op.Sinh(node.inputs[0])),)


@rule("Asinh")
def asinh(op: Emitter, node: Node, g: str) -> Gradients:
    """sqrt(x^2 + 1) is cosh(y), whatever x is."""
    return (op.Div(g, op.Cosh(node.outputs[0])),)


@rule("Acosh")
def acosh(op: Emitter, node: Node, g: str) -> Gradients:
    """sqrt(x^2 - 1) is sinh(y), beside 1 too."""
    return (op.Div(g, op.Sinh(node.outputs[0])),)


@rule("Atanh")
def atanh(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Div(g, _one_less_square(op, node.inputs[0])),)


@rule("Erf")
def erf(op: Emitter, node: Node, g: str) -> Gradients:
    x = node.inputs[0]
    return (op.Mul(g, op.Mul(op.Exp(op.Neg(op.Mul(x, x))), 2 / sqrt(pi))),)


# -- rectifiers
# -------------------------------------------------------------------------------------------------------------


@rule("Relu")
def relu(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, op.step(node.outputs[0])),)


@rule("LeakyRelu")
def leaky_relu(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Where(op.Greater(node.inputs[0], 0), g, op.Mul(g, node.attribute("alpha", 0.01))),)


@rule("ThresholdedRelu")
def thresholded_relu(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, op.mask(op.Greater(node.inputs[0], node.attribute("alpha", 1.0)), g)),)


@rule("PRelu", broadcasts=True)
def prelu(op: Emitter, node: Node, g: str) -> Gradients:
    x, slope = node.inputs
    positive = op.Greater(x, 0)
    return op.Where(positive, g, op.Mul(g, slope)), op.Where(positive, 0, op.Mul(g, x))


@rule("Elu")
def elu(op: Emitter, node: Node, g: str) -> Gradients:
    return (_through_elu(op, node.inputs[0], g, node.attribute("alpha", 1.0)),)


@rule("Selu")
def selu(op: Emitter, node: Node, g: str) -> Gradients:
    scaled = op.Mul(g, node.attribute("gamma", 1.05070102214813232421875))
    return (_through_elu(op, node.inputs[0], scaled, node.attribute("alpha", 1.67326319217681884765625)),)


def _through_elu(op: Emitter, x: str, g: str, alpha: float) -> str:
    """alpha exp(x) on the negative side: y + alpha, which is the same, keeps none of its digits far from 0."""
    return op.Where(op.Greater(x, 0), g, op.Mul(g, op.Mul(op.Exp(op.Min(x, 0)), alpha)))


@rule("Celu")
def celu(op: Emitter, node: Node, g: str) -> Gradients:
    x = node.inputs[0]
    return (op.Mul(g, op.Exp(op.Div(op.Min(x, 0), node.attribute("alpha", 1.0)))),)


@rule("Clip")
def clip(op: Emitter, node: Node, g: str) -> Gradients:
    """y = min(max(x, low), high).

    The bounds themselves pass the gradient to x, as torch's clamp does; outside, it goes to the bound. Not so those of
    a capped rectifier, as in torch's relu6: its gradient is read from y alone, which needs no x.
    """
    x, low, high = node.inputs[0], node.input(1), node.input(2)
    if (cap := _rectifier_cap(op, low, high)) is not None:
        y = node.outputs[0]
        return op.Mul(g, op.Mul(op.step(y), op.step(y, cap, falling=True))), None, None
    inside = [op.GreaterOrEqual(x, low)] if low else []
    inside += [op.LessOrEqual(x, high)] if high else []
    dx = op.Mul(g, op.mask(reduce(op.And, inside), g)) if inside else g
    above = op.Greater(op.Max(x, low) if low else x, high) if high else None
    below = op.Less(x, low) if low else None
    below = op.And(below, op.Not(above)) if below and above else below
    return dx, _total(op, g, below), _total(op, g, above)


def _rectifier_cap(op: Emitter, low: str, high: str) -> float | None:
    """The upper bound of a Clip to [0, high] with constant bounds, as ReLU6 is written; else None."""
    floor, cap = op.constant(low), op.constant(high)
    return float(cap) if floor is not None and cap is not None and not floor.any() and cap > 0 else None


def _total(op: Emitter, g: str, condition: str | None) -> str | None:
    return op.ReduceSum(op.Where(condition, g, 0), keepdims=0) if condition else None


@rule("Shrink")
def shrink(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, op.mask(op.Greater(op.Abs(node.inputs[0]), node.attribute("lambd", 0.5)), g)),)


# -- smooth activations
# -----------------------------------------------------------------------------------------------------


@rule("Sigmoid")
def sigmoid(op: Emitter, node: Node, g: str) -> Gradients:
    y = node.outputs[0]
    return (op.Mul(g, op.Mul(y, op.Sub(1, y))),)


@rule("Tanh")
def tanh(op: Emitter, node: Node, g: str) -> Gradients:
    y = node.outputs[0]
    return (op.Mul(g, op.Sub(1, op.Mul(y, y))),)


@rule("Softplus")
def softplus(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, op.Sigmoid(node.inputs[0])),)


@rule("Softsign")
def softsign(op: Emitter, node: Node, g: str) -> Gradients:
    scale = op.Add(op.Abs(node.inputs[0]), 1)
    return (op.Div(op.Div(g, scale), scale),)


@rule("HardSigmoid")
def hard_sigmoid(op: Emitter, node: Node, g: str) -> Gradients:
    """Zero at both corners, as in torch: y is inside (0, 1) exactly where the line is."""
    y = node.outputs[0]
    inside = op.mask(op.And(op.Greater(y, 0), op.Less(y, 1)), g)
    return (op.Mul(op.Mul(g, node.attribute("alpha", 0.2)), inside),)


@rule("HardSwish")
def hard_swish(op: Emitter, node: Node, g: str) -> Gradients:
    """y = x h with h = clip(x/6 + 1/2, 0, 1), so y' = h + x h'."""
    x, sixth = node.inputs[0], float(np.float32(1 / 6))  # as ONNX's function body stores it
    h = op.HardSigmoid(x, alpha=sixth, beta=0.5)
    slope = op.mask(op.Less(op.Abs(x), 3.0), g)
    return (op.Mul(g, op.Add(h, op.Mul(op.Mul(x, sixth), slope))),)


@rule("Swish", since=24)
def swish(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.Mul(g, swish_slope(op, node, node.attribute("alpha", 1.0))),)


def swish_slope(op: Emitter, node: Node, alpha: float) -> str:
    """y = x s with s = sigmoid(alpha x), so y' = s + y alpha (1 - s)."""
    s = op.Sigmoid(op.Mul(node.inputs[0], alpha))
    return op.Add(s, op.Mul(node.outputs[0], op.Mul(op.Sub(1, s), alpha)))


@rule("Mish")
def mish(op: Emitter, node: Node, g: str) -> Gradients:
    """y = x t with t = tanh(softplus(x)), so y' = t + x (1 - t^2) sigmoid(x)."""
    x = node.inputs[0]
    t = op.Tanh(op.Softplus(x))
    return (op.Mul(g, op.Add(t, op.Mul(op.Mul(x, op.Sigmoid(x)), op.Sub(1, op.Mul(t, t))))),)


@rule("Gelu", since=20)
def gelu(op: Emitter, node: Node, g: str) -> Gradients:
    derivative = gelu_tanh_slope if node.attribute("approximate", "none") == "tanh" else gelu_erf_slope
    return (op.Mul(g, derivative(op, node.inputs[0])),)


def gelu_erf_slope(op: Emitter, x: str) -> str:
    """Phi(x) + x phi(x), the normal distribution and its density: with s = x / sqrt(2), (1 + erf(s)) / 2 +
    s exp(-s^2) / sqrt(pi).

    The time of each step is that of a pass over memory, and Erf and the square share s; dividing by exp(s^2), which may
    overflow to the limit 0, spares the pass that changes the sign.
    """
    s = op.Mul(x, sqrt(0.5))
    along = op.Mul(op.Div(s, op.Exp(op.Mul(s, s))), 1 / sqrt(pi))
    return op.Add(_to_unit(op, op.Erf(s)), along)


def _to_unit(op: Emitter, value: str) -> str:
    """(1 + value) / 2 of what lies between -1 and 1; in one step of float32, the only type onnxruntime has it for."""
    if op.graph.dtype(value) == TensorProto.FLOAT:
        return op.HardSigmoid(value, alpha=0.5, beta=0.5)
    return op.Add(op.Mul(value, 0.5), 0.5)


def gelu_tanh_slope(op: Emitter, x: str) -> str:
    """y = x (1 + t) / 2 with t = tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3).

    Beyond 10, t is 1 or -1 whatever the square is there, which may be too large a number.
    """
    scale, square = sqrt(2 / pi), op.Min(op.Mul(x, x), 100)
    t = op.Tanh(op.Mul(x, op.Add(op.Mul(square, 0.044715 * scale), scale)))
    slope = op.Mul(op.Sub(1, op.Mul(t, t)), op.Add(op.Mul(square, 3 * 0.044715 * scale), scale))
    return op.Mul(op.Add(op.Add(t, 1), op.Mul(x, slope)), 0.5)


@rule("Cast")
@rule("CastLike")
def cast(op: Emitter, node: Node, g: str) -> Gradients:
    """Between floating-point types of 16 bits and more, whose rounding counts as none."""
    if any(op.graph.is_narrow(name) for name in (node.inputs[0], node.outputs[0])):
        raise Refusal(
            "a number of 8 bits or less is a staircase whose true gradient is zero",
            "explain the float model that this one was quantized from",
        )
    return op.cast_like(g, node.inputs[0]), *[None] * (len(node.inputs) - 1)


@rule("Trilu")
def trilu(op: Emitter, node: Node, g: str) -> Gradients:
    return op.Trilu(g, node.input(1), upper=node.attribute("upper", 1)), None
