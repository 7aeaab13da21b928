"""Raising old operator sets keeps the meaning of every node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, defs, helper, numpy_helper

from explainserve.onnx_vjp import GRADIENT_RULES, UnsupportedOperators, find_gaps, input_gradient
from explainserve.onnx_vjp.opset import FLOOR, OLDEST, prepared
from onnx_vjp.suite import case, operator, suite
from onnx_vjp.vjp_oracle import Case, check, run

_rng = np.random.default_rng(0)
X = _rng.standard_normal((2, 3, 4)).astype(np.float32)
IMAGE = _rng.standard_normal((1, 2, 4, 4)).astype(np.float32)

FORMS: list[tuple[int, str, np.ndarray, dict[str, object], dict[str, np.ndarray]]] = [
    (9, "Slice", X, {"starts": [1, 0], "ends": [3, -1], "axes": [1, 2]}, {}),
    (7, "Clip", X, {"min": -0.5, "max": 0.5}, {}),
    (7, "Clip", X, {"max": 0.5}, {}),
    (7, "Pad", X, {"pads": [0, 1, 0, 0, 0, 2], "value": 1.5}, {}),
    (7, "Pad", X, {"pads": [0, 1, 0, 0, 0, 2], "mode": "edge"}, {}),
    (7, "Unsqueeze", X, {"axes": [0, 4]}, {}),
    (7, "Squeeze", X[:1], {"axes": [0]}, {}),
    (11, "ReduceSum", X, {"axes": [0, 2], "keepdims": 0}, {}),
    (17, "ReduceMean", X, {"axes": [-1]}, {}),
    (12, "ReduceL2", X, {"axes": [1]}, {}),
    (11, "Softmax", X, {}, {}),
    (11, "Softmax", X, {"axis": -1}, {}),
    (8, "LogSoftmax", X, {"axis": 2}, {}),
    (9, "Split", X, {"split": [1, 3], "axis": 2}, {}),
    (13, "Split", X, {"axis": 2}, {}),
    (7, "Dropout", X, {"ratio": 0.3}, {}),
    (9, "TopK", X, {"k": 2, "axis": 1}, {}),
    (7, "Upsample", IMAGE, {"scales": [1.0, 1.0, 2.0, 3.0]}, {}),
    (9, "Upsample", IMAGE, {"mode": "linear"}, {"s": np.array([1, 1, 2, 2], np.float32)}),
    (10, "Resize", IMAGE, {"mode": "nearest"}, {"s": np.array([1, 1, 2, 2], np.float32)}),
    (10, "Resize", IMAGE, {"mode": "nearest"}, {"s": np.array([1, 1, 0.5, 0.75], np.float32)}),
    (10, "Resize", IMAGE, {"mode": "nearest"}, {"s": np.array([1, 1, 1.5, 0.6], np.float32)}),
    (10, "Resize", IMAGE, {"mode": "linear"}, {"s": np.array([1, 1, 1.5, 0.6], np.float32)}),
    (
        10,
        "RoiAlign",
        IMAGE,
        {"output_height": 2, "output_width": 2, "sampling_ratio": 2},
        {"r": np.array([[0, 0, 3, 2]], np.float32), "i": np.array([0])},
    ),
    (7, "MaxPool", IMAGE, {"kernel_shape": [2, 2]}, {}),
    (7, "LpPool", IMAGE, {"kernel_shape": [2, 2], "strides": [2, 2]}, {}),
    (10, "AveragePool", IMAGE, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1, "strides": [2, 2]}, {}),
    (
        7,
        "BatchNormalization",
        X,
        {"spatial": 1},
        {name: np.abs(_rng.standard_normal(3)).astype(np.float32) for name in "sbmv"},
    ),
    (
        8,
        "BatchNormalization",
        X,
        {"spatial": 0, "epsilon": 0.01},
        {name: _rng.uniform(0.5, 1.5, (3, 4)).astype(np.float32) for name in "sbmv"},
    ),
]


def old_model(
    version: int, operator: str, x: np.ndarray, attributes: dict[str, object], more: dict[str, np.ndarray]
) -> onnx.ModelProto:
    outputs = ["y", "z"] if operator in ("Split", "TopK") else ["y"]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *more], outputs, **attributes)],
        "old",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in more.items()],
    )
    old = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=7)
    return onnx.shape_inference.infer_shapes(old, data_prop=True)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[1]}-{form[0]}-{'-'.join(form[3])}")
def test_an_old_form_computes_what_it_did_and_has_a_gradient(
    form: tuple[int, str, np.ndarray, dict[str, object], dict[str, np.ndarray]],
) -> None:
    _, _, x, *_ = form
    old = old_model(*form)
    new = prepared(old)
    assert new.opset_import[0].version == FLOOR
    onnx.checker.check_model(new)
    (before,), (after,) = run(old, {"x": x}, ["y"]), run(new, {"x": x}, ["y"])
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=2e-7)
    gradient = input_gradient(old, ["x"], "y")
    generator = np.random.default_rng(1)
    direction, g = (generator.standard_normal(value.shape).astype(np.float32) for value in (x, before))
    (dx,) = run(gradient.model, {"x": x, gradient.cotangent: g}, [gradient.gradients["x"]])
    ahead, behind = (run(old, {"x": x + step * direction}, ["y"])[0].astype(np.float64) for step in (1e-3, -1e-3))
    np.testing.assert_allclose(np.sum(dx * direction), np.sum(g * (ahead - behind)) / 2e-3, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("scales", [[1, 1, 0.6, 0.5], [1, 1, 2, 1.5], [1, 1, 1.5, 0.6]])
def test_what_is_nearest_is_rounded_as_before_where_the_scales_are_computed(scales: list[float]) -> None:
    """Down along axes that grow, up along those that shrink, which only the run tells."""
    x, s, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", IMAGE.shape), ("s", [4]), ("y", None))
    )
    graph = helper.make_graph([helper.make_node("Resize", ["x", "s"], ["y"])], "old", [x, s], [y])
    old = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=7)
    feeds = {"x": IMAGE, "s": np.array(scales, np.float32)}
    (before,) = run(old, feeds, ["y"])
    gradient = input_gradient(old, ["x"], "y")
    g = _rng.standard_normal(before.shape).astype(np.float32)
    y, dx = run(gradient.model, {**feeds, gradient.cotangent: g}, ["y", gradient.gradients["x"]])
    np.testing.assert_array_equal(y, before)
    np.testing.assert_allclose(np.sum(dx * IMAGE), np.sum(g * before), rtol=1e-5)


@pytest.mark.parametrize("version", [7, 9, 13])
def test_weights_normalized_in_training_mode_are_what_they_were(version: int) -> None:
    """Before operator set 14 further outputs meant training; networks standardize weights so."""
    stored = {name: _rng.uniform(0.5, 1.5, 3).astype(np.float32) for name in "sbmv"}
    stored["w"] = _rng.standard_normal((1, 3, 4)).astype(np.float32)
    nodes = [
        helper.make_node("BatchNormalization", ["w", *"sbmv"], ["normal", "m1", "v1", "saved_m", "saved_v"]),
        helper.make_node("Mul", ["x", "normal"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 3, 4]) for name in "xy")
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    imports = [helper.make_opsetid("", version)]
    old = helper.make_model(helper.make_graph(nodes, "old", [x], [y], tensors), opset_imports=imports, ir_version=7)
    gradient = input_gradient(old, ["x"], "y")
    g = np.ones_like(X)
    (before,) = run(old, {"x": X}, ["y"])
    y, dx = run(gradient.model, {"x": X, gradient.cotangent: g}, ["y", gradient.gradients["x"]])
    np.testing.assert_allclose(y, before, rtol=1e-5)
    w = stored["w"]
    centered = w - w.mean((0, 2), keepdims=True)
    normal = centered / np.sqrt(w.var((0, 2), keepdims=True) + 1e-5)
    normal = normal * stored["s"][:, None] + stored["b"][:, None]
    np.testing.assert_allclose(dx, np.broadcast_to(normal, X.shape), rtol=1e-4, atol=1e-5)


def test_what_has_no_newer_form_is_a_gap_and_every_one_is_listed() -> None:
    """Scans of operator set 8 with lengths, one of them in a branch, and statistics taken pixel by pixel."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("s", "i", "o", "p")]
    inner = [helper.make_node("Add", ["s", "i"], ["o"]), helper.make_node("Identity", ["o"], ["p"])]
    body = helper.make_graph(inner, "body", values[:2], values[2:])
    scan = {"body": body, "num_scan_inputs": 1}
    in_branch = helper.make_node("Scan", ["lengths", "zero", "z"], ["last", "all"], name="inner", **scan)
    branches = {
        name: helper.make_graph([node], name, [], [helper.make_tensor_value_info("all", TensorProto.FLOAT, None)])
        for name, node in (("then_branch", in_branch), ("else_branch", helper.make_node("Abs", ["z"], ["all"])))
    }
    nodes = [
        helper.make_node("BatchNormalization", ["x", *"sbmv"], ["n", "m2", "v2"], name="batch", spatial=0),
        helper.make_node("Scan", ["lengths", "zero", "n"], ["f", "z"], **scan),
        helper.make_node("If", ["flag"], ["y"], **branches),
    ]
    stored = {name: np.ones((3, 2), np.float32) for name in "sbmv"}
    stored |= {"lengths": np.array([2]), "zero": np.zeros((1, 2), np.float32), "flag": np.array(True)}
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 2]) for name in "xy")
    graph = helper.make_graph(nodes, "old", [x], [y], tensors)
    old = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=4)
    gaps = find_gaps(old, ["x"], "y")
    assert [(gap.operator, gap.node) for gap in gaps] == [
        ("BatchNormalization", "batch"),
        ("Scan", "f"),
        ("Scan", "inner"),
    ]
    assert all(gap.reason and "export" in gap.remedy for gap in gaps)
    with pytest.raises(UnsupportedOperators) as caught:
        input_gradient(old, ["x"], "y")
    assert caught.value.gaps == tuple(gaps)


