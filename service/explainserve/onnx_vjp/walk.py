"""Reverse-mode differentiation of an ONNX graph: the walk.

The walk visits the nodes between `wrt` and `of` from the last to the first, asks each one's rule for the vector-
Jacobian product, undoes broadcasting, and sums the cotangents of tensors that are used more than once. Nothing else
of the graph is touched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from onnx import NodeProto, defs

from explainserve.onnx_vjp import rules as _rules  # noqa: F401  (fills the registry)
from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.functions import expand
from explainserve.onnx_vjp.gaps import Gap
from explainserve.onnx_vjp.graph import Graph
from explainserve.onnx_vjp.malformed import MALFORMED
from explainserve.onnx_vjp.path import live_path, state_in
from explainserve.onnx_vjp.placement import summed
from explainserve.onnx_vjp.registry import Refusal, Refused, Rule, State, Table


class Walk:
    """Writes the vector-Jacobian product of `of` with respect to `wrt` behind the nodes of `graph`.

    Operators of the path that are made of others are replaced on construction; `vjp` then does the walk. `gaps` lists
    what could not be differentiated, in the bodies of nodes too.
    """

    def __init__(
        self, graph: Graph, wrt: Sequence[str], of: Sequence[str], table: Table, gaps: list[Gap] | None = None
    ) -> None:
        self.graph, self.wrt, self.of, self.table = graph, tuple(wrt), tuple(of), table
        self.gaps = [] if gaps is None else gaps
        self._refusals = expand(graph, self.wrt, self.of, table)
        if table.canonised is not None:
            table.canonised(graph, self.wrt)
        self.path = live_path(graph, self.wrt, self.of, table)
        self._cotangents: dict[str, list[str]] = defaultdict(list)

    def vjp(self, cotangents: Mapping[str, str], op: Emitter, twins: Mapping[str, str] | None = None) -> dict[str, str]:
        """The tensor that holds the product for each `wrt` on which an `of` depends.

        `cotangents` has one tensor per `of`, of its shape and type; `twins` the tensors of another forward pass by
        the names of this one's, for rules that compare the two.
        """
        for name, cotangent in cotangents.items():
            if name in self.path.tensors:
                self._cotangents[name].append(op.Mul(cotangent, name) if self.table.relevance else cotangent)
        for node in reversed(self.path.nodes):
            self._visit(op, Node(node, self.path.tensors, twins or {}, self._within))
        sums = {name: self._sum(op, name) for name in self.wrt}
        return {name: value for name, value in sums.items() if value is not None}

    def _within(self, graph: Graph, wrt: Sequence[str], of: Sequence[str]) -> Walk:
        return Walk(graph, wrt, of, self.table, self.gaps)

    def _sum(self, op: Emitter, name: str) -> str | None:
        parts = self._cotangents.get(name)
        if not parts:
            return None
        parts[:] = [summed(op, parts)]
        self.graph.shapes.assign(parts[0], name)
        return parts[0]

    def _visit(self, op: Emitter, node: Node) -> None:
        state = state_in(self.table, self.graph, node.proto)
        outputs = [self._sum(op, name) if name else None for name in node.outputs]
        try:
            gradients = self._gradients(op, state, node, outputs)
        except Refusal as refusal:
            self.gaps.append(Gap.at(node.proto, refusal))
            # Any value keeps the walk going, so that the gaps behind this one are found too.
            gradients = [name if node.differentiates(index) else None for index, name in enumerate(node.sources)]
            state = None
        broadcast = isinstance(state, Rule) and state.broadcasts
        for index, (name, gradient) in enumerate(zip(node.sources, gradients, strict=False)):
            if gradient is not None and node.differentiates(index):
                gradient = op.sum_to(gradient, name) if broadcast else gradient
                self.graph.shapes.assign(gradient, name)
                self._cotangents[name].append(gradient)

    def _gradients(
        self, op: Emitter, state: State | None, node: Node, outputs: list[str | None]
    ) -> Sequence[str | None]:
        rule = self._rule(state, node)
        if not any(outputs):
            return [None] * len(node.inputs)
        if rule.every_output:
            gradients = _applied(rule, op, node, outputs)
        elif any(outputs[1:]):
            raise Refusal("only the first output has a gradient rule", "remove the use of the other outputs")
        else:
            gradients = _applied(rule, op, node, outputs[0])
        _check_arity(node, gradients, self.graph.version(node.proto))
        return gradients

    def _rule(self, state: State | None, node: Node) -> Rule:
        if isinstance(state, Refused):
            raise Refusal(state.reason, state.remedy)
        if refusal := self._refusals.get(node.outputs[0]):
            raise refusal
        if not isinstance(state, Rule):
            raise Refusal(
                "no gradient rule", "export the model with standard operators, or use a method that needs no gradient"
            )
        return state


def _applied(rule: Rule, op: Emitter, node: Node, cotangent: Any) -> Sequence[str | None]:
    """What the formula gives. Formulas take it for granted that a node is what its operator allows."""
    try:
        return rule.formula(op, node, cotangent)
    except MALFORMED as error:
        raise Refusal(
            f"its attributes or inputs do not fit its operator ({type(error).__name__}: {error})",
            "check the file with onnx.checker.check_model(model, full_check=True)",
        ) from error


def _check_arity(node: Node, gradients: Sequence[str | None], version: int) -> None:
    if len(gradients) < len(node.inputs) and len(node.inputs) > _most_inputs(node.proto, version):
        raise Refusal("it has more inputs than its operator", "check the file with onnx.checker.check_model")
    if len(gradients) < len(node.inputs) or any(isinstance(gradient, tuple) for gradient in gradients):
        raise AssertionError(
            f"the rule of {node.proto.op_type} returned {len(gradients)} gradients for {len(node.inputs)} inputs. "
            "This is a bug."
        )


def _most_inputs(node: NodeProto, version: int) -> int:
    try:
        return defs.get_schema(node.op_type, version, node.domain).max_input
    except defs.SchemaError:
        return len(node.input)
