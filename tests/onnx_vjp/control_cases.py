"""Cases of If, Scan and Loop: every axis and direction, captured tensors, nested bodies, hidden names.

Their oracle is onnxruntime in float64: the reference evaluator knows neither axes nor directions of a Scan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import onnx
import onnxruntime as ort
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_vjp.precision import in_type
from onnx_vjp.vjp_oracle import Case, Feeds, Function

F = TensorProto.FLOAT

_rng = np.random.default_rng(11)
STEPS, ROWS, WIDTH = 5, 2, 3
X = _rng.standard_normal((STEPS, ROWS, WIDTH)).astype(np.float32)
H, S = (_rng.standard_normal(shape).astype(np.float32) for shape in ((ROWS, WIDTH), (WIDTH,)))
W = _rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
DYNAMIC = {"x": ["steps", "rows", WIDTH], "h": ["rows", WIDTH], "s": [WIDTH]}


def node(operator: str, inputs: str, outputs: str, **attributes: object) -> NodeProto:
    """A node from names with spaces between; a dash stands for an absent one."""
    names = [["" if name == "-" else name for name in text.split()] for text in (inputs, outputs)]
    return helper.make_node(operator, *names, name=outputs.split()[0], **attributes)


def body(nodes: Sequence[NodeProto], inputs: str = "", outputs: str = "") -> GraphProto:
    """A subgraph; a name that starts with `i_`, `b_` is an integer or boolean scalar, others are float tensors."""
    return helper.make_graph(nodes, "body", [*map(_value, inputs.split())], [*map(_value, outputs.split())])


def _value(name: str) -> onnx.ValueInfoProto:
    kind = {"i_": TensorProto.INT64, "b_": TensorProto.BOOL}.get(name[:2], F)
    return helper.make_tensor_value_info(name, kind, None if kind == F else [])


def model(
    nodes: Sequence[NodeProto], feeds: Feeds, outputs: str, constants: Feeds | None = None, dynamic: bool = True
) -> onnx.ModelProto:
    """A model of operator set 21, with dynamic sizes where DYNAMIC has them."""
    inputs = []
    for name, value in feeds.items():
        shape = DYNAMIC.get(name, value.shape) if dynamic else value.shape
        inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape))
    results = [helper.make_tensor_value_info(name, F, None) for name in outputs.split()]
    stored = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(nodes, "control", inputs, results, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def by_runtime(model: onnx.ModelProto) -> Function:
    """The model as a function, by onnxruntime in float64."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    wide = in_type(model, TensorProto.DOUBLE).SerializeToString()
    session = ort.InferenceSession(wide, options, ["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*values: np.ndarray) -> list[np.ndarray]:
        feeds = {
            name: v.astype(np.float64) if v.dtype == np.float32 else v for name, v in zip(names, values, strict=True)
        }
        return list(session.run(None, feeds))

    return run


def case(name: str, model: onnx.ModelProto, feeds: Feeds) -> Case:
    """A case with the float64 function of its own model."""
    return Case(name, model, feeds, by_runtime(model))


def control_cases() -> Iterator[Case]:
    """If, Scan and Loop."""
    yield from _branches()
    yield from _scans()
    yield from _loops()


def _branches() -> Iterator[Case]:
    then = body([node("Mul", "x s", "t"), node("Tanh", "t", "o")], outputs="o")
    other = body([node("Exp", "x", "o")], outputs="o")
    for taken in (True, False):
        feeds = {"c": np.array(taken), "x": X, "s": S}
        yield case(f"If:{taken}", model([node("If", "c", "y", then_branch=then, else_branch=other)], feeds, "y"), feeds)
        step = body(
            [
                node("ReduceSum", "row", "total", keepdims=0),
                node("Greater", "total zero", "b_positive"),
                node(
                    "If",
                    "b_positive",
                    "after",
                    then_branch=body([node("Mul", "before s", "t"), node("Sin", "t", "o")], outputs="o"),
                    else_branch=body([node("Mul", "row row", "t"), node("Mul", "t before", "o")], outputs="o"),
                ),
                node("Tanh", "after", "t"),
            ],
            "before row",
            "after t",
        )
        scan = node("Scan", "h x", "last all", body=step, num_scan_inputs=1)
        total = [node("ReduceSum", "all first", "t", keepdims=0), node("Add", "t last", "o")]
        nodes = [
            node(
                "If",
                "c",
                "y",
                then_branch=body([scan, *total], outputs="o"),
                else_branch=body([node("Identity", "h", "o")], outputs="o"),
            )
        ]
        feeds = {"c": np.array(taken), "h": H, "x": X, "s": S}
        constants = {"zero": np.array(0, np.float32), "first": np.array([0])}
        yield case(f"If:nested {taken}", model(nodes, feeds, "y", constants), feeds)


def recurrence() -> GraphProto:
    """h' = tanh(h W + row), and s h' besides."""
    nodes = [
        node("MatMul", "before W", "product"),
        node("Add", "product row", "sum"),
        node("Tanh", "sum", "after"),
        node("Mul", "after s", "scaled"),
    ]
    return body(nodes, "before row", "after scaled")


def _scans() -> Iterator[Case]:
    for read, write, dynamic in product((0, 1), (0, 1), (True, False)):
        ways = {"scan_input_directions": [read], "scan_output_directions": [write], "scan_output_axes": [1]}
        scan = node("Scan", "h x", "last all", body=recurrence(), num_scan_inputs=1, **ways)
        feeds = {"h": H, "x": X, "s": S}
        label = f"Scan:{read}{write}{dynamic}"
        yield case(label, model([scan], feeds, "last all", {"W": W}, dynamic), feeds)
    for output in ("last", "all"):
        scan = node("Scan", "h x", "last all", body=recurrence(), num_scan_inputs=1, scan_input_axes=[-2])
        feeds = {"h": H, "x": np.ascontiguousarray(X.transpose(1, 0, 2)), "s": S}
        yield case(f"Scan:axis {output}", model([scan], feeds, output, {"W": W}, dynamic=False), feeds)
    # A state that no cotangent reaches, one that depends on nothing, and one handed on as it is.
    nodes = [
        node("Mul", "a row", "a_"),
        node("Add", "b c", "sum"),
        node("Identity", "d", "d_"),
        node("Mul", "row d", "written"),
        node("Add", "i_n i_one", "i_next"),
        node("Cast", "i_n", "number", to=F),
        node("Mul", "written number", "numbered"),
    ]
    step = body(nodes, "a b i_n d row", "a_ sum i_next d_ numbered")
    scan = node("Scan", "h c zero_count h x", "u v w z all", body=step, num_scan_inputs=1)
    feeds = {"h": H, "c": H + 1, "x": X}
    constants = {"zero_count": np.array(0), "i_one": np.array(1)}
    for outputs in ("all", "v all", "u z"):
        yield case(f"Scan:{outputs}", model([scan], feeds, outputs, constants), feeds)


def _loops() -> Iterator[Case]:
    nodes = [
        node("Cast", "i_step", "step", to=F),
        node("MatMul", "before W", "product"),
        node("Mul", "step s", "scaled"),
        node("Add", "product scaled", "sum"),
        node("Tanh", "sum", "after"),
        node("Mul", "after before", "written"),
        node("Add", "i_count i_step", "i_next"),
        node("Cast", "i_count", "counted", to=F),
        node("Mul", "written counted", "all"),
        node("Identity", "b_on", "b_off"),
    ]
    step = body(nodes, "i_step b_on before i_count", "b_off after i_next all")
    for count, condition in product((4, 1), ("-", "yes")):
        loop = node("Loop", f"count {condition} h one", "last n all", body=step)
        feeds = {"count": np.array(count), "h": H, "s": S}
        constants = {"W": W, "one": np.array(1), "yes": np.array(True)}
        yield case(f"Loop:{count} {condition}", model([loop], feeds, "last all", constants), feeds)
    feeds = {"count": np.array(0), "h": H, "s": S}
    loop = node("Loop", "count - h one", "last n all", body=step)
    yield case("Loop:empty", model([loop], feeds, "last", {"W": W, "one": np.array(1)}), feeds)
    until = body(
        [
            node("Mul", "before s", "after"),
            node("ReduceSum", "after", "r", keepdims=0),
            node("Less", "r most", "b_off"),
        ],
        "i_step b_on before",
        "b_off after",
    )
    feeds = {"h": np.abs(H), "s": np.abs(S) + 1.2}
    constants = {"yes": np.array(True), "most": np.array(100, np.float32)}
    yield case("Loop:while", model([node("Loop", "- yes h", "y", body=until)], feeds, "y", constants), feeds)
