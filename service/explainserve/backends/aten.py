"""What nodes of exported graphs do, in torch's own words: ATen operators, their arguments and their values."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node


def operator(node: Node) -> str:
    """Name of the ATen operator, without its overload; that of the operator whose output an item is; "" of others."""
    if is_item(node):
        return operator(node.all_input_nodes[0])
    target = node.target
    known = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    return str(target._schema.name).removeprefix("aten::") if known else ""  # type: ignore[union-attr]


def is_item(node: Node) -> bool:
    """Whether a node picks one of several outputs of another one."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of an ATen operator by name, with their defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    stated = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in stated}
    return {
        **defaults,
        **{argument.name: value for argument, value in zip(stated, node.args, strict=False)},
        **node.kwargs,
    }


def called(target: Any, given: Mapping[str, Any]) -> Any:
    """What an ATen operator returns for arguments by name."""
    stated = target._schema.arguments
    positional = [given[argument.name] for argument in stated if not argument.kwarg_only]
    return target(*positional, **{argument.name: given[argument.name] for argument in stated if argument.kwarg_only})


def stored(node: Node, module: nn.Module) -> torch.Tensor | None:
    """The tensor of the module that a node stands for; None for what is computed."""
    while operator(node) in ("lift_fresh_copy", "clone", "detach"):
        node = node.all_input_nodes[0]
    found = functools.reduce(getattr, str(node.target).split("."), module) if node.op == "get_attr" else None
    return found if isinstance(found, torch.Tensor) else None


def mutates(node: Node) -> bool:
    """Whether an operator changes what it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def tensor_of(node: Node) -> torch.Tensor | None:
    """The example of a node's value, without numbers; None where the value is no tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def dependents(source: Node, without: Collection[Node] = ()) -> set[Node]:
    """`source` and all nodes that depend on its values, not only on its sizes, by routes that avoid some nodes."""
    found, waiting = {source}, [source]
    while waiting:
        users = waiting.pop().users
        new = [user for user in users if user not in found and user not in without and _has_values(user)]
        found.update(new)
        waiting += new
    return found


def _has_values(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)) or node.op == "output"
