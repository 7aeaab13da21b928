"""SmoothGrad-squared (Hooker, Erhan, Kindermans, Kim: A Benchmark for Interpretability Methods, NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from explainserve.explanation import Attribution
from explainserve.methods.contract import ReadingGuide
from explainserve.methods.noise_tunnel import NoiseTunnel
from explainserve.methods.sampling import Maps, mean_attribution


@dataclass(frozen=True)
class SmoothGradSquared(NoiseTunnel):
    """The mean of the squares of a method's maps at noisy copies of the instance, element by element."""

    @property
    def reading_guide(self) -> ReadingGuide:
        """That of the base, in squared units."""
        units = f"square of {self._base.reading_guide.units}"
        return self._guide(
            units, "Hooker et al.: A Benchmark for Interpretability Methods, NeurIPS 2019, arXiv:1806.10758"
        )

    def combined(self, samples: Sequence[Maps], step_count: int) -> Attribution:
        """The mean of the squares."""
        squares = [{name: np.square(values) for name, values in sample.items()} for sample in samples]
        return mean_attribution(squares, step_count)
