"""Rows inside an ONNX graph: ends of paths go in, scores at selectors and weighted sums of gradients come out.

A graph that interpolates, seeds and sums by itself takes arrays of an input's size per path, and returns them per
segment: of each row, only a few numbers cross to a device and back. `row_feeds` makes what such a graph takes.

On the CPU, interpolating and summing are matrix products, which pass over the rows once
(`benchmarks/results/rows_in_graph.md`). A product multiplies by zero what has no share in a result, and 0 x NaN is NaN.
So its factor is checked first, and where a number in it is not finite, each result is the product of what has a share
in it. Other devices gather and scatter instead, which leaves out what has no share without looking: a branch would wait
for the host, and products may round to fewer bits than float32 has. On the CPU that is slow: in onnxruntime's ScatterND
threads overwrite each other's sums, and its ScatterElements has only one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from explainserve.onnx_vjp.opset import FLOOR, sort_nodes, version_of
from explainserve.onnx_vjp.subgraphs import names_within

MULTIPLYING = frozenset({"cpu"})
"""Devices on which matrix products interpolate and sum."""

_FLOATS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE})
_INDEX = TensorProto.INT64
_WITH_LOOPS = 11


class RowGraph:
    """A model that is changed in place until it takes segments and returns what is asked of them.

    The tensors of the model keep their names. What is added is called `prefix` and then as `row_feeds` calls it.

    Args:
        model: of any operator set from 7 for `interpolate`, from 18 for `select` and `reduce`.
        multiplies: whether matrix products interpolate and sum.
        bare: names of the tensors without a batch axis; such a model is given one row at a time.
        prefix: one that no name in the model has; parts of a model need the same.

    Attributes:
        prefix: see above.
        outputs: the tensors that come back, in order.
    """

    def __init__(
        self, model: onnx.ModelProto, *, multiplies: bool, bare: Collection[str] = (), prefix: str = ""
    ) -> None:
        self.model = model
        self.prefix = prefix or unused_prefix(model.graph)
        self.outputs: list[str] = []
        self._bare = bare
        self._numbers = itertools.count()
        self._nodes: list[NodeProto] = []
        if version_of(model) is None:
            model.opset_import.append(helper.make_opsetid("", FLOOR))
        self.multiplies = multiplies and (version_of(model) or 0) >= _WITH_LOOPS

    def interpolate(self, names: Collection[str]) -> None:
        """Computes the batches of these inputs inside the graph: points of paths where they are floating-point, values
        by index where they are not.
        """
        for value in [value for value in self.model.graph.input if value.name in names]:
            kind = value.type.tensor_type.elem_type
            if kind in _FLOATS:
                self._interpolate(value.name, kind, self._rank(value))
            else:
                values = self._input(f"values/{value.name}", kind, self._rank(value, stacked=True))
                places = self._input(f"places/{value.name}", _INDEX, 0 if value.name in self._bare else 1)
                self._add("Gather", values, places, name=value.name)
            self._take_from_inputs(value)
        self._insert()

    def select(self, score: str, cotangent: str) -> None:
        """Returns the shape of `score`, and of each row what it has at the entries of its segment's selector; computes
        `cotangent`, an input of that shape, from the weights of these entries.
        """
        (seeded,) = (value for value in self.model.graph.input if value.name == cotangent)
        kind = seeded.type.tensor_type.elem_type
        shape, flat, segment = self._add("Shape", score), self._flat(score), self._input("segment", _INDEX, 1)
        entries = self._add("Gather", self._input("entries", _INDEX, 2), segment)
        weights = self._add("Gather", self._input("entry_weights", TensorProto.FLOAT, 2), segment)
        zeros = self._add("Expand", self._constant(0, _work(kind)), self._add("Shape", flat))
        updates = self._cast(weights, TensorProto.FLOAT, _work(kind))
        seeds = self._add("ScatterElements", zeros, entries, updates, axis=1, reduction="add")
        self._add("Cast", self._add("Reshape", seeds, shape), to=kind, name=cotangent)
        self._take_from_inputs(seeded)
        self.outputs += [shape, self._add("GatherElements", flat, entries, axis=1)]
        self._insert()

    def reduce(self, gradients: Mapping[str, int]) -> None:
        """Returns of each of these tensors the weighted sum over the rows of each segment, flat, in float32 or better.
        `gradients` maps their names to element types.
        """
        for gradient, kind in gradients.items():
            work = _work(kind)
            rows = self._cast(self._flat(gradient), kind, work)
            weights = self._cast(self._input("weights", TensorProto.DOUBLE, 2), TensorProto.DOUBLE, work)
            total = self._product if self.multiplies else self._scattered
            self.outputs.append(total(weights, rows, work))
        self._insert()

    def _interpolate(self, name: str, kind: int, rank: int | None) -> None:
        """The points of an input on all rows."""
        work = _work(kind)
        ends = self._cast(self._input(f"ends/{name}", kind, 2), kind, work)
        if self.multiplies:
            points = self._product(self._input(f"shares/{name}", work, 2), ends, work)
        else:
            points = self._gathered(name, ends, work)
        shape = self._input(f"shape/{name}", _INDEX, 1, extent=rank)
        self._add("Reshape", self._cast(points, work, kind), shape, name=name)

    def _gathered(self, name: str, ends: str, work: int) -> str:
        """to_start x start + to_end x end on rows that move, and the end itself on rows that do not."""
        places = [self._input(f"{which}/{name}", _INDEX, 1) for which in ("start", "end")]
        start, end = (self._add("Gather", ends, place) for place in places)
        to_start, to_end = (self._input(f"to_{which}/{name}", work, 2) for which in ("start", "end"))
        mixed = self._add("Add", self._add("Mul", start, to_start), self._add("Mul", end, to_end))
        candidates = self._add("Concat", mixed, ends, axis=0)
        return self._add("Gather", candidates, self._input(f"candidate/{name}", _INDEX, 1))

    def _scattered(self, weights: str, rows: str, work: int) -> str:
        """Weighted rows added up where their segment is; rows of weight 0 are left out."""
        zero = self._constant(0, work)
        weight = self._add("ReduceSum", self._add("Transpose", weights), self._constant([1], _INDEX))
        used = self._add("Where", self._add("Equal", weight, zero), zero, self._add("Mul", rows, weight))
        shape = self._add("Concat", self._add("Shape", weights, end=1), self._add("Shape", rows, start=1), axis=0)
        segment = self._add("Unsqueeze", self._input("segment", _INDEX, 1), self._constant([1], _INDEX))
        places = self._add("Expand", segment, self._add("Shape", rows))
        sums = self._add("Expand", zero, shape)
        return self._add("ScatterElements", sums, places, used, axis=0, reduction="add")

    def _product(self, shares: str, factor: str, work: int) -> str:
        """shares x factor; where a number of the factor is not finite, only of what has a share."""
        total = self._add("ReduceSum", factor, keepdims=0)
        finite = self._add("Less", self._add("Sub", total, total), self._constant(1, work))
        whole = self._graph([], lambda: [self._add("MatMul", shares, factor)], [work])
        parts = self._graph([], lambda: [self._product_of_parts(shares, factor, work)], [work])
        return self._add("If", finite, then_branch=whole, else_branch=parts)

    def _product_of_parts(self, shares: str, factor: str, work: int) -> str:
        """shares x factor, one row of shares after the other."""
        count = self._add("Gather", self._add("Shape", shares), self._constant(0, _INDEX))
        row, going = (self._fresh() for _ in range(2))

        def step() -> list[str]:
            own = self._add("Gather", shares, row)
            used = self._add("Cast", own, to=TensorProto.BOOL)
            part = self._add("MatMul", self._add("Compress", own, used), self._add("Compress", factor, used, axis=0))
            return [self._add("Identity", going), part]

        body = self._graph([(row, _INDEX), (going, TensorProto.BOOL)], step, [TensorProto.BOOL, work])
        return self._add("Loop", count, "", body=body)

    def _graph(
        self, inputs: Sequence[tuple[str, int]], write: Callable[[], list[str]], kinds: Sequence[int]
    ) -> GraphProto:
        """A graph inside of a node: numbers as inputs, results of these kinds."""
        outside, self._nodes = self._nodes, []
        results = write()
        nodes, self._nodes = self._nodes, outside
        formals = [helper.make_tensor_value_info(name, kind, []) for name, kind in inputs]
        outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(results, kinds, strict=True)]
        return helper.make_graph(nodes, results[-1], formals, outputs)

    def _flat(self, name: str) -> str:
        """A tensor as one vector per row."""
        return self._add("Reshape", name, self._constant([1 if name in self._bare else 0, -1], _INDEX))

    def _cast(self, name: str, kind: int, to: int) -> str:
        return name if kind == to else self._add("Cast", name, to=to)

    def _constant(self, value: Any, kind: int) -> str:
        array = np.array(value, helper.tensor_dtype_to_np_dtype(kind))
        return self._add("Constant", value=numpy_helper.from_array(array))

    def _add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        result = name or self._fresh()
        self._nodes.append(helper.make_node(operator, inputs, [result], name=f"{self.prefix}{result}", **attributes))
        return result

    def _fresh(self) -> str:
        return f"{self.prefix}{next(self._numbers)}"

    def _input(self, name: str, kind: int, rank: int | None, extent: int | None = None) -> str:
        """A new input, or the one of that name; `extent` is that of a single axis. TensorRT needs to know ranks."""
        full = self.prefix + name
        if full not in {value.name for value in self.model.graph.input}:
            shape = None if rank is None else [extent] * rank
            self.model.graph.input.append(helper.make_tensor_value_info(full, kind, shape))
        return full

    def _rank(self, value: ValueInfoProto, *, stacked: bool = False) -> int | None:
        """The rank of a tensor, or of arrays of such rows that are put together; None where it is not stated."""
        if not value.type.tensor_type.HasField("shape"):
            return None
        return len(value.type.tensor_type.shape.dim) + (stacked and value.name in self._bare)

    def _take_from_inputs(self, value: ValueInfoProto) -> None:
        """What is computed from now on keeps its stated type and shape."""
        self.model.graph.value_info.add().CopyFrom(value)
        self.model.graph.input.remove(value)

    def _insert(self) -> None:
        self.model.graph.node.extend(self._nodes)
        self._nodes = []
        sort_nodes(self.model.graph)


def _work(kind: int) -> int:
    """The type that numbers of a floating-point type are interpolated and summed in."""
    return TensorProto.DOUBLE if kind == TensorProto.DOUBLE else TensorProto.FLOAT


def unused_prefix(graph: GraphProto) -> str:
    """A prefix of no name in a graph."""
    taken = {value.name for value in graph.input} | set(names_within(graph))
    prefixes = ("rows" + "_" * count + "/" for count in itertools.count())
    return next(prefix for prefix in prefixes if not any(name.startswith(prefix) for name in taken))
