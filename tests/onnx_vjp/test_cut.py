"""Cutting at a tensor, the routes around it, the layers that are offered, and gradients in two parts."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from explainserve.onnx_vjp import cut, input_gradient, layers, split
from onnx_vjp.test_walk import model, node
from onnx_vjp.vjp_oracle import run

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


def residual() -> onnx.ModelProto:
    """A block with a skip connection: 'branch' is beside it, 'stem' and 'sum' are not."""
    nodes = [
        node("MatMul", "x w", "stem"),
        node("Relu", "stem", "branch"),
        node("Add", "branch stem", "sum"),
        node("Sigmoid", "sum", "y"),
    ]
    return model(nodes, {"x": ["n", 4]}, ["y"], {"w": np.eye(4, 3, dtype=np.float32) + 0.5})


def embedded() -> onnx.ModelProto:
    """Token ids are looked up, and a mask that is another input silences some."""
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 5])
    mask = helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["n", 5, 1])
    table = numpy_helper.from_array(np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32), "table")
    nodes = [
        node("Gather", "table ids", "embedding"),
        node("Mul", "embedding mask", "kept"),
        node("ReduceMean", "kept axes", "mean", keepdims=0),
        node("Tanh", "mean", "y"),
    ]
    axes = numpy_helper.from_array(np.array([1]), "axes")
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph(nodes, "text", [ids, mask], [output], [table, axes])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_extents_that_are_computed_from_those_of_inputs_have_no_symbol() -> None:
    """Words of all texts in one axis: it is neither of the file's, and no name for it means anything to a person."""
    nodes = [node("Reshape", "x rows", "words"), node("MatMul", "words w", "h"), node("Tanh", "h", "y")]
    constants = {"rows": np.array([-1, 4]), "w": np.eye(4, dtype=np.float32)}
    (layer,) = layers(model(nodes, {"x": ["n", "length", 4]}, ["y"], constants))
    assert layer.shape == (None, 4)


@pytest.mark.parametrize("tensor", ["stem", "branch", "sum"])
def test_the_parts_together_are_the_model(tensor: str) -> None:
    whole = residual()
    parts = cut(whole, [tensor])
    (value,) = run(parts.before, {"x": X}, [tensor])
    needed = {entry.name for entry in parts.after.graph.input}
    (found,) = run(parts.after, {k: v for k, v in {tensor: value, "x": X}.items() if k in needed}, ["y"])
    np.testing.assert_allclose(found, run(whole, {"x": X}, ["y"])[0], rtol=1e-6)
    assert [entry.name for entry in parts.before.graph.output] == [tensor]


def test_a_cut_tensor_may_come_from_a_node_that_is_needed_for_another() -> None:
    """As the states of a recurrent layer, and the last of them."""
    nodes = [
        node("MatMul", "x w", "wide"),
        node("Split", "wide", "first second", axis=1, num_outputs=2),
        node("Mul", "first second", "y"),
    ]
    weights = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    parts = cut(model(nodes, {"x": ["n", 4]}, ["y"], {"w": weights}), ["first"])
    (value,) = run(parts.before, {"x": X}, ["first"])
    (found,) = run(parts.after, {"first": 2 * value, "x": X}, ["y"])
    first, second = np.split(X @ weights, 2, axis=1)
    np.testing.assert_allclose(value, first, rtol=1e-5)
    np.testing.assert_allclose(found, 2 * first * second, rtol=1e-5)
    assert [bypass.route for bypass in parts.bypasses] == [("x", "wide", "second", "y")]


def test_a_cut_beside_a_skip_connection_names_the_other_route() -> None:
    (bypass,) = cut(residual(), ["branch"]).bypasses
    assert (bypass.input, bypass.output, bypass.route) == ("x", "y", ("x", "stem", "sum", "y"))
    assert "x -> stem -> sum -> y" in str(bypass)


@pytest.mark.parametrize("tensor", ["stem", "sum"])
def test_a_cut_across_every_route_has_no_bypass(tensor: str) -> None:
    parts = cut(residual(), [tensor])
    assert parts.bypasses == ()
    assert [entry.name for entry in parts.after.graph.input] == [tensor]


def test_routes_around_one_tensor_are_closed_by_cutting_several() -> None:
    nodes = [node("Exp", "x", "a"), node("Neg", "x", "b"), node("Mul", "a b", "y")]
    graph = model(nodes, {"x": [3]}, ["y"])
    assert len(cut(graph, ["a"]).bypasses) == 1
    assert cut(graph, ["a", "b"]).bypasses == ()


