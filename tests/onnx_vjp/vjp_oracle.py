"""Vector-Jacobian products against central differences of onnx's reference evaluator in float64."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, defs, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from explainserve.onnx_vjp import GradientGraph, Table, input_gradient
from onnx_vjp.precision import FLOATS, subgraphs
from onnx_vjp.reference import Loop, Optional, Reference, Scan, Scatter

Function = Callable[..., "np.ndarray | Sequence[np.ndarray]"]
Feeds = dict[str, np.ndarray]

DIRECTIONS = 3
STEP = 1e-6
# Per element, where cotangents are about 1: what float32 leaves of a saturated function's derivative. Where a gradient
# agrees by this allowance only, the same graph in float64 has to agree but for the rounding of the differences, which
# grows with the values that they are taken of.
FLOAT32_ROUNDING = 1e-6
DIFFERENCE_ROUNDING = 1e-9
# An operator set that every version of onnxruntime in use accepts.
RUNTIME_OPSET = 21


@dataclass(frozen=True)
class Case:
    """A model with tensors in and out, and its input values.

    `function` is a float64 oracle for what the reference evaluator lacks or gets wrong; it takes the inputs in order
    and returns the float outputs. `random`: no output can be evaluated twice, and the gradient is zero. `seeded`: the
    reference evaluator can, and runs the gradient too, since others draw other numbers of its seed. `controls` are
    float inputs that steer the operator and are no operand of a function that one differentiates; `positive` are those
    that must stay above zero.
    """

    name: str
    model: onnx.ModelProto
    feeds: Feeds
    function: Function | None = None
    random: bool = False
    seeded: bool = False
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
    return value.dtype.name in ("float16", "float32", "float64", "bfloat16")


# -- running
# -----------------------------------------------------------------------------------------------------------------


def run(model: onnx.ModelProto, feeds: Feeds, outputs: list[str]) -> list[np.ndarray]:
    """onnxruntime, or the reference evaluator where it has no kernel or takes no such arrays from numpy."""
    if any(value.dtype.name == "bfloat16" for value in feeds.values()):
        return run_reference(model, feeds, outputs)
    try:
        return _by_onnxruntime(model, feeds, outputs)
    except _NoKernel:
        return run_reference(model, feeds, outputs)


def run_reference(model: onnx.ModelProto, feeds: Feeds, outputs: list[str]) -> list[np.ndarray]:
    """onnx's reference evaluator, in the types that the model has."""
    with np.errstate(all="ignore"):
        return list(ReferenceEvaluator(model, new_ops=[Loop, Optional, Scan, Scatter]).run(outputs, feeds))


class _NoKernel(Exception):
    """onnxruntime does not accept the model."""


def _by_onnxruntime(model: onnx.ModelProto, feeds: Feeds, outputs: list[str]) -> list[np.ndarray]:
    return list(_session(_accepted(model)).run(outputs, feeds))


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    states = ort.capi.onnxruntime_pybind11_state
    try:
        return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except (states.NotImplemented, states.InvalidGraph, states.Fail) as error:
        raise _NoKernel(str(error)) from error


def _accepted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the oldest operator set in which its operators mean the same: onnxruntime lags behind onnx."""
    version = _version(model)
    needed = max((_since(node, version) for node in model.graph.node), default=1)
    return _at(model, min(version, max(needed, RUNTIME_OPSET)))


def _version(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain == ""), default=1)


def _since(node: onnx.NodeProto, version: int) -> int:
    inner = [child for attribute in node.attribute for graph in subgraphs(attribute) for child in graph.node]
    own = defs.get_schema(node.op_type, version, "").since_version if node.domain == "" else 1
    return max([own, *(_since(child, version) for child in inner)])


def _at(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    if version == _version(model):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for entry in copy.opset_import:
        entry.version = version if entry.domain == "" else entry.version
    copy.ir_version = min(copy.ir_version, 11)
    return copy


def gradients(
    case: Case, gradient: GradientGraph, feeds: Feeds, cotangents: Feeds
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The forward outputs and the gradients. Where onnxruntime runs the model, it must run its gradient graph too."""
    names = [*case.outputs, *gradient.gradients.values()]
    feeds = {**feeds, **{gradient.cotangents[name]: value for name, value in cotangents.items()}}
    accepted = _accepted(gradient.model)
    if not case.seeded and _runs(_at(case.model, min(_version(case.model), _version(accepted)))):
        values = list(_session(accepted).run(names, feeds))
    else:
        values = run_reference(gradient.model, feeds, names)
    return values[: len(case.outputs)], values[len(case.outputs) :]


def _runs(model: onnx.ModelProto) -> bool:
    try:
        _session(model)
    except _NoKernel:
        return False
    return True


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


