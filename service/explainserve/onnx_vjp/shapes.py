"""Types and shapes of all tensors, with dynamic dimensions told apart exactly.

ONNX's shape inference loses track of symbols (the product of two, their way through Shape, Gather, Mul, Concat,
Reshape), but it computes with numbers well. So it probes the model with several numbers for each symbol: a dimension
that always comes out equal is static, one that differs is dynamic, and two dynamic dimensions are the same when all
their numbers agree. A dynamic dimension is taken not to be broadcast itself.

Two probes are with large numbers that windows, patches and heads divide: they fit most models, and what they do not
infer, the symbolic inference of ONNX answers (two symbols that broadcast against each other must be equal). To them
alone, the first 77 tokens of a text would always be 77, and what is padded to whole windows as large as before. So
there are checks, with numbers that are small and odd. Not every model takes those: what a check does not infer says
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, OperatorSetIdProto, TensorProto, TypeProto, ValueInfoProto, defs, helper, numpy_helper

from explainserve.onnx_vjp.evaluation import evaluate
from explainserve.onnx_vjp.lost_shapes import complete
from explainserve.onnx_vjp.malformed import MALFORMED
from explainserve.onnx_vjp.subgraphs import is_standard

Dimension = int | str | None
Shape = tuple[Dimension, ...]
Types = dict[str, TypeProto]
Numbers = tuple[int | None, ...]
"""A dimension in each probe, None where it is not inferred."""


class TensorType(NamedTuple):
    """Element type and shape, UNDEFINED and None where they are unknown."""

    dtype: int
    shape: Shape | None

    def proto(self) -> TypeProto:
        """The type as ONNX writes it."""
        return helper.make_tensor_type_proto(self.dtype, self.shape)

    def stacked(self) -> TensorType:
        """The type of any number of such tensors, stacked along a new first axis."""
        return TensorType(self.dtype, None if self.shape is None else (None, *self.shape))

    def without_axis(self, axis: int) -> TensorType:
        """The type of one piece of a tensor that is cut along `axis`."""
        shape = self.shape
        return TensorType(self.dtype, shape and tuple(np.delete(np.array(shape, object), axis)))


# Longer constants are no shapes. Inference writes out integer arithmetic element by element, so it must not see them.
SHAPE_ELEMENTS = 16

# Divisible by what windows, patches and heads divide sizes by, and small: inference writes out a Range of them.
_DIVISIBLE = 672
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
# Where among the primes the factors of the large numbers start, and the numbers of the checks.
_FACTORS, _CHECK, _SMALL_CHECK = map(_PRIMES.index, (11, 37, 5))
_LARGE, _PROBES = 2, 5

# Operators that inference cannot see through, and others that have the same answer: operator, which inputs it takes,
# attributes.
_AS_INPUT: tuple[str, tuple[int, ...], Mapping[str, str]] = ("Identity", (0,), {})
_STAND_INS = {
    ("", "GroupNormalization"): _AS_INPUT,
    ("", "MeanVarianceNormalization"): _AS_INPUT,
    ("", "SimplifiedLayerNormalization"): _AS_INPUT,
    ("com.microsoft", "BiasGelu"): _AS_INPUT,
    ("com.microsoft", "DequantizeLinear"): ("DequantizeLinear", (0, 1, 2), {}),
    ("com.microsoft", "FastGelu"): _AS_INPUT,
    ("com.microsoft", "Gelu"): _AS_INPUT,
    ("com.microsoft", "GroupNorm"): _AS_INPUT,
    ("com.microsoft", "Inverse"): _AS_INPUT,
    ("com.microsoft", "MatMulNBits"): ("Einsum", (0, 2), {"equation": "...k,nb->...n"}),
    ("com.microsoft", "NGramRepeatBlock"): ("Identity", (1,), {}),
    ("com.microsoft", "QuickGelu"): _AS_INPUT,
    ("com.microsoft", "RotaryEmbedding"): _AS_INPUT,
    ("com.microsoft", "SkipLayerNormalization"): _AS_INPUT,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _AS_INPUT,
}


class Shapes:
    """What is known about each tensor of a growing graph: element type and shape."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._imports, self._ir_version = model.opset_import, model.ir_version
        self._version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
        symbols = _symbols(model)
        self._numbers = {symbol: _numbers(index, len(symbols)) for index, symbol in enumerate(symbols)}
        self._symbols: dict[Numbers, str] = {numbers[:_LARGE]: symbol for symbol, numbers in self._numbers.items()}
        self._symbolic = _inferred(model, None)
        self._probes = [self._probed(model, probe) for probe in range(_PROBES)]
        unknown: list[Types] = [{} for _ in range(_LARGE)]
        while clamped := self._clamped(model.graph.node, unknown[0].keys()):
            for probe, stated in enumerate(unknown):
                types = self._probes[probe]
                stated.update((name, _with_unknown(types[name], axes)) for name, axes in clamped.items())
                self._probes[probe] = self._probed(model, probe, stated)

    def _probed(
        self, model: onnx.ModelProto, probe: int, stated: Mapping[str, TypeProto] = MappingProxyType({})
    ) -> Types:
        """Types with symbols replaced by their numbers in a probe, where those of `stated` are given."""
        types = _inferred(model, {symbol: numbers[probe] for symbol, numbers in self._numbers.items()}, stated)
        complete(model.graph, types, partial(self._known_of_node, types), self._evaluate, stated.keys())
        return types

    def _clamped(self, nodes: Iterable[NodeProto], known: Set[str]) -> dict[str, list[int]]:
        """Where the large probes contradict themselves, the axes that they take to be static against a check, of each
        output of the nodes concerned, less the outputs of `known`.

        A table of 512 positions that is sliced up to the length of a sequence is 512 long in both. What is added to it
        does not fit, so a check alone knows the shape of the sum.
        """
        large, checks = self._probes[:_LARGE], self._probes[_LARGE:]
        if all(_rank(types.get(n)) >= _rank(check[n]) for types in large for check in checks for n in check):
            return {}
        axes = {
            name: [axis for axis, numbers in enumerate(self._numbers_of(name) or ()) if _is_clamped(numbers)]
            for node in nodes
            if known.isdisjoint(node.output)
            for name in node.output
            if name in large[0]
        }
        concerned = [node for node in nodes if any(axes.get(name) for name in node.output)]
        return {name: axes[name] for node in concerned for name in node.output if name in axes}

    def _known_of_node(
        self, types: Mapping[str, TypeProto], node: NodeProto, values: Mapping[str, np.ndarray]
    ) -> Mapping[str, TypeProto]:
        return self._of_node(node, _version(node, self._imports), types, values)

    def _evaluate(self, node: NodeProto, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        return evaluate(node, inputs, self._imports)

    def __contains__(self, name: object) -> bool:
        return name in self._symbolic or name in self._probes[0]

    def dtype(self, name: str) -> int:
        """The TensorProto data type, UNDEFINED where inference did not find it."""
        kind = self._symbolic.get(name) or self._probes[0].get(name)
        return kind.tensor_type.elem_type if kind is not None else TensorProto.UNDEFINED

    def shape(self, name: str) -> Shape | None:
        """Dimensions as int, symbol or None (unknown), or None where even the rank is unknown."""
        numbers, symbolic = self._numbers_of(name), _dims(self._symbolic.get(name))
        # ONNX stops half way, with a lower rank, where sizes do not fit or exceed the output_shape of a ConvTranspose.
        if numbers is not None and (symbolic is None or len(symbolic) == len(numbers)):
            return tuple(map(self._dimension, numbers))
        return None if symbolic is None else tuple(_symbol(dim) for dim in symbolic)

    def _numbers_of(self, name: str) -> list[Numbers] | None:
        """The numbers of every dimension, or None where the large probes do not tell how many there are."""
        found = [_dims(types.get(name)) for types in self._probes]
        ranks = [None if dims is None else len(dims) for dims in found]
        rank = ranks[0]
        if rank is None or ranks[:_LARGE] != [rank] * _LARGE:
            return None
        sizes = [[_size(dim) for dim in dims] if dims and len(dims) == rank else [None] * rank for dims in found]
        return list(zip(*sizes, strict=True))

    def _dimension(self, numbers: Numbers) -> Dimension:
        if None in numbers[:_LARGE]:
            return None
        known = {number for number in numbers if number is not None}
        if len(known) == 1:
            return known.pop()
        symbol = self._symbols.get(numbers[:_LARGE])
        if symbol is not None and _agree(numbers, self._numbers[symbol]):
            return symbol
        return "|".join("?" if number is None else str(number) for number in numbers)

    def type(self, name: str) -> TensorType:
        """What is known of a tensor."""
        return TensorType(self.dtype(name), self.shape(name))

    def stated(self, name: str) -> TensorType:
        """What is known of a tensor in terms of the model's inputs: without the dimensions that are computed from
        theirs.
        """
        shape, own = self.shape(name), self._numbers.keys()
        return TensorType(
            self.dtype(name), shape and tuple(d if isinstance(d, int) or d in own else None for d in shape)
        )

    def type_proto(self, name: str) -> TypeProto:
        """The type as ONNX writes it, with the model's own symbols."""
        own = self._numbers.keys()
        shape = self.shape(name)
        dims = (
            None
            if shape is None
            else [d if isinstance(d, int) or (d in own and not str(d).startswith("?")) else None for d in shape]
        )
        return helper.make_tensor_type_proto(self.dtype(name), dims)

    @property
    def _all(self) -> list[dict[str, TypeProto]]:
        return [*self._probes, self._symbolic]

    def assign(self, name: str, like: str) -> None:
        """State that a tensor has the type and shape of another one."""
        for types in self._all:
            if like in types:
                types[name] = types[like]
            else:
                types.pop(name, None)

    def declare(self, name: str, kind: TensorType) -> None:
        """State the type of a tensor; its symbols are those of this graph, derived ones included."""
        shape = kind.shape
        for probe, types in enumerate(self._probes):
            dims = shape and [d if isinstance(d, int) else self._derived(d)[probe] for d in shape]
            types[name] = helper.make_tensor_type_proto(kind.dtype, dims)
        own = shape and [d if isinstance(d, int) or d in self._numbers else None for d in shape]
        self._symbolic[name] = helper.make_tensor_type_proto(kind.dtype, own)

    def _derived(self, symbol: str | None) -> Numbers:
        """The numbers that stand for a symbol, which a derived one has for its name."""
        if symbol is not None and symbol in self._numbers:
            return self._numbers[symbol]
        numbers = tuple(int(number) if number.isdigit() else None for number in (symbol or "").split("|"))
        return numbers if len(numbers) == _PROBES else (None,) * _PROBES

    def add_constant(self, name: str, data_type: int, dims: Iterable[int]) -> None:
        """Make the type of a new initializer known."""
        kind = helper.make_tensor_type_proto(data_type, list(dims))
        for types in self._all:
            types[name] = kind

    def add_node(self, node: NodeProto, version: int, constants: Mapping[str, np.ndarray]) -> None:
        """Infer the types of a new node's outputs, as far as its inputs and the constants among them tell."""
        for types in self._all:
            found = self._of_node(node, version, types, constants)
            types.update((name, kind) for name, kind in found.items() if name and kind.tensor_type.elem_type)

    def element_count(self, node: NodeProto, version: int, values: Mapping[str, np.ndarray]) -> int | None:
        """Elements of all outputs of a node on values, or None where inference does not find them."""
        types = {
            name: helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in values.items()
        }
        found = self._of_node(node, version, types, values)
        counts = [_element_count(found[name]) if name in found else None for name in node.output if name]
        return None if None in counts else sum(count for count in counts if count is not None)

    def _of_node(
        self, node: NodeProto, version: int, types: Mapping[str, TypeProto], constants: Mapping[str, np.ndarray]
    ) -> Mapping[str, TypeProto]:
        """Types of the outputs, as far as those of the inputs and the constants among them tell."""
        node = stand_in(node)
        version = version if node.domain else self._version
        try:
            if _is_scaled(node) and (sizes := _multiplied(node, types, constants)).size:
                node, types, constants = _by_sizes(node, sizes, types)
            data = {
                name: numpy_helper.from_array(value, name)
                for name, value in constants.items()
                if value.size <= SHAPE_ELEMENTS
            }
            schema = defs.get_schema(node.op_type, version, node.domain)
            found: Types = onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                {name: types[name] for name in node.input if name in types},
                data,
                {},
                list(self._imports),
                self._ir_version,
            )
        except MALFORMED:
            found = {}
        return found | _resized(node, types, found)


