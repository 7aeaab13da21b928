"""The bodies of nodes, differentiated: a body with its vector-Jacobian product behind it, and how iterations of one
are taken back.

The second pass over a loop's iterations reads what the first one knew. The states before each iteration are stored,
and so are intermediate tensors where their shapes are settled; the others are computed again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.graph import CONDITION, COUNTER, Graph, consumed
from explainserve.onnx_vjp.registry import Refusal
from explainserve.onnx_vjp.shapes import Dimension, Shape, TensorType


@dataclass(frozen=True)
class Differentiated:
    """A body whose first `forward_count` nodes are its own; those behind compute `gradients`, by tensor."""

    graph: Graph
    op: Emitter
    forward_count: int
    gradients: Mapping[str, str]

    def gradient(self, name: str) -> str:
        """The gradient of a tensor that the body knows, zeros where nothing flows to it."""
        return self.gradients.get(name) or self.op.zeros_like(name)

    def as_outputs(self, values: Iterable[str]) -> list[str]:
        """The values under names that outputs may have: a copy where one is an input, a constant, a tensor of the
        body's own nodes, or given twice.
        """
        computed = {name for node in self.graph.nodes[self.forward_count :] for name in node.output}
        names: list[str] = []
        for value in values:
            names.append(value if value in computed and value not in names else self._copied(value))
        return names

    def _copied(self, value: str) -> str:
        name = self.graph.fresh("vjp/output")
        self.graph.append(helper.make_node("Identity", [value], [name]))
        self.graph.shapes.assign(name, value)
        return name

    def needed(self, outputs: Iterable[str], stored: Collection[str] = ()) -> tuple[list[NodeProto], set[str]]:
        """The nodes that the outputs need, and every tensor that these read. Tensors of the body's own nodes that are
        `stored` are not computed again.
        """
        kept, reads = [], set(outputs)
        for position in reversed(range(len(self.graph.nodes))):
            node = self.graph.nodes[position]
            wanted = reads.intersection(node.output)
            if wanted and not (position < self.forward_count and wanted.issubset(stored)):
                if self.graph.is_random(node):
                    raise Refusal(
                        f"{node.op_type} in a body would be drawn twice", "export the model in evaluation mode"
                    )
                kept.append(node)
                reads.update(consumed(node))
        return kept[::-1], reads


def differentiated(node: Node, graph: Graph, wrt: Sequence[str], seeds: Sequence[tuple[str, str]]) -> Differentiated:
    """Write the gradient of a body of `node` with respect to `wrt`; `seeds` pairs its results with cotangents."""
    walk = node.walk(graph, wrt, [result for result, _ in seeds])
    forward_count, op = len(graph.nodes), Emitter(graph)
    parts: dict[str, list[str]] = defaultdict(list)
    for result, cotangent in seeds:
        parts[result].append(cotangent)
    cotangents = {result: op.Sum(*values) if len(values) > 1 else values[0] for result, values in parts.items()}
    return Differentiated(graph, op, forward_count, walk.vjp(cotangents, op))


# -- iterations --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A tensor that iterations hand on: its first value and the cotangent of its last outside, and what a body calls
    it before and after an iteration.
    """

    initial: str
    cotangent: str | None
    before: str
    after: str


@dataclass(frozen=True)
class Pieces:
    """A tensor that a body reads or writes one piece of per iteration: its name inside and outside, the axis that is
    cut, and whether the first iteration has the first piece (0) or the last (1).
    """

    inner: str
    outer: str
    axis: int = 0
    direction: int = 0


@dataclass(frozen=True)
class Iterations:
    """A Loop or Scan with a cotangent: what its body hands on, what it reads piece by piece, and the cotangents of
    what it writes, with the results' names as `inner`. `graph` is the body; `settled` says whether shapes are the
    same in every iteration.
    """

    node: Node
    body: GraphProto
    graph: Graph
    states: Sequence[State]
    reads: Sequence[Pieces]
    writes: Sequence[Pieces]
    settled: bool

    @property
    def formals(self) -> list[str]:
        """What the body calls its inputs."""
        return [value.name for value in self.body.input]

    @property
    def captured(self) -> Sequence[str]:
        """The tensors that the body reads from outside."""
        return self.node.sources[len(self.node.inputs) :]

    @property
    def live(self) -> list[str]:
        """What the body calls the tensors whose gradient is needed."""
        names = [*self.formals[: len(self.node.inputs)], *self.captured]
        return [name for index, name in enumerate(names) if self.node.differentiates(index)]

    def carried(self) -> list[State]:
        """The states that hand a cotangent back: those that depend on a live tensor and that a cotangent reaches."""
        live, results = set(self.live), [piece.inner for piece in self.writes]
        while grown := self._dependent(live) - live:
            live |= grown
        needed = {state.after for state in self.states if state.cotangent}
        while grown := self._reached(live, [*results, *needed]) - needed:
            needed |= grown
        return [state for state in self.states if state.before in live and state.after in needed]

    def _dependent(self, live: Collection[str]) -> set[str]:
        path = self.node.walk(self.graph, list(live), [state.after for state in self.states]).path
        return {state.before for state in self.states if state.after in path.tensors}

    def _reached(self, live: Collection[str], of: Sequence[str]) -> set[str]:
        path = self.node.walk(self.graph, list(live), of).path
        return {state.after for state in self.states if state.before in path.tensors}