def check(case: Case, tolerance: float = 1e-3, *, rules: Table | None = None) -> bool:
    """Assert that the gradient of each float input, summed over all float outputs, agrees with float64 central
    differences along random directions, and that the outputs are those of the model.

    Returns whether any gradient differs from zero.
    """
    gradient = input_gradient(case.model, case.wrt, case.outputs, rules=rules)
    feeds = moved_off_kinks(case)
    generator = np.random.default_rng(7)
    evaluate = _oracle(case)
    expected = evaluate(feeds)
    cotangents = [_cotangent(generator, value) for value in expected]
    outputs, values = gradients(case, gradient, feeds, dict(zip(case.outputs, cotangents, strict=True)))
    for name, value in zip(case.wrt, values, strict=True):
        _check_form(name, value, feeds[name])
    if case.random:
        assert not any(np.any(value) for value in values), "a random output has a gradient"
        return False
    for name, output, value in zip(case.outputs, outputs, expected, strict=True):
        largest = float(np.abs(value[np.isfinite(value)]).max(initial=1.0))
        np.testing.assert_allclose(output, value, 1e-3, 1e-4 * largest, err_msg=f"output {name}")

    def forward(moved: Feeds) -> float:
        results = evaluate({**feeds, **moved})
        return sum(float(np.sum(g[g != 0] * value[g != 0])) for g, value in zip(cotangents, results, strict=True))

    wide = cache(lambda: _in_float64(case, gradient, feeds, cotangents))
    for name, value in zip(case.wrt, values, strict=True):
        for _ in range(DIRECTIONS if value.size else 0):
            direction = generator.standard_normal(value.shape)
            ahead, behind = (forward({name: _wide(feeds[name]) + sign * STEP * direction}) for sign in (1, -1))
            expected, rounding = (ahead - behind) / (2 * STEP), DIFFERENCE_ROUNDING * max(abs(ahead), 1.0)
            if not _agrees(value, direction, expected, tolerance, rounding):
                _compare(name, value, direction, expected, tolerance, FLOAT32_ROUNDING)
                _compare(f"{name} in float64", wide()[name], direction, expected, tolerance, rounding)
    return any(np.any(value) for value in values)


def check_types(own: Case, wide: Case) -> None:
    """Assert that the gradient in the types that a case has agrees with the one in float32, as far as they tell."""
    gradients = [input_gradient(entry.model, entry.wrt, entry.outputs) for entry in (own, wide)]
    feeds, generator = moved_off_kinks(own), np.random.default_rng(1)
    outputs = run(own.model, feeds, own.outputs)
    cotangents = [generator.standard_normal(np.shape(value)).astype(value.dtype) for value in outputs]
    results = [
        _results(entry, gradient, feeds, cotangents) for entry, gradient in zip((own, wide), gradients, strict=True)
    ]
    coarsest = max(EPSILON[value.dtype.name] for value in feeds.values() if _is_float(value))
    for name, value, expected in zip(own.wrt, *results, strict=True):
        assert value.dtype == feeds[name].dtype, f"gradient of {name} is {value.dtype}"
        error = np.linalg.norm(value.astype(np.float64) - expected)
        allowed = 20 * coarsest * max(float(np.linalg.norm(expected)), 1e-3 * expected.size**0.5)
        assert error <= allowed, f"gradient of {name} is off by {error}, not by {allowed} at most"


EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-18, "float64": 2.0**-18}


def _results(case: Case, gradient: GradientGraph, feeds: Feeds, cotangents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The gradients at inputs and cotangents that are brought to the types of the model."""
    given = {**feeds, **{gradient.cotangents[name]: g for name, g in zip(case.outputs, cotangents, strict=True)}}
    for value in gradient.model.graph.input:
        kind = value.type.tensor_type.elem_type
        given[value.name] = given[value.name].astype(helper.tensor_dtype_to_np_dtype(kind))
    return run(gradient.model, given, list(gradient.gradients.values()))


def _check_form(name: str, gradient: np.ndarray, value: np.ndarray) -> None:
    assert gradient.shape == value.shape, f"gradient of {name} has shape {gradient.shape}"
    assert gradient.dtype == value.dtype, f"gradient of {name} is {gradient.dtype}"
    assert np.all(np.isfinite(gradient)), f"gradient of {name} is not finite"


def _cotangent(generator: np.random.Generator, value: np.ndarray) -> np.ndarray:
    """Zero where the output is infinite, as masked scores are: there is no derivative there."""
    return np.where(np.isfinite(value), generator.standard_normal(value.shape), 0).astype(np.float32)


def _in_float64(case: Case, gradient: GradientGraph, feeds: Feeds, cotangents: Sequence[np.ndarray]) -> Feeds:
    """The gradients by the reference evaluator in float64."""
    given = {**feeds, **{gradient.cotangents[name]: g for name, g in zip(case.outputs, cotangents, strict=True)}}
    results = Reference(gradient.model).run(
        list(gradient.gradients.values()), {name: _wide(value) for name, value in given.items()}
    )
    return dict(zip(case.wrt, results, strict=True))


def _agrees(gradient: np.ndarray, direction: np.ndarray, expected: float, tolerance: float, rounding: float) -> bool:
    """The products' norm is what their sum is likely to be: where they happen to cancel, rounding must not count."""
    products = gradient.astype(np.float64) * direction
    scale = max(abs(expected), float(np.linalg.norm(products)))
    return abs(float(products.sum()) - expected) <= tolerance * scale + rounding * float(np.linalg.norm(direction))


def _compare(
    name: str, gradient: np.ndarray, direction: np.ndarray, expected: float, tolerance: float, rounding: float
) -> None:
    actual = float(np.sum(gradient.astype(np.float64) * direction))
    agrees = _agrees(gradient, direction, expected, tolerance, rounding)
    assert agrees, f"gradient of {name}: {actual} instead of {expected}"


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