def _element_count(kind: TypeProto) -> int | None:
    """Elements of a tensor whose shape is static, else None."""
    dims = [dim.dim_value for dim in kind.tensor_type.shape.dim if dim.HasField("dim_value") and dim.dim_value >= 0]
    static = kind.tensor_type.HasField("shape") and len(dims) == len(kind.tensor_type.shape.dim)
    return math.prod(dims) if static else None


def stand_in(node: NodeProto) -> NodeProto:
    """A node that inference sees through and that has the same answer, or the node itself."""
    found = _STAND_INS.get((node.domain, node.op_type))
    if found is None:
        return node
    operator, positions, attributes = found
    inputs = [node.input[position] for position in positions if position < len(node.input)]
    return helper.make_node(operator, inputs, node.output[:1], node.name, **attributes)


def _resized(node: NodeProto, types: Mapping[str, TypeProto], found: Mapping[str, TypeProto]) -> Types:
    """The type that inference does not find of what a Resize to unknown sizes gives: its input's, sizes unknown."""
    if not is_standard(node, "Resize") or not node.input or not node.output:
        return {}
    kind = types.get(node.input[0])
    if kind is None or (dims := _dims(kind)) is None or _dims(found.get(node.output[0])) is not None:
        return {}
    return {node.output[0]: helper.make_tensor_type_proto(kind.tensor_type.elem_type, [None] * len(dims))}


