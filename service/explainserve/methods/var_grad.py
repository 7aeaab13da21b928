"""VarGrad (Adebayo, Gilmer, Goodfellow, Kim: Local Explanation Methods for Deep Networks Lack Sensitivity, 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from explainserve.explanation import Attribution
from explainserve.methods.contract import ReadingGuide
from explainserve.methods.noise_tunnel import NoiseTunnel
from explainserve.methods.sampling import Maps, estimated


@dataclass(frozen=True)
class VarGrad(NoiseTunnel):
    """The population variance of a method's maps at noisy copies of the instance, element by element."""

    fewest: ClassVar[int] = 3

    @property
    def reading_guide(self) -> ReadingGuide:
        """That of the base, in squared units."""
        units = f"square of {self._base.reading_guide.units}"
        return self._guide(units, "Adebayo et al.: Local Explanation Methods Lack Sensitivity, 2018, arXiv:1810.03307")

    def combined(self, samples: Sequence[Maps], step_count: int) -> Attribution:
        """In two passes, the mean first: E[g^2] - E[g]^2 would cancel. The standard error of a variance follows from
        the fourth moment: sqrt((m4 - m2^2) / n). Two samples are equally far from their mean, which tells none."""
        variances, errors = {}, {}
        for name in samples[0]:
            stacked = np.stack([sample[name] for sample in samples]).astype(np.float64)
            squares = np.square(stacked - stacked.mean(axis=0))
            variances[name] = squares.mean(axis=0)
            errors[name] = squares.std(axis=0) / np.sqrt(len(samples))
        answer = estimated(variances, errors, step_count)
        return answer if len(samples) >= self.fewest else replace(answer, map_error=None, standard_errors={})
