"""SmoothGrad (Smilkov, Thorat, Kim, Viegas, Wattenberg: removing noise by adding noise, 2017, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

from explainserve.methods.contract import ReadingGuide
from explainserve.methods.noise_tunnel import NoiseTunnel


@dataclass(frozen=True)
class SmoothGrad(NoiseTunnel):
    """The mean of a method's maps at noisy copies of the instance."""

    @property
    def reading_guide(self) -> ReadingGuide:
        """That of the base."""
        units = self._base.reading_guide.units
        return self._guide(units, "Smilkov et al.: SmoothGrad: removing noise by adding noise, 2017, arXiv:1706.03825")
