"""How many nodes a graph really has: a call of a function stands for its body, and those for theirs.

A file of a few kilobytes can hold thirty functions that each call the one before twice. ONNX, onnxruntime and the
gradient builder all write such calls out, so they are counted before any of them sees the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

MAX_NODES = 200_000
"""Several times those of the largest networks that people export."""

Name = tuple[str, str]


def node_count(model: onnx.ModelProto) -> int:
    """Nodes of the graph, of its subgraphs, and of the functions as often as they are called.

    Raises:
        ValueError: a function calls itself.
    """
    bodies = {(function.domain, function.name): _called(function.node) for function in model.functions}
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
    return [(node.domain, node.op_type) for node in _nodes(nodes)]


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their subgraphs, which protobuf keeps from nesting deeply."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)
