"""Functions of an exported graph that name its tensors, or follow a gradient rule: graphs of their own, which hold the
nodes that they need and the same weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from explainserve.backends import exported_layers, pattern_file, torch_deeplift, torch_rules
from explainserve.backends.aten import dependents, mutates, tensor_of
from explainserve.backends.contract import (
    OperatorGap,
    layer_not_on_path,
    no_value_range,
    not_differentiable,
    unknown_layer,
)
from explainserve.backends.exported_activation import final_activation
from explainserve.backends.exported_relevance import explained
from explainserve.backends.exported_rule import Copies, HeldParameters, NoRule, Route, Stated
from explainserve.backends.exported_rules import HANDED_DOWN, PATTERN_RULES, copy_by
from explainserve.backends.torch_lrp import BOX_RULES, LRP_RULES
from explainserve.errors import InvalidRequest
from explainserve.plan import Differentiation, GradientRule
from explainserve.signature import Layer, ScoreHead, Signature

_MOST_FUNCTIONS = 64
"""Graphs of one model that are kept; the oldest goes first."""

_SEARCHED = {
    torch_deeplift.RULE: torch_deeplift.RULE,
    **dict.fromkeys(LRP_RULES, "lrp_epsilon"),
    **dict.fromkeys(PATTERN_RULES, "pattern_net"),
}
"""Rules that not every operator has, by the one whose gaps are theirs too."""


@dataclass(frozen=True, eq=False)
class GraphFunction:
    """One function of a graph.

    Attributes:
        inputs: element types by name, of layers that are cut and of the model's inputs that are left.
        layers: names and element types of those whose values come back.
    """

    module: GraphModule
    inputs: Mapping[str, torch.dtype]
    layers: Mapping[str, torch.dtype]

    def __call__(self, points: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and the values of layers, which have a history where they are differentiated."""
        output, values = self.module(*(points[name] for name in self.inputs))
        return output, dict(zip(self.layers, values, strict=True))


