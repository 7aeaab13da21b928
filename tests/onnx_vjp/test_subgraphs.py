"""Graphs inside nodes: names, gaps, gradient rules, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import helper

from explainserve.onnx_vjp import GRADIENT_RULES, find_gaps, input_gradient
from explainserve.onnx_vjp.opset import prepared
from explainserve.onnx_vjp.subgraphs import MAX_DEPTH, subgraphs
from onnx_vjp.control_cases import H, S, X, body, control_cases, model, node
from onnx_vjp.vjp_oracle import run

LOOP = ("i_step b_on before", "b_off after")
"""What the body of a Loop with one state takes and returns."""


def one() -> np.ndarray:
    return np.ones_like(H)


def test_a_gap_in_a_body_is_named() -> None:
    mystery = helper.make_node("Mystery", ["row"], ["m"], name="inner", domain="elsewhere")
    step = body([mystery, node("Add", "before m", "after")], "before row", "after")
    graph = model([node("Scan", "h x", "y", body=step, num_scan_inputs=1)], {"h": H, "x": X}, "y")
    graph.opset_import.append(helper.make_opsetid("elsewhere", 1))
    assert [(gap.operator, gap.node) for gap in find_gaps(graph, ["x"], "y")] == [("Mystery", "inner")]
    assert find_gaps(graph, ["h"], "y") == []


def test_a_branch_that_is_never_taken_is_not_asked_for_a_rule() -> None:
    mystery = body([helper.make_node("Mystery", ["h"], ["o"], domain="elsewhere")], outputs="o")
    choice = node("If", "c", "y", then_branch=body([node("Neg", "h", "o")], outputs="o"), else_branch=mystery)
    graph = model([choice], {"h": H}, "y", {"c": np.array(True)})
    graph.opset_import.append(helper.make_opsetid("elsewhere", 1))
    gradient = input_gradient(graph, ["h"], "y")
    assert "If" not in {part.op_type for part in gradient.model.graph.node}
    (dh,) = run(gradient.model, {"h": H, gradient.cotangent: one()}, [gradient.gradients["h"]])
    np.testing.assert_array_equal(dh, -one())


def test_gradient_rules_reach_into_bodies() -> None:
    step = body([node("Relu", "before", "r"), node("Neg", "r", "after"), node("Identity", "b_on", "b_off")], *LOOP)
    graph = model([node("Loop", "once - h", "y", body=step)], {"h": H}, "y", {"once": np.array(1)})
    feeds = {"h": np.abs(H)}
    for table, slope in (("standard", -1), ("guided_backpropagation", 0)):
        gradient = input_gradient(graph, ["h"], "y", rules=GRADIENT_RULES[table]())
        (dh,) = run(gradient.model, {**feeds, gradient.cotangent: one()}, [gradient.gradients["h"]])
        np.testing.assert_array_equal(dh, slope * one(), err_msg=table)


def test_a_state_that_grows_is_refused_with_the_reason() -> None:
    step = body([node("Concat", "before before", "after", axis=0), node("Identity", "b_on", "b_off")], *LOOP)
    graph = model([node("Loop", "count - h", "y", body=step)], {"count": np.array(3), "h": H}, "y")
    (gap,) = find_gaps(graph, ["h"], "y")
    assert (gap.operator, gap.node) == ("Loop", "y")
    assert "shape of 'before' changes" in gap.reason


def test_a_dropout_in_a_body_that_runs_twice_is_refused() -> None:
    step = body([node("RandomNormalLike", "before", "noise"), node("Mul", "before noise", "after")], outputs="after")
    choice = node("If", "c", "y", then_branch=step, else_branch=body([node("Neg", "before", "o")], outputs="o"))
    graph = model([node("Exp", "h", "before"), choice], {"c": np.array(True), "h": H}, "y")
    (gap,) = find_gaps(graph, ["h"], "y")
    assert "drawn twice" in gap.reason


def test_a_name_that_hides_another_keeps_its_meaning() -> None:
    """`t` is the outer tensor until the branch defines its own."""
    hiding = body([node("Mul", "t t", "u"), node("Exp", "u", "t"), node("Neg", "t", "o")], outputs="o")
    choice = node("If", "c", "y", then_branch=hiding, else_branch=body([node("Neg", "t", "o")], outputs="o"))
    graph = prepared(model([node("Mul", "h s", "t"), choice], {"c": np.array(True), "h": H, "s": S}, "y"))
    inner = next(a.g for a in graph.graph.node[-1].attribute if a.name == "then_branch")
    first, second, third = inner.node
    assert list(first.input) == ["t", "t"]
    assert second.output[0] == third.input[0] != "t"


def test_subgraphs_without_end_are_an_error() -> None:
    inner = body([node("Neg", "h", "o")], outputs="o")
    for _ in range(MAX_DEPTH):
        inner = body([node("If", "c", "o", then_branch=inner, else_branch=inner)], outputs="o")
    graph = model([node("If", "c", "y", then_branch=inner, else_branch=inner)], {"c": np.array(True), "h": H}, "y")
    with pytest.raises(ValueError, match="deep"):
        input_gradient(graph, ["h"], "y")


def test_a_function_with_a_loop_keeps_what_it_captures() -> None:
    """Range is a Loop over its own `delta`."""
    graph = model([node("Range", "start limit delta", "y")], {}, "y", {"limit": np.array(9, np.float32)})
    for name in ("start", "delta"):
        graph.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []))
    gradient = input_gradient(graph, ["start", "delta"], "y")
    feeds = {"start": np.array(1, np.float32), "delta": np.array(2, np.float32), gradient.cotangent: np.ones(4, "f")}
    values = run(gradient.model, feeds, list(gradient.gradients.values()))
    assert [value.item() for value in values] == [4, 0 + 1 + 2 + 3]


def _damaged(whole: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model with one thing missing from, or added to, a node that has subgraphs."""
    (position,) = [index for index, part in enumerate(whole.graph.node) if any(subgraphs(part))]
    for damage in ("attributes", "inputs", "outputs", "body inputs", "body outputs", "body nodes", "more"):
        copy = onnx.ModelProto()
        copy.CopyFrom(whole)
        part = copy.graph.node[position]
        inner = next(subgraphs(part))
        fields = {"attributes": part.attribute, "inputs": part.input, "outputs": part.output}
        fields |= {"body inputs": inner.input, "body outputs": inner.output, "body nodes": inner.node}
        if damage == "more":
            inner.input.add(name="extra")
        elif fields[damage]:
            del fields[damage][-1]
        yield copy


@pytest.mark.parametrize("name", ["If:True", "If:constant", "Loop:4 yes", "Scan:00True"])
def test_a_damaged_graph_is_an_error_or_has_gaps(name: str) -> None:
    models = {case.name: case.model for case in control_cases()}
    branch = body([node("Neg", "h", "o")], outputs="o")
    choice = node("If", "c", "y", then_branch=branch, else_branch=branch)
    models["If:constant"] = model([choice], {"h": H}, "y", {"c": np.array(True)})
    for damaged in _damaged(models[name]):
        floats = [value.name for value in damaged.graph.input if value.type.tensor_type.elem_type == 1]
        with contextlib.suppress(ValueError):
            assert isinstance(find_gaps(damaged, floats, [value.name for value in damaged.graph.output]), list)
