"""Which gradient rules an ONNX model can follow, and the tables that they are followed by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from explainserve.backends import pattern_file
from explainserve.backends.contract import (
    NO_RECTIFIERS,
    OperatorGap,
    no_value_range,
)
from explainserve.backends.onnx_weights import Weights
from explainserve.model_config import Precision
from explainserve.onnx_vjp import (
    BOX_RULES,
    FIRST_LAYER_RULES,
    GRADIENT_RULES,
    LRP_RULES,
    PATTERN_RULES,
    RECTIFIER_RULES,
    Gap,
    Table,
    append_score_head,
    behind_layers,
    find_gaps,
    has_rectifiers,
)
from explainserve.plan import STANDARD, GradientRule
from explainserve.signature import Signature

_SEARCHED = {
    STANDARD.name: STANDARD.name,
    "deeplift_rescale": "deeplift_rescale",
    **dict.fromkeys(LRP_RULES, "lrp_epsilon"),
    **dict.fromkeys(PATTERN_RULES, "pattern_net"),
}
"""Rules that not every operator has, by the one whose gaps are theirs too."""


class OnnxRules:
    """The gradient rules of a model.

    Args:
        patterns: of linear layers, by name.
        explained: names of the tensors that are explained where a request says nothing else.
    """

    def __init__(
        self,
        graph: onnx.ModelProto,
        signature: Signature,
        weights: Weights,
        patterns: Mapping[str, NDArray[np.float32]],
        precision: Precision,
        explained: Sequence[str],
    ) -> None:
        self._graph = graph
        self._signature = signature
        self._weights = weights
        self._patterns = patterns
        self._precision = precision
        self._explained = explained
        self._gaps: dict[str, str] = {}

    @property
    def pattern_bytes(self) -> int:
        """Of the patterns."""
        return sum(pattern.nbytes for pattern in self._patterns.values())

    def refusals(self, layers: Sequence[str]) -> dict[str, str]:
        """See `contract.LoadedModel.gradient_rules`; rules for rectifiers towards `layers` where no input moves."""
        if self._precision is Precision.FLOAT16:
            return {STANDARD.name: ""}
        return {
            **dict.fromkeys((STANDARD.name, "deeplift_rescale", *LRP_RULES), ""),
            **dict.fromkeys(RECTIFIER_RULES, self._unrectified(self._signature.differentiable_inputs or layers)),
            **dict.fromkeys(BOX_RULES, no_value_range(self._signature)),
            **dict.fromkeys(PATTERN_RULES, "" if self._patterns else pattern_file.MISSING),
        }

    def gap(self, rule: str) -> str:
        """See `contract.LoadedModel.rule_gap`; inputs have none of the standard rule, or are not explained by any."""
        searched = _SEARCHED.get(rule)
        if searched is None or self._precision is Precision.FLOAT16 or (rule in PATTERN_RULES and not self._patterns):
            return ""
        if searched not in self._gaps:
            known = rule == STANDARD.name and self._signature.differentiable_inputs
            self._gaps[searched] = "" if known else self._first_gap(searched)
        return self._gaps[searched]

    def _unrectified(self, wrt: Sequence[str]) -> str:
        """Why rules for rectifiers are not defined, or ""."""
        outputs, weights = self._signature.differentiable_outputs, self._weights.of(self._graph)
        try:
            return "" if has_rectifiers(self._graph, wrt, outputs, weights=weights) else NO_RECTIFIERS
        except ValueError as error:
            return str(error)

    def _first_gap(self, rule: str) -> str:
        """Of a rule that not every operator has, or ""; known only towards the first output, or what the softmax or
        sigmoid takes in which that ends."""
        if not (self._explained and self._signature.differentiable_outputs):
            return ""
        wrt, output = self._explained, self._signature.differentiable_outputs[0]
        head = self._signature.output(output).head_before_activation
        graph, score = append_score_head(self._graph, output, head.value, axis=1)
        table, weights = self.table(GradientRule(rule), wrt), self._weights.of(graph)
        try:
            gaps = find_gaps(graph, wrt, score, rules=table, weights=weights)
        except ValueError as error:
            return str(error)
        return str(operator_gaps(gaps[:1])[0]) if gaps else ""

    def table(self, rule: GradientRule, wrt: Sequence[str]) -> Table:
        """What a rule is followed by, towards the tensors `wrt`."""
        return GRADIENT_RULES[rule.name](**self._rule_options(rule, wrt))

    def stated(self, rule: GradientRule, wrt: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """A rule and all that its table is made by, patterns by their digest."""
        options = self._rule_options(rule, wrt)
        if rule.name in PATTERN_RULES:
            options["patterns"] = pattern_file.digest(self._patterns)
        return rule.name, options

    def _rule_options(self, rule: GradientRule, wrt: Sequence[str]) -> dict[str, Any]:
        """What the table of a rule is made by: its own options, what the model's owner states, what is explained."""
        options: dict[str, Any] = dict(rule.options)
        if rule.name in BOX_RULES:
            stated = {name: self._signature.input(name).bounds for name in self._signature.differentiable_inputs}
            options["bounds"] = {name: [end.tolist() for end in ends] for name, ends in stated.items() if ends}
        if rule.name in FIRST_LAYER_RULES:
            options["hidden"] = self._hidden(wrt)
        if rule.name in PATTERN_RULES:
            options["patterns"] = self._patterns
        return options

    def _hidden(self, wrt: Sequence[str]) -> list[str]:
        """Those among layers that are explained which are behind other ones."""
        inputs = {value.name for value in self._graph.graph.input}
        if inputs.issuperset(wrt):
            return []
        behind = behind_layers(self._graph.graph.node, inputs)
        return [name for name in wrt if name in behind]


def gradient_gaps(graph: onnx.ModelProto, signature: Signature, weights: Weights) -> tuple[OperatorGap, ...]:
    """All that stands between any floating-point output and the floating-point inputs, each once."""
    wrt = signature.differentiable_inputs
    if signature.undifferentiable_reason:
        return ()
    arrays = weights.of(graph)
    try:
        found = [
            gap for output in signature.differentiable_outputs for gap in find_gaps(graph, wrt, output, weights=arrays)
        ]
    except ValueError as error:  # what onnxruntime evaluates need not be a graph by the rules
        return (OperatorGap("the graph", "", str(error), "check the file with onnx.checker.check_model"),)
    return tuple(dict.fromkeys(operator_gaps(found)))


def operator_gaps(gaps: Iterable[Gap]) -> tuple[OperatorGap, ...]:
    """In the words of the contract."""
    return tuple(
        OperatorGap(f"{gap.domain}.{gap.operator}" if gap.domain else gap.operator, gap.node, gap.reason, gap.remedy)
        for gap in gaps
    )
