"""Cutting a model at intermediate tensors, so that a path can run over embeddings or any layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx
from onnx import NodeProto, TensorProto

from explainserve.onnx_vjp.arguments import check_model, tensor_names
from explainserve.onnx_vjp.functions import make_readable
from explainserve.onnx_vjp.graph import Graph, consumed
from explainserve.onnx_vjp.malformed import malformed_as_value_error
from explainserve.onnx_vjp.opset import prepared
from explainserve.onnx_vjp.routes import around, dependents
from explainserve.onnx_vjp.well_formed import check_well_formed


@dataclass(frozen=True)
class Bypass:
    """A route by which the values of an input reach an output without passing a cut tensor.

    What is found of the cut tensor is then not all that the input does. `route` names the tensors on the way, both
    ends included.
    """

    input: str
    output: str
    route: tuple[str, ...]

    def __str__(self) -> str:
        return f"input '{self.input}' reaches output '{self.output}' around the cut: {' -> '.join(self.route)}"


@dataclass(frozen=True)
class Cut:
    """A model in two parts.

    `before` takes the inputs of the model that the cut tensors depend on, and returns those tensors. `after` takes the
    tensors, and whatever other inputs of the model its outputs depend on (masks, or inputs with a `bypasses` entry),
    and returns the outputs of the model that depend on a cut tensor. Both keep all names.
    """

    before: onnx.ModelProto
    after: onnx.ModelProto
    bypasses: tuple[Bypass, ...]


def cut(model: onnx.ModelProto, tensors: Sequence[str]) -> Cut:
    """Split `model` at intermediate tensors of any type; none of them may be an input.

    Raises ValueError for a malformed graph, for a tensor that does not exist or is an input, for one that no output
    depends on or whose type is not known, and for one that depends on another of `tensors`; UnsupportedOperators for
    nodes of old operator sets that newer ones have no form of; TypeError for an argument of another type.
    """
    check_model(model)
    return _cut(model, tensor_names("tensors", tensors))


@malformed_as_value_error()
def _cut(model: onnx.ModelProto, wanted: tuple[str, ...]) -> Cut:
    plain = prepared(model)
    check_well_formed(plain)
    graph = Graph(plain)
    make_readable(graph)
    outputs = [value.name for value in graph.proto.graph.output]
    reached = _checked(graph, wanted, outputs)
    before = _needed(graph.nodes, wanted, ())
    after = [_set_aside(graph, node, wanted) for node in _needed(graph.nodes, reached, wanted)]
    return Cut(
        _part(graph, before, [], wanted),
        _part(graph, after, wanted, reached),
        tuple(_bypasses(graph, wanted, reached)),
    )


def _checked(graph: Graph, wanted: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """The outputs that depend on the tensors."""
    inputs = {value.name for value in graph.proto.graph.input}
    reached: set[str] = set()
    for name in wanted:
        if name not in graph or (name not in graph.producers and name not in inputs):
            raise ValueError(f"the model has no tensor '{name}'")
        if name in inputs:
            raise ValueError(f"tensor '{name}' is an input of the model: there is nothing before it to cut off")
        found = dependents(graph.nodes, name)
        if others := found.intersection(wanted) - {name}:
            raise ValueError(f"tensor '{min(others)}' depends on '{name}': only one of them can be cut")
        if not found.intersection(outputs):
            raise ValueError(f"no output depends on tensor '{name}'")
        if graph.dtype(name) == TensorProto.UNDEFINED:
            raise ValueError(f"the type of tensor '{name}' is not known: state it in the file")
        reached |= found
    return [name for name in outputs if name in reached]


def _needed(nodes: Sequence[NodeProto], results: Collection[str], given: Collection[str]) -> list[NodeProto]:
    """The nodes that compute `results` from the inputs and from `given`, in order."""
    needed, found = set(results) - set(given), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            found.append(node)
            needed.update(name for name in consumed(node) if name not in given)
    return found[::-1]


def _set_aside(graph: Graph, node: NodeProto, given: Collection[str]) -> NodeProto:
    """The node, which is needed for another output, with the outputs that are given under names that nobody reads."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for index, name in enumerate(node.output):
        if name in given:
            copy.output[index] = graph.fresh(f"{name}/unused")
            graph.shapes.assign(copy.output[index], name)
    return copy


def _part(graph: Graph, nodes: Sequence[NodeProto], given: Sequence[str], results: Sequence[str]) -> onnx.ModelProto:
    read = {name for node in nodes for name in consumed(node)}
    inputs = [graph.value_info(name, name) for name in given]
    inputs += [value for value in graph.proto.graph.input if value.name in read]
    declared = {value.name: value for value in graph.proto.graph.output}
    return graph.part(nodes, inputs, [declared.get(name) or graph.value_info(name, name) for name in results])


def _bypasses(graph: Graph, wanted: Collection[str], outputs: Sequence[str]) -> list[Bypass]:
    """One route around the cut for each input whose values reach a cut tensor, where there is one."""
    inputs = (value.name for value in graph.proto.graph.input)
    sources = (source for source in inputs if not dependents(graph.nodes, source).isdisjoint(wanted))
    routes = (around(graph.nodes, source, outputs, wanted) for source in sources)
    return [Bypass(route[0], route[-1], route) for route in routes if route]
