"""A gradient graph in two parts, so that one forward pass serves any number of cotangents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import NodeProto

from explainserve.onnx_vjp.gradient import GradientGraph
from explainserve.onnx_vjp.graph import Graph, consumed


@dataclass(frozen=True)
class SplitGradient:
    """The parts of a gradient graph.

    `forward` computes the outputs of the model and the `residuals`: all that the backward part reads of the forward
    pass. `backward` takes the residuals and the cotangents, and returns the gradients; it may run many times on the
    residuals of one forward pass. Names are those of the gradient graph.
    """

    forward: onnx.ModelProto
    backward: onnx.ModelProto
    residuals: tuple[str, ...]


def split(gradient: GradientGraph) -> SplitGradient:
    """Part a gradient graph where the cotangents enter: what does not depend on one is computed once, in `forward`."""
    graph = Graph(gradient.model)
    cotangents, results = set(gradient.cotangents.values()), set(gradient.gradients.values())
    backward = _dependent(graph.nodes, cotangents, results)
    later = {id(node) for node in backward}
    forward = [node for node in graph.nodes if id(node) not in later]
    available = {value.name for value in graph.proto.graph.input} | {name for node in forward for name in node.output}
    read = dict.fromkeys(name for node in backward for name in consumed(node))
    residuals = tuple(name for name in read if name in available and name not in cotangents)
    return SplitGradient(
        _forward(gradient, graph, forward, residuals),
        _backward(gradient, graph, backward, residuals),
        residuals,
    )


def _dependent(nodes: Sequence[NodeProto], sources: set[str], results: set[str]) -> list[NodeProto]:
    """The nodes that depend on a source, and those that write a result, in order."""
    dependent, found = set(sources), []
    for node in nodes:
        if dependent.intersection(consumed(node)) or results.intersection(node.output):
            dependent.update(node.output)
            found.append(node)
    return found


def _forward(
    gradient: GradientGraph, graph: Graph, nodes: Sequence[NodeProto], residuals: Sequence[str]
) -> onnx.ModelProto:
    declared = {value.name: value for value in gradient.model.graph.output}
    names = [name for name in declared if name not in gradient.gradients.values()]
    fed = {value.name for value in gradient.model.graph.input}
    extra = [name for name in residuals if name not in declared and name not in fed]
    inputs = [value for value in gradient.model.graph.input if value.name not in gradient.cotangents.values()]
    outputs = [declared[name] for name in names] + [graph.value_info(name, name) for name in extra]
    return graph.part(nodes, inputs, outputs)


def _backward(
    gradient: GradientGraph, graph: Graph, nodes: Sequence[NodeProto], residuals: Sequence[str]
) -> onnx.ModelProto:
    declared = {value.name: value for value in (*gradient.model.graph.input, *gradient.model.graph.output)}
    inputs = [graph.value_info(name, name) for name in residuals]
    inputs += [declared[name] for name in gradient.cotangents.values()]
    return graph.part(nodes, inputs, [declared[name] for name in gradient.gradients.values()])
