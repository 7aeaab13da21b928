"""The intermediate tensors that a person can pick: layers for CAM methods, embeddings for paths."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import NodeProto

from explainserve.onnx_vjp.arguments import check_model
from explainserve.onnx_vjp.final_activation import final_activation
from explainserve.onnx_vjp.functions import make_readable
from explainserve.onnx_vjp.graph import FLOATS, Graph
from explainserve.onnx_vjp.malformed import malformed_as_value_error
from explainserve.onnx_vjp.opset import prepared
from explainserve.onnx_vjp.registry import canonical_domain
from explainserve.onnx_vjp.routes import bypassed, dependents, outputs_reached
from explainserve.onnx_vjp.shapes import Shape

OPERATORS: Mapping[str, frozenset[str]] = {
    "": frozenset(
        {
            *("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Add", "Concat", "Mul"),
            *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Clip", "Sigmoid", "Tanh"),
            *("Gelu", "Swish", "HardSwish", "Mish"),
            *("BatchNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization"),
            *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LSTM", "GRU", "RNN", "Attention"),
        }
    ),
    "com.microsoft": frozenset(
        {
            *("FusedConv", "FusedGemm", "FusedMatMul", "MatMulNBits", "GroupNorm"),
            *("BiasGelu", "FastGelu", "Gelu", "QuickGelu"),
            *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization"),
            *("Attention", "GroupQueryAttention", "MultiHeadAttention"),
        }
    ),
    "com.microsoft.nchwc": frozenset({"Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}),
}
"""Operators whose outputs are offered, by domain."""


@dataclass(frozen=True)
class Layer:
    """A floating-point tensor between the inputs and the outputs.

    `module` is the path of the module that computes it, where the exporter tells (`layer1.0.conv1`), else empty.
    `shape` has an int, a symbol of the inputs or None (unknown, or computed from theirs) per axis, or is None where
    even the rank is unknown; of a tensor that the file lays out in blocks it is that of `cut`, with the channels of
    zeros that fill up the last block. `bypassed` names the inputs whose values reach it, and around it too an output
    that depends on it, such as past a branch of a residual block. They are those of the `bypasses` of its cut.
    """

    name: str
    operator: str
    module: str
    shape: Shape | None
    bypassed: tuple[str, ...]


def layers(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """The tensors that OPERATORS compute from a model's inputs and that an output depends on, in topological order: of
    a recurrent layer, each of its outputs that is used. No output is among them, nor its softmax or sigmoid before it
    was renamed, cast or rearranged.

    Raises ValueError for a malformed graph, and for one of which `cut` could not read the tensors; UnsupportedOperators
    for nodes of old operator sets that newer ones have no form of; TypeError for what is no model.
    """
    check_model(model)
    return _layers(model)


@malformed_as_value_error()
def _layers(model: onnx.ModelProto) -> tuple[Layer, ...]:
    graph = Graph(prepared(model))
    offered = list(_offered(graph))
    make_readable(graph)
    outputs = [value.name for value in graph.proto.graph.output]
    activations = [final_activation(graph.proto, output) for output in outputs]
    same = {name for own in activations if own is not None for name in own.results}
    reached = outputs_reached(graph.nodes, outputs)
    sources = [value.name for value in graph.proto.graph.input]
    dependent = {source: dependents(graph.nodes, source) for source in sources}
    around = {source: bypassed(graph.nodes, source, reached) for source in sources}
    return tuple(
        Layer(
            name,
            node.op_type,
            _module(node),
            _in_terms_of_inputs(graph, name),
            tuple(source for source in sources if name in around[source]),
        )
        for node, name in offered
        if graph.dtype(name) in FLOATS
        and name not in {*outputs, *same}
        and reached.get(name)
        and any(name in dependent[source] for source in sources)
    )


def _offered(graph: Graph) -> Iterator[tuple[NodeProto, str]]:
    for node in graph.nodes:
        if node.op_type in OPERATORS.get(canonical_domain(node.domain), ()):
            yield from ((node, name) for name in node.output if name)


def _in_terms_of_inputs(graph: Graph, name: str) -> Shape | None:
    """The shape of a tensor with symbols of the file alone."""
    shape = graph.shapes.stated(name).shape
    return shape and tuple(None if isinstance(d, str) and d.startswith("?") else d for d in shape)


def _module(node: NodeProto) -> str:
    """The module's path: the exporter of torch writes it into the node's metadata, older ones into its name."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
    try:
        path = ast.literal_eval(scopes) if scopes else []
    except (ValueError, SyntaxError):
        path = []
    if isinstance(path, list) and len(path) > 1:
        return str(path[-2])
    parts = node.name.strip("/").split("/") if node.name.startswith("/") else []
    return parts[-2] if len(parts) > 1 else ""