@dataclass(frozen=True, eq=False)
class NamedGraph:
    """A graph that changes no tensor in place, so that a node's name stands for one value.

    Attributes:
        module: holds the graph and its weights.
        inputs: by the names of the signature.
        constants: of other placeholders.
        outputs: by the names of the signature.
        pre_activations: what the outputs would be without the softmax or sigmoid in which they end, of those that do.
        stated: what rules take that the file does not hold.
    """

    module: GraphModule
    inputs: Mapping[str, Node]
    constants: Mapping[Node, Any]
    outputs: Mapping[str, Node]
    pre_activations: Mapping[str, Node]
    stated: Stated
    _functions: dict[Differentiation, GraphFunction] = field(default_factory=dict, init=False, repr=False)
    _held: HeldParameters = field(default_factory=HeldParameters, init=False, repr=False)
    _gaps: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        program: ExportedProgram,
        signature: Signature,
        leaves: Sequence[Any],
        kept: Sequence[int],
        patterns: Mapping[str, Tensor],
    ) -> NamedGraph:
        """The graph of a program, whose weights it shares.

        Args:
            leaves: of a call's arguments: None for a tensor, else the constant that was exported.
            kept: positions of the outputs that are tensors.
            patterns: see `Stated`.
        """
        if any(map(mutates, _nodes_within(program.graph_module))):
            program = program.run_decompositions({torch.ops.aten.copy.default: copied})
        module = program.module(check_guards=False)
        module.requires_grad_(False)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        tensors = [node for node, leaf in zip(placeholders, leaves, strict=True) if leaf is None]
        constants = {node: leaf for node, leaf in zip(placeholders, leaves, strict=True) if leaf is not None}
        results: Any = module.graph.output_node().args[0]
        outputs = {spec.name: results[position] for spec, position in zip(signature.outputs, kept, strict=True)}
        activations = {name: final_activation(node) for name, node in outputs.items()}
        return cls(
            module,
            {spec.name: node for spec, node in zip(signature.inputs, tensors, strict=True)},
            constants,
            outputs,
            {name: found.left_out(module.graph) for name, found in activations.items() if found is not None},
            Stated({spec.name: spec.bounds for spec in signature.inputs if spec.bounds is not None}, patterns),
        )

    def with_weights(self, module: nn.Module) -> NamedGraph:
        """The same graph with the weights that another module of the same program has."""
        other = GraphModule(self.module, self.module.graph)
        other.load_state_dict(module.state_dict(), strict=False, assign=True)
        twins = dict(zip(self.module.graph.nodes, other.graph.nodes, strict=True))
        return NamedGraph(
            other,
            {name: twins[node] for name, node in self.inputs.items()},
            {twins[node]: leaf for node, leaf in self.constants.items()},
            {name: twins[node] for name, node in self.outputs.items()},
            {name: twins[node] for name, node in self.pre_activations.items()},
            self.stated,
        )

    @property
    def gradient_bytes(self) -> int:
        """What rules hold beside the weights: patterns, and parameters of layers together with what is behind them."""
        return sum(pattern.nbytes for pattern in self.stated.patterns.values()) + self._held.byte_count

    def layers(self, signature: Signature) -> tuple[Layer, ...]:
        """What a person can pick."""
        nodes, outputs = list(self.module.graph.nodes), set(self.outputs.values())
        same = {node for found in map(final_activation, outputs) if found is not None for node in found.results}
        return exported_layers.layers(nodes, self.inputs, outputs | same, signature)

    def gradient_rules(self, signature: Signature) -> dict[str, str]:
        """See `contract.LoadedModel.gradient_rules`."""
        return {
            **torch_rules.gradient_rules(self.module),
            **dict.fromkeys((torch_deeplift.RULE, *LRP_RULES), ""),
            **dict.fromkeys(BOX_RULES, no_value_range(signature)),
            **dict.fromkeys(PATTERN_RULES, "" if self.stated.patterns else pattern_file.MISSING),
        }

    def rule_gap(self, rule: str, signature: Signature, explained: Sequence[str]) -> str:
        """See `contract.LoadedModel.rule_gap`.

        Args:
            explained: names of the layers that are explained where no input can be.
        """
        searched = _SEARCHED.get(rule)
        if searched is None or not signature.differentiable_outputs:
            return ""
        if searched not in self._gaps:
            inputs = signature.differentiable_inputs
            alternatives = [inputs] if inputs else [(name,) for name in explained]
            output = signature.output(signature.differentiable_outputs[0])
            functions = [Differentiation(output.name, output.head_before_activation, wrt) for wrt in alternatives]
            self._gaps[searched] = self._first_gap(searched, functions)
        return self._gaps[searched]

    def _first_gap(self, rule: str, functions: Iterable[Differentiation]) -> str:
        """Of a rule in any of these functions, or ""."""
        for function in functions:
            layers = tuple(name for name in function.wrt if name not in self.inputs)
            try:
                self._built(replace(function, rule=GradientRule(rule), cut=layers))
            except NoRule as refusal:
                return str(refusal)
            except InvalidRequest:  # the output does not depend on the layer
                continue
        return ""

    def function(self, asked: Differentiation) -> GraphFunction:
        """The function of an output that taps, cuts and differentiates layers, and follows a rule.

        Raises:
            InvalidRequest: a layer does not exist (UNKNOWN_LAYER), the output does not depend on it
                (LAYER_NOT_ON_PATH), or on another layer that is cut as well (LAYERS_NOT_CUT).
            Unsupported: an operator, or the head of the score, does not have the rule (NOT_DIFFERENTIABLE).
        """
        if asked.head is not ScoreHead.PRE_ACTIVATION:
            if asked.rule.name in HANDED_DOWN and asked.head is not ScoreHead.IDENTITY:
                raise not_differentiable([_head_gap(asked)])
            asked = replace(asked, head=ScoreHead.IDENTITY)
        if asked not in self._functions:
            if len(self._functions) >= _MOST_FUNCTIONS:
                del self._functions[next(iter(self._functions))]
            try:
                self._functions[asked] = self._built(asked)
            except NoRule as refusal:
                raise not_differentiable([refusal.gap]) from refusal
        return self._functions[asked]

    def _built(self, asked: Differentiation) -> GraphFunction:
        output = self._result(asked)
        cut = {name: self._layer(name) for name in asked.cut}
        roots = {name: self._layer(name) for name in asked.wrt if name not in self.inputs and name not in cut}
        tapped = {name: cut.get(name) or self._layer(name) for name in asked.taps}
        self._check_cut(cut)
        for name, node in {**cut, **roots, **tapped}.items():
            if output not in dependents(node, without=set(cut.values()) - {node}):
                raise layer_not_on_path(name, asked.output)
        returned = {**roots, **tapped}
        given = {**cut, **{name: node for name, node in self.inputs.items() if node not in cut.values()}}
        needed = _needed([output, *returned.values()], set(cut.values()))
        given = {name: node for name, node in given.items() if node in needed}
        route = self._route(asked, [*cut.values(), *roots.values()], _needed([output], set(cut.values())))
        graph = self._copied(needed, given, set(roots.values()), asked.rule, route, [output, *returned.values()])
        return GraphFunction(GraphModule(self.module, graph), _types(given), _types(returned))

    def _route(self, asked: Differentiation, layers: Sequence[Node], needed: Collection[Node]) -> Route:
        """The route of what is asked, of whose nodes `needed` compute the output; `layers` are cut or explained."""
        named = {**self.inputs, **{node.name: node for node in layers}}
        explained = frozenset(named[name] for name in asked.wrt)
        sources = explained if explained.issubset(self.inputs.values()) else frozenset(self.inputs.values())
        without = [node for node in needed if (value := tensor_of(node)) is not None and not value.is_floating_point()]
        varying = frozenset().union(*(dependents(node, without) for node in explained)).intersection(needed)
        return Route(self.module, self.inputs, sources, explained, varying, frozenset(layers), self._held)

    def _result(self, asked: Differentiation) -> Node:
        results = self.pre_activations if asked.head is ScoreHead.PRE_ACTIVATION else self.outputs
        return results[asked.output]

    def _layer(self, name: str) -> Node:
        found: Node | None = next((node for node in self.module.graph.nodes if node.name == name), None)
        if found is None or not exported_layers.is_layer(found):
            raise unknown_layer(name)
        return found

    def _check_cut(self, cut: Mapping[str, Node]) -> None:
        for name, node in cut.items():
            behind = dependents(node)
            other = next((other for other, n in cut.items() if n is not node and n in behind), None)
            if other is not None:
                text = f"layer {other!r} depends on {name!r}: only one of them can be cut"
                raise InvalidRequest("LAYERS_NOT_CUT", text, layers=", ".join(cut))

    def _copied(
        self,
        needed: Collection[Node],
        given: Mapping[str, Node],
        roots: Collection[Node],
        rule: GradientRule,
        route: Route,
        results: Sequence[Node],
    ) -> Graph:
        """A graph from `given` to the first of `results` and a tuple of the others.

        Args:
            needed: nodes that are copied.
            roots: nodes from whose values gradients are taken.
            rule: by which the graph passes backward on the route.
        """
        graph, copies = Graph(), dict(self.constants)
        by_rule = copy_by(rule, route, self.stated)
        for node in given.values():
            copies[node] = graph.placeholder(node.name)
        for node in self.module.graph.nodes:
            if node in needed and node not in copies:
                copy = by_rule if route.passes(node) else _plain_copy
                copies[node] = copy(graph, node, copies)
            if node in roots:
                copies[node] = graph.call_function(with_history, (copies[node],))
        output, *others = (copies[node] for node in results)
        if rule.name in HANDED_DOWN:
            output = graph.call_function(explained, (output,))
        graph.output((output, tuple(others)))
        graph.eliminate_dead_code()  # layers that were merged with what is behind them
        return graph


