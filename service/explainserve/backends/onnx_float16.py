"""An ONNX graph in float16: products and convolutions in it, what sums or exponentiates numbers in float32.

The policy is that of torch's autocast. Products and convolutions are in float16 whatever comes in. What only moves,
compares or joins numbers is in float16 where all that it joins is. All else, and the inputs and outputs of the graph,
stays in float32. Casts stand where one meets the other, so the gradient of the graph goes the same way back.

onnxconverter-common and onnxruntime's tools convert too. They know only what to leave out, cast the inputs of whole
islands, and truncate constants that are too large.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from explainserve.backends.onnx_weights import Array, Weights
from explainserve.onnx_vjp.registry import canonical_domain
from explainserve.onnx_vjp.subgraphs import captured

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_JOINING = frozenset({"Add", "Clip", "Concat", "Div", "Max", "Min", "Mul", "PRelu", "Sub", "Sum", "Where"})
_MOVING = frozenset(
    {
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GlobalMaxPool",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
_POINTWISE = frozenset({"Abs", "HardSigmoid", "HardSwish", "LeakyRelu", "Neg", "Relu", "Sigmoid", "Tanh"})
_FOLLOWING = _JOINING | _MOVING | _POINTWISE
"""Of one result, or of one that has the same numbers in other places; rounding is that of their operands."""

_LARGEST = float(np.finfo(np.float16).max)


def in_float16(model: onnx.ModelProto, weights: Weights) -> tuple[onnx.ModelProto, Weights]:
    """A copy of a float32 model that computes products in float16, and its weights, held anew.

    Tensors keep their names; inputs, outputs and what subgraphs read stay in float32. What shape inference finds no
    type for stays as it is, and so does a node with a constant that is too large for float16.
    """
    converted = weights.embedded(_Conversion(model, weights).model())
    own = Weights()
    own.take(converted)
    return converted, own


class _Conversion:
    """Walks the nodes in order. `_computed` are the tensors that are computed in float16; `_held` has the names under
    which numbers of tensors are in float16, `_widened` those under which numbers of others are in float32.
    """

    def __init__(self, model: onnx.ModelProto, weights: Weights) -> None:
        self._model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        graph = self._graph = self._model.graph
        values = (*graph.value_info, *graph.input, *graph.output)
        self._kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        self._kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._constants = _constants(graph, weights.of(model))
        self._kept = {value.name for value in graph.output}
        self._kept.update(name for node in graph.node for name in captured(node))
        self._computed: set[str] = set()
        self._held: dict[str, str] = {}
        self._widened: dict[str, str] = {}
        self._nodes: list[NodeProto] = []

    def model(self) -> onnx.ModelProto:
        """The result."""
        for node in list(self._graph.node):
            if self._converts(node):
                node.input[:] = [self._narrow(name) for name in node.input]
                self._nodes.append(node)
                node.output[:] = [self._produced(name) for name in node.output]
            else:
                node.input[:] = [self._wide(name) for name in node.input]
                self._nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        self._state_types()
        self._drop_unused()
        return self._model

    def _converts(self, node: NodeProto) -> bool:
        floats = [name for name in node.input if self._is_float(name)]
        known = all(not name or self._kinds.get(name) for name in (*node.input, *node.output))
        if canonical_domain(node.domain) or not known or not floats or not all(map(self._fits, floats)):
            return False
        moving = [name for name in floats if name not in self._constants]
        return node.op_type in _PRODUCTS or (
            node.op_type in _FOLLOWING and bool(moving) and self._computed.issuperset(moving)
        )

    def _is_float(self, name: str) -> bool:
        return self._kinds.get(name) == TensorProto.FLOAT

    def _fits(self, name: str) -> bool:
        """Whether the finite numbers of a constant are finite in float16."""
        if name not in self._constants:
            return True
        sizes = np.abs(self._constants[name])
        return bool(sizes[np.isfinite(sizes)].max(initial=0.0) <= _LARGEST)

    def _narrow(self, name: str) -> str:
        """The name of a tensor in float16."""
        if not self._is_float(name):
            return name
        if name not in self._held:
            self._held[name] = self._stored(name) if name in self._constants else self._cast(name, TensorProto.FLOAT16)
        return self._held[name]

    def _wide(self, name: str) -> str:
        """The name of a tensor in float32."""
        if self._held.get(name) != name:
            return name
        if name not in self._widened:
            self._widened[name] = self._cast(name, TensorProto.FLOAT)
        return self._widened[name]

    def _produced(self, name: str) -> str:
        """The name of what a node computes in float16; a tensor that is read from outside is made of it in float32."""
        if not self._is_float(name):
            return name
        self._computed.add(name)
        self._held[name] = name
        if name in self._kept:
            self._held[name] = f"{name}/float16"
            self._nodes.append(_cast(self._held[name], name, TensorProto.FLOAT))
        return self._held[name]

    def _cast(self, name: str, kind: int) -> str:
        result = f"{name}/float16" if kind == TensorProto.FLOAT16 else f"{name}/float32"
        self._nodes.append(_cast(name, result, kind))
        return result

    def _stored(self, name: str) -> str:
        result = f"{name}/float16"
        array = self._constants[name].astype(np.float16)
        self._graph.initializer.append(numpy_helper.from_array(array, result))
        return result

    def _state_types(self) -> None:
        for value in self._graph.value_info:
            if self._held.get(value.name) == value.name:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16

    def _drop_unused(self) -> None:
        """Removes the constants of which only the copy in float16 is read."""
        graph = self._graph
        read = {name for node in graph.node for name in (*node.input, *captured(node))} | self._kept
        nodes = [node for node in graph.node if node.op_type != "Constant" or node.output[0] in read]
        tensors = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(tensors)


def _cast(source: str, result: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"{result}/cast", to=kind)


def _constants(graph: GraphProto, weights: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
    """The float32 constants of a graph by name."""
    fed = {value.name for value in graph.input}
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in fed}
    for node in graph.node:
        values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
        if node.op_type == "Constant" and values:
            tensors[node.output[0]] = values[0]
    return {
        name: np.asarray(weights[name] if name in weights else numpy_helper.to_array(tensor), np.float32)
        for name, tensor in tensors.items()
        if tensor.data_type == TensorProto.FLOAT
    }
