"""Gradient rules on exported graphs: what replaces the derivative of rectifiers; everything else keeps its own.

Guided backpropagation (Springenberg et al. 2015, arXiv:1412.6806) passes only positive cotangents through the
rectifier's derivative; the deconvnet (Zeiler and Fergus 2014, arXiv:1311.2901) applies the rectifier to the cotangent
instead. What counts as a rectifier is what does in ONNX graphs; see `onnx_vjp.tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from explainserve.backends.aten import arguments, operator, stored
from explainserve.backends.contract import NO_RECTIFIERS
from explainserve.plan import STANDARD

Copies = Mapping[Node, Any]
"""What stands in a new graph for the nodes of another one."""

_RECTIFIERS = frozenset({"relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "elu", "celu", "selu"})
_LOWER_BOUNDS = {"hardtanh": "min_val", "clamp": "min", "clamp_min": "min", "threshold": "value"}


def gradient_rules(module: GraphModule) -> dict[str, str]:
    """Every rule, and why the graph of a module cannot follow it: "" where it can."""
    return {STANDARD.name: "", **dict.fromkeys(RULES, _refusal(module))}


def rectified(node: Node, module: nn.Module) -> Node | None:
    """The input of a node that it rectifies; None where it does nothing of the kind.

    Args:
        module: holds the constants of the node's graph.
    """
    name, given = operator(node), arguments(node)
    if name == "maximum":
        one, other = given["self"], given["other"]
        return one if _is_zero(other, module) else other if _is_zero(one, module) else None
    rectifies = name in _RECTIFIERS or (name in _LOWER_BOUNDS and _is_zero(given[_LOWER_BOUNDS[name]], module))
    return next(iter(node.all_input_nodes)) if rectifies else None


def _refusal(module: GraphModule) -> str:
    """Why the graph cannot follow rules that are defined on rectifiers, or ""."""
    if any(_rectifies(part) for name, part in module.named_modules() if name):
        return "rectifiers lie in a part of the graph that runs under a condition, in a loop or in a mode of its own"
    return "" if _rectifies(module) else NO_RECTIFIERS


def _rectifies(module: nn.Module) -> bool:
    nodes = module.graph.nodes if isinstance(module, GraphModule) else ()
    return any(rectified(node, module) is not None for node in nodes)


def _is_zero(value: Any, module: nn.Module) -> bool:
    """Whether a bound is the constant zero: a number, or a tensor that the graph holds."""
    held = stored(value, module) if isinstance(value, Node) else value
    return not held.any() if isinstance(held, Tensor) else isinstance(held, (int, float)) and held == 0


def _guided(graph: Graph, node: Node, source: Node, copies: Copies) -> Node:
    return graph.call_function(positive_cotangent, (graph.node_copy(node, copies.__getitem__),))


def _deconvnet(graph: Graph, node: Node, source: Node, copies: Copies) -> Node:
    """Only the rectified input is replaced: a slope that depends on the inputs keeps its derivative."""
    apart = graph.call_function(torch.detach, (copies[source],))
    copy = graph.node_copy(node, lambda read: apart if read is source else copies[read])
    return graph.call_function(rectified_cotangent, (copies[source], copy))


RULES: Mapping[str, Callable[[Graph, Node, Node, Copies], Node]] = {
    "guided_backpropagation": _guided,
    "deconvnet": _deconvnet,
}
"""By name of the rule: copies a rectifier to another graph, given its node there and the input that it rectifies."""


def positive_cotangent(value: Tensor) -> Tensor:
    """The value, of whose cotangent only what is positive passes."""
    if value.requires_grad:
        value.register_hook(torch.relu)  # type: ignore[no-untyped-call]
    return value


def rectified_cotangent(source: Tensor, value: Tensor) -> Tensor:
    """The value; what is positive of its cotangent is that of the source, of the same shape."""
    passed: Tensor = _RectifiedCotangent.apply(source, value)  # type: ignore[no-untyped-call]
    return passed


class _RectifiedCotangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(cotangents[0]), cotangents[0]
