"""Graphs inside nodes: the branches of If, the bodies of Loop and Scan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from onnx import GraphProto, NodeProto, ValueInfoProto

from explainserve.onnx_vjp.registry import canonical_domain

MAX_DEPTH = 8
"""Each level of loops is inferred several times, so that the work doubles with every level."""


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node holds as attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def is_standard(node: NodeProto, operator: str) -> bool:
    """Whether a node is this operator of ONNX's own domain, not of the same name elsewhere."""
    return node.op_type == operator and canonical_domain(node.domain) == ""


def captured(node: NodeProto) -> list[str]:
    """The outer tensors that the subgraphs of a node read, each once, in the order of their first use."""
    return list(dict.fromkeys(name for graph in subgraphs(node) for name in read_from_outside(graph)))


def read_from_outside(graph: GraphProto) -> Iterator[str]:
    """Every tensor that a subgraph reads and does not define, once per use."""
    own = set(_declared(graph)) | {name for node in graph.node for name in node.output}
    for node in graph.node:
        yield from (name for name in (*node.input, *captured(node)) if name and name not in own)
    yield from (value.name for value in graph.output if value.name not in own)


def names_within(graph: GraphProto) -> Iterator[str]:
    """Every tensor that a graph or one of its subgraphs defines, and every node name."""
    yield from _declared(graph)
    for node in graph.node:
        yield from (node.name, *node.output)
        for inner in subgraphs(node):
            yield from names_within(inner)


def _declared(graph: GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)


def rename(graph: GraphProto, outer: Mapping[str, str], fresh: Callable[[str], str]) -> None:
    """Give every tensor that a subgraph defines the name `fresh` of its own, and read outer tensors under the names
    that `outer` has for them. A name that is defined again hides the one outside from there on.
    """
    scope = dict(outer)
    for value in graph.input:
        scope[value.name] = value.name = fresh(value.name)
    for tensor in graph.initializer:
        scope[tensor.name] = tensor.name = fresh(tensor.name)
    for node in graph.node:
        node.input[:] = [scope.get(name, name) for name in node.input]
        for inner in subgraphs(node):
            rename(inner, scope, fresh)
        scope.update((name, fresh(name)) for name in node.output if name)
        node.output[:] = [scope[name] if name else "" for name in node.output]
    _rename_values(graph.output, scope)
    _rename_values(graph.value_info, scope)


def instance(body: GraphProto, operands: Sequence[str], fresh: Callable[[str], str]) -> GraphProto:
    """A copy of a body that works on the given tensors in place of its inputs, its own named by `fresh`."""
    copy = GraphProto()
    copy.CopyFrom(body)
    formals = [value.name for value in copy.input]
    del copy.input[:]
    rename(copy, dict(zip(formals, operands, strict=True)), fresh)
    return copy


def _rename_values(values: Iterable[ValueInfoProto], scope: Mapping[str, str]) -> None:
    for value in values:
        value.name = scope.get(value.name, value.name)


def make_names_unique(graph: GraphProto) -> None:
    """Rename tensors inside subgraphs until no name is defined twice, neither around nor beside another.

    Raises ValueError where subgraphs hold subgraphs more than MAX_DEPTH deep.
    """
    if _depth(graph) > MAX_DEPTH:
        raise ValueError(f"the graph has subgraphs within subgraphs, more than {MAX_DEPTH} deep")
    taken = {*_declared(graph), *(name for node in graph.node for name in node.output)}

    def fresh(hint: str) -> str:
        name, serial = hint, 0
        while name in taken:
            serial += 1
            name = f"{hint}_{serial}"
        taken.add(name)
        return name

    for node in graph.node:
        for inner in subgraphs(node):
            rename(inner, {}, fresh)


def _depth(graph: GraphProto) -> int:
    return max((1 + _depth(inner) for node in graph.node for inner in subgraphs(node)), default=0)
