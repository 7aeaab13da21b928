"""Sums and products of the elements up to each one."""

from __future__ import annotations

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, rule


@rule("CumSum")
def cumsum(op: Emitter, node: Node, g: str) -> Gradients:
    """Every element sums those before it; its gradient sums those after it."""
    return _sum_of_later(op, node, g), None


@rule("CumProd", since=26)
def cumprod(op: Emitter, node: Node, g: str) -> Gradients:
    """dx_i = sum_k g_k y_k / x_i over the products that x_i is part of.

    Where x_i is the first zero of its row, y / x_i is the product with that zero left out; behind it nothing counts.
    """
    x, axis = node.inputs
    attributes = {"exclusive": node.attribute("exclusive", 0), "reverse": node.attribute("reverse", 0)}
    zero = op.Equal(x, 0)
    zeros_so_far = op.CumSum(op.mask(zero, x), axis, reverse=attributes["reverse"])
    first_zero = op.And(zero, op.Equal(zeros_so_far, 1))
    without = op.CumProd(op.Where(first_zero, 1, x), axis, **attributes)
    through_zero = _sum_of_later(op, node, op.Mul(g, without))
    dx = op.Div(_sum_of_later(op, node, op.Mul(g, node.outputs[0])), op.Where(zero, 1, x))
    return op.Where(first_zero, through_zero, dx), None


def _sum_of_later(op: Emitter, node: Node, value: str) -> str:
    """At each element the sum over the outputs that it is part of."""
    return op.CumSum(
        value, node.inputs[1], exclusive=node.attribute("exclusive", 0), reverse=1 - node.attribute("reverse", 0)
    )
