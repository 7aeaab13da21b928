"""A pass for onnxruntime's CPU provider: cotangents go back to the maxima of disjoint windows by MaxUnpool.

Windows that overlap may share a maximum, so that ScatterElements adds. Where they do not, each element gets one
cotangent or none, and MaxUnpool, which assigns, takes 0.4 times as long; both have one thread. Other providers have no
MaxUnpool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, TypeProto, helper, numpy_helper

from explainserve.onnx_vjp.graph import without_unread

_UNPADDED = frozenset({b"NOTSET", b"VALID"})


def unpool_disjoint_windows(model: onnx.ModelProto) -> None:
    """Change a gradient graph whose types are stated, in place; it computes the same, bit by bit."""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    vectors = {value.name for value in graph.value_info if _is_vector(value.type.tensor_type)}
    nodes: list[NodeProto] = []
    replaced: list[str] = []
    for node in graph.node:
        pooling = _Scattered.by(node, producers)
        if pooling is None or not vectors.issuperset(pooling.replaced):
            nodes.append(node)
        else:
            nodes += pooling.unpooled()
            replaced += pooling.replaced
    kept = without_unread(nodes, [value.name for value in graph.output], replaced)
    del graph.node[:]
    graph.node.extend(kept)


@dataclass(frozen=True)
class _Scattered:
    """The gradient of a max pooling, as `rules.pooling.unpooled` writes it.

    Attributes:
        replaced: the flat sums.
        name: of the gradient, which has the shape of what was pooled.
    """

    pool: NodeProto
    cotangent: str
    replaced: tuple[str, ...]
    name: str

    @classmethod
    def by(cls, node: NodeProto, producers: Mapping[str, NodeProto]) -> _Scattered | None:
        """What a node gives its shape; None where that is something else, or windows may overlap."""
        sums = _behind(node, 0, "ScatterElements", producers) if node.op_type == "Reshape" else None
        positions, cotangents = (_behind(sums, index, "Reshape", producers) for index in (1, 2))
        pool = _behind(positions, 0, "MaxPool", producers)
        blank = _behind(sums, 0, "ConstantOfShape", producers)
        if not (sums and positions and cotangents and pool and blank) or positions.input[0] != pool.output[1]:
            return None
        if not _is_zero(blank) or not _are_disjoint(pool):
            return None
        return cls(pool, cotangents.input[0], tuple(sums.output), node.output[0])

    def unpooled(self) -> list[NodeProto]:
        """The same by MaxUnpool."""
        shape, geometry = f"{self.name}/shape", _attributes(self.pool)
        return [
            helper.make_node("Shape", [self.pool.input[0]], [shape], name=shape),
            helper.make_node(
                "MaxUnpool",
                [self.cotangent, self.pool.output[1], shape],
                [self.name],
                name=self.name,
                kernel_shape=geometry["kernel_shape"],
                strides=geometry["strides"],
            ),
        ]


def _is_vector(kind: TypeProto.Tensor) -> bool:
    """Of float32, which is all that onnxruntime's MaxUnpool takes."""
    return kind.elem_type == TensorProto.FLOAT and len(kind.shape.dim) == 1


def _is_zero(blank: NodeProto) -> bool:
    value = _attributes(blank).get("value")
    return value is None or not numpy_helper.to_array(value).any()


def _are_disjoint(pool: NodeProto) -> bool:
    """Whether no two windows share an element, and all lie inside the tensor, as MaxUnpool wants them."""
    geometry = _attributes(pool)
    kernel, strides = geometry["kernel_shape"], geometry.get("strides", [])
    apart = len(kernel) == len(strides) and all(size <= stride for size, stride in zip(kernel, strides, strict=True))
    inside = not any(geometry.get("pads", [])) and geometry.get("auto_pad", b"NOTSET") in _UNPADDED
    whole = set(geometry.get("dilations", [])) <= {1} and not geometry.get("ceil_mode")
    return apart and inside and whole and not geometry.get("storage_order")


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _behind(node: NodeProto | None, index: int, operator: str, producers: Mapping[str, NodeProto]) -> NodeProto | None:
    """The node that an input of another comes from, where it is of this operator."""
    found = None if node is None else producers.get(node.input[index])
    return found if found is not None and found.op_type == operator else None
