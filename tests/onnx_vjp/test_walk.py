"""The walk: what is differentiated, what is refused, and what comes back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from explainserve.onnx_vjp import (
    GRADIENT_RULES,
    UnsupportedOperators,
    find_gaps,
    has_rectifiers,
    input_gradient,
    overridden,
    standard,
)
from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Composition, Refusal, Rule, ZeroGradient
from onnx_vjp.vjp_oracle import run

F = TensorProto.FLOAT
IMPORTS = [helper.make_opsetid("", 21), helper.make_opsetid("elsewhere", 1)]


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: list[str],
    constants: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    declared = [helper.make_tensor_value_info(name, F, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info(name, F, None) for name in outputs]
    stored = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(nodes, "test", declared, results, stored)
    plain = helper.make_model(graph, opset_imports=IMPORTS, ir_version=10)
    return onnx.shape_inference.infer_shapes(plain)


def gradients(
    graph: onnx.ModelProto,
    wrt: list[str],
    of: str,
    cotangent: np.ndarray,
    feeds: dict[str, np.ndarray],
    table: str = "standard",
) -> list[np.ndarray]:
    result = input_gradient(graph, wrt, of, rules=GRADIENT_RULES[table]())
    onnx.checker.check_model(result.model)
    return run(result.model, {**feeds, result.cotangent: cotangent}, [result.gradients[name] for name in wrt])


def node(operator: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(
        operator, inputs.split(), outputs.split(), name=f"{operator}_{outputs.split()[0]}", **attributes
    )


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_repeated_uses_are_summed() -> None:
    graph = model([node("Mul", "x x", "square"), node("Add", "square x", "y")], {"x": [3]}, ["y"])
    (dx,) = gradients(graph, ["x"], "y", f32(1, 1, 1), {"x": f32(1, 2, 3)})
    np.testing.assert_array_equal(dx, f32(3, 5, 7))


def test_an_intermediate_tensor_can_be_differentiated_by_and_of() -> None:
    nodes = [node("Exp", "x", "h"), node("Mul", "h h", "s"), node("Neg", "s", "y")]
    feeds = {"x": f32(0.0, 1.0)}
    graph = model(nodes, {"x": [2]}, ["y"])
    h = np.exp(feeds["x"])
    dx, dh = gradients(graph, ["x", "h"], "y", f32(1, 1), feeds)
    np.testing.assert_allclose(dh, -2 * h, rtol=1e-6)
    np.testing.assert_allclose(dx, -2 * h * h, rtol=1e-6)
    (inner,) = gradients(graph, ["x"], "s", f32(1, 1), feeds)
    np.testing.assert_allclose(inner, 2 * h * h, rtol=1e-6)


def test_an_unrelated_tensor_gets_zeros_of_its_own_shape() -> None:
    graph = model([node("Neg", "x", "y"), node("Exp", "z", "w")], {"x": ["n", 2], "z": ["n", 3]}, ["y", "w"])
    feeds = {"x": np.ones((4, 2), np.float32), "z": np.ones((4, 3), np.float32)}
    dx, dz = gradients(graph, ["x", "z"], "y", np.ones((4, 2), np.float32), feeds)
    assert dx.shape == (4, 2)
    np.testing.assert_array_equal(dz, np.zeros((4, 3), np.float32))


def test_the_gradient_of_a_tensor_by_itself_is_the_cotangent() -> None:
    graph = model([node("Neg", "x", "y")], {"x": [2]}, ["y"])
    (dy,) = gradients(graph, ["y"], "y", f32(2, 3), {"x": f32(0, 0)})
    np.testing.assert_array_equal(dy, f32(2, 3))


def test_original_outputs_and_dynamic_batch_survive() -> None:
    graph = model([node("Relu", "x", "y")], {"x": ["batch", 2]}, ["y"])
    result = input_gradient(graph, ["x"], "y")
    assert [output.name for output in result.model.graph.output] == ["y", result.gradients["x"]]
    shapes = {value.name: value.type.tensor_type.shape.dim[0].dim_param for value in result.model.graph.input}
    assert shapes == {"x": "batch", result.cotangent: "batch"}
    for batch in (1, 5):
        x = np.full((batch, 2), 2, np.float32)
        assert run(result.model, {"x": x, result.cotangent: x}, [result.gradients["x"]])[0].shape == (batch, 2)


def test_nodes_beside_the_path_are_never_asked_for_a_rule() -> None:
    aside = helper.make_node("Unknown", ["z"], ["w"], domain="elsewhere")
    graph = model([aside, node("Neg", "x", "y")], {"x": [2], "z": [2]}, ["y", "w"])
    assert find_gaps(graph, ["x"], "y") == []


def test_all_gaps_are_listed_at_once() -> None:
    nodes = [
        helper.make_node("Mystery", ["x"], ["a"], name="first", domain="elsewhere"),
        node("QuantizeLinear", "a scale", "q"),
        node("DequantizeLinear", "q scale", "b"),
        helper.make_node("Mystery", ["a"], ["c"], name="second", domain="elsewhere"),
        node("Add", "b c", "y"),
    ]
    graph = model(nodes, {"x": [2]}, ["y"], {"scale": np.array(0.1, np.float32)})
    gaps = find_gaps(graph, ["x"], "y")
    assert [gap.node for gap in gaps if gap.domain == "elsewhere"] == ["second", "first"]
    assert {gap.operator for gap in gaps if not gap.domain} == {"QuantizeLinear", "DequantizeLinear"}
    with pytest.raises(UnsupportedOperators, match="first") as error:
        input_gradient(graph, ["x"], "y")
    assert set(error.value.gaps) == set(gaps)


def test_a_quantized_graph_is_refused_although_integers_carry_no_gradient() -> None:
    nodes = [node("QuantizeLinear", "x scale", "q"), node("DequantizeLinear", "q scale", "y")]
    graph = model(nodes, {"x": [2]}, ["y"], {"scale": np.array(0.1, np.float32)})
    gaps = find_gaps(graph, ["x"], "y")
    assert {gap.operator for gap in gaps} == {"QuantizeLinear", "DequantizeLinear"}
    assert all("quantiz" in gap.reason for gap in gaps)


def test_a_branch_passes_the_gradient_to_what_it_captures() -> None:
    branch = helper.make_graph([node("Neg", "h", "o")], "branch", [], [helper.make_tensor_value_info("o", F, [2])])
    choice = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    graph = model([node("Exp", "x", "h"), choice], {"x": [2]}, ["y"], {"c": np.array(True)})
    (dx,) = gradients(graph, ["x"], "y", f32(1, 1), {"x": f32(0, 1)})
    np.testing.assert_allclose(dx, -np.exp(f32(0, 1)), rtol=1e-6)


def test_a_malformed_graph_is_an_error_that_says_so() -> None:
    graph = model([node("Neg", "x", "y")], {"x": [2]}, ["y"])
    graph.graph.node[0].domain = "never imported"
    with pytest.raises(ValueError, match="never imported"):
        input_gradient(graph, ["x"], "y")


@pytest.mark.parametrize(("name", "reason"), [("nothing", "no tensor 'nothing'"), ("indices", "INT64")])
def test_a_tensor_that_cannot_be_differentiated_is_named(name: str, reason: str) -> None:
    graph = model([node("ArgMax", "x", "indices"), node("Neg", "x", "y")], {"x": [2]}, ["y"])
    with pytest.raises(ValueError, match=reason):
        input_gradient(graph, [name], "y")


def test_nothing_flows_through_operators_with_zero_gradient() -> None:
    nodes = [node("Floor", "x", "f"), node("Mul", "x f", "y")]
    (dx,) = gradients(model(nodes, {"x": [2]}, ["y"]), ["x"], "y", f32(1, 1), {"x": f32(1.5, 2.5)})
    np.testing.assert_array_equal(dx, f32(1, 2))


def test_an_operator_without_a_rule_is_expanded_to_its_function_body() -> None:
    nodes = [node("MeanVarianceNormalization", "x", "m", axes=[0]), node("Reshape", "m all", "y")]
    graph = model(nodes, {"x": [4]}, ["y"], {"all": np.array([4])})
    x, g = f32(1, 2, 4, 8), f32(1, 0, 0, -1)
    (dx,) = gradients(graph, ["x"], "y", g, {"x": x})
    normal = (x - x.mean()) / x.std()
    np.testing.assert_allclose(dx, (g - g.mean() - normal * (g * normal).mean()) / x.std(), rtol=1e-4, atol=1e-6)


def test_a_function_of_the_model_itself_is_inlined() -> None:
    body = [node("Mul", "a a", "b")]
    square = helper.make_function("elsewhere", "Square", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    graph = model([helper.make_node("Square", ["x"], ["y"], domain="elsewhere")], {"x": [2]}, ["y"])
    graph.functions.append(square)
    graph = onnx.shape_inference.infer_shapes(graph)
    (dx,) = gradients(graph, ["x"], "y", f32(1, 1), {"x": f32(3, 4)})
    np.testing.assert_array_equal(dx, f32(6, 8))


def test_weights_may_stay_outside_of_the_model() -> None:
    kernel = np.random.default_rng(2).standard_normal((4, 3, 3, 3)).astype(np.float32)
    graph = model([node("Conv", "x w", "y", pads=[1, 1, 1, 1])], {"x": ["n", 3, 5, 5]}, ["y"], {"w": kernel})
    outside = onnx.ModelProto()
    outside.CopyFrom(graph)
    (tensor,) = outside.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="elsewhere")
    result = input_gradient(outside, ["x"], "y", weights={"w": kernel})
    stored = {entry.name: entry for entry in result.model.graph.initializer}
    assert stored["w"] == tensor
    stored["w"].CopyFrom(graph.graph.initializer[0])
    x = np.ones((2, 3, 5, 5), np.float32)
    cotangent = np.ones((2, 4, 5, 5), np.float32)
    (found,) = run(result.model, {"x": x, result.cotangent: cotangent}, [result.gradients["x"]])
    (expected,) = gradients(graph, ["x"], "y", cotangent, {"x": x})
    np.testing.assert_array_equal(found, expected)


def test_the_weight_of_a_matrix_product_is_not_copied() -> None:
    weight = np.random.default_rng(3).standard_normal((40, 50)).astype(np.float32)
    graph = model([node("MatMul", "x w", "y")], {"x": ["n", 7, 40]}, ["y"], {"w": weight})
    result = input_gradient(graph, ["x"], "y")
    assert [entry.name for entry in result.model.graph.initializer if len(entry.dims) == 2] == ["w"]
    x, g = np.ones((2, 7, 40), np.float32), np.ones((2, 7, 50), np.float32)
    (dx,) = run(result.model, {"x": x, result.cotangent: g}, [result.gradients["x"]])
    np.testing.assert_allclose(dx, g @ weight.T, rtol=1e-4, atol=1e-5)


def test_several_tensors_are_differentiated_at_once() -> None:
    nodes = [node("Exp", "x", "h"), node("Neg", "h", "a"), node("Mul", "h h", "b")]
    graph = model(nodes, {"x": [2]}, ["a", "b"])
    result = input_gradient(graph, ["x"], ["a", "b"])
    x, da, db = f32(0.5, 1.0), f32(1, 2), f32(3, 4)
    feeds = {"x": x, result.cotangents["a"]: da, result.cotangents["b"]: db}
    (dx,) = run(result.model, feeds, [result.gradients["x"]])
    np.testing.assert_allclose(dx, -da * np.exp(x) + db * 2 * np.exp(2 * x), rtol=1e-6)


def test_an_intermediate_tensor_and_its_gradient_come_together() -> None:
    nodes = [node("Exp", "x", "h"), node("Mul", "h h", "y")]
    result = input_gradient(model(nodes, {"x": [2]}, ["y"]), ["h"], "y")
    x, ones = f32(0.5, 1.0), f32(1, 1)
    h, dh = run(result.model, {"x": x, result.cotangent: ones}, ["h", result.gradients["h"]])
    np.testing.assert_allclose(h, np.exp(x), rtol=1e-6)
    np.testing.assert_allclose(dh, 2 * h, rtol=1e-6)


# -- compositions ------------------------------------------------------------------------------------------------------


def _square_of_rows(op: Emitter, node: Node) -> list[str | None]:
    """Twice the row sums of squares: needs the rank, which is unknown behind an operator that inference lacks."""
    (x,) = node.inputs
    return [op.Mul(op.ReduceSum(op.Mul(x, x), [op.rank(x) - 1], keepdims=1), 2), None]


def _never(op: Emitter, node: Node) -> list[str | None]:
    raise Refusal("never works", "leave it out")


FOREIGN = {("elsewhere", "Squares", 1): Composition(_square_of_rows), ("elsewhere", "Never", 1): Composition(_never)}


def test_a_composition_takes_the_place_of_its_node_whatever_inference_knows() -> None:
    nodes = [
        helper.make_node("Squares", ["x"], ["a", "unused"], domain="elsewhere"),
        helper.make_node("Squares", ["a"], ["b"], domain="elsewhere"),
        node("Add", "b shift", "y"),
    ]
    graph = model(nodes, {"x": ["n", 3]}, ["y"], {"shift": f32(1)})
    result = input_gradient(graph, ["x"], "y", rules=overridden(standard(), FOREIGN))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    y, dx = run(result.model, {"x": x, result.cotangent: np.ones((2, 1), np.float32)}, ["y", result.gradients["x"]])
    rows = 2 * (x**2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(y, 2 * rows**2 + 1, rtol=1e-6)
    np.testing.assert_allclose(dx, 4 * rows * 4 * x, rtol=1e-6)


def test_a_composition_that_refuses_is_a_gap_with_its_reason() -> None:
    nodes = [node("Exp", "x", "h"), helper.make_node("Never", ["h"], ["y"], name="culprit", domain="elsewhere")]
    (gap,) = find_gaps(model(nodes, {"x": [2]}, ["y"]), ["x"], "y", rules=overridden(standard(), FOREIGN))
    assert (gap.node, gap.reason, gap.remedy) == ("culprit", "never works", "leave it out")


def test_the_newest_state_that_a_version_knows_is_found_however_a_domain_counts() -> None:
    """Vendors count their operator sets by release or by date."""
    states = {("vendor", "Op", since): ZeroGradient(str(since)) for since in (20240101, 100, 3)}
    table = overridden(standard(), states)
    for version, since in ((20250101, 20240101), (20240101, 20240101), (20240100, 100), (99, 3), (3, 3)):
        assert table.lookup("vendor", "Op", version) is states["vendor", "Op", since]
    assert table.lookup("vendor", "Op", 2) is None
    assert table.lookup("ai.onnx", "Add", 21) is table.lookup("", "Add", 7) is not None


@pytest.mark.parametrize("operator", ["Add", "Div", "Max", "Mod", "Mul", "Pow", "Sub"])
def test_a_named_dimension_that_is_one_in_the_run_is_broadcast(operator: str) -> None:
    attributes = {"fmod": 1} if operator == "Mod" else {}
    graph = model([node(operator, "a b", "y", **attributes)], {"a": ["k", "m", "n"], "b": ["p", "q"]}, ["y"])
    a = np.random.default_rng(0).uniform(1, 4, (2, 3, 4)).astype(np.float32)
    b, wide = f32(1.5, 2.5, 3.5).reshape(3, 1), ["k", "m", "n"]
    g = np.random.default_rng(1).standard_normal(a.shape).astype(np.float32)
    da, db = gradients(graph, ["a", "b"], "y", g, {"a": a, "b": b})
    same = model([node(operator, "a b", "y", **attributes)], {"a": wide, "b": wide}, ["y"])
    expected_a, expected_b = gradients(same, ["a", "b"], "y", g, {"a": a, "b": np.broadcast_to(b, a.shape).copy()})
    np.testing.assert_allclose(da, expected_a, rtol=1e-5)
    np.testing.assert_allclose(db, expected_b.sum((0, 2))[:, None], rtol=1e-4)


def test_a_rule_that_forgets_an_input_is_a_bug() -> None:
    broken = overridden(standard(), {("", "Add", 1): Rule(lambda op, node, g: (g,))})
    graph = model([node("Add", "x x", "y")], {"x": [2]}, ["y"])
    with pytest.raises(AssertionError, match="1 gradients for 2 inputs"):
        input_gradient(graph, ["x"], "y", rules=broken)


def test_pieces_of_one_tensor_are_joined_without_padding() -> None:
    nodes = [node("Split", "x", "a b c", axis=0, num_outputs=3), node("Mul", "a b", "ab"), node("Mul", "ab c", "y")]
    slices = [
        node("Slice", "x zero one", "a"),
        node("Slice", "x one two", "b"),
        node("Slice", "x two three", "c"),
        *nodes[1:],
    ]
    bounds = {name: np.array([value]) for name, value in {"zero": 0, "one": 1, "two": 2, "three": 3}.items()}
    graph = model(slices, {"x": [3, 2]}, ["y"], bounds)
    x = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    cotangent = np.ones((1, 2), np.float32)
    (dx,) = gradients(graph, ["x"], "y", cotangent, {"x": x})
    np.testing.assert_array_equal(dx, x.prod(axis=0) / x)
    assert "Pad" not in {part.op_type for part in input_gradient(graph, ["x"], "y").model.graph.node}


def test_a_shared_weight_listed_as_input_does_not_stay_overridable() -> None:
    graph = model([node("Mul", "x w", "y")], {"x": [2], "w": [2]}, ["y"], {"w": f32(2, 3)})
    assert "w" not in {value.name for value in input_gradient(graph, ["x"], "y").model.graph.input}


# -- points where the derivative jumps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "attributes", "x", "expected"),
    [
        ("Relu", {}, [-1, 0, 1], [0, 0, 1]),
        ("LeakyRelu", {"alpha": 0.5}, [-1, 0, 1], [0.5, 0.5, 1]),
        ("Abs", {}, [-1, 0, 1], [-1, 0, 1]),
        ("HardSigmoid", {"alpha": 0.5, "beta": 0.5}, [-1, 0, 1], [0, 0.5, 0]),
        ("HardSwish", {}, [-3, 0, 3], [0, 0.5, 1]),
        ("ReduceMax", {"keepdims": 0}, [2, 1, 2], [0.5, 0, 0.5]),
        ("ReduceL2", {"keepdims": 0}, [0, 0, 0], [0, 0, 0]),
    ],
)
def test_kinks_agree_with_torch(
    operator: str, attributes: dict[str, object], x: list[float], expected: list[float]
) -> None:
    graph = model([node(operator, "x", "y", **attributes)], {"x": [3]}, ["y"])
    cotangent = np.ones((), np.float32) if attributes.get("keepdims") == 0 else f32(1, 1, 1)
    (dx,) = gradients(graph, ["x"], "y", cotangent, {"x": f32(*x)})
    np.testing.assert_allclose(dx, f32(*expected))


def test_clip_passes_the_gradient_at_its_bounds() -> None:
    constants = {"low": np.array(-1, np.float32), "high": np.array(6, np.float32)}
    graph = model([node("Clip", "x low high", "y")], {"x": [5]}, ["y"], constants)
    (dx,) = gradients(graph, ["x"], "y", f32(1, 1, 1, 1, 1), {"x": f32(-2, -1, 3, 6, 7)})
    np.testing.assert_array_equal(dx, f32(0, 1, 1, 1, 0))


@pytest.mark.parametrize("high", [6, 0.3, 1e30])
def test_a_capped_rectifier_passes_the_gradient_between_its_bounds(high: float) -> None:
    low, cap = np.float32(0), np.float32(high)
    constants = {"low": np.array(low), "high": np.array(cap)}
    graph = model([node("Clip", "x low high", "y")], {"x": [6]}, ["y"], constants)
    edges = [low, np.finfo(np.float32).tiny, np.nextafter(cap, low), cap]
    (dx,) = gradients(graph, ["x"], "y", np.ones(6, np.float32), {"x": f32(-1, *edges, np.inf)})
    np.testing.assert_array_equal(dx, f32(0, 0, 1, 1, 0, 0))


def test_a_rectifier_passes_the_gradient_of_the_smallest_and_the_largest_numbers() -> None:
    graph = model([node("Relu", "x", "y")], {"x": [4]}, ["y"])
    numbers = np.finfo(np.float32)
    (dx,) = gradients(graph, ["x"], "y", f32(2, 2, 2, 2), {"x": f32(-numbers.tiny, 0, numbers.tiny, numbers.max)})
    np.testing.assert_array_equal(dx, f32(0, 0, 2, 2))


@pytest.mark.parametrize("operator", ["Max", "Min"])
def test_tied_operands_share_evenly(operator: str) -> None:
    graph = model([node(operator, "a b", "y")], {"a": [1], "b": [1]}, ["y"])
    da, db = gradients(graph, ["a", "b"], "y", f32(1), {"a": f32(2), "b": f32(2)})
    assert (da.item(), db.item()) == (0.5, 0.5)


@pytest.mark.parametrize("operator", ["MaxPool", "GlobalMaxPool"])
def test_a_tied_window_gives_everything_to_its_first_maximum(operator: str) -> None:
    attributes = {"kernel_shape": [2, 2]} if operator == "MaxPool" else {}
    graph = model([node(operator, "x", "y", **attributes)], {"x": [1, 1, 2, 2]}, ["y"])
    (dx,) = gradients(graph, ["x"], "y", np.ones((1, 1, 1, 1), np.float32), {"x": np.ones((1, 1, 2, 2), np.float32)})
    np.testing.assert_array_equal(dx.ravel(), f32(1, 0, 0, 0))


# -- gradient rules ----------------------------------------------------------------------------------------------------


def test_gradient_rules_change_rectifiers_only() -> None:
    graph = model([node("Relu", "x", "r"), node("Mul", "r w", "y")], {"x": [4]}, ["y"], {"w": f32(1, -1, 1, -1)})
    feeds, ones = {"x": f32(1, 1, -1, -1)}, f32(1, 1, 1, 1)
    expected = {"standard": (1, -1, 0, 0), "guided_backpropagation": (1, 0, 0, 0), "deconvnet": (1, 0, 1, 0)}
    for table, values in expected.items():
        (dx,) = gradients(graph, ["x"], "y", ones, feeds, table)
        np.testing.assert_array_equal(dx, f32(*values), err_msg=table)


@pytest.mark.parametrize(("low", "guided"), [(0.0, True), (-1.0, False)])
def test_clip_is_a_rectifier_where_its_lower_bound_is_zero(low: float, guided: bool) -> None:
    constants = {"low": np.array(low, np.float32), "high": np.array(6, np.float32)}
    graph = model([node("Clip", "x low high", "y")], {"x": [1]}, ["y"], constants)
    (dx,) = gradients(graph, ["x"], "y", f32(-1), {"x": f32(2)}, "guided_backpropagation")
    assert dx.item() == (0 if guided else -1)


@pytest.mark.parametrize("narrow", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1])
def test_a_cast_to_few_bits_is_a_gap_and_not_zero(narrow: int) -> None:
    imports = [helper.make_opsetid("", 23)]
    nodes = [node("Cast", "x", "q", to=narrow), node("Reshape", "q s", "r"), node("Cast", "r", "y", to=F)]
    graph = model(nodes, {"x": [2, 3]}, ["y"], {"s": np.array([6])})
    del graph.opset_import[:]
    graph.opset_import.extend(imports)
    reasons = {gap.node: gap.reason for gap in find_gaps(graph, ["x"], "y")}
    assert set(reasons) == {"Cast_q", "Cast_y"}
    assert all("8 bits or less" in reason for reason in reasons.values())


def nearest(narrow: int, *between: onnx.NodeProto) -> onnx.ModelProto:
    """x rounded to multiples of 0.1 by way of another type; what lies `between` leads from `q` to `i`."""
    nodes = [
        *(node("Div", "x step", "d"), node("Round", "d", "r"), node("Clip", "r low high", "c")),
        *(node("Cast", "c", "q", to=narrow), *between, node("Cast", "i" if between else "q", "f", to=F)),
        node("Mul", "f step", "y"),
    ]
    constants = {"step": np.array(0.1, np.float32), "low": np.array(0, np.float32), "high": np.array(99, np.float32)}
    return model(nodes, {"x": [2]}, ["y"], constants)


@pytest.mark.parametrize("narrow", [TensorProto.INT8, TensorProto.UINT8])
@pytest.mark.parametrize("between", [[], [node("Cast", "q", "i", to=TensorProto.INT32)], [node("Max", "q q", "i")]])
def test_what_is_quantized_by_casts_is_refused_as_by_quantize_linear(
    narrow: int, between: list[onnx.NodeProto]
) -> None:
    reasons = {gap.node: gap.reason for gap in find_gaps(nearest(narrow, *between), ["x"], "y")}
    assert "Cast_q" in reasons
    assert all("8 bits or less" in reason for reason in reasons.values())


@pytest.mark.parametrize("wide", [TensorProto.INT32, TensorProto.INT64])
def test_a_cast_to_wide_integers_is_a_step_like_floor(wide: int) -> None:
    feeds = {"x": f32(0.33, 2.71)}
    (dx,) = gradients(nearest(wide), ["x"], "y", f32(1, 1), feeds)
    np.testing.assert_array_equal(dx, f32(0, 0))


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.UINT8])
def test_places_that_are_computed_from_the_input_pass_nothing(kind: int) -> None:
    nodes = [
        *(node("Cast", "x", "rough", to=kind), node("Cast", "rough", "place", to=TensorProto.INT64)),
        *(node("Gather", "table place", "g"), node("Mul", "g x", "y")),
    ]
    graph = model(nodes, {"x": [2]}, ["y"], {"table": f32(5, 6, 7)})
    (dx,) = gradients(graph, ["x"], "y", f32(1, 1), {"x": f32(2.2, 0.8)})
    np.testing.assert_array_equal(dx, f32(7, 5))


def test_bytes_that_mask_are_not_quantized_values() -> None:
    """As exporters before PyTorch 1.2 wrote comparisons."""
    nodes = [
        *(node("Greater", "x zero", "b"), node("Cast", "b", "u", to=TensorProto.UINT8), node("Cast", "u", "f", to=F)),
        node("Mul", "x f", "y"),
    ]
    graph = model(nodes, {"x": [2]}, ["y"], {"zero": np.array(0, np.float32)})
    (dx,) = gradients(graph, ["x"], "y", f32(1, 1), {"x": f32(2, -2)})
    np.testing.assert_array_equal(dx, f32(1, 0))


@pytest.mark.parametrize("operands", ["zero x", "x zero", "x one"])
@pytest.mark.parametrize(("table", "values"), [("guided_backpropagation", (1, 0, 0, 0)), ("deconvnet", (1, 0, 1, 0))])
def test_the_maximum_with_zero_is_a_rectifier(operands: str, table: str, values: tuple[int, ...]) -> None:
    constants = {"w": f32(1, -1, 1, -1), "zero": np.array(0, np.float32), "one": np.array(1, np.float32)}
    graph = model([node("Max", operands, "r"), node("Mul", "r w", "y")], {"x": [4]}, ["y"], constants)
    (dx,) = gradients(graph, ["x"], "y", f32(1, 1, 1, 1), {"x": f32(2, 2, -2, -2)}, table)
    np.testing.assert_array_equal(dx, f32(1, -1, 0, 0) if "one" in operands else f32(*values))


@pytest.mark.parametrize(
    ("operator", "operands", "rectifies"),
    [
        ("Relu", "h", True),
        ("Max", "h zero", True),
        ("Max", "h one", False),
        ("Clip", "h zero one", True),
        ("Clip", "h one", False),
        ("Sigmoid", "h", False),
    ],
)
def test_rectifiers_are_those_that_rules_change(operator: str, operands: str, rectifies: bool) -> None:
    constants = {"zero": np.array(0, np.float32), "one": np.array(1, np.float32)}
    graph = model([node("Tanh", "x", "h"), node(operator, operands, "y")], {"x": [4]}, ["y"], constants)
    assert has_rectifiers(graph, ["x"], "y") is rectifies


def test_a_rectifier_off_the_way_is_none() -> None:
    """As a count of words that is kept from being zero, in the mean over a text."""
    nodes = [node("Relu", "mask", "count"), node("Div", "x count", "y")]
    assert not has_rectifiers(model(nodes, {"x": [4], "mask": [4]}, ["y"]), ["x"], "y")
    assert has_rectifiers(model(nodes, {"x": [4], "mask": [4]}, ["y"]), ["x", "mask"], "y")


@pytest.mark.parametrize("operator", ["LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "PRelu"])
def test_every_rectifier_follows_the_rules(operator: str) -> None:
    inputs = "x slope" if operator == "PRelu" else "x"
    constants = {"w": f32(1, -1, 1, -1), "slope": f32(0.5)}
    graph = model([node(operator, inputs, "r"), node("Mul", "r w", "y")], {"x": [4]}, ["y"], constants)
    feeds, ones = {"x": f32(2, 2, -2, -2)}, f32(1, 1, 1, 1)
    (true,) = gradients(graph, ["x"], "y", ones, feeds)
    (guided,) = gradients(graph, ["x"], "y", ones, feeds, "guided_backpropagation")
    (deconvolved,) = gradients(graph, ["x"], "y", ones, feeds, "deconvnet")
    np.testing.assert_allclose(guided, np.where(f32(1, -1, 1, -1) > 0, true, 0), rtol=1e-6)
    np.testing.assert_array_equal(deconvolved, f32(1, 0, 1, 0))


def test_elements_of_any_number_of_batches_are_gathered() -> None:
    """As the older exporter of torch writes a diagonal."""
    i = helper.make_tensor_value_info("i", TensorProto.INT64, ["n", 3, 1])
    whole = model([node("GatherND", "x i", "y", batch_dims=1)], {"x": ["n", 4]}, ["y"], {})
    whole.graph.input.append(i)
    gradient = input_gradient(whole, ["x"], "y")
    indices, g = np.array([[[3], [0], [3]], [[1], [2], [0]]]), np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    feeds = {"x": np.zeros((2, 4), np.float32), "i": indices, gradient.cotangent: g}
    (dx,) = run(gradient.model, feeds, [gradient.gradients["x"]])
    np.testing.assert_array_equal(dx, [[2, 0, 0, 4], [6, 4, 5, 0]])
