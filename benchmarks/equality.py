"""Whether two answers to one request are equal, as the contract defines it.

Maps of a fixed rule agree to a relative L2 distance of 1e-5 or the model's noise floor, whichever is larger. Where
values are differences of scores, what these have in common cancels and their rounding stays, so the noise floor of the
map is that of the scores over how much they differ. So do maps of the adaptive rule where it chose the same points;
where it did not, the estimates of their errors cover the distance. Maps that are further apart get a second look
(`second_look.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainserve.v1 import attribution_pb2, statistics_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

RELATIVE_DISTANCE = 1e-5
SCORE_ROUNDING = 2.0**-22
"""Relative, of a float32 score in micro-batches of other sizes: two units in the last place, as a small network has."""
DIFFERENCES = frozenset({"occlusion", "feature_ablation"})
"""Methods whose values are differences of two scores."""
NEGLIGIBLE = 1e-9
"""Absolute distance of maps that are zero but for rounding."""

Array = NDArray[Any]


def differences(answer: pb.ExplainResponse, alone: pb.ExplainResponse) -> Iterator[str]:
    """What differs beside the maps themselves, in words; nothing where the answers are equal."""
    if len(answer.attributions) != len(alone.attributions):
        yield f"{len(answer.attributions)} attributions, alone {len(alone.attributions)}"
        return
    for name in ("model_name", "model_version", "model_sha256"):
        if getattr(answer.provenance, name) != getattr(alone.provenance, name):
            yield f"{name} differs"
    if answer.baselines != alone.baselines:
        yield "baselines differ"
    if [group.group for group in answer.joint] != [group.group for group in alone.joint]:
        yield "groups differ"
    for index, pair in enumerate(zip(answer.attributions, alone.attributions, strict=True)):
        for difference in _of_attribution(*pair):
            yield f"attribution {index}: {difference}"


def unequal_maps(answer: pb.ExplainResponse, alone: pb.ExplainResponse) -> list[int]:
    """Positions of maps of other points, or further apart than maps of the same points may be."""
    pairs = enumerate(zip(answer.attributions, alone.attributions, strict=True))
    return [index for index, pair in pairs if not (same_points(*pair) and distance(*pair) <= tolerance(alone, index))]


def tolerance(alone: pb.ExplainResponse, position: int) -> float:
    """Relative distance of a map at a position and an equal one of the same points."""
    line, noise_floor = alone.attributions[position], alone.provenance.noise_floor
    used = [spec.WhichOneof("method") for spec in alone.provenance.effective_methods[line.method_index :]]
    of_scores = 2 * max(noise_floor, SCORE_ROUNDING) * _cancellation(line) if {*used[:1]} & DIFFERENCES else 0.0
    return max(RELATIVE_DISTANCE, noise_floor, of_scores)


def _cancellation(line: attribution_pb2.Attribution) -> float:
    """How many times larger the scores are than their differences, which the map holds: at most, by their mean."""
    values = _whole_map(line)
    values = values[np.isfinite(values)]
    size = float(np.sqrt(np.square(values).mean())) if values.size else 0.0
    return (abs(line.instance_output_value) + float(np.abs(values).max())) / size if size else 0.0


def distance(found: attribution_pb2.Attribution, alone: attribution_pb2.Attribution) -> float:
    """Relative L2 distance of two maps, all inputs together."""
    return relative_distance(_whole_map(found), _whole_map(alone))


def _of_attribution(found: attribution_pb2.Attribution, alone: attribution_pb2.Attribution) -> Iterator[str]:
    if _position(found) != _position(alone):
        yield f"position {_position(found)}, alone {_position(alone)}"
        return
    fixed = alone.stop_reason == attribution_pb2.STOP_REASON_FIXED_STEPS
    if fixed and found.step_count != alone.step_count:
        yield f"{found.step_count} steps of a fixed rule, alone {alone.step_count}"
    for field in ("instance_output_value", "baseline_output_value"):
        if not _close(getattr(found, field), getattr(alone, field)):
            yield f"{field} {getattr(found, field)}, alone {getattr(alone, field)}"
    for part in found.inputs:
        yield from _of_figures(part)


def _of_figures(part: attribution_pb2.InputAttribution) -> Iterator[str]:
    """Figures are those of the map beside them."""
    elements = [statistics for statistics in part.statistics if statistics.view == statistics_pb2.VIEW_ELEMENTS]
    if not elements or not part.HasField("tensor"):
        return
    values = _values(part.tensor)
    finite = values[np.isfinite(values)]
    if elements[0].finite_count != finite.size or not _close(elements[0].l2_norm, float(np.linalg.norm(finite))):
        yield f"the statistics of {part.name} are not those of its map"


def _position(line: attribution_pb2.Attribution) -> tuple[object, ...]:
    baseline = line.baseline_index if line.HasField("baseline_index") else None
    target = line.target.SerializeToString(deterministic=True)
    return line.method_index, line.instance_index, line.target_index, baseline, target


def same_points(found: attribution_pb2.Attribution, alone: attribution_pb2.Attribution) -> bool:
    """Whether both maps were made of the same points of the path, as far as the answers tell."""
    if found.step_count != alone.step_count:
        return False
    if found.HasField("score_path") and alone.HasField("score_path"):
        return list(found.score_path.alphas) == list(alone.score_path.alphas)
    return True


def relative_distance(found: Array, alone: Array) -> float:
    """Relative L2 distance over the elements that are finite; infinite where others than those are not."""
    finite = np.isfinite(alone)
    if found.shape != alone.shape or not np.array_equal(np.isfinite(found), finite):
        return float("inf")
    distance, norm = np.linalg.norm(found[finite] - alone[finite]), np.linalg.norm(alone[finite])
    if distance <= NEGLIGIBLE:
        return 0.0
    return float(distance / norm) if norm else float("inf")


def _whole_map(line: attribution_pb2.Attribution) -> Array:
    """All inputs in one vector, float64; completeness and errors are over their sum."""
    tensors = [_values(part.tensor) for part in line.inputs if part.HasField("tensor")]
    return np.concatenate(tensors) if tensors else np.zeros(0)


def _values(tensor: Tensor) -> Array:
    assert tensor.data_type == DATA_TYPE_FLOAT32
    return np.frombuffer(tensor.data, "<f4").astype(np.float64)


def _close(found: float, alone: float) -> bool:
    return bool(np.isclose(found, alone, rtol=1e-4, atol=1e-6, equal_nan=True))
