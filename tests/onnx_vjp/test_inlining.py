"""Functions are counted before they are written out: a small file may hold more nodes than any machine can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from explainserve.onnx_vjp import cut, find_gaps, input_gradient, layers
from explainserve.onnx_vjp.inlining import inlined, node_count
from hostile_graphs import circular, doubled
from onnx_graphs import linear, model, node

X, Y = [("x", [1, 3])], [("y", [1, 3])]

ENTRIES: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "input_gradient": lambda proto: input_gradient(proto, ["x"], "y"),
    "find_gaps": lambda proto: find_gaps(proto, ["x"], "y"),
    "cut": lambda proto: cut(proto, ["y"]),
    "layers": layers,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_functions_that_multiply_are_refused_with_their_count(entry: str) -> None:
    with pytest.raises(ValueError, match=r"^the model has \d{18,} nodes with its functions written out; 200000 are"):
        ENTRIES[entry](doubled(60))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_function_that_calls_itself_is_refused_by_name(entry: str) -> None:
    with pytest.raises(ValueError, match=r"function 'F[12]' calls itself"):
        ENTRIES[entry](circular())


def test_nodes_of_functions_and_of_subgraphs_are_counted() -> None:
    branch = helper.make_graph([node("Neg", ["x"], ["t"])] * 3, "branch", [], [])
    branching = model([node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], X, Y)

    assert node_count(branching) == 7
    assert node_count(linear(np.ones((3, 2), np.float32))) == 1
    assert node_count(doubled(3)) >= 8


def test_a_thousand_functions_in_a_row_are_counted() -> None:
    """More than Python's own stack has frames."""
    proto = doubled(1_500)
    for function in proto.functions[1:]:
        del function.node[1:]
        function.node[0].output[0] = "b"

    assert node_count(proto) == 1_502


def test_overloads_of_a_function_are_counted_apart() -> None:
    """Each calls the one before twice, and all have one name."""
    proto = doubled(60)
    for level, function in enumerate(proto.functions):
        function.name, function.overload = "F", str(level)
        for call in function.node if level else ():
            call.op_type, call.overload = "F", str(level - 1)
    proto.graph.node[0].op_type, proto.graph.node[0].overload = "F", "60"

    assert node_count(proto) > 2**60


def test_calls_by_the_other_name_of_the_default_domain_are_counted() -> None:
    """They are written out too."""
    proto = doubled(2)
    for function in proto.functions:
        function.domain = "ai.onnx"
    for call in (*proto.functions[1].node, *proto.functions[2].node, *proto.graph.node):
        call.domain = ""

    assert [written.op_type for written in inlined(proto).graph.node] == ["Neg"] * 4
    assert node_count(proto) >= 4
