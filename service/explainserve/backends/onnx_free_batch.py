"""Freeing the batch of a graph that was exported with a batch of one.

Exporters bake the one into constants: targets of Reshape, tensors that are concatenated to rows, initial states, sizes
of Resize. Shapes are inferred twice, for one row and for many; where a constant does not follow, it is made to. Whether
the result computes the same is for the caller to check: a graph can depend on its batch in other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, TypeProto, defs, helper, numpy_helper

from explainserve.backends.onnx_graph import BATCH
from explainserve.onnx_vjp.evaluation import evaluate

SMALL = 16
"""Elements of tensors that may hold shapes."""

ROWS = 7919
"""Many rows: a prime, so that an extent tells whether it grows with them."""

Extents = tuple[int, ...]


def declared(model: onnx.ModelProto, batched: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` whose `batched` inputs and whose outputs are declared to have any number of rows."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]  # shapes inferred with a batch of one
    for value in copy.graph.input:
        if value.name in batched:
            value.type.tensor_type.shape.dim[0].dim_param = BATCH
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    return copy


def repaired(model: onnx.ModelProto, batched: Sequence[str]) -> onnx.ModelProto:
    """The same, with constants that follow the number of rows."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    freeing = _Freeing(copy, batched)
    nodes = [part for node in model.graph.node for part in freeing.repaired(node)]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return declared(copy, batched)


@dataclass
class _Run:
    """What is known when the graph runs on some number of rows: types, and the values of small tensors."""

    types: dict[str, TypeProto]
    values: dict[str, np.ndarray]

    def extents(self, name: str) -> Extents | None:
        """The shape, where all of it is known."""
        kind = self.types.get(name)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        dims = kind.tensor_type.shape.dim
        return tuple(dim.dim_value for dim in dims) if all(dim.HasField("dim_value") for dim in dims) else None

    def infer(self, node: NodeProto, model: onnx.ModelProto) -> None:
        """Adds what a node's inputs tell of its outputs; what is known stays."""
        inputs = {name: self.types[name] for name in node.input if name in self.types}
        data = {name: numpy_helper.from_array(self.values[name]) for name in node.input if name in self.values}
        for name, kind in _output_types(node, inputs, data, model).items():
            if self.extents(name) is None:
                self.types[name] = kind
        for name, value in self._output_values(node, model).items():
            self.values.setdefault(name, value)

    def _output_values(self, node: NodeProto, model: onnx.ModelProto) -> dict[str, np.ndarray]:
        if node.op_type == "Shape":
            extents = self.extents(node.input[0])
            start, end = (next((a.i for a in node.attribute if a.name == key), None) for key in ("start", "end"))
            return {} if extents is None else {node.output[0]: np.array(extents[start:end], np.int64)}
        known = [name for name in node.input if name]
        if not known or any(name not in self.values for name in known):
            return {}
        return _evaluated(node, {name: self.values[name] for name in known}, model)


class _Freeing:
    def __init__(self, model: onnx.ModelProto, batched: Sequence[str]) -> None:
        self.model = model
        values = _small_constants(model.graph)
        given = {value.name for value in model.graph.input} | {tensor.name for tensor in model.graph.initializer}
        self._one = _Run(_inferred(model), dict(values))
        self._many = _Run({name: kind for name, kind in self._one.types.items() if name in given}, dict(values))
        for name in batched:
            self.grow(name, name, 0)
        self._innermost: set[str] = set()

    def repaired(self, node: NodeProto) -> Iterator[NodeProto]:
        """The node as it is, or the nodes that take its place."""
        copy = NodeProto()
        copy.CopyFrom(node)
        repair = REPAIRS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        for part in [*(repair(self, copy) if repair else ()), copy]:
            self._one.infer(part, self.model)
            self._many.infer(part, self.model)
            self._follow(part)
            yield part

    def _follow(self, node: NodeProto) -> None:
        """Rows that are innermost in an axis stay so through operators that keep the axis."""
        for name in node.output:
            axis, extents = self.batch_axis(name), self.one(name)
            for source in self._innermost.intersection(node.input):
                before = self.one(source)
                if axis is None or not extents or not before or axis != self.batch_axis(source):
                    continue
                if node.op_type != "Reshape" and before[axis] == extents[axis]:
                    self._innermost.add(name)

    # -- what repairs ask and do ---------------------------------------------------------------------------------------

    def one(self, name: str) -> Extents | None:
        """The shape for one row, where all of it is known."""
        return self._one.extents(name)

    def batch_axis(self, name: str) -> int | None:
        """The axis that grows with the rows, or None where none is known to."""
        one, many = self.one(name), self._many.extents(name)
        if one is None or many is None or len(one) != len(many):
            return None
        return next((axis for axis, (a, b) in enumerate(zip(one, many, strict=True)) if a and b == a * ROWS), None)

    def boundary(self, name: str) -> int | None:
        """Where rows are in row-major order: how many elements of one row lie from their axis on."""
        axis, extents = self.batch_axis(name), self.one(name)
        if axis is None or extents is None:
            return None
        return prod(extents[axis + 1 :] if name in self._innermost else extents[axis:])

    def baked(self, name: str) -> np.ndarray | None:
        """The value of a small tensor that does not follow the rows, else None."""
        one, many = self._one.values.get(name), self._many.values.get(name)
        return one if one is not None and many is not None and np.array_equal(one, many) else None

    def merge_innermost(self, name: str) -> None:
        """States that rows are innermost in the axis that grows."""
        self._innermost.add(name)

    def constant(self, value: Sequence[int], hint: str) -> str:
        """A new int64 initializer."""
        array, name = np.array(value, np.int64), f"{hint}/free"
        while name in self._one.types:
            name += "_"
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        for run in (self._one, self._many):
            run.types[name] = helper.make_tensor_type_proto(TensorProto.INT64, array.shape)
            run.values[name] = array
        return name

    def grow(self, name: str, like: str, axis: int) -> None:
        """States that a tensor has the type of another one, with rows along `axis`."""
        self._one.types[name] = self._one.types[like]
        self._many.types[name] = _with_rows(self._one.types[like], axis)

    def row_count(self, like: str, axis: int, hint: str) -> tuple[list[NodeProto], str]:
        """Nodes that read the extent of an axis, and the name of the vector of length one that they leave it in."""
        shape, count = f"{hint}/shape", f"{hint}/rows"
        position = self.constant([axis], f"{hint}/axis")
        read = helper.make_node("Gather", [shape, position], [count], name=count)
        return [helper.make_node("Shape", [like], [shape], name=shape), read], count


