"""Layer-wise relevance propagation: its options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from explainserve.errors import InvalidRequest
from explainserve.explanation import Instance, Question, Subject, Target
from explainserve.methods import Lrp
from explainserve.plan import Selector
from explainserve.signature import Score, ScoreHead

INSTANCE = Instance({"x": np.ones(3, np.float32)}, {})
TARGET = Target("y", Score.OUTPUT, ScoreHead.IDENTITY, Selector(np.array([0]), np.ones(1, np.float32)))
QUESTION = Question(Subject({}, {"x": (3,)}), INSTANCE, TARGET, None, 1.0, None)


def options_of(method: Lrp) -> dict[str, float]:
    """Of the gradient rule that it asks for."""
    return dict(method.plan(QUESTION).segments[0].function.rule.options)


def test_a_rule_is_asked_for_with_the_options_that_concern_it() -> None:
    assert options_of(Lrp("epsilon", epsilon=0.1)) == {"epsilon": 0.1}
    assert options_of(Lrp("gamma", gamma=3.0)) == {"epsilon": 1e-6, "gamma": 3.0}
    assert options_of(Lrp("alpha_beta")) == {"epsilon": 1e-6, "alpha": 2.0}


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "alpha_beta", "composite", "deep_taylor", "epsilon_gamma_box"])
def test_a_method_needs_its_own_rule(rule: str) -> None:
    assert Lrp(rule).needs.rule == f"lrp_{rule}"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"epsilon": 0.0}, "OPTION_OUT_OF_RANGE"),
        ({"rule": "gamma", "gamma": -1.0}, "OPTION_OUT_OF_RANGE"),
        ({"rule": "alpha_beta", "alpha": 0.5}, "OPTION_OUT_OF_RANGE"),
        ({"gamma": 0.5}, "OPTION_WITHOUT_EFFECT"),
        ({"rule": "alpha_beta", "gamma": 0.5}, "OPTION_WITHOUT_EFFECT"),
        ({"rule": "deep_taylor", "alpha": 2.0}, "OPTION_WITHOUT_EFFECT"),
        ({"rule": "epsilon_gamma_box", "alpha": 2.0}, "OPTION_WITHOUT_EFFECT"),
        ({"rule": "flat"}, "ENUM_UNKNOWN"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Lrp(**options)
    assert refused.value.reason == reason


def test_only_options_that_the_rule_has_are_stated() -> None:
    assert (Lrp().gamma, Lrp().alpha) == (None, None)
    assert (Lrp("epsilon_gamma_box").gamma, Lrp("epsilon_gamma_box").alpha) == (0.25, None)
    assert (Lrp("alpha_beta").gamma, Lrp("alpha_beta").alpha) == (None, 2.0)


def test_rules_that_are_independent_of_later_layers_say_so() -> None:
    assert Lrp("alpha_beta").reading_guide.fails_randomization
    assert not Lrp("epsilon").reading_guide.fails_randomization
