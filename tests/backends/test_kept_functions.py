"""Functions of a model that are kept: the usual ones for good, the latest of those that clients choose."""

from __future__ import annotations

from dataclasses import replace

from closed_form import FORWARD, GRADIENT
from explainserve.backends.kept_functions import MOST_CHOSEN, KeptFunctions
from explainserve.plan import Differentiation, GradientRule


class Builder:
    def __init__(self) -> None:
        self.built: list[Differentiation] = []

    def __call__(self, function: Differentiation) -> str:
        self.built.append(function)
        return repr(function)


def layer(number: int) -> Differentiation:
    return replace(FORWARD, taps=(f"layer{number}",))


def test_each_is_built_once_while_it_is_kept() -> None:
    kept, build = KeptFunctions[str](), Builder()
    epsilon = replace(GRADIENT, rule=GradientRule("lrp_epsilon", (("epsilon", 0.1),)))

    for _ in range(2):
        for function in (FORWARD, GRADIENT, layer(0), epsilon):
            assert kept.get(function, build) == repr(function)
    assert build.built == [FORWARD, GRADIENT, layer(0), epsilon]
    assert len(kept.all) == 4


def test_what_clients_choose_is_bounded_and_what_was_used_last_stays() -> None:
    kept, build = KeptFunctions[str](), Builder()
    for function in (FORWARD, layer(0)):
        kept.get(function, build)
    for number in range(1, 3 * MOST_CHOSEN):
        kept.get(layer(number), build)
        kept.get(layer(0), build)

    assert len(kept.all) == 1 + MOST_CHOSEN
    assert build.built.count(layer(0)) == build.built.count(FORWARD) == 1
    kept.get(FORWARD, build)
    kept.get(layer(1), build)
    assert (build.built.count(FORWARD), build.built.count(layer(1))) == (1, 2)
