"""Gradients of graphs that compute in sixteen bits: cotangents scaled on their way to what float16 holds.

A saturated score sends cotangents back that are far below the smallest number of float16. The gradient is linear in
them. So those of each row are multiplied by a power of two where they pass a tensor, and its gradients divided by it in
the end: nothing but underflow changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx

from explainserve.onnx_vjp.emitter import Emitter
from explainserve.onnx_vjp.gradient import GradientGraph, Weights, input_gradient
from explainserve.onnx_vjp.graph import Graph, consumed
from explainserve.onnx_vjp.opset import sort_nodes

_EXPONENT = 4
"""The largest cotangent of a row is scaled to at most 2 to the power of this: gradients more often shrink than grow on
their way down, and float16 ends at 6e-8 and at 2 to the power of 16."""
_LARGEST_EXPONENT = 100
"""Of a scale; float32 ends at 127."""


def scaled_gradient(
    model: onnx.ModelProto,
    wrt: Sequence[str],
    of: str,
    at: str,
    *,
    single: bool = False,
    weights: Weights | None = None,
) -> GradientGraph:
    """What `input_gradient` returns, with the cotangents of each row scaled at the tensor `at` on the way from `of` to
    `wrt`; at `of` itself, where a path from a `wrt` goes around `at`.

    The first axis of all these tensors counts rows, unless `single` says that there is one row, with or without that
    axis. Raises what `input_gradient` does.
    """
    passed = of if _goes_around(model, wrt, of, at) else at
    upper = input_gradient(model, [passed], of, weights=weights)
    lower = input_gradient(upper.model, wrt, passed, weights=weights)
    graph = Graph(lower.model)
    op = Emitter(graph)
    rows = [1 if single else 0, -1]
    arriving = upper.gradients[passed]
    scale = _scale(op, op.Reshape(arriving, rows))
    scaled = op.reshape_like(op.Mul(op.Reshape(arriving, rows), scale), arriving)
    graph.append(onnx.helper.make_node("Identity", [scaled], [lower.cotangent], name=lower.cotangent))
    gradients = {
        name: op.Identity(op.reshape_like(op.Div(op.Reshape(own, rows), scale), own))
        for name, own in lower.gradients.items()
    }
    return GradientGraph(_model(model, graph, lower, gradients), upper.cotangents, gradients)


def _scale(op: Emitter, rows: str) -> str:
    """A power of two for each row, shape (rows, 1); 1 where the row is all zeros or not finite."""
    largest = op.ReduceMax(op.Abs(rows), [1], keepdims=1)
    exponent = op.Sub(float(_EXPONENT), op.Ceil(op.Mul(op.Log(largest), 1 / math.log(2))))
    scalable = op.And(op.Greater(largest, 0.0), op.Less(largest, np.inf))
    return op.Where(scalable, op.Pow(2.0, op.Min(exponent, float(_LARGEST_EXPONENT))), 1.0)


def _model(model: onnx.ModelProto, graph: Graph, lower: GradientGraph, gradients: dict[str, str]) -> onnx.ModelProto:
    """The graph with the inputs and outputs of `model`, the cotangent and the gradients."""
    inputs = [value for value in lower.model.graph.input if value.name != lower.cotangent]
    own = {value.name for value in model.graph.output}
    outputs = [value for value in lower.model.graph.output if value.name in own]
    outputs += [graph.value_info(name, like) for like, name in gradients.items()]
    joined = graph.part(graph.nodes, inputs, outputs)
    sort_nodes(joined.graph)
    return joined


def _goes_around(model: onnx.ModelProto, wrt: Sequence[str], of: str, at: str) -> bool:
    """Whether `of` depends on a `wrt` other than through `at`."""
    producers = {name: node for node in model.graph.node for name in node.output}
    reached, pending = {at}, [of]
    while pending:
        name = pending.pop()
        if name not in reached and name in producers:
            pending += consumed(producers[name])
        reached.add(name)
    return not reached.isdisjoint(set(wrt) - {at})