def _is_scaled(node: NodeProto) -> bool:
    return node.op_type == "Resize" and not node.domain and len(node.input) == 3 and not node.input[1]


def _multiplied(node: NodeProto, types: Mapping[str, TypeProto], constants: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sizes that a Resize by scales gives, none where they are not known.

    Inference takes the product of size and scale exactly, the runtime in float32: 10 times 0.7 is 7.
    """
    dims, scales = _dims(types.get(node.input[0])), constants.get(node.input[2])
    if dims is None or scales is None or not all(dim.HasField("dim_value") for dim in dims):
        return np.zeros(0, np.int64)
    axes = next((attribute.ints for attribute in node.attribute if attribute.name == "axes"), range(len(dims)))
    sizes = np.array([dims[axis].dim_value for axis in axes], np.float32)
    with np.errstate(all="ignore"):
        return np.floor(sizes * scales.astype(np.float32)).astype(np.int64)


def _by_sizes(
    node: NodeProto, sizes: np.ndarray, types: Mapping[str, TypeProto]
) -> tuple[NodeProto, dict[str, TypeProto], dict[str, np.ndarray]]:
    """A Resize to stated sizes, with the types and the constant that it reads."""
    x = node.input[0]
    name = f"{x}/sizes"
    stated = helper.make_node("Resize", [x, "", "", name], node.output)
    stated.attribute.extend(attribute for attribute in node.attribute if attribute.name == "axes")
    kinds = {x: types[x], name: helper.make_tensor_type_proto(TensorProto.INT64, sizes.shape)}
    return stated, kinds, {name: sizes}


def _multiplies_exactly(scales: TensorProto) -> bool:
    """Whether no product with a size is rounded: 11 bits of a scale times 13 of a size are exact in float32."""
    values = numpy_helper.to_array(scales)
    with np.errstate(over="ignore"):
        return bool(np.all(values.astype(np.float16) == values))


def _symbols(model: onnx.ModelProto) -> list[str]:
    """Every symbol of the inputs; a dimension without a name gets one of its own, starting with '?'."""
    found: dict[str, None] = {}
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                found[dim.dim_param or f"?{value.name}:{axis}"] = None
    return list(found)


def _dims(kind: TypeProto | None) -> Sequence[onnx.TensorShapeProto.Dimension] | None:
    return kind.tensor_type.shape.dim if kind is not None and kind.tensor_type.HasField("shape") else None


def _rank(kind: TypeProto | None) -> int:
    """The number of dimensions, -1 where it is not known."""
    dims = _dims(kind)
    return -1 if dims is None else len(dims)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | None:
    return int(dim.dim_value) if dim.HasField("dim_value") else None


def _agree(one: Numbers, other: Numbers) -> bool:
    """Whether no probe tells two dimensions apart."""
    return all(a == b for a, b in zip(one, other, strict=True) if a is not None and b is not None)


def _is_clamped(numbers: Numbers) -> bool:
    """Whether a dimension is static to the large probes, but not to a check."""
    return None not in numbers[:_LARGE] and len(set(numbers[:_LARGE])) == 1 and len(set(numbers) - {None}) > 1


def _with_unknown(kind: TypeProto, axes: Iterable[int]) -> TypeProto:
    """A type with the sizes of these axes unknown."""
    copy = TypeProto()
    copy.CopyFrom(kind)
    for axis in axes:
        copy.tensor_type.shape.dim[axis].Clear()
    return copy


def _symbol(dim: onnx.TensorShapeProto.Dimension) -> Dimension:
    return int(dim.dim_value) if dim.HasField("dim_value") else str(dim.dim_param) or None


def _numbers(index: int, count: int) -> tuple[int, ...]:
    """What stands in each probe for one of so many symbols."""
    large = (_DIVISIBLE * _prime(_FACTORS + index + probe * count) for probe in range(_LARGE))
    # The smallest of all are given from the last symbol on: lengths of texts and sides of images stand behind batches.
    return *large, _prime(_CHECK + index), _prime(_SMALL_CHECK + index), _prime(count - 1 - index)


def _prime(index: int) -> int:
    """A prime; behind the listed ones, any odd number."""
    return _PRIMES[index] if index < len(_PRIMES) else _PRIMES[-1] + 2 * (index - len(_PRIMES) + 1)


def _inferred(
    model: onnx.ModelProto, numbers: Mapping[str, int] | None, stated: Mapping[str, TypeProto] = MappingProxyType({})
) -> Types:
    """Types with symbols replaced by numbers, or left as they are, where those of `stated` are given."""
    kept = (stand_in(node) for node in model.graph.node if stated.keys().isdisjoint(node.output))
    reduced = skeleton(model, kept, numbers)
    reduced.graph.input.extend(ValueInfoProto(name=name, type=kind) for name, kind in stated.items())
    try:
        result = onnx.shape_inference.infer_shapes(reduced, strict_mode=False, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        if numbers is None:
            raise ValueError(f"the graph is malformed: {error}") from error
        return {}
    # What inference does not find is as the file declares it.
    return _declared(model.graph, numbers) | _typed((*result.value_info, *result.output, *result.input))


def _declared(graph: onnx.GraphProto, numbers: Mapping[str, int] | None) -> Types:
    """Types as a file states them, with symbols replaced by numbers, or left as they are."""
    stored = {t.name: helper.make_tensor_type_proto(t.data_type, list(t.dims)) for t in graph.initializer}
    return _typed(_numeric(value, numbers) for value in (*graph.value_info, *graph.output)) | stored


def _typed(values: Iterable[ValueInfoProto]) -> Types:
    return {value.name: value.type for value in values if value.type.tensor_type.elem_type}


def skeleton(
    model: onnx.ModelProto, nodes: Iterable[NodeProto], numbers: Mapping[str, int] | None = None
) -> onnx.ModelProto:
    """What inference needs of a model, with `nodes` for its own and symbols replaced by numbers, or left as they are.

    Weights enter as types only, so that models above protobuf's 2 GB pass too. Declared shapes are left out: inference
    does not correct them.
    """
    reduced = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = reduced.graph
    graph.name = model.graph.name
    graph.node.extend(nodes)
    foreign = {name for node in model.graph.node if not _has_schema(node, model) for name in node.output}
    graph.value_info.extend(_numeric(value, numbers) for value in model.graph.value_info if value.name in foreign)
    graph.output.extend(ValueInfoProto(name=value.name) for value in model.graph.output)
    graph.input.extend(_numeric(value, numbers) for value in model.graph.input)
    scales = {node.input[2] for node in model.graph.node if _is_scaled(node)}
    for tensor in model.graph.initializer:
        small = int(np.prod(tensor.dims, dtype=np.int64)) <= SHAPE_ELEMENTS and not tensor.external_data
        if small and (tensor.name not in scales or _multiplies_exactly(tensor)):
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return reduced


def _has_schema(node: NodeProto, model: onnx.ModelProto) -> bool:
    try:
        return bool(defs.has(node.op_type, _version(node, model.opset_import), node.domain))
    except TypeError:  # a name that is no text
        return False


def _version(node: NodeProto, imports: Iterable[OperatorSetIdProto]) -> int:
    return next((entry.version for entry in imports if entry.domain == node.domain), 1)


def _numeric(value: ValueInfoProto, numbers: Mapping[str, int] | None) -> ValueInfoProto:
    """The value with numbers in place of symbols; an unknown symbol becomes an unknown dimension."""
    if numbers is None:
        return value
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    for axis, dim in enumerate(copy.type.tensor_type.shape.dim):
        if not dim.HasField("dim_value"):
            number = numbers.get(dim.dim_param or f"?{value.name}:{axis}")
            dim.Clear()
            if number is not None:
                dim.dim_value = number
    return copy
