"""Reverse-mode differentiation of an ONNX graph: the walk.

The walk visits the nodes between `wrt` and `of` from the last to the first, asks each one's rule for the vector-
Jacobian product, undoes broadcasting, and sums the cotangents of tensors that are used more than once. Nothing else
of the graph is touched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
from onnx import NodeProto

from explainserve.onnx_vjp import rules as _rules  # noqa: F401  (fills the registry)
from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.functions import expand_functions
from explainserve.onnx_vjp.gaps import Gap, UnsupportedOperators
from explainserve.onnx_vjp.graph import Graph, consumed
from explainserve.onnx_vjp.opset import prepared
from explainserve.onnx_vjp.path import live_path, version_of
from explainserve.onnx_vjp.placement import summed
from explainserve.onnx_vjp.registry import Refusal, Refused, Rule, Table, lookup, standard


@dataclass(frozen=True)
class GradientGraph:
    """A model that computes its original outputs and a vector-Jacobian product.

    `cotangent` names the extra input, of the shape and type of `of`; `gradients` maps each `wrt` to the output that
    holds sum over `of` of cotangent * d of / d wrt, in the shape and type of that `wrt`.
    """

    model: onnx.ModelProto
    cotangent: str
    gradients: dict[str, str]


def input_gradient(model: onnx.ModelProto, wrt: Sequence[str], of: str, *, rules: Table | None = None) -> GradientGraph:
    """Differentiate tensor `of` with respect to each tensor of `wrt`; any float tensors of the graph, inputs and
    intermediates alike.

    `rules` is the table of gradient rules, the true derivatives by default. A tensor on which `of` does not depend
    gets zeros. Initializers that the model lists as inputs too become constants: the gradient is built on their
    values.

    Raises ValueError for a malformed graph and for a tensor that does not exist or is not float, and
    UnsupportedOperators with every gap of the path.
    """
    walk = _Walk(model, wrt, of, standard() if rules is None else rules)
    if walk.gaps:
        raise UnsupportedOperators(walk.gaps)
    return walk.result()


def find_gaps(model: onnx.ModelProto, wrt: Sequence[str], of: str, *, rules: Table | None = None) -> list[Gap]:
    """Everything that `input_gradient` would refuse, without raising. An empty list means that the gradient exists."""
    return _Walk(model, wrt, of, standard() if rules is None else rules).gaps


class _Walk:
    def __init__(self, model: onnx.ModelProto, wrt: Sequence[str], of: str, table: Table) -> None:
        self.graph = Graph(prepared(model))
        self.wrt, self.of, self.table = tuple(dict.fromkeys(wrt)), of, table
        _check_tensors(self.graph, (*wrt, of))
        expand_functions(self.graph, self.wrt, of, table)
        self.forward_count = len(self.graph.nodes)
        self.op = Emitter(self.graph)
        self.cotangent = self.graph.fresh("cotangent")
        self.graph.shapes.assign(self.cotangent, of)
        self.gaps: list[Gap] = []
        self.cotangents: dict[str, list[str]] = defaultdict(list)
        self._differentiate()

    def _differentiate(self) -> None:
        path = live_path(self.graph, self.wrt, self.of, self.table)
        if self.of in path.tensors:
            self.cotangents[self.of].append(self.cotangent)
        for node in reversed(path.nodes):
            self._visit(node, path.tensors)
        self.sums = {name: self._sum(name) or self.op.zeros_like(name) for name in self.wrt}

    def _sum(self, name: str) -> str | None:
        parts = self.cotangents.get(name)
        if not parts:
            return None
        parts[:] = [summed(self.op, parts)]
        self.graph.shapes.assign(parts[0], name)
        return parts[0]

    def _visit(self, node: NodeProto, live: frozenset[str]) -> None:
        state = lookup(self.table, node.domain, node.op_type, version_of(self.graph, node))
        outputs = [self._sum(name) if name else None for name in node.output]
        try:
            gradients = self._gradients(state, node, live, outputs)
        except Refusal as refusal:
            self.gaps.append(
                Gap(node.op_type, node.domain, node.name or node.output[0], refusal.reason, refusal.remedy)
            )
            # Any value keeps the walk going, so that the gaps behind this one are found too.
            gradients = [name if name in live else None for name in node.input]
            state = None
        for name, gradient in zip(node.input, gradients, strict=False):
            if gradient is not None and name in live:
                broadcast = isinstance(state, Rule) and state.broadcasts
                gradient = self.op.sum_to(gradient, name) if broadcast else gradient
                self.graph.shapes.assign(gradient, name)
                self.cotangents[name].append(gradient)

    def _gradients(
        self, state: object, node: NodeProto, live: frozenset[str], outputs: list[str | None]
    ) -> Sequence[str | None]:
        if isinstance(state, Refused):
            raise Refusal(state.reason, state.remedy)
        if not isinstance(state, Rule):
            raise Refusal(
                "no gradient rule", "export the model with standard operators, or use a method that needs no gradient"
            )
        if not any(outputs):
            return [None] * len(node.input)
        if state.every_output:
            gradients = state.formula(self.op, Node(node, live), outputs)
        elif any(outputs[1:]):
            raise Refusal("only the first output has a gradient rule", "remove the use of the other outputs")
        else:
            gradients = state.formula(self.op, Node(node, live), outputs[0])
        _check_arity(node, gradients)
        return gradients

    def result(self) -> GradientGraph:
        graph = self.graph
        names = {name: graph.fresh(f"gradient/{name}") for name in self.wrt}
        nodes = graph.nodes + [onnx.helper.make_node("Identity", [self.sums[name]], [names[name]]) for name in self.wrt]
        kept = _without_unused(nodes, self.forward_count, names.values())
        inputs = [graph.value_info(self.cotangent, self.of)]
        outputs = [graph.value_info(names[name], name) for name in self.wrt]
        return GradientGraph(graph.model(kept, inputs, outputs), self.cotangent, names)


def _check_tensors(graph: Graph, names: Iterable[str]) -> None:
    for name in names:
        if name not in graph:
            raise ValueError(f"the model has no tensor '{name}'")
        if not graph.is_float(name):
            kind = onnx.TensorProto.DataType.Name(graph.dtype(name))
            raise ValueError(f"tensor '{name}' is {kind}; gradients exist for float tensors only")


def _check_arity(node: NodeProto, gradients: Sequence[str | None]) -> None:
    if len(gradients) < len(node.input) or any(isinstance(gradient, tuple) for gradient in gradients):
        raise AssertionError(
            f"the rule of {node.op_type} returned {len(gradients)} gradients for {len(node.input)} inputs. "
            "This is a bug."
        )


def _without_unused(nodes: Sequence[NodeProto], forward_count: int, outputs: Iterable[str]) -> list[NodeProto]:
    """All forward nodes, and of the others those that the outputs need."""
    needed = set(outputs)
    kept = []
    for position in reversed(range(len(nodes))):
        node = nodes[position]
        if position < forward_count or needed.intersection(node.output):
            kept.append(node)
            needed.update(consumed(node))
    return kept[::-1]