class Reverse:
    """The iterations taken back: a body that hands back the cotangents of states and sums those of captured tensors.

    `starts` has the first value of each, by the name of the state in the forward body or of the captured tensor.
    """

    def __init__(self, op: Emitter, forward: Iterations) -> None:
        self.op, self.forward, self.graph = op, forward, forward.graph
        states = forward.carried()
        for state in states:
            _check_shape(op.graph, forward.graph, state)
        self.seeds = [Pieces(self._like(p.inner), p.outer, p.axis, p.direction) for p in forward.writes]
        self.before = {state.before: self._like(state.before) for state in states}
        pairs = [(state.after, self.before[state.before]) for state in states]
        pairs += [(piece.inner, seed.inner) for piece, seed in zip(forward.writes, self.seeds, strict=True)]
        handed_on = {state.before for state in forward.states}
        wrt = [*self.before, *(name for name in forward.live if name not in handed_on)]
        self.body = differentiated(forward.node, self.graph, wrt, pairs)
        self.starts = {state.before: state.cotangent or op.zeros_like(state.initial) for state in states}
        self.after = {name: self.body.gradient(name) for name in self.before}
        for name in forward.captured:
            if name in self.body.gradients:
                self._sum(name)

    def _like(self, name: str) -> str:
        cotangent = self.graph.fresh(f"cotangent/{name}")
        self.graph.shapes.assign(cotangent, name)
        return cotangent

    def _sum(self, captured: str) -> None:
        self.starts[captured] = self.op.zeros_like(captured)
        self.before[captured] = self._like(captured)
        self.after[captured] = self.body.op.Add(self.before[captured], self.body.gradients[captured])

    def scan(self) -> dict[str, str]:
        """The gradients, by name in the forward body, from a Scan over the pieces in reverse order."""
        written = [piece for piece in self.forward.reads if piece.inner in self.body.gradients]
        outputs = self.body.as_outputs([*self.after.values(), *(self.body.gradients[p.inner] for p in written)])
        nodes, read = self._nodes(outputs)
        pieces = [piece for piece in self.forward.reads if piece.inner in read] + self._stored(read)
        pieces = [*self.seeds, *(pieces or self.forward.reads[:1])]
        inputs = [*self.before.values(), *(piece.inner for piece in pieces)]
        values = self.op.emit(
            "Scan",
            *self.starts.values(),
            *(piece.outer for piece in pieces),
            outputs=len(outputs),
            body=self.graph.subgraph(nodes, inputs, outputs, "gradient"),
            num_scan_inputs=len(pieces),
            scan_input_axes=[piece.axis for piece in pieces],
            scan_input_directions=[1 - piece.direction for piece in pieces],
            scan_output_axes=[piece.axis for piece in written] or None,
            scan_output_directions=[1 - piece.direction for piece in written] or None,
        )
        return dict(zip([*self.starts, *(piece.inner for piece in written)], values, strict=True))

    def loop(self) -> dict[str, str]:
        """The gradients, by name in the forward body, from a Loop that counts down: unlike a Scan it may be empty."""
        outputs = self.body.as_outputs(self.after.values())
        nodes, read = self._nodes(outputs)
        pieces = self._stored(read) or self._stored({self.forward.formals[0]})
        count = self.op.Squeeze(self.op.dim(pieces[0].outer, 0), [0])
        last = self.op.Sub(count, 1)
        step, position, going, gone = (self.graph.fresh(f"vjp/{name}") for name in ("step", "position", "on", "on"))
        self.graph.shapes.declare(step, COUNTER)
        self.graph.shapes.declare(going, CONDITION)
        self.graph.shapes.declare(gone, CONDITION)
        taken = [helper.make_node("Gather", [p.outer, position], [p.inner]) for p in (*self.seeds, *pieces)]
        turned = [helper.make_node("Sub", [last, step], [position]), helper.make_node("Identity", [going], [gone])]
        inputs = [step, going, *self.before.values()]
        body = self.graph.subgraph([*turned, *taken, *nodes], inputs, [gone, *outputs], "gradient")
        values = self.op.emit(
            "Loop", count, self.op.array(np.array(True)), *self.starts.values(), outputs=len(outputs), body=body
        )
        return dict(zip(self.starts, values, strict=True))

    def _nodes(self, outputs: Sequence[str]) -> tuple[list[NodeProto], list[str]]:
        """The nodes of the body, and what they read of the forward body's inputs and stored tensors."""
        forward = self.graph.nodes[: self.body.forward_count]
        varying = _varying(forward, self.forward.formals)
        storable = {name for name in varying if self._is_settled(name)}
        nodes, read = self.body.needed(outputs, storable)
        computed = {name for node in nodes for name in node.output}
        return nodes, [name for name in varying if name in read and name not in computed]

    def _is_settled(self, name: str) -> bool:
        shape = self.graph.shape(name)
        return self.forward.settled and shape is not None and None not in shape

    def _stored(self, names: Iterable[str]) -> list[Pieces]:
        """Have the forward loop return tensors of its body too, stacked along a new first axis."""
        sliced = {piece.inner for piece in self.forward.reads}
        pieces = [Pieces(name, self.op.graph.fresh(f"vjp/{name}")) for name in names if name not in sliced]
        for state in self.forward.states:
            if state.before in {piece.inner for piece in pieces}:
                _check_shape(self.op.graph, self.graph, state)
        if pieces:
            self.graph.fill(self.forward.body, self.graph.nodes[: self.body.forward_count])
            self._pad_outputs()
        for piece in pieces:
            self._store(piece)
        return pieces

    def _pad_outputs(self) -> None:
        node = self.forward.node.proto
        missing = len(self.forward.body.output) - (node.op_type == "Loop") - len(node.output)
        node.output.extend([""] * missing)

    def _store(self, piece: Pieces) -> None:
        node, body, result = self.forward.node.proto, self.forward.body, piece.inner
        if result in self.forward.formals or result in {value.name for value in body.output}:
            result = self.graph.fresh(piece.outer)
            body.node.append(helper.make_node("Identity", [piece.inner], [result]))
        body.output.append(self.graph.value_info(result, piece.inner))
        node.output.append(piece.outer)
        for attribute in node.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)
        self.op.graph.shapes.declare(piece.outer, self.graph.shapes.stated(piece.inner).stacked())


