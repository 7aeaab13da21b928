"""What rules write with: an operator emitter that folds constants, shares equal nodes and knows shapes.

Rules are written against operator set 18 or newer; `opset.py` raises older models to it first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from math import frexp, ldexp
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper

from explainserve.onnx_vjp.graph import FLOATS, Graph
from explainserve.onnx_vjp.registry import Refusal
from explainserve.onnx_vjp.shapes import SHAPE_ELEMENTS, Shape
from explainserve.onnx_vjp.subgraphs import captured, subgraphs

if TYPE_CHECKING:
    from explainserve.onnx_vjp.walk import Walk

# What they return takes many bytes and says no more than their inputs, so that files keep the nodes.
_FILLING = frozenset({"ConstantOfShape", "Expand"})

Operand = str | float | int | Sequence[int] | np.ndarray | None


class Node:
    """A forward node as a rule sees it. An absent optional input is the empty string.

    `sources` are the inputs and, behind them, the tensors that its subgraphs read; a rule returns gradients in this
    order.
    """

    def __init__(
        self,
        proto: NodeProto,
        live: frozenset[str],
        twins: Mapping[str, str] | None = None,
        walk: Callable[[Graph, Sequence[str], Sequence[str]], Walk] | None = None,
    ) -> None:
        self.proto = proto
        self._walk = walk
        self.inputs: tuple[str, ...] = tuple(proto.input)
        self.sources: tuple[str, ...] = (*self.inputs, *captured(proto))
        self.outputs: tuple[str, ...] = tuple(proto.output)
        self._live = live
        self._twins = twins or {}

    def input(self, index: int) -> str:
        """The name of an input, or the empty string where it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value (strings decoded), or `default` where the node does not set it."""
        for attribute in self.proto.attribute:
            if attribute.name == name:
                return _attribute_value(attribute)
        return default

    def differentiates(self, index: int) -> bool:
        """Whether the gradient of this source is needed at all: a rule may spare itself work that is costly to
        write.
        """
        return index < len(self.sources) and self.sources[index] in self._live

    def on_path(self, value: str) -> bool:
        """Whether a tensor lies between what is differentiated and what it is differentiated by."""
        return value in self._live

    def walk(self, body: Graph, wrt: Sequence[str], of: Sequence[str]) -> Walk:
        """A walk over one of the node's bodies by the rules of the walk that this node is visited by."""
        assert self._walk is not None, "a composition is no walk. This is a bug."
        return self._walk(body, wrt, of)

    def twin(self, value: str) -> str:
        """The same tensor in the other forward pass of a rule that compares two; itself where both share it."""
        return self._twins.get(value, value)


