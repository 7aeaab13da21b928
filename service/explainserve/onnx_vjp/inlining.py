"""Writing out the functions of a model, once it is known how many nodes that gives.

A file of a few kilobytes can hold thirty functions that each call the one before twice. ONNX and onnxruntime write
such calls out whatever they come to, so they are counted before either of them sees the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx.inliner

from explainserve.onnx_vjp.registry import canonical_domain
from explainserve.onnx_vjp.subgraphs import subgraphs

MAX_NODES = 200_000
"""Several times those of the largest networks that people export."""

Name = tuple[str, str, str]
"""The domain, the name and the overload by which nodes call a function."""


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the bodies of its functions in place of their calls: itself where it has no functions.

    Raises ValueError where that would give more than MAX_NODES nodes, and where a function calls itself.
    """
    if not model.functions:
        return model
    count = node_count(model)
    if count > MAX_NODES:
        raise ValueError(f"the model has {count} nodes with its functions written out; {MAX_NODES} are the most")
    return onnx.inliner.inline_local_functions(model)


def node_count(model: onnx.ModelProto) -> int:
    """Nodes of the graph, of its subgraphs, and of the functions as often as they are called.

    Raises:
        ValueError: a function calls itself.
    """
    bodies = {_name(function, function.name): _called(function.node) for function in model.functions}
    counts: dict[Name, int] = {}
    pending, opened = list(bodies), set[Name]()
    while pending:
        name = pending[-1]
        missing = (
            [] if name in counts else [called for called in bodies[name] if called in bodies and called not in counts]
        )
        if missing and name in opened:
            raise ValueError(f"function {name[1]!r} calls itself")
        opened.add(name)
        if missing:
            pending += missing
        else:
            counts[name] = 1 + sum(counts.get(called, 1) for called in bodies[name])
            pending.pop()
    return sum(counts.get(called, 1) for called in _called(model.graph.node))


def _called(nodes: Iterable[onnx.NodeProto]) -> list[Name]:
    return [_name(node, node.op_type) for node in _nodes(nodes)]


def _name(of: onnx.NodeProto | onnx.FunctionProto, operator: str) -> Name:
    return canonical_domain(of.domain), operator, of.overload


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their subgraphs, which protobuf keeps from nesting deeply."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _nodes(graph.node)
