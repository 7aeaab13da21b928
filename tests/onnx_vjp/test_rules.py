"""Every registered rule against central differences, case by case."""

from __future__ import annotations

from collections import defaultdict

import pytest
from onnx import defs

from explainserve.onnx_vjp import Rule, find_gaps, standard, state_of
from onnx_vjp.operator_cases import own_cases, suite_cases
from onnx_vjp.vjp_oracle import Case, check, differentiated

RULES = {
    (domain, operator, since) for (domain, operator, since), state in standard().items() if isinstance(state, Rule)
}
OPERATORS = {operator for _, operator, _ in RULES}

# Cases of the suite that are no function to differentiate, or that the oracle cannot evaluate, each with the reason.
TRAINING = "training mode is refused"
SCATTER = "reductions other than 'add' are refused"
CORNERS = "onnxruntime and the reference disagree about align_corners when scales do not give a whole size"
LEFT_OUT: dict[str, str] = {
    "test_batchnorm_epsilon_training_mode": TRAINING,
    "test_batchnorm_example_training_mode": TRAINING,
    "test_training_dropout": TRAINING,
    "test_training_dropout_zero_ratio": TRAINING,
    "test_training_dropout_zero_ratio_mask": TRAINING,
    "test_training_dropout_default": TRAINING,
    "test_training_dropout_default_mask": TRAINING,
    "test_training_dropout_mask": TRAINING,
    "test_scatter_elements_with_reduction_max": SCATTER,
    "test_scatter_elements_with_reduction_min": SCATTER,
    "test_scatter_elements_with_reduction_mul": SCATTER,
    "test_scatternd_max": SCATTER,
    "test_scatternd_max_with_element_indices": SCATTER,
    "test_scatternd_min": SCATTER,
    "test_scatternd_min_with_element_indices": SCATTER,
    "test_scatternd_multiply": SCATTER,
    "test_resize_downsample_scales_cubic_align_corners": CORNERS,
    "test_resize_downsample_scales_linear_align_corners": CORNERS,
    "test_mod_float_edge_cases_fmod_0_float32": "its inputs are infinite",
}


def _reached(case: Case) -> tuple[str, str, int]:
    """The registry key that a case exercises."""
    version = max(18, next(entry.version for entry in case.model.opset_import if entry.domain == ""))
    keys = [key for key in RULES if key[:2] == ("", case.node.op_type) and key[2] <= version]
    return max(keys, key=lambda key: key[2], default=("", case.node.op_type, 0))


CASES = [*own_cases(), *suite_cases(OPERATORS)]
BY_RULE: dict[tuple[str, str, int], list[Case]] = defaultdict(list)
for _case in CASES:
    if _case.name not in LEFT_OUT and differentiated(_case):
        BY_RULE[_reached(_case)].append(_case)


@pytest.mark.parametrize("key", sorted(RULES), ids=lambda key: f"{key[1]}-{key[2]}")
def test_a_rule_agrees_with_central_differences(key: tuple[str, str, int]) -> None:
    assert BY_RULE[key], f"rule {key} has no case"
    failures = []
    for case in BY_RULE[key]:
        try:
            check(case)
        except Exception as error:
            failures.append(f"{case.name}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("key", sorted(standard()), ids=lambda key: f"{key[1]}-{key[2]}")
def test_registered_operators_exist(key: tuple[str, str, int]) -> None:
    domain, operator, since = key
    schema = defs.get_schema(operator, defs.onnx_opset_version(), domain)
    assert since <= schema.since_version
    assert state_of(domain, operator, schema.since_version) is not None


def test_cases_left_out_exist() -> None:
    assert set(LEFT_OUT) <= {case.name for case in CASES}


def test_no_case_has_a_gap() -> None:
    gaps = {
        case.name: find_gaps(case.model, differentiated(case), case.model.graph.output[0].name)
        for cases in BY_RULE.values()
        for case in cases
    }
    assert {name: found for name, found in gaps.items() if found} == {}
