"""Files that onnxruntime has optimized: the gradient is that of the file before."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from explainserve.backends.onnx_blocks import state_block_size
from explainserve.onnx_vjp import GRADIENT_RULES, cut, find_gaps, has_rectifiers, input_gradient, layers
from onnx_vjp.microsoft_oracle import evaluate

LEVELS = {
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def optimized(model: onnx.ModelProto, level: str, folder: Path) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = LEVELS[level]
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


def gradient(model: onnx.ModelProto, feeds: dict[str, np.ndarray], wrt: str = "x") -> tuple[np.ndarray, np.ndarray]:
    """Output and gradient, for a cotangent that depends on the output's shape only."""
    result = input_gradient(model, [wrt], "y")
    shape = evaluate(model, feeds, ["y"])[0].shape
    cotangent = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    y, dx = evaluate(result.model, {**feeds, result.cotangent: cotangent}, ["y", result.gradients[wrt]])
    return y, dx


def assert_same(model: onnx.ModelProto, other: onnx.ModelProto, feeds: dict[str, np.ndarray], wrt: str = "x") -> None:
    (y, dx), (other_y, other_dx) = gradient(model, feeds, wrt), gradient(other, feeds, wrt)
    np.testing.assert_allclose(other_y, y, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(other_dx - dx) <= 1e-4 * np.linalg.norm(dx)


def operators(model: onnx.ModelProto, domain: str) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.domain == domain)