@pytest.mark.parametrize("version", [7, 10, 11])
@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=["float32", "float16"])
def test_a_rectifier_is_one_in_every_operator_set(version: int, kind: type) -> None:
    """ReLU6 as files of MobileNet's days have it: zero at its bounds, changed by the tables for rectifiers."""
    x, g = np.array([-1, 0, 3, 6, 7], kind), np.array([1, 1, -1, 1, 1], kind)
    element = helper.np_dtype_to_tensor_dtype(x.dtype)
    values = [helper.make_tensor_value_info(name, element, ["n"]) for name in "xy"]
    bounds = {"low": np.array(0, kind), "high": np.array(6, kind)}
    old = version < 11
    clip = helper.make_node(
        "Clip", ["x"] if old else ["x", *bounds], ["y"], **({"min": 0.0, "max": 6.0} if old else {})
    )
    tensors = [] if old else [numpy_helper.from_array(value, name) for name, value in bounds.items()]
    graph = helper.make_graph([clip], "relu6", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=7)
    expected = {"standard": [0, 0, -1, 0, 0], "guided_backpropagation": [0] * 5, "deconvnet": [1, 1, 0, 1, 1]}
    for table, wanted in expected.items():
        gradient = input_gradient(model, ["x"], "y", rules=GRADIENT_RULES[table]())
        (dx,) = run(gradient.model, {"x": x, gradient.cotangent: g}, [gradient.gradients["x"]])
        np.testing.assert_array_equal(dx, wanted, err_msg=table)


