"""PatternNet and PatternAttribution (Kindermans et al. 2018, arXiv:1705.05598, section 4) on exported graphs.

The backward pass starts from the value of what is explained; in a linear layer it goes back by the pattern in the place
of the weights, or by both multiplied. All else has its derivative, and what LRP has no rule for has none here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from explainserve.backends.aten import operator, tensor_of
from explainserve.backends.exported_linear import LinearLayer, linear_layer
from explainserve.backends.exported_relevance import CARRIED, SCALING, handed_down
from explainserve.backends.exported_rule import Copies, Copy, NoRule, Route, Stated


def pattern_rule(weighted: bool, route: Route, stated: Stated) -> Copy:
    """Back by the patterns; `weighted`, times the weights."""

    def copied(graph: Graph, node: Node, copies: Copies) -> Any:
        layer = linear_layer(node, route)
        if layer is None:
            _check_carried(node, route)
            return graph.node_copy(node, copies.__getitem__)
        going_back = _going_back(layer, _pattern(layer, stated), weighted)
        return graph.call_function(going_back, (copies[layer.source], layer.parameters(graph, copies)))

    return copied


def _check_carried(node: Node, route: Route) -> None:
    """Raises NoRule for what patterns are not defined on."""
    if operator(node) not in CARRIED:
        raise NoRule(node, "patterns are not defined on it")
    if operator(node) in SCALING and len(route.varying.intersection(node.all_input_nodes)) > 1:
        raise NoRule(node, "patterns are not defined on a product of tensors")


def _pattern(layer: LinearLayer, stated: Stated) -> Tensor:
    name, pattern, weights = layer.node.name, stated.patterns.get(layer.node.name), tensor_of(layer.weights)
    shape = None if weights is None else tuple(weights.shape)
    if pattern is None:
        raise NoRule(layer.node, f"there is no pattern for layer '{name}'", f"add an array '{name}' of shape {shape}")
    if pattern.shape != shape:
        raise NoRule(
            layer.node,
            f"the pattern of layer '{name}' has shape {tuple(pattern.shape)}, its weights {shape}",
            "give it that of the weights",
        )
    return pattern


def _going_back(layer: LinearLayer, pattern: Tensor, weighted: bool) -> Any:
    """The layer, whose backward pass goes by the pattern."""

    def linear(a: Tensor, parameters: tuple[Tensor, Tensor | None]) -> Tensor:
        (w, b), source = parameters, a.detach()
        with torch.no_grad():
            z = layer.function(source, w, b)
            back = w * pattern if weighted else pattern

        def share(g: Tensor) -> Sequence[Tensor]:
            leaf = source.detach().requires_grad_()
            with torch.enable_grad():
                signal = layer.function(leaf, back, None)
            return torch.autograd.grad(signal, leaf, g)

        return handed_down(z, share, a)

    return linear
