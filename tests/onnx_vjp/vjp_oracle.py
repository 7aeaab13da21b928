"""Vector-Jacobian products against central differences of onnx's reference evaluator in float64."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, defs, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from explainserve.onnx_vjp import GradientGraph, Table, input_gradient
from onnx_vjp.precision import FLOATS
from onnx_vjp.reference import Loop, Optional, Reference, Scan, Scatter

Function = Callable[..., "np.ndarray | Sequence[np.ndarray]"]
Feeds = dict[str, np.ndarray]

DIRECTIONS = 3
STEP = 1e-6
# The newest operator set that every version of onnxruntime in use accepts.
RUNTIME_OPSET = 23


@dataclass(frozen=True)
class Case:
    """A model with tensors in and out, and its input values.

    `function` is a float64 oracle for what the reference evaluator lacks or gets wrong; it takes the inputs in order
    and returns the float outputs. `random`: no output can be evaluated twice, and the gradient is zero. `controls` are
    float inputs that steer the operator and are no operand of a function that one differentiates; `positive` are those
    that must stay above zero.
    """

    name: str
    model: onnx.ModelProto
    feeds: Feeds
    function: Function | None = None
    random: bool = False
    controls: Collection[str] = field(default=())
    positive: Collection[str] = field(default=())

    @property
    def node(self) -> onnx.NodeProto:
        """The operator under test, where there is only one."""
        return self.model.graph.node[-1]

    @property
    def outputs(self) -> list[str]:
        """The float outputs."""
        return [value.name for value in self.model.graph.output if value.type.tensor_type.elem_type in FLOATS]

    @property
    def wrt(self) -> list[str]:
        """The float inputs that the gradient is taken of."""
        return [name for name, value in self.feeds.items() if _is_float(value) and name not in self.controls]


def _is_float(value: np.ndarray) -> bool:
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"


# -- running
# -----------------------------------------------------------------------------------------------------------------


def run(model: onnx.ModelProto, feeds: Feeds, outputs: list[str]) -> list[np.ndarray]:
    """onnxruntime, or the reference evaluator where it has no kernel."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(_accepted(model).SerializeToString(), options, ["CPUExecutionProvider"])
    except (
        ort.capi.onnxruntime_pybind11_state.NotImplemented,
        ort.capi.onnxruntime_pybind11_state.InvalidGraph,
        ort.capi.onnxruntime_pybind11_state.Fail,
    ):
        return run_reference(model, feeds, outputs)
    return list(session.run(outputs, feeds))


def run_reference(model: onnx.ModelProto, feeds: Feeds, outputs: list[str]) -> list[np.ndarray]:
    """onnx's reference evaluator, in the types that the model has."""
    with np.errstate(all="ignore"):
        return list(ReferenceEvaluator(model, new_ops=[Loop, Optional, Scan, Scatter]).run(outputs, feeds))


def _accepted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in an operator set that onnxruntime accepts, where its operators mean the same there."""
    newest = max((entry.version for entry in model.opset_import if entry.domain == ""), default=1)
    if newest <= RUNTIME_OPSET or any(_changed(node, newest) for node in model.graph.node):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for entry in copy.opset_import:
        entry.version = RUNTIME_OPSET if entry.domain == "" else entry.version
    copy.ir_version = min(copy.ir_version, 10)
    return copy


def _changed(node: onnx.NodeProto, version: int) -> bool:
    return node.domain == "" and defs.get_schema(node.op_type, version, "").since_version > RUNTIME_OPSET


# -- checking
# -----------------------------------------------------------------------------------------------------------------


def moved_off_kinks(case: Case, seed: int = 0) -> Feeds:
    """The case's inputs with a small seeded jitter, so that no tie or corner is hit exactly."""
    generator = np.random.default_rng(seed)

    def moved(name: str, value: np.ndarray) -> np.ndarray:
        if name not in case.wrt:
            return value
        jitter = (0.02 * generator.standard_normal(value.shape)).astype(value.dtype)
        return np.asarray(np.abs(value + jitter) + value.dtype.type(0.1) if name in case.positive else value + jitter)

    return {name: moved(name, value) for name, value in case.feeds.items()}


def check(case: Case, tolerance: float = 1e-3, *, rules: Table | None = None) -> GradientGraph:
    """Assert that the gradient of each float input, summed over all float outputs, agrees with float64 central
    differences along random directions.
    """
    gradient = input_gradient(case.model, case.wrt, case.outputs, rules=rules)
    feeds = moved_off_kinks(case)
    generator = np.random.default_rng(7)
    evaluate = _oracle(case)
    expected = evaluate(feeds)
    cotangents = [_cotangent(generator, value) for value in expected]

    def forward(moved: Feeds) -> float:
        values = evaluate({**feeds, **moved})
        return sum(float(np.sum(g[g != 0] * value[g != 0])) for g, value in zip(cotangents, values, strict=True))

    seeds = {gradient.cotangents[name]: g for name, g in zip(case.outputs, cotangents, strict=True)}
    names = [*case.outputs, *gradient.gradients.values()]
    values = run(gradient.model, {**feeds, **seeds}, names)
    for name, actual, value in zip([] if case.random else case.outputs, values, expected, strict=False):
        largest = float(np.abs(value[np.isfinite(value)]).max(initial=1.0))
        np.testing.assert_allclose(actual, value, 1e-3, 1e-4 * largest, err_msg=f"output {name}")
    values = values[len(case.outputs) :]
    for name, value in zip(gradient.gradients, values, strict=True):
        assert value.shape == feeds[name].shape, f"gradient of {name} has shape {value.shape}"
        assert value.dtype == feeds[name].dtype, f"gradient of {name} is {value.dtype}"
        assert np.all(np.isfinite(value)), f"gradient of {name} is not finite"
        if case.random:
            assert not np.any(value), f"gradient of {name} is not zero"
            continue
        for _ in range(DIRECTIONS if value.size else 0):
            direction = generator.standard_normal(value.shape)
            ahead, behind = (forward({name: _wide(feeds[name]) + sign * STEP * direction}) for sign in (1, -1))
            _compare(name, value * direction, (ahead - behind) / (2 * STEP), tolerance)
    return gradient


