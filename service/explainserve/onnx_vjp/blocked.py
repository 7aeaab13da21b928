"""A pass for onnxruntime's CPU provider, which computes convolutions on channels in blocks.

A sum stays in blocks only if all of its operands are. One operand that is not (what a transposed convolution or the
head of the network sent back) takes the others out, and with them a whole chain of residual blocks. A convolution of
each channel with 1 brings that operand in: exact, and one pass in place of many. Where no sum follows, it would cost
what it saves.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

_SUMS = frozenset({"Add", "Sum"})
_JOINING = _SUMS | {"Mul"}
_KEEPING = _JOINING | {"Clip", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Relu", "Sigmoid", "Tanh"}
_BLOCK = 16


def keep_in_blocks(model: onnx.ModelProto) -> None:
    """Change a model whose types are stated, in place, so that sums and products between convolutions stay in blocks.

    The model computes the same, bit by bit; other runtimes gain nothing.
    """
    _Layout(model).apply()


class _Layout:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        values = (*self.graph.value_info, *self.graph.input, *self.graph.output)
        self.shapes = {value.name: _shape(value) for value in values}
        self.wanted = self._wanted()
        self.blocked: set[str] = set()
        self.entries: dict[str, str] = {}
        self.nodes: list[NodeProto] = []

    def apply(self) -> None:
        for node in self.graph.node:
            if self._loses_blocks(node):
                node.input[:] = [self._entered(name) for name in node.input]
            self._append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _append(self, node: NodeProto) -> None:
        self.nodes.append(node)
        if self._stays(node):
            self.blocked.add(node.output[0])

    def _wanted(self) -> set[str]:
        """What sums and products should keep in blocks: sums on the way to a convolution, and what leads to them."""
        reaching, wanted = set[str](), set[str]()
        for node in reversed(self.graph.node):
            through = node.op_type in _KEEPING and not reaching.isdisjoint(node.output)
            if node.op_type == "Conv" or through:
                reaching.update(_operands(node))
            if through and (node.op_type in _SUMS or not wanted.isdisjoint(node.output)):
                wanted.update(node.output, _operands(node))
        return wanted

    def _loses_blocks(self, node: NodeProto) -> bool:
        """Whether one operand may take others out of blocks that are wanted behind the node."""
        shapes = {self.shapes.get(name) for name in node.input}
        joins = node.op_type in _JOINING and len(shapes) == 1
        return joins and node.output[0] in self.wanted and not self.blocked.isdisjoint(node.input)

    def _stays(self, node: NodeProto) -> bool:
        if node.op_type == "Conv":
            return self._has_blocks(node.output[0])
        return node.op_type in _KEEPING and self.blocked.issuperset(_operands(node))

    def _has_blocks(self, name: str) -> bool:
        shape = self.shapes.get(name)
        return shape is not None and len(shape) == 4 and isinstance(shape[1], int) and shape[1] % _BLOCK == 0

    def _entered(self, name: str) -> str:
        if name in self.blocked or not self._has_blocks(name):
            return name
        if name not in self.entries:
            self.entries[name] = self._enter(name)
        return self.entries[name]

    def _enter(self, name: str) -> str:
        shape = self.shapes[name]
        assert shape is not None
        entry = f"{name}/blocked"
        kernel = self._ones(int(shape[1] or 0))
        self.graph.value_info.append(helper.make_tensor_value_info(entry, TensorProto.FLOAT, shape))
        self.shapes[entry] = shape
        self._append(helper.make_node("Conv", [name, kernel], [entry], name=entry, group=shape[1], kernel_shape=[1, 1]))
        return entry

    def _ones(self, channels: int) -> str:
        name = f"blocked/ones_{channels}"
        if name not in {tensor.name for tensor in self.graph.initializer}:
            ones = np.ones((channels, 1, 1, 1), np.float32)
            self.graph.initializer.append(numpy_helper.from_array(ones, name))
        return name


def _operands(node: NodeProto) -> list[str]:
    """The inputs whose layout decides: the bounds of a Clip and the weights of a convolution have none."""
    return list(node.input if node.op_type in _JOINING else node.input[:1])


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...] | None:
    """Dimensions as numbers and symbols; None where one is unknown, or elements are not float32."""
    kind = value.type.tensor_type
    dims: Iterable[int | str] = [dim.dim_value or dim.dim_param for dim in kind.shape.dim]
    return tuple(dims) if kind.elem_type == TensorProto.FLOAT and all(dims) else None
