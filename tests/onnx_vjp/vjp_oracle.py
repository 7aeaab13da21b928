"""Vector-Jacobian products against central differences of onnx's reference evaluator in float64."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from explainserve.onnx_vjp import GradientGraph, input_gradient

# Inputs of float type that no gradient is offered for: they steer the operator, and it is not a function one
# differentiates.
CONTROLS = {"Resize": (1, 2, 3), "Dropout": (1,), "CastLike": (1,), "ConvTranspose": (1,)}
# Running statistics and weights that the reference reads as vectors of an even spread: positive where the operator
# needs it.
POSITIVE = {
    "BatchNormalization": (4,),
    "Log": (0,),
    "Sqrt": (0,),
    "Pow": (0,),
    "Acosh": (0,),
    "ReduceLogSum": (0,),
    "Div": (1,),
}


Function = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Case:
    """A single-node model with float32 inputs and outputs, and its input values.

    `function` is a float64 oracle for what the reference evaluator lacks or gets wrong; it takes the float inputs in
    order.
    """

    name: str
    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    function: Function | None = None

    @property
    def node(self) -> onnx.NodeProto:
        """The operator under test."""
        return self.model.graph.node[-1]


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    """onnxruntime, or the reference evaluator where it has no kernel."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except (ort.capi.onnxruntime_pybind11_state.NotImplemented, ort.capi.onnxruntime_pybind11_state.Fail):
        return list(ReferenceEvaluator(model).run(outputs, feeds))
    return list(session.run(outputs, feeds))


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every float32 tensor and attribute in float64."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    graph = double.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        if node.op_type == "GroupNormalization" and model.opset_import[0].version >= 21:
            node.attribute.append(helper.make_attribute("stash_type", TensorProto.DOUBLE))
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.name in ("to", "stash_type") and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.DOUBLE
        elif attribute.type == AttributeProto.TENSOR:
            _widen(attribute.t)
    return double


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def moved_off_kinks(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """The case's inputs with a small seeded jitter, so that no tie or corner is hit exactly."""
    generator = np.random.default_rng(seed)
    moved = {}
    for position, name in enumerate(case.node.input):
        if name not in case.feeds:
            continue
        value = case.feeds[name]
        if value.dtype == np.float32 and position not in CONTROLS.get(case.node.op_type, ()):
            value = value + (0.02 * generator.standard_normal(value.shape)).astype(np.float32)
            value = np.abs(value) + np.float32(0.1) if position in POSITIVE.get(case.node.op_type, ()) else value
        moved[name] = np.asarray(value)
    return {**case.feeds, **moved}


def differentiated(case: Case) -> list[str]:
    """The float inputs whose gradient the operator's rule offers."""
    controls = {case.node.input[i] for i in CONTROLS.get(case.node.op_type, ()) if i < len(case.node.input)}
    names = [name for name in case.feeds if case.feeds[name].dtype == np.float32 and case.feeds[name].size]
    return [name for name in names if name not in controls]


def check(case: Case, tolerance: float = 1e-3) -> GradientGraph:
    """Assert that the float32 gradient agrees with a float64 central difference along a random direction, for all
    inputs together.
    """
    feeds, wrt, of = moved_off_kinks(case), differentiated(case), case.model.graph.output[0].name
    gradient = input_gradient(case.model, wrt, of)
    generator = np.random.default_rng(7)
    directions = {name: generator.standard_normal(feeds[name].shape) for name in wrt}
    evaluate = _oracle(case, of)

    def forward(step: float) -> np.ndarray:
        return evaluate(
            {
                name: np.asarray(_wide(value) + step * directions[name] if name in wrt else value)
                for name, value in feeds.items()
            }
        )

    cotangent = generator.standard_normal(forward(0.0).shape).astype(np.float32)
    step = 1e-6
    expected = float(np.sum((forward(step) - forward(-step)) / (2 * step) * cotangent))
    values = run(gradient.model, {**feeds, gradient.cotangent: cotangent}, [gradient.gradients[name] for name in wrt])
    for name, value in zip(wrt, values, strict=True):
        assert value.shape == feeds[name].shape, f"{case.name}: gradient of {name} has shape {value.shape}"
        assert value.dtype == np.float32
    products = [value.astype(np.float64) * directions[name] for name, value in zip(wrt, values, strict=True)]
    actual = sum(float(product.sum()) for product in products)
    scale = max(abs(expected), float(np.sqrt(sum(np.sum(product**2) for product in products))))
    assert np.isfinite(actual), f"{case.name}: gradient is not finite"
    assert abs(actual - expected) <= tolerance * scale + 1e-6, f"{case.name}: {actual} instead of {expected}"
    return gradient


def _oracle(case: Case, of: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """The case's function in float64."""
    function = case.function
    if function is not None:
        return lambda feeds: np.asarray(function(*feeds.values()))
    reference = ReferenceEvaluator(in_float64(case.model))
    return lambda feeds: np.asarray(reference.run([of], {name: _wide(value) for name, value in feeds.items()})[0])


def _wide(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float64) if value.dtype == np.float32 else value


def frozen(case: Case, keep: Collection[str] = ()) -> Case:
    """The case with its integer and boolean inputs, other than `keep`, as constants of the model: what files hold."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    names = [name for name, value in case.feeds.items() if value.dtype.kind in "iub" and name not in keep]
    inputs = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(numpy_helper.from_array(case.feeds[name], name) for name in names)
    return Case(
        case.name, model, {name: value for name, value in case.feeds.items() if name not in names}, case.function
    )


def single(
    operator: str,
    feeds: dict[str, np.ndarray],
    *,
    outputs: int = 1,
    version: int = 21,
    name: str = "",
    dynamic: Collection[str] | None = None,
    function: Function | None = None,
    **attributes: object,
) -> Case:
    """A model of one node whose inputs, in order, are `feeds`; a name with an underscore in front stands for an
    absent input.

    Integer inputs are constants. With `dynamic`, no dimension of a float input is known, and the integer inputs it
    names are computed at run time.
    """
    present = {key: value for key, value in feeds.items() if not key.startswith("_")}
    inputs = [_declared(key, value, dynamic is not None) for key, value in present.items()]
    node = helper.make_node(
        operator, [key if key in present else "" for key in feeds], [f"y{i}" for i in range(outputs)], **attributes
    )
    result = helper.make_tensor_value_info("y0", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], operator, inputs, [result]),
        opset_imports=[helper.make_opsetid("", version)],
        ir_version=10,
    )
    label = name or "-".join(f"{key}={value}" for key, value in attributes.items()) or "plain"
    return frozen(
        Case(f"{operator}:{label}{'' if dynamic is None else ':dynamic'}", model, present, function), dynamic or ()
    )


def _declared(name: str, value: np.ndarray, dynamic: bool) -> onnx.ValueInfoProto:
    unknown = dynamic and value.dtype == np.float32
    shape = [f"{name}_{axis}" for axis in range(value.ndim)] if unknown else value.shape
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)