def _cotangent(generator: np.random.Generator, value: np.ndarray) -> np.ndarray:
    """Zero where the output is infinite, as masked scores are: there is no derivative there."""
    return np.where(np.isfinite(value), generator.standard_normal(value.shape), 0).astype(np.float32)


def _compare(name: str, products: np.ndarray, expected: float, tolerance: float) -> None:
    """The products' norm is what their sum is likely to be: where they happen to cancel, rounding must not count."""
    actual = float(products.sum())
    scale = max(abs(expected), float(np.linalg.norm(products)))
    assert abs(actual - expected) <= tolerance * scale + 1e-6, f"{name}: {actual} instead of {expected}"


def _oracle(case: Case) -> Callable[[Feeds], list[np.ndarray]]:
    """The case's float outputs in float64."""
    function = case.function
    if function is not None:
        return lambda feeds: _listed(function(*feeds.values()))
    reference = Reference(case.model)
    return lambda feeds: reference.run(case.outputs, {name: _wide(value) for name, value in feeds.items()})


def _listed(values: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
    return [values] if isinstance(values, np.ndarray | float) else list(values)


def _wide(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float64) if _is_float(value) else value


# -- making
# -----------------------------------------------------------------------------------------------------------------


def frozen(case: Case, keep: Collection[str] = ()) -> Case:
    """The case with its integer and boolean inputs, other than `keep`, as constants of the model: what files hold."""
    names = [name for name, value in case.feeds.items() if value.dtype.kind in "iub" and name not in keep]
    if not names:
        return case
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    inputs = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(numpy_helper.from_array(case.feeds[name], name) for name in names)
    feeds = {name: value for name, value in case.feeds.items() if name not in names}
    return replace(case, model=model, feeds=feeds)


# Float inputs that no gradient is offered for: they steer the operator, and it is not a function one differentiates.
CONTROLS = {"Resize": (1, 2, 3), "Upsample": (1,), "Dropout": (1,), "CastLike": (1,)}
# Where the operator needs a positive number.
POSITIVE = {
    "BatchNormalization": (4,),
    "Log": (0,),
    "Sqrt": (0,),
    "Pow": (0,),
    "Acosh": (0,),
    "ReduceLogSum": (0,),
    "Div": (1,),
}


def named(node: onnx.NodeProto, positions: dict[str, tuple[int, ...]]) -> list[str]:
    """The inputs of a node at the positions listed for its operator."""
    return [node.input[i] for i in positions.get(node.op_type, ()) if i < len(node.input)]


def single(
    operator: str,
    feeds: Feeds,
    *,
    outputs: int = 1,
    checked: int = 1,
    version: int = 21,
    name: str = "",
    domain: str = "",
    dynamic: Collection[str] | None = None,
    function: Function | None = None,
    **attributes: object,
) -> Case:
    """A model of one node whose inputs, in order, are `feeds`; a name with an underscore in front stands for an
    absent input.

    The first `checked` outputs are float and are differentiated. `version` is that of the operator's domain. Integer
    inputs are constants. With `dynamic`, no dimension of a float input is known, and the integer inputs it names are
    computed at run time.
    """
    present = {key: value for key, value in feeds.items() if not key.startswith("_")}
    inputs = [_declared(key, value, dynamic is not None) for key, value in present.items()]
    results = [f"y{i}" for i in range(outputs)]
    names = [key if key in present else "" for key in feeds]
    node = helper.make_node(operator, names, results, domain=domain, **attributes)
    imports = [helper.make_opsetid(domain, version), *([helper.make_opsetid("", 21)] if domain else [])]
    declared = [helper.make_tensor_value_info(result, TensorProto.FLOAT, None) for result in results[:checked]]
    graph = helper.make_graph([node], operator, inputs, declared)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    label = name or "-".join(f"{key}={value}" for key, value in attributes.items()) or "plain"
    label = f"{operator}:{label}{'' if dynamic is None else ':dynamic'}"
    controls, positive = named(node, CONTROLS), named(node, POSITIVE)
    case = Case(label, model, present, function, controls=controls, positive=positive)
    return frozen(case, dynamic or ())


def _declared(name: str, value: np.ndarray, dynamic: bool) -> onnx.ValueInfoProto:
    unknown = dynamic and value.dtype == np.float32
    shape = [f"{name}_{axis}" for axis in range(value.ndim)] if unknown else value.shape
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)
