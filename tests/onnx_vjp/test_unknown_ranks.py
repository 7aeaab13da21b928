"""Gradients of tensors whose number of axes only the run tells, as behind a Squeeze without axes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from explainserve.onnx_vjp import find_gaps
from onnx_vjp.vjp_oracle import Case, check, single

_rng = np.random.default_rng(17)


def _x(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape).astype(np.float32)


def _of_unknown_rank(case: Case, name: str) -> Case:
    """The case with an input that passes a Reshape to sizes given at run time, as many as there may be."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    graph, sizes = model.graph, f"{name}/sizes"
    for node in graph.node:
        node.input[:] = [f"{name}/reshaped" if read == name else read for read in node.input]
    graph.node.insert(0, helper.make_node("Reshape", [name, sizes], [f"{name}/reshaped"]))
    graph.input.append(helper.make_tensor_value_info(sizes, TensorProto.INT64, ["rank"]))
    feeds = {**case.feeds, sizes: np.array(case.feeds[name].shape, np.int64)}
    return replace(case, model=model, feeds=feeds)


CASES = {
    "a vector times a matrix": (single("MatMul", {"a": _x(4), "b": _x(4, 5)}), "a"),
    "rows times a matrix": (single("MatMul", {"a": _x(2, 3, 4), "b": _x(4, 5)}), "a"),
    "rows of rows": (single("Gather", {"x": _x(5, 4), "i": np.array([[0, 3], [3, -1]])}), "x"),
    "rows by a last axis": (single("Gather", {"x": _x(5, 4), "i": np.array([1, 1, 0])}, axis=-1), "x"),
    "elements of batches": (single("GatherND", {"x": _x(2, 3, 4), "i": np.array([[1], [0]])}, batch_dims=1), "x"),
    "every second": (
        single("Slice", {"x": _x(5, 4), "s": np.array([1]), "e": np.array([9]), "a": np.array([-1])}),
        "x",
    ),
    "axes reversed": (single("Transpose", {"x": _x(2, 3, 4)}), "x"),
    "a normalized last axis": (single("LayerNormalization", {"x": _x(2, 3, 4), "scale": _x(4), "bias": _x(4)}), "x"),
    "the largest of all": (single("ReduceMax", {"x": _x(3, 4)}, keepdims=0), "x"),
    "a norm along the first axis": (single("ReduceL2", {"x": _x(3, 4), "axes": np.array([0])}, keepdims=0), "x"),
    "what is broadcast": (single("Add", {"a": _x(4), "b": _x(2, 3, 4)}), "a"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_needs_no_rank(name: str) -> None:
    assert check(_of_unknown_rank(*CASES[name]))


@pytest.mark.parametrize("shape", [(3,), (3, 5), (4, 3, 5)], ids=str)
def test_a_stored_matrix_times_a_tensor_of_unknown_rank(shape: tuple[int, ...]) -> None:
    case = single("MatMul", {"a": _x(2, 3), "b": _x(*shape)})
    weight = case.model.graph.input.pop(0).name
    case.model.graph.initializer.append(numpy_helper.from_array(case.feeds.pop(weight), weight))
    assert check(_of_unknown_rank(case, "b"))


def test_a_rule_that_needs_the_rank_says_so() -> None:
    case = _of_unknown_rank(single("Tile", {"x": _x(3, 4), "repeats": np.array([2, 1])}), "x")
    (gap,) = find_gaps(case.model, ["x"], "y0")
    assert gap.operator == "Tile" and "the rank of tensor 'x/reshaped' is unknown" in gap.reason
