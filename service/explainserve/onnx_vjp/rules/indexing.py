"""Operators that read or write elements by position: the gradient of a read is a write that adds, and the other way
round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, rule


@rule("Slice")
def slice_(op: Emitter, node: Node, g: str) -> Gradients:
    """Steps of 1 at known places are a padding with zeros; anything else is a write by position, one axis after the
    other, or element by element where only the run tells the axes.
    """
    x, *absent = node.inputs[0], *[None] * (len(node.inputs) - 1)
    axes = _slice_axes(op, node)
    if axes is None:
        return placed_by_element(op, g, x, lambda numbers: op.Slice(numbers, *node.inputs[1:]), distinct=True), *absent
    pads = _static_pads(op, node, axes)
    if pads is not None:
        return op.Pad(g, pads), *absent
    for order, axis in reversed(list(enumerate(axes))):
        g = place(op, g, x, axis, _slice_positions(op, node, order, axis), distinct=True)
    return g, *absent


def _slice_axes(op: Emitter, node: Node) -> list[int] | None:
    """The axes of a slice, or None where they are not known beforehand."""
    axes = node.input(3)
    if not axes:
        starts = op.shape(node.inputs[1])
        return list(range(starts[0])) if starts is not None and isinstance(starts[0], int) else None
    constant, shape = op.constant(axes), op.shape(node.inputs[0])
    return None if constant is None or shape is None else [int(axis) % len(shape) for axis in constant]


def placed_by_element(op: Emitter, g: str, x: str, read: Callable[[str], str], *, distinct: bool = False) -> str:
    """Add `g` into zeros where `read` took its elements from in x, of whatever rank: the same read of the elements'
    numbers tells. `distinct`: it takes none twice.
    """
    numbers = op.reshape_like(counted(op, op.ReduceProd(op.dims(x), keepdims=1)), x)
    places = op.Reshape(read(numbers), [-1])
    return op.reshape_like(place(op, op.Reshape(g, [-1]), op.Reshape(x, [-1]), 0, places, distinct=distinct), x)


def _static_pads(op: Emitter, node: Node, axes: Sequence[int]) -> np.ndarray | None:
    """The padding that undoes a slice of step 1 with constant bounds over axes of known size, else None."""
    x, shape = node.inputs[0], op.shape(node.inputs[0])
    starts, ends, steps = op.constant(node.inputs[1]), op.constant(node.inputs[2]), op.constant(node.input(4))
    if shape is None or starts is None or ends is None or (node.input(4) and (steps is None or np.any(steps != 1))):
        return None
    rank = op.rank(x)
    pads = np.zeros(2 * rank, np.int64)
    for axis, start, end in zip(axes, starts, ends, strict=True):
        size = shape[axis]
        if not isinstance(size, int):
            return None
        begin, stop, _ = slice(int(start), int(end)).indices(size)
        if stop <= begin:
            return None
        pads[axis], pads[rank + axis] = begin, size - stop
    return pads


def _slice_positions(op: Emitter, node: Node, order: int, axis: int) -> str:
    """Which positions of one axis the slice read, as an int64 vector: the same slice of 0, 1, 2, ..."""
    bounds = [
        op.Slice(op.Cast(name, to=TensorProto.INT64), [order], [order + 1]) if name else None
        for name in (node.inputs[1], node.inputs[2], node.input(4))
    ]
    start, end, step = bounds
    return op.Slice(counted(op, op.dim(node.inputs[0], axis)), start, end, [0], step)


def counted(op: Emitter, size: str) -> str:
    """0, 1, ..., size - 1 for a size of shape (1,)."""
    zero, one = (op.array(np.array(value, np.int64)) for value in (0, 1))
    return op.Range(zero, op.Squeeze(size, [0]), one)


def place(op: Emitter, g: str, x: str, axis: int, positions: str, *, distinct: bool = False) -> str:
    """Add the rows of `g` along `axis` into zeros at `positions`; all other axes of `g` are as they are, the axis is
    as long as in `x`. `distinct`: no position comes twice.
    """
    rank = op.rank(g)
    perm = [axis, *(other for other in range(rank) if other != axis)]
    front = op.Transpose(g, perm=perm) if axis else g
    dims = op.Concat(op.dim(x, axis), op.Slice(op.Shape(front), [1], [rank]), axis=0)
    known = op.constant(positions)
    if distinct or (known is not None and len(np.unique(known)) == known.size):
        placed = op.ScatterND(op.zeros(dims, g), op.Unsqueeze(positions, [1]), front)
    else:
        placed = _summed_in_places(op, front, dims, op.Unsqueeze(positions, [1]))
    return op.Transpose(placed, perm=[int(other) for other in np.argsort(perm)]) if axis else placed


def _summed_in_places(op: Emitter, g: str, dims: str, indices: str) -> str:
    """`g` added to zeros of shape `dims`, as ScatterND does; onnxruntime's CPU provider has no sums in sixteen bits."""
    wide = op.widened(g)
    return op.cast_like(reduced_scatter(op, op.zeros(dims, wide), indices, wide, "add"), g)