def test_a_model_without_broadcasting_rules_is_refused() -> None:
    with pytest.raises(ValueError, match="operator set 6"):
        prepared(old_model(6, "Neg", X, {}, {}))


def test_nodes_in_any_order_have_a_gradient() -> None:
    """What is read before it is written must not end the path silently."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    nodes = [helper.make_node("Mul", ["square", "x"], ["y"]), helper.make_node("Mul", ["x", "x"], ["square"])]
    model = helper.make_model(helper.make_graph(nodes, "order", [x], [y]), opset_imports=[helper.make_opsetid("", 18)])
    gradient = input_gradient(model, ["x"], "y")
    feeds = {"x": np.array([2.0, -3.0], np.float32), gradient.cotangent: np.ones(2, np.float32)}
    (dx,) = run(gradient.model, feeds, [gradient.gradients["x"]])
    np.testing.assert_allclose(dx, [12.0, 27.0])


# Operators whose older forms the reference evaluator takes for the newest one; FORMS has them.
MISREAD = {"BatchNormalization", "Hardmax", "LogSoftmax", "Softmax"}


def _older(entry: Case) -> Iterator[Case]:
    """The same node under every older version of its operator that accepts it."""
    node, (newest,) = entry.node, [o.version for o in entry.model.opset_import if not o.domain]
    since = [schema.since_version for schema in defs.get_all_schemas_with_history() if schema.name == node.op_type]
    for version in sorted({max(version, OLDEST) for version in since if version < newest} - {newest}):
        old = onnx.ModelProto()
        old.CopyFrom(entry.model)
        old.opset_import[0].version = version
        try:
            onnx.checker.check_model(old, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            continue  # Its form is another one.
        yield replace(entry, model=old, name=f"{entry.name} in {version}")


@pytest.mark.slow
def test_operators_mean_the_same_in_every_version_that_accepts_them() -> None:
    seen: set[tuple[str, int]] = set()
    failures = []
    names = [name for name in suite() if not operator(name)[0] and operator(name)[1] not in MISREAD]
    for entry in (case(name) for name in names if "_expanded" not in name):
        if not entry.wrt or not entry.outputs or len(entry.model.graph.node) > 1:
            continue
        for old in _older(entry):
            key = (entry.node.op_type, old.model.opset_import[0].version)
            if key not in seen:
                seen.add(key)
                try:
                    check(old)
                except UnsupportedOperators:
                    seen.discard(key)
                except Exception as error:
                    failures.append(f"{old.name}: {type(error).__name__}: {error}"[:300])
    assert not failures, "\n".join(failures)
    assert len({name for name, _ in seen}) > 40
