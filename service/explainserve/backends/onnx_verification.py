"""Whether an execution provider computes what the CPU provider computes.

Providers can be wrong: a release for another processor returned a gradient that differed by more than its own size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from explainserve.backends.probe import relative_difference
from explainserve.model_config import Precision

Array = NDArray[np.generic]

LARGEST_DIFFERENCES = {
    Precision.FLOAT32: 1e-2,
    Precision.TF32: 0.1,
    Precision.FLOAT16: 0.1,
    Precision.BFLOAT16: 0.5,
}
"""Relative L2 difference to the CPU provider up to which a provider is believed. Rounding of deep networks stays well
below: float32 has 24 bits, TensorFloat-32 and float16 have 11, bfloat16 has 8."""


def largest_difference(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest relative L2 difference among outputs; infinite where not the same elements are finite."""
    pairs = zip(found, expected, strict=True)
    return max(relative_difference(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)
