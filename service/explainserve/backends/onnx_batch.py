"""How many rows an ONNX model takes at a time: found by trying, since files state it wrongly both ways."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from explainserve.backends import onnx_free_batch
from explainserve.backends.contract import LoadOptions
from explainserve.backends.onnx_session import QUIET, open_session
from explainserve.backends.onnx_weights import Weights
from explainserve.backends.probe import FreeExtents, free_extents, sample_instances
from explainserve.errors import ModelRefused, first_line, is_out_of_memory
from explainserve.signature import Signature

Array = NDArray[np.generic]


def with_rows(
    model: onnx.ModelProto, declared: Signature, options: LoadOptions, weights: Weights
) -> tuple[onnx.ModelProto, bool]:
    """The model, or a copy of it, that accepts any batch, and True; or the model as it is, and False.

    Exporters bake a batch of one into files, and declare a free batch where a Reshape holds one. Each candidate is
    tried on two rows, and copies must return what the file returns for each row alone.
    """
    original = open_session(model, options, weights)
    batched = [spec.name for spec in declared.inputs if spec.batched]
    stated_free = bool(batched) and all(spec.axes[0].size is None for spec in declared.inputs if spec.batched)
    trials = (_Trial(declared, extents) for extents in free_extents(declared))
    tried = next(((trial, alone) for trial in trials if (alone := trial.alone(original)) is not None), None)
    if tried is None:  # nothing can be tried: believe what the file states
        return model, stated_free
    trial, alone = tried
    if stated_free and trial.keeps_rows(original):
        return model, True
    for change in (onnx_free_batch.declared, onnx_free_batch.repaired) if batched else ():
        candidate = change(model, batched)
        try:
            if trial.agrees(open_session(candidate, options, weights), alone):
                return candidate, True
        except ModelRefused:
            continue
    return model, False


class _Trial:
    """Two random rows at the given free extents."""

    def __init__(self, declared: Signature, extents: FreeExtents) -> None:
        self._declared = declared
        self._rows = sample_instances(declared, 2, extents)

    def alone(self, session: onnxruntime.InferenceSession) -> list[list[Array]] | None:
        """All outputs of each row by itself, or None where the model does not run on them."""
        results = [_tried(session, self._feeds(i, i + 1)) for i in range(2)]
        first, second = results
        return None if first is None or second is None else [first, second]

    def keeps_rows(self, session: onnxruntime.InferenceSession) -> bool:
        """Whether two rows go in and two come out."""
        results = _tried(session, self._feeds(0, 2))
        return results is not None and all(self._is_batch(array) for array in results)

    def agrees(self, session: onnxruntime.InferenceSession, alone: list[list[Array]]) -> bool:
        """Whether two rows together give what each gives alone, up to rounding."""
        results = _tried(session, self._feeds(0, 2))
        return results is not None and all(
            self._is_batch(both) and _close(both, np.concatenate([first, second]))
            for both, first, second in zip(results, *alone, strict=True)
        )

    def _is_batch(self, array: Array) -> bool:
        return array.ndim > 0 and len(array) == 2

    def _feeds(self, first: int, last: int) -> Mapping[str, Array]:
        return {
            spec.name: np.stack([row[spec.name] for row in self._rows[first:last]])
            if spec.batched
            else self._rows[0][spec.name]
            for spec in self._declared.inputs
        }


def _tried(session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> list[Array] | None:
    try:
        return [np.asarray(array) for array in session.run(None, feeds, QUIET)]
    except Exception as error:  # that it raises, whatever it raises, is the answer
        if is_out_of_memory(error):
            raise MemoryError(first_line(error)) from error
        return None


def _close(found: Array, expected: Array) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    tolerance = 1e-4 * np.abs(expected).max(initial=0.0) + 1e-30
    return bool(np.allclose(found, expected, rtol=0.0, atol=tolerance, equal_nan=True))
