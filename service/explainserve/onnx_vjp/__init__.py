"""Reverse-mode differentiation of ONNX graphs. Knows onnx and numpy, nothing of the service.

Start at `input_gradient` (gradient.py), then the walk (walk.py) and rules/ (the derivative table); registry.py holds
the three states of an operator.
"""

from explainserve.onnx_vjp.cut import Bypass, Cut, cut
from explainserve.onnx_vjp.final_activation import FinalActivation, final_activation
from explainserve.onnx_vjp.gaps import Gap, UnsupportedOperators
from explainserve.onnx_vjp.gradient import GradientGraph, find_gaps, input_gradient
from explainserve.onnx_vjp.heads import HEADS, HEADS_BEFORE_ACTIVATION, append_score_head
from explainserve.onnx_vjp.layers import Layer, layers
from explainserve.onnx_vjp.lrp import behind_layers
from explainserve.onnx_vjp.registry import (
    Composition,
    Refused,
    Rule,
    State,
    Table,
    ZeroGradient,
    composition,
    overridden,
    refused,
    rule,
    standard,
    state_of,
    zero_gradient,
)
from explainserve.onnx_vjp.scaling import scaled_gradient
from explainserve.onnx_vjp.shapes import Shape
from explainserve.onnx_vjp.split import SplitGradient, split
from explainserve.onnx_vjp.tables import (
    BOX_RULES,
    FIRST_LAYER_RULES,
    GRADIENT_RULES,
    LRP_RULES,
    PATTERN_RULES,
    RECTIFIER_RULES,
    has_rectifiers,
)

__all__ = [
    "BOX_RULES",
    "FIRST_LAYER_RULES",
    "GRADIENT_RULES",
    "HEADS",
    "HEADS_BEFORE_ACTIVATION",
    "LRP_RULES",
    "PATTERN_RULES",
    "RECTIFIER_RULES",
    "Bypass",
    "Composition",
    "Cut",
    "FinalActivation",
    "Gap",
    "GradientGraph",
    "Layer",
    "Refused",
    "Rule",
    "Shape",
    "SplitGradient",
    "State",
    "Table",
    "UnsupportedOperators",
    "ZeroGradient",
    "append_score_head",
    "behind_layers",
    "composition",
    "cut",
    "final_activation",
    "find_gaps",
    "has_rectifiers",
    "input_gradient",
    "layers",
    "overridden",
    "refused",
    "rule",
    "scaled_gradient",
    "split",
    "standard",
    "state_of",
    "zero_gradient",
]
