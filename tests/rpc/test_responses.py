"""Parts of answers that no small model shows."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from closed_form import ClosedForm, served
from explainserve.backends.contract import Compilation
from explainserve.backends.probe import ProbeResult
from explainserve.explainer import Usage
from explainserve.explanation import Attribution, StopReason, Target
from explainserve.figures import Entry
from explainserve.methods import IntegratedGradients
from explainserve.model_config import Compile, ModelConfig
from explainserve.plan import Selector
from explainserve.rpc import responses
from explainserve.served_model import ServedModel
from explainserve.signature import Score, ScoreHead

TARGET = Target("y", Score.OUTPUT, ScoreHead.IDENTITY, Selector(np.array([0]), np.ones(1, np.float32)))


def entry(at_instance: float, at_baseline: float) -> Entry:
    empty: dict[str, Any] = {"maps": {}, "tensors": {}, "spread": {}}
    return Entry(
        method=IntegratedGradients(),
        method_index=0,
        instance_index=0,
        target_index=0,
        baseline_index=0,
        target=TARGET,
        attribution=Attribution({}, 1),
        instance_output_value=at_instance,
        baseline_output_value=at_baseline,
        step_count=1,
        stop_reason=StopReason.FIXED_STEPS,
        map_error=None,
        **empty,
    )


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((4e40, 3e40), False),
        ((4e40, 4e40), True),
        ((1.0, 1.0 + 1e-7), True),
        ((1.0, 1.001), False),
        ((0.0, 0.0), True),
        ((np.inf, 1.0), False),
        ((np.nan, 1.0), False),
        ((1.0, np.nan), False),
    ],
)
def test_change_within_rounding_is_negligible_whatever_its_size(ends: tuple[float, float], expected: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert responses._negligible(entry(*ends)) is expected


@pytest.mark.parametrize("measured", [None, 0.0, 1e-6])
def test_noise_floor_is_absent_where_it_was_not_measured(measured: float | None) -> None:
    model = replace(served(ClosedForm()), probe=ProbeResult(rows_independent=True, noise_floor=measured))
    own = responses.provenance(model, Usage(), [])

    assert own.HasField("noise_floor") == (measured is not None)
    assert own.noise_floor == (measured or 0.0)


def asked_to_be_compiled(found: Compilation | None) -> ServedModel:
    loaded = ClosedForm()
    loaded.compilation = found
    return replace(served(loaded), config=ModelConfig(compile=Compile.WHEN_FASTER))


def test_what_compiling_changes_is_told() -> None:
    model = asked_to_be_compiled(Compilation(map_error=2e-6))

    assert responses.provenance(model, Usage(), []).execution_map_error == 2e-6
    assert model.warnings == ()


@pytest.mark.parametrize(
    ("found", "why"), [(Compilation(refusal="no compiler"), "no compiler"), (None, "only .pt2 files")]
)
def test_why_nothing_is_compiled_is_told(found: Compilation | None, why: str) -> None:
    model = asked_to_be_compiled(found)
    (warning,) = model.warnings

    assert why in warning
    assert not responses.provenance(model, Usage(), []).HasField("execution_map_error")
