"""Functions of several tensors that broadcast. Each formula returns the broadcast shape; the walk sums it down."""

from __future__ import annotations

from functools import reduce

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, rule


@rule("Add", broadcasts=True)
def add(op: Emitter, node: Node, g: str) -> Gradients:
    return g, g


@rule("Sub", broadcasts=True)
def sub(op: Emitter, node: Node, g: str) -> Gradients:
    return g, op.Neg(g)


@rule("Mul", broadcasts=True)
def mul(op: Emitter, node: Node, g: str) -> Gradients:
    a, b = node.inputs
    return op.Mul(g, b), op.Mul(g, a)


@rule("Div", broadcasts=True)
def div(op: Emitter, node: Node, g: str) -> Gradients:
    """A constant's reciprocal multiplies faster, where the type surely holds it."""
    b, y = node.inputs[1], node.outputs[0]
    da = op.Mul(g, op.Reciprocal(b)) if op.constant(b) is not None and op.widened(b) == b else op.Div(g, b)
    return da, op.of_shape(op.Neg(op.Mul(da, y)), y)


@rule("Pow", broadcasts=True)
def pow_(op: Emitter, node: Node, g: str) -> Gradients:
    """dx = g p x^(p-1), zero where p is; dp = g y log(x), taken as zero where x is not positive."""
    x, exponent = node.inputs
    p = op.constant(exponent)
    if p is not None and p.size == 1:
        power = float(p.item())
        factor = op.Mul(x, 2) if power == 2 else op.Mul(op.Pow(x, power - 1), power)
        return op.Mul(g, factor) if power else op.Mul(g, op.zeros_like(x)), None
    p_float = op.cast_like(exponent, x)
    slope = op.Where(op.Equal(p_float, 0), 0, op.Mul(p_float, op.Pow(x, op.Sub(p_float, 1))))
    growth = op.Where(op.Greater(x, 0), op.Mul(node.outputs[0], op.Log(x)), 0)
    return op.Mul(g, slope), op.cast_like(op.Mul(g, growth), exponent)


@rule("Mod", broadcasts=True)
def mod(op: Emitter, node: Node, g: str) -> Gradients:
    """fmod(a, b) = a - trunc(a/b) b, where the quotient is piecewise constant."""
    (a, b), y = node.inputs, node.outputs[0]
    quotient = op.Div(op.Sub(a, y), b)
    return g, op.of_shape(op.Neg(op.Mul(g, op.Round(quotient))), y)


@rule("Sum", broadcasts=True)
def sum_(op: Emitter, node: Node, g: str) -> Gradients:
    return [g] * len(node.inputs)


@rule("Mean", broadcasts=True)
def mean(op: Emitter, node: Node, g: str) -> Gradients:
    return [op.Mul(g, 1 / len(node.inputs))] * len(node.inputs)


@rule("Max", "Min", broadcasts=True)
def extremum(op: Emitter, node: Node, g: str) -> Gradients:
    """Tied operands share the gradient evenly, as in torch.maximum."""
    if len(node.inputs) == 1:
        return (g,)
    hits = [op.mask(op.Equal(x, node.outputs[0]), g) for x in node.inputs]
    share = op.Div(g, reduce(op.Add, hits))
    return [op.Mul(share, hit) for hit in hits]


@rule("Where", broadcasts=True)
def where(op: Emitter, node: Node, g: str) -> Gradients:
    condition = node.inputs[0]
    return None, op.Where(condition, g, 0), op.Where(condition, 0, g)


@rule("Expand", broadcasts=True)
def expand(op: Emitter, node: Node, g: str) -> Gradients:
    """A dynamic dimension may be what is expanded, which only the run tells."""
    x, shape = node.inputs[0], op.shape(node.inputs[0])
    static = shape is not None and all(isinstance(size, int) for size in shape)
    return g if static or op.constant(node.inputs[1]) is not None else op.sum_to_dynamic(g, x), None