def _varying(nodes: Sequence[NodeProto], formals: Sequence[str]) -> list[str]:
    """The tensors of a body that depend on its inputs, in order: only these differ between iterations."""
    varying = dict.fromkeys(formals)
    for node in nodes:
        if any(name in varying for name in consumed(node)):
            varying.update(dict.fromkeys(name for name in node.output if name))
    return list(varying)


def _differ(old: Dimension, new: Dimension) -> bool:
    """Whether two dimensions are known to be different: two symbols of the model may stand for the same number."""
    computed = isinstance(new, str) and "|" in new
    return old != new and (computed or (isinstance(old, int) and isinstance(new, int)))


def _check_shape(outer: Graph, body: Graph, state: State) -> None:
    """Refuse a state that is no tensor, or whose shape is known to change from one iteration to the next."""
    if outer.dtype(state.initial) == body.dtype(state.before) == TensorProto.UNDEFINED:
        raise Refusal(f"'{state.before}' is no tensor", "collect values in a scan output instead of a sequence")
    first, after = outer.shape(state.initial), body.shape(state.after)
    if first is None or after is None:
        return
    before = body.shape(state.before) or first
    sizes = zip(first, before, after, strict=False)
    if len(first) != len(after) or any(start is not None and _differ(old, new) for start, old, new in sizes):
        raise Refusal(
            f"the shape of '{state.before}' changes from one iteration to the next",
            "collect values in a scan output instead of a growing state",
        )


# -- writing ----------------------------------------------------------------------------------------------------------


def emit_scan(
    op: Emitter,
    states: Sequence[str],
    rows: Sequence[str],
    step: Callable[[Emitter, Sequence[str], Sequence[str]], Sequence[str]],
    *,
    written: int,
    backward: bool = False,
) -> tuple[str, ...]:
    """A Scan along the first axis of `rows`, from its end where it is `backward`: the final states and what it writes.

    `step(op, states, rows)` emits the body, and returns the states after a step and `written` values besides.
    """
    outer = op.graph
    types = [*map(outer.shapes.type, states), *(outer.shapes.type(name).without_axis(0) for name in rows)]
    names = [outer.fresh("step/before") for _ in types]
    formals = [helper.make_value_info(name, kind.proto()) for name, kind in zip(names, types, strict=True)]
    graph = outer.nested(GraphProto(input=formals), types)
    body = Differentiated(graph, Emitter(graph), 0, {})
    outputs = body.as_outputs(step(body.op, names[: len(states)], names[len(states) :]))
    values = op.emit(
        "Scan",
        *states,
        *rows,
        outputs=len(outputs),
        body=graph.subgraph(graph.nodes, names, outputs, "step"),
        num_scan_inputs=len(rows),
        scan_input_directions=[int(backward)] * len(rows),
        scan_output_directions=[int(backward)] * written,
    )
    for value, state in zip(values, states, strict=False):
        outer.shapes.assign(value, state)
    for value, name in zip(values[len(states) :], outputs[len(states) :], strict=True):
        outer.shapes.declare(value, _per_step(graph.shapes.stated(name), outer.shape(rows[0])))
    return values


def _per_step(piece: TensorType, rows: Shape | None) -> TensorType:
    """The type of what a Scan along the first axis of `rows` stacks up from the pieces of its steps."""
    if piece.shape is None or rows is None:
        return TensorType(piece.dtype, None)
    return TensorType(piece.dtype, (rows[0], *piece.shape))
