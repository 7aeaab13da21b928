"""Which two-digit pictures the demo shows: the first that the trained network is sure about, in the order drawn."""

from collections.abc import Iterable

import numpy as np

from network import TwoDigits, pair_probabilities
from pictures import Digits, Pair, pairs

SELECTION_SEED = 9
SELECTION_COUNT = 24
SURE = 0.9


def select(network: TwoDigits, held_out: Digits, count: int = SELECTION_COUNT) -> tuple[list[Pair], int]:
    """The first `count` candidates that obey the rule, and how many candidates were drawn to find them."""
    chosen: list[Pair] = []
    candidates: Iterable[Pair] = pairs(np.random.default_rng(SELECTION_SEED), held_out)
    for drawn, candidate in enumerate(candidates, start=1):
        if is_sure(network, candidate):
            chosen.append(candidate)
        if len(chosen) == count:
            return chosen, drawn
    raise AssertionError("the candidates are endless")


def is_sure(network: TwoDigits, pair: Pair) -> bool:
    """The rule, and the only one: one of the picture's two classes has a probability above 90%."""
    return max(pair_probabilities(network, pair)) > SURE
