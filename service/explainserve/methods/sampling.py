"""What methods that draw samples have in common: noise, rounds of bounded size, and means with standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Instance, Question
from explainserve.methods.contract import FLOAT32_BYTES

ROUND_BYTES = 2**25
"""Of what one round brings back, about: enough rows to fill micro-batches."""
MIN_ROUND, MAX_ROUND = 8, 512
MAX_NOISE = float(np.finfo(np.float32).max) / 16
"""Largest standard deviation, in any unit, whose samples are finite in float32; beyond it none could be explained."""
FEWEST_SAMPLES = 2
"""That tell a standard error."""

Maps = Mapping[str, NDArray[np.float32]]


def round_size(element_count: int) -> int:
    """Samples of one round, by the elements of a map."""
    return max(MIN_ROUND, min(MAX_ROUND, ROUND_BYTES // (FLOAT32_BYTES * max(1, element_count))))


def next_round(question: Question, done: int, total: int, fewest: int = FEWEST_SAMPLES) -> range:
    """The samples of the next round: as many as fill micro-batches. Where time may end before, first the fewest that
    make a map, and then as many as there are already: what the end cuts off is no more than what it leaves.

    Args:
        done: samples of earlier rounds.
    """
    size = round_size(question.subject.element_count)
    if question.anytime:
        size = min(size, max(fewest, done))
    return range(done, min(total, done + size))


def noise(seed: int, sample: int, position: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard Gaussian noise, float32, from PCG64 with the seed sequence (seed, sample, position of the input)."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, sample, position))))
    return generator.standard_normal(shape, np.float32)


def noisy(instance: Instance, seed: int, sample: int, scales: Mapping[str, float]) -> Instance:
    """The instance with noise of the given standard deviations in its moving inputs, float32."""

    def make() -> Instance:
        moving = {
            name: x.astype(np.float32) + np.float32(scales[name]) * noise(seed, sample, position, x.shape)
            for position, (name, x) in enumerate(instance.moving.items())
        }
        return Instance(moving, instance.fixed)

    return instance.derived(("noise", seed, sample, tuple(scales.values())), make)


def mean_attribution(samples: Sequence[Maps], step_count: int) -> Attribution:
    """The mean of independent samples with its standard error, computed in float64."""
    means, errors = {}, {}
    for name in samples[0]:
        stacked = np.stack([sample[name] for sample in samples])
        means[name] = stacked.mean(axis=0, dtype=np.float64)
        errors[name] = stacked.std(axis=0, ddof=1, dtype=np.float64) / np.sqrt(len(samples))
    return estimated(means, errors, step_count)


def estimated(
    means: Mapping[str, NDArray[np.float64]], errors: Mapping[str, NDArray[np.float64]], step_count: int
) -> Attribution:
    """A map with its standard errors, and the ratio of their lengths as its error; none for a map of zeros."""
    length, error = (np.sqrt(sum(float(np.square(a).sum()) for a in arrays.values())) for arrays in (means, errors))
    return Attribution(
        {name: values.astype(np.float32) for name, values in means.items()},
        step_count,
        map_error=float(error / length) if length else None,
        standard_errors={name: values.astype(np.float32) for name, values in errors.items()},
    ).checked()


def check_sample_count(count: int, minimum: int, maximum: int | None = None) -> None:
    """Raises InvalidRequest (SAMPLE_COUNT_OUT_OF_RANGE) outside the range."""
    if count < minimum or (maximum is not None and count > maximum):
        raise InvalidRequest(
            "SAMPLE_COUNT_OUT_OF_RANGE",
            f"sample_count is {count}; expected at least {minimum}"
            + ("" if maximum is None else f" and at most {maximum}"),
            sample_count=count,
            min=minimum,
            max=maximum or "",
        )


def check_seed(seed: int) -> None:
    """Raises InvalidRequest (SEED_OUT_OF_RANGE) for a negative seed."""
    if seed < 0:
        raise InvalidRequest("SEED_OUT_OF_RANGE", f"seed {seed} is negative", seed=seed)


def check_option(
    option: str, value: float, *, low: float = 0.0, high: float = float("inf"), above: bool = True
) -> None:
    """Raises InvalidRequest (OPTION_OUT_OF_RANGE) for what is not finite, not above `low` (or not at least, unless
    `above`) or greater than `high`."""
    inside = (value > low if above else value >= low) and value <= high and np.isfinite(value)
    if not inside:
        upper = f"at most {high}" if np.isfinite(high) else "finite"
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            f"{option} is {value}; expected {'more than' if above else 'at least'} {low} and {upper}",
            option=option,
            value=value,
            min=low,
            max=high,
        )


def check_has_effect(method: object, option: str, why_not: str) -> None:
    """Raises InvalidRequest (OPTION_WITHOUT_EFFECT) for an option that is given where the others leave it no effect.

    Args:
        why_not: why it has none, after "has no effect".
    """
    value = getattr(method, option)
    if value is not None:
        kind = type(method).__name__
        raise InvalidRequest(
            "OPTION_WITHOUT_EFFECT",
            f"{option} {value} of {kind} has no effect {why_not}; leave it out",
            method=kind,
            option=option,
            value=value,
        )
