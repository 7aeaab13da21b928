"""Branches, scans and loops: the gradient is a branch, scan or loop over the bodies' own gradients.

How often a loop runs is piecewise constant in its inputs, so it need not be known.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import GraphProto

from explainserve.onnx_vjp.bodies import Differentiated, Iterations, Pieces, Reverse, State, differentiated
from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.graph import Graph
from explainserve.onnx_vjp.registry import Gradients, rule


@rule("If", every_output=True)
def if_(op: Emitter, node: Node, cotangents: list[str | None]) -> Gradients:
    """The same choice between the gradients of the branches; a branch gives zeros for a tensor that it does not use."""
    live = [name for index, name in enumerate(node.sources) if node.differentiates(index)]
    branches = [_branch(op, node, node.attribute(name), live, cotangents) for name in ("then_branch", "else_branch")]
    found = [name for name in live if any(name in branch.gradients for branch in branches)]
    if not found:
        return [None] * len(node.sources)
    then, other = (_gradients(branch, found) for branch in branches)
    values = op.emit("If", node.inputs[0], outputs=len(found), then_branch=then, else_branch=other)
    gradients = dict(zip(found, values, strict=True))
    return [gradients.get(name) for name in node.sources]


def _branch(
    op: Emitter, node: Node, branch: GraphProto, live: Sequence[str], cotangents: Sequence[str | None]
) -> Differentiated:
    graph = op.graph.nested(branch, [], (*live, *(g for g in cotangents if g)))
    seeds = [(value.name, g) for value, g in zip(branch.output, cotangents, strict=False) if g]
    return differentiated(node, graph, live, seeds)


def _gradients(branch: Differentiated, wrt: Sequence[str]) -> GraphProto:
    """The branch computed again, with its gradient."""
    outputs = branch.as_outputs([branch.gradient(name) for name in wrt])
    nodes, _ = branch.needed(outputs)
    return branch.graph.subgraph(nodes, [], outputs, "gradient")


@rule("Scan", since=9, every_output=True)
def scan(op: Emitter, node: Node, cotangents: list[str | None]) -> Gradients:
    """A Scan from the last step to the first."""
    body: GraphProto = node.attribute("body")
    count = len(node.inputs) - node.attribute("num_scan_inputs")
    formals, results = [value.name for value in body.input], [value.name for value in body.output]
    reads = list(map(Pieces, formals[count:], node.inputs[count:], *_ways(node, "input", len(formals) - count)))
    written = zip(results[count:], cotangents[count:], *_ways(node, "output", len(results) - count), strict=False)
    types = [op.graph.shapes.type(name) for name in node.inputs[:count]]
    types += [op.graph.shapes.type(piece.outer).without_axis(piece.axis) for piece in reads]
    forward = Iterations(
        node,
        body,
        graph=op.graph.nested(body, types),
        states=list(map(State, node.inputs, cotangents[:count], formals, results)),
        reads=reads,
        writes=[Pieces(name, g, axis, direction) for name, g, axis, direction in written if g],
        settled=True,
    )
    found = Reverse(op, forward).scan()
    return [found.get(name) for name in (*formals, *forward.captured)]


def _ways(node: Node, kind: str, count: int) -> tuple[list[int], list[int]]:
    """The axes and directions of a Scan's inputs or outputs."""
    axes, directions = (node.attribute(f"scan_{kind}_{name}") or [0] * count for name in ("axes", "directions"))
    return axes, directions


@rule("Loop", every_output=True)
def loop(op: Emitter, node: Node, cotangents: list[str | None]) -> Gradients:
    """A Loop from the last iteration to the first."""
    body: GraphProto = node.attribute("body")
    count = len(body.input) - 2
    formals, results = [value.name for value in body.input[2:]], [value.name for value in body.output[1:]]
    graph = op.graph.loop_body(node.proto)
    states = list(map(State, node.inputs[2:], cotangents[:count], formals, results))
    forward = Iterations(
        node,
        body,
        graph,
        states,
        reads=[],
        writes=[Pieces(name, g) for name, g in zip(results[count:], cotangents[count:], strict=False) if g],
        settled=all(_is_settled(graph, state) for state in states),
    )
    found = Reverse(op, forward).loop()
    return [*[None] * min(len(node.inputs), 2), *(found.get(name) for name in (*formals, *forward.captured))]


def _is_settled(graph: Graph, state: State) -> bool:
    """Whether every iteration is known to keep the shape of a state."""
    shape = graph.shape(state.before)
    return shape is not None and not any(str(size).startswith(f"?{state.before}:") for size in shape)
