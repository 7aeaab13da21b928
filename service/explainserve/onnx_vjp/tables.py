"""Gradient rules: tables that replace the derivative of rectifiers and leave everything else as it is.

Guided backpropagation (Springenberg et al. 2015, arXiv:1412.6806) passes only positive cotangents through the
rectifier's derivative; the deconvnet (Zeiler and Fergus 2014, arXiv:1311.2901) applies the rectifier to the cotangent
instead. DeepLIFT's rescale rule has contracts of its own: see deeplift.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from explainserve.onnx_vjp import rules as _rules  # noqa: F401  (fills the registry)
from explainserve.onnx_vjp.deeplift import rescale_rule
from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Formula, Gradients, Key, Rule, State, Table, overridden, standard

_RECTIFIERS = frozenset({"Celu", "Elu", "LeakyRelu", "PRelu", "Relu", "Selu", "ThresholdedRelu"})


def _guided(derivative: Formula) -> Formula:
    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        return derivative(op, node, op.Relu(g))

    return formula


def _deconvnet(derivative: Formula) -> Formula:
    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        """Only the rectified input is replaced: a learned slope keeps its derivative."""
        return op.Relu(g), *(derivative(op, node, g)[1:] if len(node.inputs) > 1 else ())

    return formula


def _clip_where_rectifier(changed: Formula, derivative: Formula) -> Formula:
    """Clip rectifies when its lower bound is zero (ReLU6); any other Clip keeps its derivative."""

    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        low = op.constant(node.input(1))
        return (changed if low is not None and not low.any() else derivative)(op, node, g)

    return formula


def _for_rectifiers(table: Table, change: Callable[[Formula], Formula]) -> Table:
    changed: dict[Key, State] = {}
    for key, state in table.items():
        _, operator, _ = key
        if not isinstance(state, Rule):
            continue
        if operator in _RECTIFIERS:
            changed[key] = Rule(change(state.formula), state.broadcasts, state.every_output)
        elif operator == "Clip":
            changed[key] = Rule(
                _clip_where_rectifier(change(state.formula), state.formula), state.broadcasts, state.every_output
            )
    return overridden(table, changed)


GRADIENT_RULES: Mapping[str, Table] = {
    "standard": standard(),
    "guided_backpropagation": _for_rectifiers(standard(), _guided),
    "deconvnet": _for_rectifiers(standard(), _deconvnet),
    "deeplift_rescale": rescale_rule(),
}
