"""ONNX files that harm the process that loads them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnx_graphs import model, node


def plus(constant: list[onnx.NodeProto], **weights: np.ndarray) -> onnx.ModelProto:
    """y = x + c, with c computed from weights."""
    return model([*constant, node("Add", ["x", "c"], ["y"])], [("x", [1, 3])], [("y", [1, 3])], weights)


def divided() -> onnx.ModelProto:
    """The least integer divided by -1 does not fit, which processors report like a division by zero."""
    quotient = [node("Div", ["least", "minus"], ["q"]), node("Cast", ["q"], ["c"], to=TensorProto.FLOAT)]
    return plus(quotient, least=np.array([-(2**63)], np.int64), minus=np.array([-1], np.int64))


def groupless() -> onnx.ModelProto:
    """Channels divided among no group."""
    nodes = [node("ConvTranspose", ["x", "W"], ["y"], group=0)]
    shape = ["a", "b", "c", "d"]
    return model(nodes, [("x", [1, 4, 8, 8])], [("y", shape)], {"W": np.ones((4, 3, 3, 3), np.float32)})


def endless() -> onnx.ModelProto:
    values = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("v", TensorProto.FLOAT, [1, 3])]
    inputs = [helper.make_tensor_value_info(*value) for value in values]
    outputs = [helper.make_tensor_value_info(f"{name}_out", *rest) for name, *rest in values[1:]]
    body = [node("Identity", ["go"], ["go_out"]), node("Neg", ["v"], ["v_out"])]
    loop = node("Loop", ["count", "", "x"], ["y"], body=helper.make_graph(body, "body", inputs, outputs))
    return model([loop], [("x", [1, 3])], [("y", [1, 3])], {"count": np.array(2**62, np.int64)})


def patient() -> onnx.ModelProto:
    """y = x after as many rounds of a loop as the largest element says."""
    values = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("v", TensorProto.FLOAT, ["batch", 4])]
    inputs = [helper.make_tensor_value_info(*value) for value in values]
    outputs = [helper.make_tensor_value_info(f"{name}_out", *rest) for name, *rest in values[1:]]
    body = [node("Identity", ["go"], ["go_out"]), node("Identity", ["v"], ["v_out"])]
    nodes = [
        node("ReduceMax", ["x"], ["largest"], keepdims=0),
        node("Cast", ["largest"], ["count"], to=TensorProto.INT64),
        node("Loop", ["count", "", "x"], ["y"], body=helper.make_graph(body, "body", inputs, outputs)),
    ]
    return model(nodes, [("x", ["batch", 4])], [("y", ["batch", 4])])


def doubled(depth: int) -> onnx.ModelProto:
    """One call of a function that calls another one twice, and so on: 2^depth nodes in all."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    functions = [helper.make_function("own", "F0", ["a"], ["b"], [node("Neg", ["a"], ["b"])], imports)]
    for level in range(1, depth + 1):
        names = [("a", "h"), ("h", "b")]
        calls = [node(f"F{level - 1}", [source], [target], domain="own") for source, target in names]
        functions.append(helper.make_function("own", f"F{level}", ["a"], ["b"], calls, imports))
    proto = model([node(f"F{depth}", ["x"], ["y"], domain="own")], [("x", [1, 3])], [("y", [1, 3])], domains=["own"])
    proto.functions.extend(functions)
    return proto


def circular() -> onnx.ModelProto:
    """A function that calls itself by way of another."""
    proto = doubled(2)
    proto.functions[1].node[0].op_type = "F2"
    return proto


def headless() -> onnx.ModelProto:
    """Heads of queries that share no head of keys."""
    attention = node("Attention", ["x", "x", "x"], ["y"], q_num_heads=9, kv_num_heads=0)
    return model([attention], [("x", [1, 6, 24])], [("y", [1, 4, 72])], opset=23)


def split() -> onnx.ModelProto:
    """Four parts of one."""
    parts = [f"y{index}" for index in range(4)]
    nodes = [node("Split", ["x"], parts, num_outputs=1)]
    return model(nodes, [("x", [49])], [(name, [13]) for name in parts])


CRASHERS = {"division": divided, "groups": groupless, "heads": headless, "split": split}
"""Files that kill the process by a signal, with the versions of libraries that this was written for."""
