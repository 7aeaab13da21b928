"""DeepLIFT's rescale rule (Shrikumar et al. 2017, arXiv:1704.02685, section 3.5) as a table of gradient rules.

The walk carries multipliers m instead of derivatives: m of a tensor times its difference to the baseline, summed over
its elements, is the difference of the output. Each rule keeps that sum: a function of one tensor has the slope of its
secant, a product of two the slope at their midpoint, and what is linear its derivative.
"""

from __future__ import annotations

from onnx import NodeProto

from explainserve.onnx_vjp import rules as _rules  # noqa: F401  (fills the registry)
from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import (
    Formula,
    Gradients,
    Key,
    Refusal,
    Refused,
    Rule,
    State,
    Table,
    standard,
)

# Smaller differences have the slope of the tangent: their quotient would be rounding.
SMALLEST_DIFFERENCE = 1e-7

_LINEAR = frozenset(
    {
        *("Add", "Cast", "CastLike", "Concat", "CumSum", "DepthToSpace", "Expand", "Flatten", "Identity"),
        *("Mean", "Neg", "Pad", "ReduceMean", "ReduceSum", "Reshape", "Resize", "Slice", "SpaceToDepth", "Split"),
        *("AveragePool", "GlobalAveragePool", "Squeeze", "Sub", "Sum", "Tile", "Transpose", "Trilu", "Unsqueeze"),
        *("Gather", "GatherElements", "GatherND"),
    }
)
_BILINEAR = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", "Mul"})
# The inputs that are multiplied; what else there is is added. Of other operators, all are.
_FACTORS = {"BatchNormalization": (0, 1, 3), "Conv": (0, 1), "ConvTranspose": (0, 1), "Gemm": (0, 1)}
_OF_ONE_TENSOR = frozenset(
    {
        *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Celu", "Clip", "Cos", "Cosh", "Elu", "Erf", "Exp"),
        *("Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "PRelu", "Pow", "Reciprocal"),
        *("Relu", "Selu", "Shrink", "Sigmoid", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh"),
        "ThresholdedRelu",
    }
)
# They have function bodies of operators that have rules here.
_EXPANDED = frozenset(
    {"GroupNormalization", "LayerNormalization", "MeanVarianceNormalization", "ReduceSumSquare", "RMSNormalization"}
)


def _difference(op: Emitter, node: Node, value: str) -> str:
    return op.Sub(value, node.twin(value))


def _varying(node: Node) -> list[int]:
    """The positions of the inputs that differ between instance and baseline."""
    return [index for index, name in enumerate(node.inputs) if name and node.twin(name) != name]


def _secant(op: Emitter, dx: str, contribution: str, tangent: str) -> str:
    """contribution / dx, and the tangent's value where dx vanishes."""
    apart = op.Greater(op.Abs(dx), SMALLEST_DIFFERENCE)
    return op.Where(apart, op.Div(contribution, op.Where(apart, dx, 1)), tangent)


def _rescaled(derivative: Formula) -> Formula:
    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        varying = _varying(node)
        if len(varying) != 1:
            raise Refusal(
                f"DeepLIFT has no rule for {node.proto.op_type} of several tensors", "use a method of true gradients"
            )
        tangents = derivative(op, node, g)
        dx, dy = (_difference(op, node, value) for value in (node.inputs[varying[0]], node.outputs[0]))
        secant = _secant(op, dx, op.Mul(g, dy), str(tangents[varying[0]]))
        return [secant if index in varying else None for index in range(len(node.inputs))]

    return formula


def _at_midpoint(derivative: Formula) -> Formula:
    """The derivative of a bilinear operator, with every factor halfway between instance and baseline."""

    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        factors = _FACTORS.get(node.proto.op_type, range(len(node.inputs)))
        varying = [index for index in _varying(node) if index in factors]
        if len(varying) > 2:
            raise Refusal("DeepLIFT has no rule for a product of three tensors", "use a method of true gradients")
        middle = {name: op.Mul(op.Add(name, node.twin(name)), 0.5) for name in (node.inputs[i] for i in varying)}
        halfway = NodeProto()
        halfway.CopyFrom(node.proto)
        halfway.input[:] = [middle.get(name, name) for name in node.inputs] if len(varying) > 1 else node.inputs
        wanted = {name for index, name in enumerate(halfway.input) if node.differentiates(index)}
        return derivative(op, Node(halfway, frozenset(wanted)), g)

    return formula


def _in_evaluation(formula: Formula) -> Formula:
    """In training another mask is drawn for the baseline, and statistics differ there."""

    def checked(op: Emitter, node: Node, g: str) -> Gradients:
        if node.attribute("training_mode", 0) or op.graph.is_random(node.proto):
            raise Refusal("DeepLIFT has no rule for training mode", "export the model in evaluation mode")
        return formula(op, node, g)

    return checked


def _batch_normalization(derivative: Formula) -> Formula:
    """(x - mean) scale / sqrt(variance + epsilon) + bias: a product of two factors, of a given variance."""
    product = _in_evaluation(_at_midpoint(derivative))

    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        if 4 in _varying(node):
            raise Refusal("the variance may differ at the baseline", "use a method of true gradients")
        return product(op, node, g)

    return formula


def _div(op: Emitter, node: Node, g: str) -> Gradients:
    """a / b is a times 1/b: 1/b at its midpoint for a, and the secant of 1/b, -1/(b b'), at the midpoint of a for b."""
    a, b = node.inputs
    low, high = op.Reciprocal(b), op.Reciprocal(node.twin(b))
    middle = op.Mul(op.Add(a, node.twin(a)), 0.5)
    return op.Mul(g, op.Mul(op.Add(low, high), 0.5)), op.Neg(op.Mul(op.Mul(g, middle), op.Mul(low, high)))


def _log_sum_exp(op: Emitter, node: Node, axis: int) -> tuple[str, str]:
    """log sum exp(x) along an axis, and its multiplier for x: the secant of log at sum exp times that of exp at x."""
    x, twin = node.inputs[0], node.twin(node.inputs[0])
    top = op.ReduceMax(op.Max(x, twin), [axis], keepdims=1)
    e, e_twin = op.Exp(op.Sub(x, top)), op.Exp(op.Sub(twin, top))
    total, total_twin = (op.ReduceSum(value, [axis], keepdims=1) for value in (e, e_twin))
    log, log_twin = op.Log(total), op.Log(total_twin)
    outer = _secant(op, op.Sub(total, total_twin), op.Sub(log, log_twin), op.Reciprocal(total))
    inner = _secant(op, op.Sub(x, twin), op.Sub(e, e_twin), e)
    return op.Sub(log, log_twin), op.Mul(outer, inner)


def _softmax(op: Emitter, node: Node, g: str) -> Gradients:
    """y = exp(u) with u = x - log sum exp(x)."""
    y, axis = node.outputs[0], node.attribute("axis", -1)
    d_log, slope = _log_sum_exp(op, node, axis)
    du = op.Sub(_difference(op, node, node.inputs[0]), d_log)
    g = _secant(op, du, op.Mul(g, _difference(op, node, y)), op.Mul(g, y))
    return (op.Sub(g, op.Mul(op.ReduceSum(g, [axis], keepdims=1), slope)),)


def _log_softmax(op: Emitter, node: Node, g: str) -> Gradients:
    axis = node.attribute("axis", -1)
    _, slope = _log_sum_exp(op, node, axis)
    return (op.Sub(g, op.Mul(op.ReduceSum(g, [axis], keepdims=1), slope)),)


def _of_a_maximum(derivative: Formula) -> Formula:
    """What the larger of both maxima exceeds the other by is due to its own position."""

    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        x, y = node.inputs[0], node.outputs[0]
        twin = Node(op.graph.producers[node.twin(y)], frozenset())
        larger = op.Max(y, node.twin(y))
        gained = derivative(op, node, op.Mul(g, op.Sub(larger, node.twin(y))))[0]
        lost = derivative(op, twin, op.Mul(g, op.Sub(y, larger)))[0]
        tangent = str(derivative(op, node, g)[0])
        secant = _secant(op, _difference(op, node, x), op.Add(gained, lost), tangent)
        return [secant, *[None] * (len(node.inputs) - 1)]

    return formula


def _where(derivative: Formula) -> Formula:
    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        if 0 in _varying(node):
            raise Refusal("the condition of Where may differ at the baseline", "use a method of true gradients")
        return derivative(op, node, g)

    return formula


_RULES: dict[str, Formula] = {"Div": _div, "Softmax": _softmax, "LogSoftmax": _log_softmax}


def _changed(operator: str, state: Rule) -> State:
    if operator in _RULES:
        return Rule(_RULES[operator], state.broadcasts, compares=True)
    if operator in _LINEAR:
        return state
    wrap = next((w for w, operators in _WRAPPED if operator in operators), None)
    if wrap is not None:
        return Rule(wrap(state.formula), state.broadcasts, state.every_output, compares=True)
    return Refused("DeepLIFT has no rule for it", "use a method of true gradients")


_WRAPPED = (
    (_at_midpoint, _BILINEAR),
    (_rescaled, _OF_ONE_TENSOR),
    (_of_a_maximum, frozenset({"GlobalMaxPool", "MaxPool", "ReduceMax"})),
    (_batch_normalization, frozenset({"BatchNormalization"})),
    (_in_evaluation, frozenset({"Dropout"})),
    (_where, frozenset({"Where"})),
)


def rescale_rule(table: Table | None = None) -> Table:
    """The rescale rule for every operator of `table` (the true derivatives by default) that has one; the others are
    refused.

    Multipliers take the place of gradients, and a gradient graph gets one more input per `wrt` for its baseline.
    """
    changed: dict[Key, State] = {}
    for key, state in (standard() if table is None else table).items():
        domain, operator, _ = key
        if not domain and operator in _EXPANDED:
            continue
        changed[key] = _changed(operator, state) if isinstance(state, Rule) else state
    return Table(changed)