def _plain_copy(graph: Graph, node: Node, copies: Copies) -> Node:
    return graph.node_copy(node, copies.__getitem__)


def _head_gap(asked: Differentiation) -> OperatorGap:
    """That of a score head, which hands nothing down."""
    name = asked.head.value.title().replace("_", "")
    reason = f"the rule {asked.rule.name!r} starts from the output itself"
    return OperatorGap(name, asked.output, reason, "explain the output as it is: its logits")


def with_history(value: Tensor) -> Tensor:
    """A value to take gradients from: where none of its own are taken, nothing before it is remembered."""
    return value if value.requires_grad else value.detach().requires_grad_()


def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What `target.copy_(source)` leaves; the operator that changes nothing has no derivative of its own."""
    return source.to(target.dtype).expand_as(target).clone()


def _needed(results: Iterable[Node], given: Collection[Node]) -> set[Node]:
    """The nodes that compute `results`, back to those that are given."""
    found: set[Node] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in given else node.all_input_nodes
    return found


def _types(nodes: Mapping[str, Node]) -> dict[str, torch.dtype]:
    values = {name: tensor_of(node) for name, node in nodes.items()}
    return {name: value.dtype for name, value in values.items() if value is not None}


def _nodes_within(module: nn.Module) -> list[Node]:
    parts = (part for part in module.modules() if isinstance(part, GraphModule))
    return [node for part in parts for node in part.graph.nodes]
