"""Folds batch normalization into the convolution before it, as `torch.jit.freeze` does for TorchScript.

An exported graph keeps both, and both cost time in every forward and backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

_CONVOLUTIONS = frozenset({torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default})
_BATCH_NORM = torch.ops.aten.batch_norm.default


def fold_batch_norm(module: GraphModule) -> GraphModule:
    """The module with every batch norm of evaluation mode folded that follows a convolution used nowhere else.

    Args:
        module: an unlifted exported program; changed in place and returned.
    """
    folded = [node for node in module.graph.nodes if node.target is _BATCH_NORM and _fold(module, node)]
    if folded:
        module.graph.eliminate_dead_code()
        module.recompile()
    return module


def _fold(module: GraphModule, norm: Node) -> bool:
    """Replaces one batch norm; False where it has to stay."""
    convolution, weight, bias, mean, variance, training, _, epsilon = norm.args[:8]
    if not isinstance(convolution, Node) or convolution.target not in _CONVOLUTIONS or len(convolution.users) > 1:
        return False
    source, kernel, *rest = convolution.args
    constants = (kernel, rest[0] if rest else None, mean, variance, weight, bias)
    if training is not False or not all(node is None or _is_constant(node) for node in constants):
        return False
    w, b, m, v, scale, shift = (None if node is None else _constant(module, node) for node in constants)
    fused = fuse_conv_bn_weights(w, b, m, v, epsilon, scale, shift)  # type: ignore[arg-type]
    with module.graph.inserting_before(norm):
        names = [_register(module, tensor) for tensor in fused]
        parameters = [module.graph.get_attr(name) for name in names]
        replacement = module.graph.call_function(
            convolution.target,
            (source, *parameters, *rest[1:]),
            convolution.kwargs,
        )
    norm.replace_all_uses_with(replacement)
    return True


def _is_constant(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def _constant(module: GraphModule, node: Any) -> torch.Tensor:
    value: Any = module
    for part in node.target.split("."):
        value = getattr(value, part)
    tensor: torch.Tensor = value.detach()
    return tensor


def _register(module: GraphModule, tensor: torch.Tensor) -> str:
    name = f"folded_{len(module._buffers)}"
    module.register_buffer(name, tensor.detach())
    return name
