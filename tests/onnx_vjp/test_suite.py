"""Every operator has a state, and every case of onnx's backend suite and of ours ends as it should."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from onnx import defs
from onnxruntime.capi import onnxruntime_pybind11_state

from explainserve.onnx_vjp import Rule, UnsupportedOperators, overridden, standard, state_of
from explainserve.onnx_vjp.emitter import Emitter
from explainserve.onnx_vjp.opset import FLOOR, REPLACED
from onnx_vjp import outcomes
from onnx_vjp.operator_cases import own_cases
from onnx_vjp.suite import case, operator, suite
from onnx_vjp.vjp_oracle import Case, check, check_types

Operator = tuple[str, str]

SOME = 6
ROOT = Path(__file__).parents[2]
SCHEMAS = (*defs.get_all_schemas_with_history(), *onnxruntime_pybind11_state.get_all_operator_schema())
OPERATORS = sorted({(schema.domain, schema.name) for schema in defs.get_all_schemas_with_history()})
RULES = sorted(
    {key[:2] for key, state in standard().items() if isinstance(state, Rule) and not key[0].startswith("com.")}
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


def some(names: Sequence[str]) -> Sequence[str]:
    """About SOME of the cases of an operator, spread over all of them: Attention has two hundred."""
    return names[:: max(1, len(names) // SOME)]


def check_suite_cases(names: Sequence[str]) -> None:
    """Of onnx's suite: each ends as recorded, and agrees with central differences where it has a gradient."""
    recorded = {line.case: line for line in outcomes.recorded() if line.source == "suite"}
    failures = []
    for name in names:
        try:
            outcome = outcomes.of_suite(name)
            if outcome != recorded.get(name):
                failures.append(f"{outcome} is not recorded: run scripts/operators --walk")
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("operator", OPERATORS, ids=_label)
def test_cases_agree_with_central_differences_and_end_as_recorded(operator: Operator) -> None:
    check_suite_cases(some(suite_names()[operator]))


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS, ids=_label)
def test_the_other_cases_do_too(operator: Operator) -> None:
    names = suite_names()[operator]
    check_suite_cases(sorted({*names} - {*some(names)}))


@pytest.mark.parametrize("operator", OPERATORS, ids=_label)
def test_own_cases_agree_with_central_differences(operator: Operator) -> None:
    failures = []
    for entry in own()[operator]:
        try:
            check(entry)
        except Exception as error:
            failures.append(f"{entry.name}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


def _has_other_types(entry: Case) -> bool:
    kinds = {entry.feeds[name].dtype.name for name in entry.wrt}
    return bool(entry.wrt and entry.outputs and kinds != {"float32"})


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_gradients_in_other_types_agree_with_those_in_float32(every: int) -> None:
    failures, count = [], 0
    for entry in filter(_has_other_types, (case(name, in_float32=False) for name in [*suite()][::every])):
        try:
            check_types(entry, case(entry.name))
            count += 1
        except UnsupportedOperators:
            continue
        except Exception as error:
            failures.append(f"{entry.name}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)
    assert count > 50 / every


def test_the_record_covers_all_cases() -> None:
    lines = outcomes.recorded()
    assert sorted(line.case for line in lines if line.source == "suite") == sorted(suite())
    assert sorted((line.domain, line.operator, line.case) for line in lines if line.source == "own") == sorted(
        (line.domain, line.operator, line.case) for line in outcomes.own()
    )


def test_no_case_is_refused_for_want_of_a_rule() -> None:
    reasons = {line.reason for line in outcomes.recorded() if line.outcome == outcomes.REFUSED}
    assert not [reason for reason in reasons if "no gradient rule" in reason]


@pytest.mark.parametrize("operator", OPERATORS, ids=_label)
def test_every_version_of_an_operator_has_a_state(operator: Operator) -> None:
    domain, name = operator
    for schema in SCHEMAS:
        if (schema.domain, schema.name) == operator:
            version = max(FLOOR, schema.since_version) if domain == "" else schema.since_version
            newest = defs.get_schema(name, defs.onnx_opset_version() if domain == "" else 99, domain)
            assert (
                state_of(domain, name, version) is not None
                or newest.has_function
                or newest.has_context_dependent_function
                or (domain == "" and name in REPLACED)
            ), f"version {schema.since_version} has no state"


@pytest.mark.parametrize("key", sorted(standard()), ids=lambda key: f"{key[1]}-{key[2]}")
def test_registered_operators_exist(key: tuple[str, str, int]) -> None:
    domain, operator, since = key
    versions = [schema.since_version for schema in SCHEMAS if (schema.domain, schema.name) == (domain, operator)]
    assert since <= max(versions)
    assert state_of(domain, operator, max(versions)) is not None


Mistake = Callable[[Rule], Rule]


def _returning(change: Callable[[Emitter, str], str | None]) -> Mistake:
    def mistaken(rule: Rule) -> Rule:
        def formula(op: Emitter, node: object, g: object) -> list[str | None]:
            return [change(op, value) if value else None for value in rule.formula(op, node, g)]

        return replace(rule, formula=formula)

    return mistaken


MISTAKES: dict[str, Mistake] = {
    "wrong sign": _returning(lambda op, value: op.Neg(value)),
    "wrong factor": _returning(lambda op, value: op.Mul(value, 1.01)),
    "forgotten": _returning(lambda op, value: None),
}


@pytest.mark.parametrize("operator", RULES, ids=_label)
def test_a_mistake_in_a_rule_is_caught(operator: Operator) -> None:
    """Which also says that every rule has a case."""
    cases = [*own()[operator], *(case(name) for name in suite_names()[operator])]
    for mistake, mistaken in MISTAKES.items():
        changed = {
            key: mistaken(state) for key, state in standard().items() if key[:2] == operator and isinstance(state, Rule)
        }
        assert any(_is_caught(entry, changed) for entry in cases), f"no case catches '{mistake}'"


def test_a_broadcast_that_is_not_undone_is_caught() -> None:
    rule = state_of("", "Add", FLOOR)
    assert isinstance(rule, Rule) and rule.broadcasts
    assert any(_is_caught(entry, {("", "Add", 1): replace(rule, broadcasts=False)}) for entry in own()["", "Add"])


def _is_caught(entry: Case, changed: dict[tuple[str, str, int], Rule]) -> bool:
    if not entry.wrt or not entry.outputs:
        return False
    try:
        check(entry, rules=overridden(standard(), changed))
    except AssertionError:
        return True
    except UnsupportedOperators:
        return False
    return False


def test_the_page_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "operators"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0
