"""The tensors of an exported graph that a person can pick: layers for CAM methods, embeddings for paths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch.fx import Node

from explainserve.backends.aten import dependents, operator, tensor_of
from explainserve.signature import Axis, Layer, Signature

BATCH = "batch"

OPERATORS: Mapping[str, Collection[str]] = {
    "Conv": {"conv1d", "conv2d", "conv3d", "convolution"},
    "ConvTranspose": {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"},
    "Gemm": {"linear", "addmm"},
    "MatMul": {"matmul", "mm", "bmm"},
    "Gather": {"embedding", "index", "index_select"},
    "Add": {"add"},
    "Concat": {"cat"},
    "Mul": {"mul"},
    "Relu": {"relu"},
    "LeakyRelu": {"leaky_relu"},
    "PRelu": {"prelu", "_prelu_kernel"},
    "Elu": {"elu"},
    "Celu": {"celu"},
    "Selu": {"selu"},
    "Clip": {"hardtanh", "relu6", "clamp", "clamp_min", "clamp_max"},
    "Sigmoid": {"sigmoid"},
    "Tanh": {"tanh"},
    "Gelu": {"gelu"},
    "Swish": {"silu"},
    "HardSwish": {"hardswish"},
    "Mish": {"mish"},
    "BatchNormalization": {"batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"},
    "LayerNormalization": {"layer_norm", "native_layer_norm"},
    "GroupNormalization": {"group_norm", "native_group_norm"},
    "InstanceNormalization": {"instance_norm"},
    "MaxPool": {
        *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    },
    "AveragePool": {
        *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    },
    "LSTM": {"lstm"},
    "GRU": {"gru"},
    "RNN": {"rnn_tanh", "rnn_relu"},
    "Attention": {"scaled_dot_product_attention"},
}
"""ATen operators whose outputs are offered, by what ONNX calls them: one name in all formats."""

_NAMES = {aten: name for name, operators in OPERATORS.items() for aten in operators}


def layers(
    nodes: Sequence[Node], inputs: Mapping[str, Node], outputs: Collection[Node], signature: Signature
) -> tuple[Layer, ...]:
    """Floating-point tensors of OPERATORS, one for each row, that depend on an input and that an output depends on.

    Args:
        nodes: of the graph, in order.
        inputs: by the names of the signature, which names their free extents.
    """
    names = {
        extent.name: axis.name
        for spec in signature.inputs
        for extent, axis in zip(axes_of(inputs[spec.name]), spec.axes, strict=True)
    }
    depending = {name: dependents(source) for name, source in inputs.items()}
    batch = {_first_extent(source) for source in inputs.values()}
    offered = [
        node
        for node in nodes
        if operator(node) in _NAMES and is_layer(node) and _first_extent(node) in batch and node not in outputs
    ]
    found: list[Layer] = []
    for node in offered:
        reached = dependents(node).intersection(outputs)
        sources = {name: source for name, source in inputs.items() if node in depending[name]}
        if reached and sources:
            around = (name for name, s in sources.items() if not dependents(s, without=(node,)).isdisjoint(reached))
            own = tuple(Axis(names.get(axis.name, axis.name), axis.size) for axis in axes_of(node))
            found.append(Layer(node.name, _NAMES[operator(node)], _module(node), own, tuple(around)))
    return tuple(found)


def _first_extent(node: Node) -> str:
    value = tensor_of(node)
    return str(value.shape[0]) if value is not None and value.ndim else ""


def is_layer(node: Node) -> bool:
    """Whether it computes a floating-point tensor that has rows."""
    value = tensor_of(node)
    return node.op == "call_function" and value is not None and value.is_floating_point() and value.ndim > 0


def axes_of(node: Node) -> tuple[Axis, ...]:
    """Static extents, and symbols of the others; a free first axis is the batch axis. None of what is no tensor."""
    value = tensor_of(node)
    return () if value is None else axes(value)


def axes(value: torch.Tensor) -> tuple[Axis, ...]:
    """Those of an example value; see `axes_of`."""
    return tuple(
        Axis("", extent) if isinstance(extent, int) else Axis(BATCH if position == 0 else str(extent))
        for position, extent in enumerate(value.shape)
    )


def _module(node: Node) -> str:
    """The module's path, which the exporter notes at each node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path if all(part.isidentifier() or part.isdigit() for part in path.split(".")) else ""
