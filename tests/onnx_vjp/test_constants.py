"""Which constants are computed while a gradient is built: all that rules look at, none that could fill the memory."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import helper

from explainserve.onnx_vjp import find_gaps, input_gradient
from explainserve.onnx_vjp.emitter import Emitter
from explainserve.onnx_vjp.graph import Graph
from onnx_graphs import model, node

LONG = 1_500
"""Nodes, more than Python's own stack has frames."""


def chain(operator: str, source: str, end: str) -> list[onnx.NodeProto]:
    names = [source, *(f"{end}_{index}" for index in range(1, LONG)), end]
    return [node(operator, [a], [b]) for a, b in itertools.pairwise(names)]


def constant(nodes: list[onnx.NodeProto], name: str, weights: dict[str, np.ndarray]) -> np.ndarray | None:
    graph = model([node("Identity", ["x"], ["y"]), *nodes], [("x", [1])], [("y", [1])], weights, domains=["elsewhere"])
    return Graph(graph).constant(name)


def test_a_long_chain_of_constants_is_followed() -> None:
    found = constant(chain("Neg", "c", "end"), "end", {"c": np.array([2.0], np.float32)})

    np.testing.assert_array_equal(found, np.float32([2.0]))


def test_a_long_chain_that_ends_in_an_input_is_no_constant() -> None:
    assert constant(chain("Neg", "x", "end"), "end", {}) is None


def test_a_long_network_is_differentiated() -> None:
    graph = model([*chain("Relu", "x", "h"), node("Clip", ["h", "h"], ["y"])], [("x", [1])], [("y", [1])])

    assert find_gaps(graph, ["x"], "y") == []


def test_a_circle_is_no_constant() -> None:
    circle = [node("Neg", ["a"], ["b"]), node("Neg", ["b"], ["a"])]

    assert constant(circle, "a", {}) is None


HUGE = np.array([1 << 20, 1 << 20], np.int64)
"""Extents of a tensor of 8 TB."""

BOMBS: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "extents": ([node("ConstantOfShape", ["huge"], ["c"])], {"huge": HUGE}),
    "extents that overflow": (
        [node("ConstantOfShape", ["huge"], ["c"])],
        {"huge": np.array([1 << 32, 1 << 32], np.int64)},
    ),
    "computed extents": (
        [
            node("NonZero", ["mask"], ["at"]),
            node("Flatten", ["at"], ["flat"], axis=0),
            node("ReduceSum", ["flat"], ["n"]),
            node("Expand", ["one", "n"], ["c"]),
        ],
        {"mask": np.ones(1 << 18, np.bool_), "one": np.ones(1, np.float32)},
    ),
    "repeats": ([node("Tile", ["one", "huge"], ["c"])], {"huge": HUGE, "one": np.ones((1, 1), np.float32)}),
    "range": (
        [node("Range", ["zero", "end", "one"], ["c"])],
        {"zero": np.array(0, np.int64), "one": np.array(1, np.int64), "end": np.array(1 << 40, np.int64)},
    ),
    "padding": (
        [node("Pad", ["one", "pads"], ["c"])],
        {"one": np.ones((1, 1), np.float32), "pads": np.array([0, 0, 1 << 20, 1 << 20], np.int64)},
    ),
    "broadcasting": (
        [node("Add", ["column", "row"], ["c"])],
        {"column": np.ones((1 << 16, 1), np.float32), "row": np.ones((1, 1 << 16), np.float32)},
    ),
    "one-hot": (
        [node("OneHot", ["ids", "depth", "values"], ["c"])],
        {"ids": np.zeros(1 << 10, np.int64), "depth": np.array(1 << 30, np.int64), "values": np.float32([0.0, 1.0])},
    ),
    "scales": (
        [node("Resize", ["one", "", "scales"], ["c"])],
        {"one": np.ones((1, 1), np.float32), "scales": np.float32([1 << 20, 1 << 20])},
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_constants_that_would_fill_the_memory_are_left_to_the_runtime(name: str) -> None:
    nodes, weights = BOMBS[name]

    assert constant(nodes, "c", weights) is None


def test_a_rule_computes_no_constant_that_would_fill_the_memory() -> None:
    """The gradient of a tensor that the output does not depend on is zeros of its shape."""
    graph = model([node("Neg", ["x"], ["y"])], [("x", [1]), ("z", [1 << 20, 1 << 20])], [("y", [1])])

    result = input_gradient(graph, ["x", "z"], "y")

    assert sum(tensor.ByteSize() for tensor in result.model.graph.initializer) < 1_000


SCATTERED: dict[str, tuple[onnx.NodeProto, dict[str, np.ndarray]]] = {
    "GatherElements": (node("GatherElements", ["x", "i"], ["y"], axis=3), {"i": np.zeros((8, 4, 28, 1), np.int64)}),
    "GlobalMaxPool": (node("GlobalMaxPool", ["x"], ["y"]), {}),
    "MaxPool": (node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2]), {}),
    "TopK": (node("TopK", ["x", "k"], ["y", "i"], axis=3), {"k": np.array([2])}),
}


@pytest.mark.parametrize("operator", SCATTERED)
def test_zeros_to_scatter_into_are_not_stored(operator: str) -> None:
    single, weights = SCATTERED[operator]
    result = input_gradient(model([single], [("x", [8, 4, 28, 28])], [("y", None)], weights), ["x"], "y")

    stored = sum(tensor.ByteSize() for tensor in result.model.graph.initializer if tensor.name not in weights)
    assert stored < 1_000


def test_values_that_do_not_fit_their_operator_are_left_to_the_runtime() -> None:
    weights = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}

    assert constant([node("Add", ["a", "b"], ["c"])], "c", weights) is None


def test_an_operator_without_a_reference_is_left_to_the_runtime() -> None:
    foreign = helper.make_node("Anything", ["a"], ["c"], domain="elsewhere")

    assert constant([foreign], "c", {"a": np.ones(2, np.float32)}) is None


def test_what_selects_is_computed_though_its_size_is_not_known_beforehand() -> None:
    found = constant([node("NonZero", ["a"], ["c"])], "c", {"a": np.float32([0, 1, 1])})

    np.testing.assert_array_equal(found, [[1, 2]])


def test_a_folded_scalar_stays_a_scalar() -> None:
    graph = Graph(model([node("Neg", ["x"], ["y"])], [("x", [1])], [("y", [1])]))
    op = Emitter(graph)

    assert graph.shape(op.Squeeze(op.array(np.array([3], np.int64)), [0])) == ()
