"""Small ONNX files, built by hand for one test each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str] | None
Value = tuple[str, Shape] | tuple[str, Shape, int]

node = helper.make_node


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    weights: Mapping[str, np.ndarray] | None = None,
    opset: int = 18,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model of IR version 9; values are float32 unless a TensorProto type stands third."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [_info(value) for value in inputs],
        [_info(value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def linear(weights: np.ndarray, batch: int | str = "batch") -> onnx.ModelProto:
    """y = x W, with x of shape (batch, inputs) and W of shape (inputs, outputs)."""
    inputs, outputs = weights.shape
    return model(
        [node("MatMul", ["x", "W"], ["y"])], [("x", [batch, inputs])], [("y", [batch, outputs])], {"W": weights}
    )


def quantized_twice() -> onnx.ModelProto:
    """Two nodes of which no gradient is taken, `first_gap` and `second_gap`, one after the other."""
    scale = ["scale", "zero"]
    nodes = [
        node("QuantizeLinear", ["x", *scale], ["q"], name="first_gap"),
        node("DequantizeLinear", ["q", *scale], ["h"], name="first_back"),
        node("QuantizeLinear", ["h", *scale], ["r"], name="second_gap"),
        node("DequantizeLinear", ["r", *scale], ["y"], name="second_back"),
    ]
    weights = {"scale": np.array(0.5, np.float32), "zero": np.array(0, np.int8)}
    return model(nodes, [("x", ["batch", 3])], [("y", ["batch", 3])], weights)


def scanned_by_lengths() -> onnx.ModelProto:
    """y, of shape (1, 3, 2), has the running sums of x over its first two steps, then zeros: node `old`, a Scan of
    operator set 8 with a length for every row, which no later operator set has.
    """
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("s", "i", "o", "p")]
    added = [node("Add", ["s", "i"], ["o"]), node("Identity", ["o"], ["p"])]
    body = helper.make_graph(added, "body", values[:2], values[2:])
    scan = node("Scan", ["lengths", "zero", "x"], ["last", "y"], name="old", body=body, num_scan_inputs=1)
    weights = {"lengths": np.array([2]), "zero": np.zeros((1, 2), np.float32)}
    return model([scan], [("x", [1, 3, 2])], [("y", [1, 3, 2])], weights, opset=8)


def save(proto: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """Writes a model into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def make_external(tensor: TensorProto, **entries: object) -> None:
    """Replaces a tensor's data by a reference; `location`, `offset` and `length` as the file states them."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def _info(value: Value) -> onnx.ValueInfoProto:
    name, shape, *kind = value
    return helper.make_tensor_value_info(name, kind[0] if kind else TensorProto.FLOAT, shape)


def _rounded(name: str, source: str, result: str) -> list[onnx.NodeProto]:
    """Two nodes of which no gradient is taken, `name` and `name`_back."""
    return [
        node("QuantizeLinear", [source, "scale", "zero"], [f"{name}_q"], name=name),
        node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [result], name=f"{name}_back"),
    ]


def quantized_within() -> onnx.ModelProto:
    """y of shape (1, 3), quantized in the branch of an If, in the bodies of a Loop and a Scan, and in a function of the
    file: nodes `in_branch`, `in_loop`, `in_scan` and `in_function`, each with a `_back`.
    """
    t, e, v, w = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "tevw")
    r, s = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "rs")
    step = helper.make_tensor_value_info("step", TensorProto.INT64, [])
    on, still = (helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("on", "still"))
    branches = {
        "then_branch": helper.make_graph(_rounded("in_branch", "x", "t"), "then", [], [t]),
        "else_branch": helper.make_graph([node("Neg", ["x"], ["e"])], "else", [], [e]),
    }
    counted = [node("Identity", ["on"], ["still"]), *_rounded("in_loop", "v", "w")]
    loop = helper.make_graph(counted, "loop", [step, on, v], [still, w])
    scan = helper.make_graph(_rounded("in_scan", "r", "s"), "scan", [r], [s])
    nodes = [
        node("ReduceMax", ["x"], ["most"], keepdims=0),
        node("Greater", ["most", "scale"], ["c"]),
        node("If", ["c"], ["a"], name="if", **branches),
        node("Loop", ["twice", "", "a"], ["b"], name="loop", body=loop),
        node("Scan", ["b"], ["d"], name="scan", body=scan, num_scan_inputs=1),
        node("Round", ["d", "scale", "zero"], ["y"], name="call", domain="own"),
    ]
    weights = {"scale": np.array(0.5, np.float32), "zero": np.array(0, np.int8), "twice": np.array(2, np.int64)}
    proto = model(nodes, [("x", [1, 3])], [("y", [1, 3])], weights, domains=["own"])
    imports = [helper.make_opsetid("", 18)]
    body = _rounded("in_function", "a", "b")
    proto.functions.append(helper.make_function("own", "Round", ["a", "scale", "zero"], ["b"], body, imports))
    return proto
