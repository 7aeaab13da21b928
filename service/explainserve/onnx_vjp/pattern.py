"""PatternNet and PatternAttribution (Kindermans et al. 2018, arXiv:1705.05598, section 4) as tables of gradient rules.

The backward pass starts from the value of what is explained. In a linear layer the pattern a of each output, the
direction of the signal in its input, takes the place of the weights w: PatternNet goes back by a and estimates the
signal, PatternAttribution goes back by w * a and says how much of the output the signal makes. All else has its
derivative.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from explainserve.onnx_vjp import rules as _rules  # noqa: F401  (fills the registry)
from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.lrp import CONVOLUTIONS, DENSE, Layer, lrp_epsilon
from explainserve.onnx_vjp.registry import Formula, Gradients, Key, Refusal, Refused, Rule, State, Table, standard

Patterns = Mapping[str, NDArray[np.floating]]
"""The pattern of each linear layer, in the shape of its weights, by the name of its output."""


def pattern_net(patterns: Patterns) -> Table:
    """Back by the patterns."""
    return _table(patterns, weighted=False)


def pattern_attribution(patterns: Patterns) -> Table:
    """Back by the patterns times the weights."""
    return _table(patterns, weighted=True)


def _table(patterns: Patterns, *, weighted: bool) -> Table:
    """What LRP has no rule for has none here."""
    refused = {key for key, state in lrp_epsilon().items() if isinstance(state, Refused)}
    states: dict[Key, State] = {}
    for key, state in standard().items():
        domain, operator, _ = key
        if key in refused:
            states[key] = Refused("patterns are not defined on it", "use a method of true gradients")
        elif isinstance(state, Rule) and not domain and operator in CONVOLUTIONS | DENSE:
            states[key] = Rule(_by_pattern(state.formula, patterns, weighted), state.broadcasts)
        elif isinstance(state, Rule) and operator in ("Div", "Mul"):
            states[key] = Rule(_by_constant(state.formula), state.broadcasts)
        else:
            states[key] = state
    return Table(states, relevance=True)


def _by_pattern(derivative: Formula, patterns: Patterns, weighted: bool) -> Formula:
    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        layer = Layer(op, node, derivative)
        pattern = op.array(_pattern(op, node, layer, patterns).astype(op.numpy_dtype(layer.w)))
        back = layer.backward(g, op.Mul(layer.w, pattern) if weighted else pattern)
        return [back if index == layer.position else None for index in range(len(node.inputs))]

    return formula


def _pattern(op: Emitter, node: Node, layer: Layer, patterns: Patterns) -> NDArray[np.floating]:
    name, shape = node.outputs[0], op.shape(layer.w)
    pattern = patterns.get(name)
    if pattern is None:
        raise Refusal(f"there is no pattern for layer '{name}'", f"add an array '{name}' of shape {shape}")
    if pattern.shape != shape:
        raise Refusal(
            f"the pattern of layer '{name}' has shape {pattern.shape}, its weights {shape}",
            "give it that of the weights",
        )
    return pattern


def _by_constant(derivative: Formula) -> Formula:
    def formula(op: Emitter, node: Node, g: str) -> Gradients:
        if sum(node.differentiates(index) for index in range(len(node.inputs))) > 1:
            raise Refusal("patterns are not defined on a product of tensors", "use a method of true gradients")
        return derivative(op, node, g)

    return formula
