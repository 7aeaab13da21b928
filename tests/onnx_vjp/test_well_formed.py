"""Graphs that break the rules of ONNX are errors that name the node, and no others are."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from explainserve.onnx_vjp import cut, find_gaps, input_gradient
from onnx_graphs import model, node

X, Y = [("x", ["batch", 3, 4])], [("y", None)]


def single(operator: str, *constants: object, **attributes: object) -> onnx.ModelProto:
    """y = operator(x, constants)."""
    weights = {f"c{index}": np.asarray(value) for index, value in enumerate(constants)}
    return model([node(operator, ["x", *weights], ["y"], **attributes)], X, Y, weights)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


MISSHAPEN = {
    "broadcasting": (single("Add", ones(5)), "Incompatible dimensions"),
    "channels": (single("Conv", ones(4, 7, 3)), "its input has 3 channels, its weights are for 7"),
    "channels of a transposed convolution": (single("ConvTranspose", ones(7, 2, 3)), "weights are for 7"),
    "element types": (single("Add", np.ones(4, np.int64)), "inconsistent type"),
    "groups": (single("Conv", ones(4, 3, 3), group=2), "its input has 3 channels, its weights are for 6"),
    "kernel of another rank": (single("MaxPool", kernel_shape=[2, 2]), "kernel_shape has incorrect size"),
    "no such axis": (single("Softmax", axis=9), "must be in [-3 , 2]"),
    "no such axis to normalize": (single("LayerNormalization", ones(4), axis=3), "axis 3 is none of 3"),
    "order of other axes": (single("Transpose", perm=[0, 1]), "perm [0, 1] is no order of 3 axes"),
    "order with an axis twice": (single("Transpose", perm=[0, 1, 1]), "perm"),
    "parts of another sum": (single("Split", np.array([2]), axis=1), "Mismatch between the sum"),
    "product": (single("MatMul", ones(5, 2)), "Incompatible dimensions"),
    "ranks": (single("Concat", ones(1, 3), axis=1), "must have same rank"),
}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_a_misshapen_node_is_named_with_what_is_wrong(name: str) -> None:
    proto, reason = MISSHAPEN[name]

    for ask in (lambda: find_gaps(proto, ["x"], "y"), lambda: input_gradient(proto, ["x"], "y")):
        with pytest.raises(ValueError) as caught:
            ask()
        assert f"{proto.graph.node[0].op_type} 'y': " in str(caught.value)
        assert reason in str(caught.value)


def test_every_misshapen_node_is_named_and_none_that_follows() -> None:
    nodes = [
        node("Softmax", ["x"], ["a"], axis=9, name="first"),
        node("Concat", ["x", "c"], ["b"], axis=1, name="second"),
        node("Add", ["a", "b"], ["y"], name="behind"),
    ]

    with pytest.raises(ValueError, match=r"Softmax 'first': .*; Concat 'second': ") as caught:
        find_gaps(model(nodes, X, Y, {"c": ones(1, 3)}), ["x"], "y")

    assert "behind" not in str(caught.value)


PLACES = {
    "a circle": ([node("Add", ["x", "y"], ["a"]), node("Neg", ["a"], ["y"])], "Add 'a': it reads 'y'"),
    "an input from nowhere": ([node("Add", ["x", "z"], ["y"])], "Add 'y': it reads 'z'"),
    "a name twice": ([node("Neg", ["x"], ["y"]), node("Exp", ["x"], ["y"])], "Exp 'y': it writes 'y'"),
    "no output": ([node("Neg", ["x"], ["z"])], "no node writes 'y'"),
}


@pytest.mark.parametrize("name", PLACES)
def test_nodes_that_do_not_follow_one_another_are_named(name: str) -> None:
    nodes, reason = PLACES[name]

    with pytest.raises(ValueError, match=reason):
        find_gaps(model(nodes, X, Y), ["x"], "y")


def test_what_a_body_reads_from_nowhere_is_named() -> None:
    y = [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    branches = {
        "then_branch": helper.make_graph([node("Neg", ["x"], ["t"])], "then", [], y),
        "else_branch": helper.make_graph([node("Add", ["x", "z"], ["t"], name="lost")], "else", [], y),
    }
    proto = model([node("If", ["c"], ["y"], **branches)], [*X, ("c", [], TensorProto.BOOL)], Y)

    with pytest.raises(ValueError, match="Add 'lost': it reads 'z'"):
        find_gaps(proto, ["x"], "y")


def test_an_output_of_another_type_than_declared_is_named() -> None:
    proto = model([node("Cast", ["x"], ["y"], to=TensorProto.DOUBLE)], X, [("y", None, TensorProto.FLOAT)])

    with pytest.raises(ValueError, match=r"Cast 'y': .*elem type"):
        find_gaps(proto, ["x"], "y")


def test_names_that_are_no_text_are_told() -> None:
    content = single("Softmax", axis=9, name="first").SerializeToString().replace(b"first", b"fir\xfft")

    proto = onnx.ModelProto.FromString(content)

    for ask in (lambda: find_gaps(proto, ["x"], "y"), lambda: cut(proto, ["y"])):
        with pytest.raises(ValueError, match="names that are no text"):
            ask()


def test_a_misshapen_graph_is_not_cut() -> None:
    nodes = [node("Neg", ["x"], ["h"]), node("Softmax", ["h"], ["y"], axis=9)]

    with pytest.raises(ValueError, match=r"Softmax 'y'"):
        cut(model(nodes, X, Y), ["h"])


def test_an_extent_of_minus_one_is_open_as_runtimes_read_it() -> None:
    proto = model([node("Mul", ["x", "c"], ["y"])], [("x", [-1, -1])], [("y", [-1, -1])], {"c": 3 * ones(2, 4)})

    result = input_gradient(proto, ["x"], "y")
    session = onnxruntime.InferenceSession(result.model.SerializeToString())
    feeds = {"x": ones(2, 4), result.cotangent: ones(2, 4)}

    np.testing.assert_array_equal(session.run([result.gradients["x"]], feeds)[0], 3 * ones(2, 4))


def test_declared_shapes_that_are_wrong_are_passed_over_as_by_runtimes() -> None:
    proto = model([node("Relu", ["x"], ["y"])], X, [("y", ["batch", 7, 9])])

    assert find_gaps(proto, ["x"], "y") == []


def test_ellipses_that_broadcast_are_let_through_as_by_runtimes() -> None:
    assert find_gaps(single("Einsum", ones(4, 2), equation="...ij,...jk"), ["x"], "y") == []


def test_nothing_is_held_against_what_reads_from_an_unknown_operator() -> None:
    nodes = [node("Frob", ["x"], ["h"], domain="own"), node("Softmax", ["h"], ["y"], axis=9)]

    (gap,) = find_gaps(model(nodes, X, Y, domains=["own"]), ["x"], "y")
    assert gap.operator == "Frob"