def test_sizes_are_no_route() -> None:
    nodes = [node("Exp", "x", "h"), node("Shape", "x", "size"), node("Reshape", "h size", "y")]
    parts = cut(model(nodes, {"x": ["n", 4]}, ["y"]), ["h"])
    assert parts.bypasses == ()
    assert [entry.name for entry in parts.after.graph.input] == ["h", "x"]
    np.testing.assert_allclose(run(parts.after, {"h": X, "x": X}, ["y"])[0], X)


def test_a_path_over_embeddings_keeps_the_mask_as_an_input() -> None:
    whole = embedded()
    parts = cut(whole, ["embedding"])
    assert parts.bypasses == ()
    assert [entry.name for entry in parts.before.graph.input] == ["ids"]
    assert [entry.name for entry in parts.after.graph.input] == ["embedding", "mask"]
    ids, mask = np.array([[1, 2, 3, 0, 6]]), np.array([[[1], [1], [0], [1], [1]]], np.float32)
    (e,) = run(parts.before, {"ids": ids}, ["embedding"])
    gradient = input_gradient(parts.after, ["embedding"], "y")
    outputs = ["y", gradient.gradients["embedding"]]
    y, de = run(
        gradient.model, {"embedding": e, "mask": mask, gradient.cotangent: np.ones((1, 3), np.float32)}, outputs
    )
    np.testing.assert_allclose(y, run(whole, {"ids": ids, "mask": mask}, ["y"])[0], rtol=1e-6)
    np.testing.assert_allclose(de, (1 - y[:, None] ** 2) * mask / 5 * np.ones_like(e), rtol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (["nothing"], "no tensor 'nothing'"),
        (["x"], "is an input"),
        (["stem", "sum"], "'sum' depends on 'stem'"),
        (["w"], "no tensor 'w'"),
    ],
)
def test_what_cannot_be_cut_is_named(tensors: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cut(residual(), tensors)


def test_a_dead_end_cannot_be_cut() -> None:
    graph = model([node("Exp", "x", "h"), node("Neg", "x", "y")], {"x": [3]}, ["y"])
    with pytest.raises(ValueError, match="no output depends"):
        cut(graph, ["h"])


def test_layers_tell_which_of_them_are_bypassed() -> None:
    found = {layer.name: layer for layer in layers(residual())}
    assert {name: layer.bypassed for name, layer in found.items()} == {
        "stem": (), "branch": ("x",), "sum": (),
    }  # fmt: skip
    assert (found["stem"].operator, found["stem"].shape) == ("MatMul", ("n", 3))


def with_two_outputs() -> onnx.ModelProto:
    """'hidden' is all that 'y' depends on, and the other output reads 'stem' beside it."""
    nodes = [
        node("Relu", "x", "stem"),
        node("Tanh", "stem", "hidden"),
        node("Neg", "hidden", "y"),
        node("Exp", "stem", "apart"),
    ]
    return model(nodes, {"x": ["n", 4]}, ["y", "apart"])


def test_a_route_to_an_output_that_does_not_depend_on_a_layer_is_no_bypass() -> None:
    graph = with_two_outputs()
    assert {layer.name: layer.bypassed for layer in layers(graph)} == {"stem": (), "hidden": ()}
    assert cut(graph, ["hidden"]).bypasses == ()


def test_an_input_of_which_a_layer_reads_the_size_alone_does_not_bypass_it() -> None:
    nodes = [node("Shape", "mask", "size"), node("Reshape", "x size", "r"), node("Relu", "r", "h")]
    graph = model([*nodes, node("Mul", "h mask", "y")], {"x": [4], "mask": [2, 2]}, ["y"])
    assert [(layer.name, layer.bypassed) for layer in layers(graph)] == [("h", ())]
    assert cut(graph, ["h"]).bypasses == ()


@pytest.mark.parametrize("used", ["states", "last"])
def test_of_a_recurrent_layer_the_outputs_that_are_used_are_offered(used: str) -> None:
    """Which of them is used, exporters and their versions decide differently."""
    generator = np.random.default_rng(5)
    weights = {
        "w": generator.standard_normal((1, 9, 2)).astype(np.float32),
        "r": generator.standard_normal((1, 9, 3)).astype(np.float32),
    }
    nodes = [node("GRU", "x w r", "states last", hidden_size=3), node("Exp", used, "y")]
    graph = model(nodes, {"x": [5, "n", 2]}, ["y"], weights)
    (layer,) = layers(graph)
    assert (layer.name, layer.operator, layer.bypassed) == (used, "GRU", ())
    parts, x = cut(graph, [used]), generator.standard_normal((5, 2, 2)).astype(np.float32)
    (found,) = run(parts.before, {"x": x}, [used])
    np.testing.assert_allclose(run(parts.after, {used: found}, ["y"])[0], run(graph, {"x": x}, ["y"])[0], rtol=1e-6)


def test_what_no_output_depends_on_is_not_offered() -> None:
    graph = model([node("Relu", "x", "dead"), node("Tanh", "x", "h"), node("Neg", "h", "y")], {"x": [3]}, ["y"])
    assert [layer.name for layer in layers(graph)] == ["h"]


def test_a_tensor_whose_type_is_not_known_is_neither_offered_nor_cut() -> None:
    graph = model([node("Exp", "x", "h"), node("Relu", "h", "r"), node("Neg", "r", "y")], {"x": [3]}, ["y"])
    graph.graph.node[0].op_type, graph.graph.node[0].domain = "Own", "elsewhere"
    graph.opset_import.append(helper.make_opsetid("elsewhere", 1))
    del graph.graph.value_info[:]
    assert layers(graph) == ()
    with pytest.raises(ValueError, match="the type of tensor 'r' is not known"):
        cut(graph, ["r"])


def test_layers_that_a_runtime_has_fused_are_offered() -> None:
    weights = {"w": np.eye(3, dtype=np.float32)}
    nodes = [node("MatMul", "x w", "h"), node("Relu", "h", "r"), node("Neg", "r", "y")]
    graph = model(nodes, {"x": ["n", 3]}, ["y"], weights)
    graph.graph.node[0].op_type, graph.graph.node[0].domain = "FusedMatMul", "com.microsoft"
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert [layer.name for layer in layers(graph)] == ["h", "r"]


def test_bypassed_layers_are_those_whose_cut_has_a_bypass() -> None:
    """Two ways to the same answer: a sweep over all tensors at once, and a search per tensor."""
    generator = np.random.default_rng(11)
    bypassed = []
    for _ in range(30):
        names = ["a", "b"]
        nodes = []
        for index in range(8):
            nodes.append(node("Add", " ".join(generator.choice(names, 2)), f"t{index}"))
            names.append(f"t{index}")
        graph = model(nodes, {"a": [2], "b": [2]}, ["t6", "t7"])
        for layer in layers(graph):
            expected = {bypass.input for bypass in cut(graph, [layer.name]).bypasses}
            assert set(layer.bypassed) == expected, (layer.name, graph)
            bypassed.append(len(expected))
    assert set(bypassed) == {0, 1, 2}


def test_a_module_path_is_read_from_the_exporters_metadata() -> None:
    graph = residual()
    entry = graph.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'layer1', 'layer1.0.conv', 'matmul']"
    graph.graph.node[1].name = "/layer1/layer1.0/act/Relu"
    modules = {layer.name: layer.module for layer in layers(graph)}
    assert (modules["stem"], modules["branch"], modules["sum"]) == ("layer1.0.conv", "act", "")


def test_one_forward_pass_serves_many_cotangents() -> None:
    gradient = input_gradient(residual(), ["x", "branch"], "y")
    parts = split(gradient)
    names = [*parts.residuals]
    values = run(parts.forward, {"x": X}, ["y", *names])
    assert gradient.cotangent not in {entry.name for entry in parts.forward.graph.input}
    for seed in range(3):
        g = np.random.default_rng(seed).standard_normal((2, 3)).astype(np.float32)
        fed = {**dict(zip(names, values[1:], strict=True)), gradient.cotangent: g}
        together = run(gradient.model, {"x": X, gradient.cotangent: g}, list(gradient.gradients.values()))
        apart = run(parts.backward, fed, list(gradient.gradients.values()))
        for expected, found in zip(together, apart, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_backward_part_computes_nothing_of_the_forward_pass() -> None:
    parts = split(input_gradient(residual(), ["x"], "y"))
    operators = [part.op_type for part in parts.backward.graph.node]
    assert not {"Relu", "Sigmoid", "HardSigmoid"}.intersection(operators)
    assert "HardSigmoid" in [part.op_type for part in parts.forward.graph.node]
