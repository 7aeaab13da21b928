"""Gradient rules: tables that replace the derivative of rectifiers and leave everything else as it is.

Guided backpropagation (Springenberg et al. 2015, arXiv:1412.6806) passes only positive cotangents through the
rectifier's derivative; the deconvnet (Zeiler and Fergus 2014, arXiv:1311.2901) applies the rectifier to the cotangent
instead. DeepLIFT's rescale rule and those of LRP and of patterns have contracts of their own: see deeplift.py, lrp.py
and pattern.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import onnx

from explainserve.onnx_vjp import rules as _rules  # noqa: F401  (fills the registry)
from explainserve.onnx_vjp.deeplift import rescale_rule
from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.gradient import Weights, find_gaps
from explainserve.onnx_vjp.lrp import (
    lrp_alpha_beta,
    lrp_composite,
    lrp_deep_taylor,
    lrp_epsilon,
    lrp_epsilon_gamma_box,
    lrp_gamma,
)
from explainserve.onnx_vjp.pattern import pattern_attribution, pattern_net
from explainserve.onnx_vjp.registry import Formula, Gradients, Key, Refusal, Rule, State, Table, overridden, standard

_RECTIFIERS = frozenset({"Celu", "Elu", "LeakyRelu", "PRelu", "Relu", "Selu", "ThresholdedRelu"})


def _guided(derivative: Formula) -> Formula:
    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        return derivative(op, node, op.Relu(g))

    return formula


def _deconvnet(derivative: Formula) -> Formula:
    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        """Only the rectified input is replaced: a learned slope keeps its derivative."""
        gradients = list(derivative(op, node, g))
        gradients[_rectified(op, node)] = op.Relu(g)
        return gradients

    return formula


def _rectified(op: Emitter, node: Node) -> int:
    """The position of the input that is rectified: the first, but for Max with zero in front."""
    return int(node.proto.op_type == "Max" and _is_zero(op, node.input(0)))


def _is_zero(op: Emitter, value: str) -> bool:
    constant = op.constant(value)
    return constant is not None and not constant.any()


# Clip rectifies when its lower bound is zero (ReLU6), Max when one of two operands is; otherwise they keep their
# derivative.
_RECTIFYING: Mapping[str, Callable[[Emitter, Node], bool]] = {
    "Clip": lambda op, node: _is_zero(op, node.input(1)),
    "Max": lambda op, node: len(node.inputs) == 2 and any(_is_zero(op, value) for value in node.inputs),
}


def _where_rectifying(operator: str, changed: Formula, derivative: Formula) -> Formula:
    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        return (changed if _RECTIFYING[operator](op, node) else derivative)(op, node, g)

    return formula


def _for_rectifiers(table: Table, change: Callable[[Formula], Formula]) -> Table:
    changed: dict[Key, State] = {}
    for key, state in table.items():
        domain, operator, _ = key
        if domain or not isinstance(state, Rule):
            continue
        if operator in _RECTIFIERS:
            changed[key] = replace(state, formula=change(state.formula))
        elif operator in _RECTIFYING:
            changed[key] = replace(state, formula=_where_rectifying(operator, change(state.formula), state.formula))
    return overridden(table, changed)


RECTIFIER_RULES = frozenset({"guided_backpropagation", "deconvnet"})
"""Rules that are defined on rectifiers, and change nothing else."""


def has_rectifiers(
    model: onnx.ModelProto, wrt: Sequence[str], of: str | Sequence[str], *, weights: Weights | None = None
) -> bool:
    """Whether any node between `wrt` and `of` rectifies, so that rules for rectifiers change anything.

    Raises ValueError, TypeError and MemoryError as `input_gradient` does.
    """
    gaps = find_gaps(model, wrt, of, rules=_for_rectifiers(standard(), _pointed_out), weights=weights)
    return any(gap.reason == _RECTIFIES for gap in gaps)


_RECTIFIES = "it is a rectifier"


def _pointed_out(_: Formula) -> Formula:
    """A rule by which each rectifier on the way is told as a gap."""

    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        raise Refusal(_RECTIFIES, "")

    return formula


_OF_LRP: Mapping[str, Callable[..., Table]] = {
    "lrp_epsilon": lrp_epsilon,
    "lrp_gamma": lrp_gamma,
    "lrp_alpha_beta": lrp_alpha_beta,
    "lrp_composite": lrp_composite,
    "lrp_deep_taylor": lrp_deep_taylor,
    "lrp_epsilon_gamma_box": lrp_epsilon_gamma_box,
}

LRP_RULES = frozenset(_OF_LRP)
"""Rules of layer-wise relevance propagation, which refuse the same operators."""

BOX_RULES = frozenset({"lrp_deep_taylor", "lrp_epsilon_gamma_box"})
"""Those among them that take the `bounds` of all inputs."""

FIRST_LAYER_RULES = BOX_RULES | {"lrp_composite"}
"""Those with a rule for first layers, which take the names of `hidden` tensors: what is explained is no input there."""

PATTERN_RULES = frozenset({"pattern_attribution", "pattern_net"})
"""Rules that take the `patterns` of all linear layers, and refuse the same operators."""

GRADIENT_RULES: Mapping[str, Callable[..., Table]] = {
    "standard": standard,
    "guided_backpropagation": lambda: _for_rectifiers(standard(), _guided),
    "deconvnet": lambda: _for_rectifiers(standard(), _deconvnet),
    "deeplift_rescale": rescale_rule,
    **_OF_LRP,
    "pattern_net": pattern_net,
    "pattern_attribution": pattern_attribution,
}
"""What makes the table of a rule, of the rule's options."""