class Emitter:
    """`op.Mul(a, b)` appends a Mul node and returns the name of its output.

    Operands are tensor names, numbers (of the first float operand's type), integer sequences (int64 vectors) or
    arrays; keywords are attributes.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._shared: dict[tuple[Any, ...], tuple[str, ...]] = {}
        for node in graph.nodes:
            self._shared.setdefault(_identity(node), tuple(node.output))

    def __getattr__(self, operator: str) -> Callable[..., str]:
        if not operator[:1].isupper():
            raise AttributeError(operator)
        return lambda *operands, **attributes: self.emit(operator, *operands, **attributes)[0]

    def emit(
        self, operator: str, *operands: Operand, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Append a node and return the names of its outputs; a node whose inputs are all constant is computed
        instead, unless it only repeats them.
        """
        for operand in operands:
            if isinstance(operand, str):
                self.graph.capture(operand)
        like = self._like(operands)
        names = [self._tensor(operand, like) for operand in operands]
        while names and not names[-1]:
            names.pop()
        attributes = {name: value for name, value in attributes.items() if value is not None}
        node = helper.make_node(operator, names, [f"{index}" for index in range(outputs)], domain=domain, **attributes)
        key = _identity(node)
        if len(self._shared.get(key, ())) < outputs:
            self._shared[key] = self._folded(node) or self._appended(node)
        return self._shared[key][:outputs]

    def _like(self, operands: Sequence[Operand]) -> str | None:
        """The operand whose type numbers take: the first float, or else the first of unknown type."""
        tensors = [operand for operand in operands if isinstance(operand, str) and operand]
        floats = [name for name in tensors if self.graph.dtype(name) in FLOATS]
        return next(iter(floats + [name for name in tensors if self.graph.dtype(name) == TensorProto.UNDEFINED]), None)

    def _folded(self, node: NodeProto) -> tuple[str, ...] | None:
        values = [self.graph.constant(name) if name else None for name in node.input]
        unknown = any(value is None for value, name in zip(values, node.input, strict=True) if name)
        if unknown or not node.input or any(subgraphs(node)):
            return None
        outputs = self.graph.folded(node, values)
        if outputs is None or (node.op_type in _FILLING and outputs[0].size > SHAPE_ELEMENTS):
            return None
        return tuple(self.graph.add_constant(np.asarray(value, order="C")) for value in outputs)

    def _appended(self, node: NodeProto) -> tuple[str, ...]:
        names = tuple(self.graph.fresh(f"vjp/{node.op_type}") for _ in node.output)
        node.output[:] = names
        node.name = names[0]
        self.graph.append(node)
        return names

    def _tensor(self, operand: Operand, like: str | None) -> str:
        if operand is None:
            return ""
        if isinstance(operand, str):
            return operand
        if isinstance(operand, int | float | np.floating):
            return self.array(np.array(operand, dtype=self.numpy_dtype(like) if like else None))
        if isinstance(operand, np.ndarray):
            return self.array(operand.astype(self.numpy_dtype(like)) if like and operand.dtype.kind == "f" else operand)
        return self.array(np.array(operand, dtype=np.int64))

    def array(self, value: np.ndarray) -> str:
        """A constant tensor; equal ones are stored once."""
        key = ("array", value.dtype.str, value.shape, blake2b(value.tobytes()).digest())
        if key not in self._shared:
            self._shared[key] = (self.graph.add_constant(value),)
        return self._shared[key][0]

    # -- what is known
    # ---------------------------------------------------------------------------------------------------

    def shape(self, value: str) -> Shape | None:
        """Dimensions as int, symbol or None, or None where even the rank is unknown."""
        return self.graph.shape(value)

    def rank(self, value: str) -> int:
        """The number of dimensions; refused where shape inference did not find it."""
        shape = self.graph.shape(value)
        if shape is None:
            raise Refusal(
                f"the rank of tensor '{value}' is unknown",
                "store the shapes of all tensors in the file, or fix its input shapes",
            )
        return len(shape)

    def constant(self, value: str) -> np.ndarray | None:
        """The value of a tensor that does not depend on the model's inputs; None for others and for an absent input."""
        return self.graph.constant(value) if value else None

    def numpy_dtype(self, value: str) -> np.dtype[Any]:
        """The numpy type of a tensor's elements; float32 where it is unknown."""
        return helper.tensor_dtype_to_np_dtype(self.graph.dtype(value) or TensorProto.FLOAT)

    # -- idioms that many rules share
    # ------------------------------------------------------------------------------------

    def dims(self, value: str) -> str:
        """The shape of a tensor as an int64 tensor: a constant where it is static."""
        shape = self.shape(value)
        return self.array(np.array(shape, np.int64)) if shape is not None and _is_static(shape) else self.Shape(value)

    def dim(self, value: str, axis: int) -> str:
        """One dimension as an int64 tensor of shape (1,)."""
        shape = self.shape(value)
        if shape is not None and isinstance(size := shape[axis], int):
            return self.array(np.array([size], np.int64))
        return self.Gather(self.Shape(value), [axis])

    def reshape_like(self, value: str, like: str) -> str:
        """`value` with its elements in the shape of `like`; one unknown dimension is left to Reshape."""
        shape = self.shape(like)
        if shape is not None and None not in shape and shape == self.shape(value):
            return value
        if shape is not None and sum(not isinstance(d, int) for d in shape) == 1 and 0 not in shape:
            return self.Reshape(value, [d if isinstance(d, int) else -1 for d in shape])
        # Where there may be a size of zero, zero is meant, not the value's own size in its place.
        positive = shape is not None and _is_static(shape) and 0 not in shape
        return self.Reshape(value, self.dims(like), allowzero=None if positive else 1)

    def of_shape(self, value: str, like: str) -> str:
        """`value`, known to have the type and shape of `like`: inference lets a named dimension win over an unknown
        one, though it may be 1 in the run.
        """
        self.graph.shapes.assign(value, like)
        return value

    def expand_like(self, value: str, like: str) -> str:
        """`value` broadcast to the shape of `like`."""
        return self.Expand(value, self.dims(like))

    def zeros(self, dims: str, like: str) -> str:
        """Zeros of shape `dims` and of the element type of `like`."""
        zero = helper.make_tensor("zero", helper.np_dtype_to_tensor_dtype(self.numpy_dtype(like)), [1], [0.0])
        return self.ConstantOfShape(dims, value=zero)

    def zeros_like(self, value: str) -> str:
        """Zeros of the shape and element type of `value`."""
        return self.zeros(self.dims(value), value)

    def cast_like(self, value: str, like: str) -> str:
        """`value` in the element type of `like`."""
        if self.graph.dtype(value) == self.graph.dtype(like):
            return value
        return self.Cast(value, to=helper.np_dtype_to_tensor_dtype(self.numpy_dtype(like)))

    def mask(self, condition: str, like: str) -> str:
        """A boolean tensor as 0 and 1 of the element type of `like`; multiplying by it measures faster than Where."""
        return self.cast_like(condition, like)

    def step(self, value: str, bound: float = 0.0, *, falling: bool = False) -> str:
        """1 where `value` is above `bound` (below it if `falling`), else 0, in the type of `value`.

        Of float32 it is a line steep enough to cross the unit interval between two neighbouring numbers: one operator
        in place of two, and one that onnxruntime computes in the blocked layout of its convolutions. Numbers below the
        smallest normal one count in part. Of other types onnxruntime has no such operator.
        """
        if self.graph.dtype(value) != TensorProto.FLOAT:
            return self.mask(self.Less(value, bound) if falling else self.Greater(value, bound), value)
        _, exponent = frexp(bound)
        slope = ldexp(-1.0 if falling else 1.0, 126 - max(exponent, 0))
        return self.HardSigmoid(value, alpha=slope, beta=-slope * bound)

    def widened(self, value: str) -> str:
        """A float16 or bfloat16 tensor in float32, any other as it is: sums, squares and counts above 65504 fit in."""
        half = self.graph.dtype(value) in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        return self.Cast(value, to=TensorProto.FLOAT) if half else value

    def divided(self, value: str, count: str) -> str:
        """`value` over an int64 count, which a type of 16 bits may not hold."""
        wide = self.widened(value)
        return self.cast_like(self.Div(wide, self.cast_like(count, wide)), value)

    def transposed(self, value: str) -> str:
        """The last two axes exchanged."""
        rank = self.rank(value)
        return self.Transpose(value, perm=[*range(rank - 2), rank - 1, rank - 2])

    def output(self, node: Node, index: int) -> str:
        """An output of a forward node by position; an optional one that nothing used so far is switched on."""
        outputs = node.proto.output
        while len(outputs) <= index:
            outputs.append("")
        if not outputs[index]:
            outputs[index] = self.graph.fresh(f"{outputs[0]}/{index}")
            self.graph.register(node.proto)
        return str(outputs[index])

    # -- broadcasting, undone
    # --------------------------------------------------------------------------------------------

    def sum_to(self, value: str, like: str) -> str:
        """`value` summed over the axes along which `like` was broadcast to it: the transpose of broadcasting."""
        axes = self._broadcast_axes(value, like)
        if axes is None:
            return self.sum_to_dynamic(value, like)
        if not axes:
            return value
        leading = self.rank(value) - self.rank(like)
        if len(axes) == leading:
            return self.ReduceSum(value, axes, keepdims=0)
        summed = self.ReduceSum(value, axes, keepdims=1)
        return self.Squeeze(summed, list(range(leading))) if leading else summed

    def _broadcast_axes(self, value: str, like: str) -> list[int] | None:
        """The axes to sum over, or None where the shapes do not tell."""
        actual, expected = self.shape(value), self.shape(like)
        if actual is None or expected is None:
            return None
        leading = len(actual) - len(expected)
        axes = list(range(leading))
        for axis, (have, want) in enumerate(zip(actual[leading:], expected, strict=True), leading):
            if want == 1 and have != 1:
                axes.append(axis)
            elif have != 1 and not isinstance(want, int) and (want is None or want != have):
                return None
        return axes

    def sum_to_dynamic(self, value: str, like: str) -> str:
        """The same, with the axes found at run time."""
        dims, wide = self.Shape(like), self.Shape(value)
        one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
        leading = self.ConstantOfShape(self.Sub(self.Shape(wide), self.Shape(dims)), value=one)
        ones = self.Equal(self.Concat(leading, dims, axis=0), self.array(np.array(1, np.int64)))
        axes = self.Reshape(self.NonZero(ones), [-1])
        summed = self.Reshape(self.ReduceSum(value, axes, keepdims=1, noop_with_empty_axes=1), dims)
        self.graph.shapes.assign(summed, like)
        return summed


def _attribute_value(attribute: AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return (
        [item.decode() if isinstance(item, bytes) else item for item in value]
        if attribute.type == AttributeProto.STRINGS
        else value
    )


def _identity(node: NodeProto) -> tuple[Any, ...]:
    attributes = sorted(
        (attribute.name, attribute.SerializeToString(deterministic=True)) for attribute in node.attribute
    )
    return (node.domain, node.op_type, tuple(node.input), tuple(attributes))


def _is_static(shape: Shape) -> bool:
    return all(isinstance(dimension, int) for dimension in shape)
