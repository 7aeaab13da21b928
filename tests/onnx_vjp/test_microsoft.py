"""Operators of onnxruntime's own domains: each in a state, each composition and rule as its kernel computes."""

from __future__ import annotations

from collections import defaultdict

import pytest
from onnxruntime.capi import onnxruntime_pybind11_state

from explainserve.onnx_vjp import Composition, Rule, standard, state_of
from onnx_vjp.microsoft_cases import cases
from onnx_vjp.microsoft_oracle import Fused, check

DOMAINS = ("com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")
SCHEMAS = sorted(
    {
        (schema.domain, schema.name)
        for schema in onnxruntime_pybind11_state.get_all_operator_schema()
        if schema.domain in DOMAINS
    }
)
CASES: dict[tuple[str, str], list[Fused]] = defaultdict(list)
for _case in cases():
    CASES[_case.node.domain, _case.node.op_type].append(_case)


def _label(operator: tuple[str, str]) -> str:
    return ".".join(operator)


def test_every_operator_has_a_state() -> None:
    assert [_label(key) for key in SCHEMAS if state_of(*key, 1) is None] == []


@pytest.mark.parametrize("operator", sorted(CASES), ids=_label)
def test_forward_pass_and_gradient_are_those_of_the_kernel(operator: tuple[str, str]) -> None:
    failures = []
    for case in CASES[operator]:
        try:
            check(case)
        except Exception as error:
            failures.append(f"{case.name}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


def test_every_rule_and_composition_has_a_case() -> None:
    written = {key[:2] for key, state in standard().items() if isinstance(state, Rule | Composition)}
    assert {key for key in written if key[0] == "com.microsoft"} <= set(CASES)