def image_model() -> onnx.ModelProto:
    """What onnxruntime lays out in blocks, with channels that do not fill one."""
    generator = np.random.default_rng(8)
    constants: dict[str, np.ndarray] = {}
    nodes: list[onnx.NodeProto] = []

    def add(operator: str, inputs: str, output: str, **attributes: object) -> None:
        nodes.append(helper.make_node(operator, inputs.split(" "), [output], name=output, **attributes))

    def conv(source: str, output: str, inputs: int, outputs: int, kernel: int, group: int = 1, **more: object) -> None:
        weights = generator.standard_normal((outputs, inputs // group, kernel, kernel)) / np.sqrt(inputs / group)
        constants[f"{output}/w"] = (weights / kernel).astype(np.float32)
        constants[f"{output}/b"] = generator.standard_normal(outputs).astype(np.float32)
        attributes = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, "group": group, **more}
        add("Conv", f"{source} {output}/w {output}/b", output, **attributes)

    conv("x", "stem", 3, 32, 3, strides=[2, 2])
    add("Relu", "stem", "relu")
    add("MaxPool", "relu", "pool", kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    conv("pool", "depth", 32, 32, 3, group=32)
    conv("depth", "branch", 32, 32, 1)
    add("Add", "branch pool", "residual")
    conv("residual", "few", 32, 24, 3)
    add("LeakyRelu", "few", "leaky", alpha=0.2)
    conv("leaky", "wide", 24, 64, 1)
    add("HardSigmoid", "wide", "gated", alpha=0.3, beta=0.4)
    add("AveragePool", "gated", "average", kernel_shape=[2, 2], strides=[2, 2])
    conv("average", "grouped", 64, 64, 3, group=2)
    add("Concat", "grouped average", "joined", axis=1)
    constants["double"] = np.array([1, 1, 2, 2], np.float32)
    nearest = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "mode": "nearest"}
    add("Resize", "joined  double", "large", **nearest)
    conv("large", "tail", 128, 32, 3)
    add("GlobalAveragePool", "tail", "mean")
    add("GlobalMaxPool", "tail", "peak")
    add("Transpose", "tail", "turned", perm=[0, 2, 3, 1])
    add("ReduceMean", "turned", "mixed", axes=[1, 2], keepdims=0)
    add("Add", "mean peak", "pooled")
    add("Flatten", "pooled", "flat")
    add("Mul", "flat mixed", "y")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 16, 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "images", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("level", LEVELS)
def test_convolutions_in_blocks_are_laid_out_plainly_again(tmp_path: Path, level: str) -> None:
    model = image_model()
    file = optimized(model, level, tmp_path)
    feeds = {"x": np.random.default_rng(3).standard_normal((2, 3, 16, 16)).astype(np.float32)}
    assert_same(model, file, feeds)


@pytest.mark.torch
@pytest.mark.parametrize("network", ["Transformer", "SqueezeExcite", "ShiftedWindows"])
def test_an_optimized_export_of_torch_has_the_gradient_of_the_export(tmp_path: Path, network: str) -> None:
    torch = pytest.importorskip("torch")
    networks = importlib.import_module("onnx_vjp.test_torch_networks")
    torch.manual_seed(1)
    model = networks.exported(getattr(networks, network)().eval(), "legacy14")
    feeds = {"x": np.random.default_rng(3).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    file = optimized(model, "all", tmp_path)
    assert any(node.domain or node.op_type == "SimplifiedLayerNormalization" for node in file.graph.node)
    assert_same(model, file, feeds)


def test_blocked_branches_beside_the_path_fit_to_it(tmp_path: Path) -> None:
    """The gradient of an activation leaves out what comes before it, which is laid out in blocks all the same."""
    model = image_model()
    file = optimized(model, "all", tmp_path)
    blocked = operators(file, "com.microsoft.nchwc")
    if not blocked:
        pytest.skip("onnxruntime lays out nothing in blocks on this processor")
    assert set(blocked) >= {"Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "ReorderOutput"}
    feeds = {"x": np.random.default_rng(3).standard_normal((2, 3, 16, 16)).astype(np.float32)}
    (depthwise,) = (
        node
        for node in file.graph.node
        if node.op_type == "Conv" and any(a.name == "group" and a.i > 2 for a in node.attribute)
    )
    result = input_gradient(file, [depthwise.output[0]], "y")
    cotangent = np.random.default_rng(4).standard_normal((2, 32)).astype(np.float32)
    outputs = ["y", result.gradients[depthwise.output[0]]]
    y, found = evaluate(result.model, {**feeds, result.cotangent: cotangent}, outputs)
    plain = input_gradient(model, ["depth"], "y")
    outputs = ["y", plain.gradients["depth"]]
    expected_y, expected = evaluate(plain.model, {**feeds, plain.cotangent: cotangent}, outputs)
    np.testing.assert_allclose(y, expected_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected, rtol=1e-3, atol=1e-5)


def test_a_stated_block_size_makes_the_weights_constant(tmp_path: Path) -> None:
    file = optimized(image_model(), "all", tmp_path)
    if not operators(file, "com.microsoft.nchwc"):
        pytest.skip("onnxruntime lays out nothing in blocks on this processor")
    feeds = {"x": np.random.default_rng(3).standard_normal((2, 3, 16, 16)).astype(np.float32)}
    assert {"ReorderInput"} == set(operators(input_gradient(file, ["x"], "y").model, "com.microsoft.nchwc"))
    state_block_size(file)
    assert not operators(input_gradient(file, ["x"], "y").model, "com.microsoft.nchwc")
    assert_same(image_model(), file, feeds)


def test_a_cut_layer_of_a_blocked_file_is_laid_out_plainly(tmp_path: Path) -> None:
    model = image_model()
    file = optimized(model, "all", tmp_path)
    if not operators(file, "com.microsoft.nchwc"):
        pytest.skip("onnxruntime lays out nothing in blocks on this processor")
    first = next(node.output[0] for node in file.graph.node if node.op_type == "Conv")
    parts = cut(file, [first])
    x = np.random.default_rng(3).standard_normal((2, 3, 16, 16)).astype(np.float32)
    (found,) = evaluate(parts.before, {"x": x}, [first])
    (expected,) = evaluate(cut(model, ["relu"]).before, {"x": x}, ["relu"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        evaluate(parts.after, {first: found}, ["y"])[0], evaluate(model, {"x": x}, ["y"])[0], rtol=1e-4
    )


def test_layers_in_blocks_are_offered_as_they_are_cut(tmp_path: Path) -> None:
    file = optimized(image_model(), "all", tmp_path)
    blocked = {node.output[0]: node.op_type for node in file.graph.node if node.domain == "com.microsoft.nchwc"}
    if not blocked:
        pytest.skip("onnxruntime lays out nothing in blocks on this processor")
    state_block_size(file)
    x = np.random.default_rng(3).standard_normal((2, 3, 16, 16)).astype(np.float32)
    offered = [layer for layer in layers(file) if layer.name in blocked]

    assert {"Conv", "MaxPool", "AveragePool", "GlobalAveragePool"} <= {layer.operator for layer in offered}
    for layer in offered:
        parts = cut(file, [layer.name])
        (value,) = evaluate(parts.before, {"x": x}, [layer.name])
        assert layer.shape is not None
        assert value.shape[1:] == layer.shape[1:]
        assert set(layer.bypassed) == {bypass.input for bypass in parts.bypasses}


def fused_model() -> onnx.ModelProto:
    """A convolution and a product that onnxruntime fuses with what activates them, and layers behind each."""
    generator = np.random.default_rng(9)
    constants = {
        "kernel": generator.standard_normal((6, 3, 3, 3)).astype(np.float32),
        "weights": generator.standard_normal((24, 5)).astype(np.float32),
        "bias": generator.standard_normal(5).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("MaxPool", ["relu"], ["pool"], kernel_shape=[3, 3], strides=[3, 3]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["gemm"], alpha=0.1),
        helper.make_node("Tanh", ["gemm"], ["tanh"]),
        helper.make_node("Mul", ["tanh", "tanh"], ["square"]),
        helper.make_node("Neg", ["square"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "fused", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("level", ["extended", "all"])
def test_every_layer_of_an_optimized_file_can_be_cut(tmp_path: Path, level: str) -> None:
    file = optimized(fused_model(), level, tmp_path)
    x = np.random.default_rng(3).standard_normal((2, 3, 8, 8)).astype(np.float32)
    expected = evaluate(file, {"x": x}, ["y"])[0]
    offered = layers(file)
    assert {"FusedGemm", "MaxPool", "Mul"} <= {layer.operator for layer in offered}
    for layer in offered:
        parts = cut(file, [layer.name])
        (value,) = evaluate(parts.before, {"x": x}, [layer.name])
        assert layer.shape == ("batch", *value.shape[1:])
        np.testing.assert_allclose(evaluate(parts.after, {layer.name: value}, ["y"])[0], expected, rtol=1e-4)


@pytest.mark.parametrize("table", ["guided_backpropagation", "deconvnet"])
def test_gradient_rules_reach_fused_rectifiers(tmp_path: Path, table: str) -> None:
    model = image_model()
    file = optimized(model, "extended", tmp_path)
    assert "FusedConv" in operators(file, "com.microsoft")
    assert has_rectifiers(file, ["x"], "y")
    x, cotangent = (
        np.random.default_rng(3).standard_normal(shape).astype(np.float32) for shape in ((2, 3, 16, 16), (2, 32))
    )
    found = []
    for proto in (model, file):
        result = input_gradient(proto, ["x"], "y", rules=GRADIENT_RULES[table]())
        found += evaluate(result.model, {"x": x, result.cotangent: cotangent}, [result.gradients["x"]])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-5)


def stored_weights_model(domain: str, attributes: dict[str, int], stored: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A product with weights that the file holds in few bits."""
    nodes = [
        helper.make_node("DequantizeLinear", list(stored), ["w"], domain=domain, **attributes),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6])
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "stored", [x], [y], tensors), opset_imports=imports, ir_version=10
    )


@pytest.mark.parametrize(
    ("domain", "attributes", "scales"),
    [
        ("", {}, ()),
        ("", {"axis": 1}, (6,)),
        ("", {"axis": 0, "block_size": 16}, (2, 6)),
        ("com.microsoft", {"axis": 1}, (6,)),
    ],
)
def test_weights_in_few_bits_let_the_gradient_through(
    domain: str, attributes: dict[str, int], scales: tuple[int, ...]
) -> None:
    generator = np.random.default_rng(6)
    stored = {
        "q": generator.integers(-100, 100, (32, 6)).astype(np.int8),
        "s": (0.01 + 0.01 * generator.random(scales)).astype(np.float32),
        "z": generator.integers(-9, 9, scales).astype(np.int8),
    }
    scale, zero = (np.repeat(stored[name], 16, axis=0) if len(scales) == 2 else stored[name] for name in "sz")
    weights = (stored["q"].astype(np.float32) - zero) * scale
    x = generator.standard_normal((3, 32)).astype(np.float32)
    result = input_gradient(stored_weights_model(domain, attributes, stored), ["x"], "y")
    cotangent = generator.standard_normal((3, 6)).astype(np.float32)
    # Where onnxruntime may fuse, it multiplies such weights by activations in few bits too.
    y, dx = evaluate(result.model, {"x": x, result.cotangent: cotangent}, ["y", result.gradients["x"]])
    np.testing.assert_allclose(y, x @ weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, cotangent @ weights.T, rtol=1e-4, atol=1e-5)


def test_every_step_of_dynamic_quantization_is_a_gap() -> None:
    """Bytes lie between the steps: they neither end the path silently nor break the walk."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["bytes", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["bytes", "w", "zero"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("DynamicQuantizeMatMul", ["scaled", "v", "step"], ["y"], domain="com.microsoft"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    stored = {"w": np.ones((4, 4), np.uint8), "v": np.ones((4, 4), np.uint8), "step": np.array(0.1, np.float32)}
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "dynamic", [x], [y], tensors), opset_imports=imports)
    gaps = find_gaps(model, ["x"], "y")
    assert {gap.operator for gap in gaps} == {"DynamicQuantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul"}
    assert all("float model" in gap.remedy for gap in gaps)


def blocked_model(operator: str, channels: int, **attributes: object) -> onnx.ModelProto:
    """One operator between reordering of images with channels last."""
    blocked = "com.microsoft.nchwc"
    nodes = [
        helper.make_node("ReorderInput", ["x"], ["blocked"], domain=blocked, channels_last=1),
        helper.make_node(operator, ["blocked"], ["result"], domain=blocked, **attributes),
        helper.make_node("ReorderOutput", ["result"], ["y"], domain=blocked, channels_last=1, channels=channels),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6, 4, channels])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(blocked, 1)]
    return helper.make_model(helper.make_graph(nodes, "blocked", [x], [y]), opset_imports=imports, ir_version=8)


@pytest.mark.parametrize("channels", [24, 64])
@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("AveragePool", {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 1]}),
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("GlobalAveragePool", {}),
        ("GlobalMaxPool", {}),
        ("MaxPool", {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 1]}),
        ("Upsample", {"scales": [1, 1, 2, 3]}),
        ("Upsample", {"scales": [1, 1, 2, 2], "mode": "linear", "coordinate_transformation_mode": "half_pixel"}),
        ("Upsample", {"scales": [1, 1, 3, 2], "mode": "linear", "coordinate_transformation_mode": "align_corners"}),
        ("Upsample", {"scales": [1, 1, 2, 2], "mode": "linear"}),
    ],
)
def test_a_blocked_operator_is_its_kernel(operator: str, attributes: dict[str, object], channels: int) -> None:
    model = blocked_model(operator, channels, **attributes)
    x = np.random.default_rng(3).standard_normal((2, 6, 4, channels)).astype(np.float32)
    try:
        (expected,) = evaluate(model, {"x": x}, ["y"])
    except Exception as error:
        pytest.skip(f"onnxruntime lays out nothing in blocks on this processor: {error}")
    y, dx = gradient(model, {"x": x})
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert dx.shape == x.shape