def reduced_scatter(op: Emitter, data: str, indices: str, updates: str, reduction: str) -> str:
    """ScatterND with a reduction, as ScatterElements on flat tensors: the threads of onnxruntime's ScatterND overwrite
    each other's sums where a place comes twice.
    """
    shape = op.shape(indices)
    if shape is None or not isinstance(depth := shape[-1], int):
        raise Refusal("indices of an unknown number of axes", "store the indices' shape in the file")
    rank, dims = op.rank(data), op.dims(data)
    below = [op.ReduceProd(op.Slice(dims, [axis], [rank]), keepdims=1) for axis in range(1, rank)] + [op.array(_ONE)]
    starts = op.Mul(positive(op, indices, op.Slice(dims, [0], [depth])), op.Concat(*below[:depth], axis=0))
    offsets = counted(op, below[depth - 1])
    flat = op.Reshape(op.Add(op.Reshape(op.ReduceSum(starts, [-1], keepdims=0), [-1, 1]), offsets), [-1])
    cells = op.ScatterElements(op.Reshape(data, [-1]), flat, op.Reshape(updates, [-1]), axis=0, reduction=reduction)
    return op.reshape_like(cells, data)


_ONE = np.ones(1, np.int64)


@rule("Gather")
def gather(op: Emitter, node: Node, g: str) -> Gradients:
    x, indices = node.inputs
    axis = node.attribute("axis", 0)
    if op.shape(x) is None or op.shape(indices) is None:
        return placed_by_element(op, g, x, lambda numbers: op.Gather(numbers, indices, axis=axis)), None
    axis, rank = axis % op.rank(x), op.rank(indices)
    run = _consecutive(op, indices, x, axis)
    if run is not None:
        lined = g if rank == 1 else op.Unsqueeze(g, [axis])
        return _padded(op, lined, axis, *run), None
    if rank == 1:
        return place(op, g, x, axis, positive(op, indices, op.dim(x, axis))), None
    merged = op.Reshape(
        g, op.Concat(op.Slice(op.dims(x), [0], [axis]), [-1], op.Slice(op.dims(x), [axis + 1], [op.rank(x)]), axis=0)
    )
    return place(op, merged, x, axis, positive(op, op.Reshape(indices, [-1]), op.dim(x, axis))), None


def _consecutive(op: Emitter, indices: str, x: str, axis: int) -> tuple[int, int] | None:
    """(elements before, elements after) when constant indices read a run of neighbours in order."""
    values, shape = op.constant(indices), op.shape(x)
    if (
        values is None
        or values.ndim > 1
        or not values.size
        or shape is None
        or not isinstance(size := shape[axis], int)
    ):
        return None
    run = values.reshape(-1) % size
    if np.any(np.diff(run) != 1):
        return None
    return int(run[0]), size - 1 - int(run[-1])


def _padded(op: Emitter, g: str, axis: int, before: int, after: int) -> str:
    rank = op.rank(g)
    pads = np.zeros(2 * rank, np.int64)
    pads[axis], pads[rank + axis] = before, after
    return op.Pad(g, pads) if before or after else g


def positive(op: Emitter, indices: str, size: str) -> str:
    """Indices counted from the end, turned to counts from the start."""
    wide = op.Cast(indices, to=TensorProto.INT64)
    return op.Where(op.Less(wide, np.array(0, np.int64)), op.Add(wide, size), wide)


@rule("GatherElements")
def gather_elements(op: Emitter, node: Node, g: str) -> Gradients:
    x, indices = node.inputs
    wide = op.widened(g)
    zeros = op.zeros(op.dims(x), wide)
    summed = op.ScatterElements(zeros, indices, wide, axis=node.attribute("axis", 0), reduction="add")
    return op.cast_like(summed, g), None


@rule("GatherND")
def gather_nd(op: Emitter, node: Node, g: str) -> Gradients:
    x, indices = node.inputs
    batch = node.attribute("batch_dims", 0)
    if op.shape(x) is None or op.shape(indices) is None:
        return placed_by_element(op, g, x, lambda numbers: op.GatherND(numbers, indices, batch_dims=batch)), None
    if batch:
        indices = _with_batch_indices(op, indices, batch)
    return _summed_in_places(op, g, op.dims(x), indices), None


def _with_batch_indices(op: Emitter, indices: str, batch: int) -> str:
    """Index tuples with the batch position in front, so that they index the whole tensor."""
    rank = op.rank(indices)
    first = op.Slice(indices, [0], [1], [rank - 1])
    coordinates = []
    for axis in range(batch):
        line = op.Reshape(counted(op, op.dim(indices, axis)), [-1 if other == axis else 1 for other in range(rank)])
        coordinates.append(op.expand_like(line, first))
        op.graph.shapes.assign(coordinates[-1], first)
    return op.Concat(*coordinates, indices, axis=rank - 1)