def _reshape(freeing: _Freeing, node: NodeProto) -> Iterable[NodeProto]:
    """The target gets the extents of one row written out, and -1 where the rows are."""
    source, target = node.input[0], freeing.baked(node.input[1])
    boundary, before = freeing.boundary(source), freeing.one(source)
    if target is None or not target.size or (boundary is None and before is not None):
        return ()
    after = freeing.one(node.output[0]) or _reached(target, before)
    if boundary is None or after is None:
        node.input[1] = freeing.constant(_free_first(target), node.output[0])
        return ()
    place, innermost = _place_of_rows(after, boundary)
    follows = [-1 if position == place else extent for position, extent in enumerate(after)]
    node.input[1] = freeing.constant(follows, node.output[0])
    if innermost:
        freeing.merge_innermost(node.output[0])
    return ()


def _reached(target: np.ndarray, before: Extents | None) -> Extents | None:
    """The extents that a target gives, where inference did not follow how it is computed."""
    if before is None:
        return None
    extents = [before[axis] if extent == 0 else int(extent) for axis, extent in enumerate(target)]
    rest = -prod(extents)
    return tuple(prod(before) // rest if extent == -1 else extent for extent in extents) if rest else None


def _place_of_rows(extents: Extents, boundary: int) -> tuple[int | None, bool]:
    """The axis that rows are in when they are at a boundary, and whether they are innermost there.

    They have an axis of extent one for themselves, or join the axis that follows; never the last one, of features,
    before which they join the axis that precedes.
    """
    starts = [axis for axis in range(len(extents)) if prod(extents[axis:]) == boundary]
    alone = next((axis for axis in starts if extents[axis] == 1), None)
    if alone is not None or not starts:
        return alone, False
    if starts[0] == len(extents) - 1 and starts[0] > 0:
        return starts[0] - 1, True
    return starts[0], False


def _free_first(target: np.ndarray) -> list[int]:
    """Without knowledge of shapes: the first extent becomes what is left over; where another one is, one is copied."""
    first, *others = (int(extent) for extent in target)
    return [0 if first == 1 else first, *others] if -1 in (first, *others) else [-1, *others]


def _with_equal_rows(positions: Callable[[NodeProto], Iterable[int]]) -> Repair:
    """Inputs that have to agree in their rows: constants of one row are repeated."""

    def repair(freeing: _Freeing, node: NodeProto) -> Iterable[NodeProto]:
        names = [(index, node.input[index]) for index in positions(node) if index < len(node.input)]
        grown = next(((name, axis) for _, name in names if (axis := freeing.batch_axis(name)) is not None), None)
        if grown is None or (node.op_type == "Concat" and grown[1] == _axis(node, freeing.one(grown[0]))):
            return
        like, axis = grown
        for index, name in names:
            shape = freeing.one(name)
            if shape is not None and freeing.batch_axis(name) is None and len(shape) > axis and shape[axis] == 1:
                yield from _repeated(freeing, node, index, (like, axis), axis)

    return repair


def _repeated(freeing: _Freeing, node: NodeProto, index: int, rows: tuple[str, int], axis: int) -> Iterator[NodeProto]:
    """Nodes that repeat an input along `axis` as often as there are rows."""
    shape, hint = freeing.one(node.input[index]) or (), f"{node.output[0]}/{index}"
    nodes, count = freeing.row_count(*rows, hint)
    yield from nodes
    before, after = (
        freeing.constant(shape[:axis], f"{hint}/before"),
        freeing.constant(shape[axis + 1 :], f"{hint}/after"),
    )
    yield helper.make_node("Concat", [before, count, after], [f"{hint}/target"], axis=0, name=f"{hint}/target")
    yield helper.make_node(
        "Expand", [node.input[index], f"{hint}/target"], [f"{hint}/expanded"], name=f"{hint}/expanded"
    )
    node.input[index] = f"{hint}/expanded"


def _initial_states(freeing: _Freeing, node: NodeProto) -> Iterable[NodeProto]:
    """States of shape (directions, batch, hidden), or (batch, directions, hidden) in layout 1, of one row."""
    axis = freeing.batch_axis(node.input[0])
    place = 0 if any(attribute.name == "layout" and attribute.i for attribute in node.attribute) else 1
    for index in (5, 6):
        if axis is not None and index < len(node.input) and node.input[index]:
            shape = freeing.one(node.input[index])
            if shape is not None and freeing.batch_axis(node.input[index]) is None and shape[place] == 1:
                yield from _repeated(freeing, node, index, (node.input[0], axis), place)


def _resize(freeing: _Freeing, node: NodeProto) -> Iterable[NodeProto]:
    """Sizes begin with the number of rows."""
    sizes = freeing.baked(node.input[3]) if len(node.input) > 3 else None
    if (
        sizes is None
        or freeing.batch_axis(node.input[0]) != 0
        or any(attribute.name == "axes" for attribute in node.attribute)
    ):
        return
    nodes, count = freeing.row_count(node.input[0], 0, node.output[0])
    yield from nodes
    rest = freeing.constant([int(size) for size in sizes[1:]], f"{node.output[0]}/sizes")
    joined = f"{node.output[0]}/free_sizes"
    yield helper.make_node("Concat", [count, rest], [joined], axis=0, name=joined)
    node.input[3] = joined


Repair = Callable[[_Freeing, NodeProto], Iterable[NodeProto]]

REPAIRS: Mapping[str, Repair] = {
    "Concat": _with_equal_rows(lambda node: range(len(node.input))),
    "GRU": _initial_states,
    "GatherElements": _with_equal_rows(lambda node: (0, 1)),
    "GridSample": _with_equal_rows(lambda node: (0, 1)),
    "LSTM": _initial_states,
    "RNN": _initial_states,
    "Reshape": _reshape,
    "Resize": _resize,
    "ScatterElements": _with_equal_rows(lambda node: (0, 1, 2)),
}
"""By operator: changes the node in place where one of its constants holds a batch of one; returns what goes before."""


def _axis(node: NodeProto, shape: Extents | None) -> int:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return axis % len(shape) if shape else axis


def _small_constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """What may hold shapes, by name."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {node.output[0]: node.attribute[0].t for node in graph.node if _is_constant(node)}
    return {name: numpy_helper.to_array(t) for name, t in tensors.items() if _is_small(t)}


def _is_small(tensor: TensorProto) -> bool:
    return len(tensor.dims) < 2 and prod(tensor.dims) <= SMALL and tensor.data_location != TensorProto.EXTERNAL


def _is_constant(node: NodeProto) -> bool:
    return node.op_type == "Constant" and node.attribute[0].name == "value"


def _inferred(model: onnx.ModelProto) -> dict[str, TypeProto]:
    """The types of all tensors for one row."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = {value.name: value.type for value in (*graph.value_info, *graph.output, *graph.input)}
    return types | {t.name: helper.make_tensor_type_proto(t.data_type, list(t.dims)) for t in graph.initializer}


def _with_rows(kind: TypeProto, axis: int = 0) -> TypeProto:
    many = TypeProto()
    many.CopyFrom(kind)
    many.tensor_type.shape.dim[axis].dim_value = ROWS
    return many


def _evaluated(node: NodeProto, values: Mapping[str, np.ndarray], model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """A node on small values; nothing where the evaluator refuses, or the result is large."""
    try:
        found = evaluate(node, [values.get(name) for name in node.input], model.opset_import)
    except Exception:  # the evaluator lets through whatever numpy raises
        return {}
    return {name: value for name, value in zip(node.output, found, strict=True) if name and value.size <= SMALL}


def _output_types(
    node: NodeProto, inputs: Mapping[str, TypeProto], data: Mapping[str, TensorProto], model: onnx.ModelProto
) -> dict[str, TypeProto]:
    version = next((entry.version for entry in model.opset_import if entry.domain == node.domain), 1)
    try:
        schema = defs.get_schema(node.op_type, version, node.domain)
        return dict(
            onnx.shape_inference.infer_node_outputs(
                schema, node, dict(inputs), dict(data), {}, list(model.opset_import), model.ir_version
            )
        )
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, defs.SchemaError, KeyError):
        return {}
