"""Rules on [0, 1]: nodes as the contract says, weights that sum to 1."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from explainserve.methods.quadrature import RULES

COUNTS = (1, 2, 3, 5, 10, 50, 512)


@pytest.fixture(params=[(name, n) for name in RULES for n in COUNTS if n >= RULES[name].min_step_count], ids=str)
def rule(request):
    name, n = request.param
    return name, n, *RULES[name].nodes_and_weights(n)


def test_weights_sum_to_one(rule):
    _, n, nodes, weights = rule
    assert nodes.shape == weights.shape == (n,)
    assert abs(weights.sum() - 1) < 1e-12


def test_nodes_ascend_in_the_unit_interval(rule):
    _, _, nodes, _ = rule
    assert np.all(np.diff(nodes) > 0)
    assert nodes[0] >= 0 and nodes[-1] <= 1


def test_rules_mirror_each_other(rule):
    name, n, nodes, weights = rule
    mirror = {"left": "right", "right": "left"}.get(name, name)
    mirrored_nodes, mirrored_weights = RULES[mirror].nodes_and_weights(n)
    np.testing.assert_allclose(1 - nodes[::-1], mirrored_nodes, atol=1e-14)
    np.testing.assert_allclose(weights[::-1], mirrored_weights, rtol=1e-12)


@given(st.integers(2, 512))
def test_nodes_are_those_of_the_contract(n):
    k = np.arange(n)
    assert RULES["left"].nodes_and_weights(n)[0].tolist() == (k / n).tolist()
    assert RULES["right"].nodes_and_weights(n)[0].tolist() == ((k + 1) / n).tolist()
    assert RULES["midpoint"].nodes_and_weights(n)[0].tolist() == ((k + 0.5) / n).tolist()
    np.testing.assert_allclose(RULES["trapezoid"].nodes_and_weights(n)[0], np.linspace(0, 1, n), atol=1e-15)


@given(st.integers(2, 512))
def test_trapezoid_halves_its_ends(n):
    _, weights = RULES["trapezoid"].nodes_and_weights(n)
    np.testing.assert_allclose(weights[1:-1] * (n - 1), 1)
    np.testing.assert_allclose(weights[[0, -1]] * (n - 1), 0.5)


@pytest.mark.parametrize(
    ("name", "n", "degree"),
    [("midpoint", 7, 1), ("trapezoid", 7, 1), ("gauss_legendre", 7, 13), ("left", 7, 0), ("right", 7, 0)],
)
def test_rules_are_exact_up_to_their_degree_and_no_further(name, n, degree):
    nodes, weights = RULES[name].nodes_and_weights(n)
    for power in range(degree + 1):
        assert abs(weights @ nodes**power - 1 / (power + 1)) < 1e-14
    assert abs(weights @ nodes ** (degree + 1) - 1 / (degree + 2)) > 1e-11


def test_callers_cannot_spoil_the_rule_for_others():
    nodes, _ = RULES["gauss_legendre"].nodes_and_weights(6)
    with pytest.raises(ValueError, match="read-only"):
        nodes[0] = 0
