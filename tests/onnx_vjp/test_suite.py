"""Every operator against central differences: all cases of onnx's backend suite, and our own."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import pytest
from onnx import defs
from onnxruntime.capi import onnxruntime_pybind11_state

from explainserve.onnx_vjp import Rule, UnsupportedOperators, standard, state_of
from onnx_vjp.operator_cases import own_cases
from onnx_vjp.suite import case, operator, suite
from onnx_vjp.vjp_oracle import Case, check

Operator = tuple[str, str]

SCHEMAS = (*defs.get_all_schemas_with_history(), *onnxruntime_pybind11_state.get_all_operator_schema())
OPERATORS = sorted(
    {(schema.domain, schema.name) for schema in defs.get_all_schemas_with_history()}
    | {(domain, name) for domain, name, _ in standard()}
)


@cache
def suite_names() -> dict[Operator, list[str]]:
    names = defaultdict(list)
    for name in suite():
        names[operator(name)].append(name)
    return names


@cache
def own() -> dict[Operator, list[Case]]:
    cases = defaultdict(list)
    for entry in own_cases():
        cases[entry.node.domain, entry.node.op_type].append(entry)
    return cases


def _label(operator: Operator) -> str:
    return operator[1] if not operator[0] else f"{operator[0]}.{operator[1]}"


@pytest.mark.parametrize("operator", OPERATORS, ids=_label)
def test_cases_agree_with_central_differences(operator: Operator) -> None:
    failures = []
    for name in suite_names()[operator]:
        failures += _failure(case(name), may_be_refused=True)
    for entry in own()[operator]:
        failures += _failure(entry, may_be_refused=False)
    assert not failures, "\n".join(failures)


def _failure(entry: Case, *, may_be_refused: bool) -> list[str]:
    if not entry.wrt or not entry.outputs:
        return []
    try:
        check(entry)
    except UnsupportedOperators as error:
        return [] if may_be_refused else [f"{entry.name}: {error}"]
    except Exception as error:
        return [f"{entry.name}: {type(error).__name__}: {error}"]
    return []


@pytest.mark.parametrize("key", sorted(standard()), ids=lambda key: f"{key[1]}-{key[2]}")
def test_registered_operators_exist(key: tuple[str, str, int]) -> None:
    domain, operator, since = key
    versions = [schema.since_version for schema in SCHEMAS if (schema.domain, schema.name) == (domain, operator)]
    assert since <= max(versions)
    assert state_of(domain, operator, max(versions)) is not None


@pytest.mark.parametrize(
    "operator",
    [
        o
        for o in OPERATORS
        if not o[0].startswith("com.") and any(k[:2] == o and isinstance(s, Rule) for k, s in standard().items())
    ],
    ids=_label,
)
def test_a_rule_has_a_case(operator: Operator) -> None:
    assert own()[operator] or any(case(name).wrt and case(name).outputs for name in suite_names()[operator])
