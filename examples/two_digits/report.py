"""The figures of the demo: what each class's map sums to in each digit's box, and how alike the two maps look."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from explainserve_client import Attribution, ExplainResult, Normalization
from pictures import Pair
from similarity import rms_difference, ssim

KINDS = ("MIN_MAX", "QUANTILE_RANGE", "POSITIVE_MAX", "SYMMETRIC_ABS_MAX", "SYMMETRIC_QUANTILE", "ABS_MASS")
VIEW = "CHANNEL_SUM"
BOXES = ("left", "right")
NEGLIGIBLE = 0.05
"""A sum of attributions below this many units of probability is called negligible."""


@dataclass(frozen=True)
class Explained:
    """One picture explained by one model: both classes in one answer, the left digit's class first.

    Attributes:
        instance: the preprocessed picture, shape (3, 64, 64).
    """

    picture: int
    pair: Pair
    model: str
    instance: np.ndarray
    result: ExplainResult


def picture_report(explained: Explained) -> dict[str, Any]:
    """All figures of one picture under one model."""
    joint = explained.result.joint["all"].statistics[VIEW]
    maps = explained.result.attributions
    return {
        "picture": explained.picture,
        "model": explained.model,
        "classes": list(explained.pair.labels),
        "boxes": {name: list(box) for name, box in zip(BOXES, explained.pair.picture.boxes, strict=True)},
        "joint_min": joint.min,
        "joint_max": joint.max,
        "maps": [_map_report(attribution, own) for attribution, own in zip(maps, BOXES, strict=True)],
        "alike": {kind: dict(_likeness(explained.result, kind)) for kind in KINDS},
        "row_count": explained.result.provenance.row_count,
    }


def _map_report(attribution: Attribution, own: str) -> dict[str, Any]:
    sums = {name: attribution.regions[name][VIEW].sum for name in BOXES}
    other = next(name for name in BOXES if name != own)
    statistics = attribution.statistics[VIEW]
    return {
        "class": attribution.target.label,
        "output": attribution.instance_output_value,
        "baseline_output": attribution.baseline_output_value,
        "sum": attribution.attribution_sum,
        "convergence_delta": attribution.convergence_delta,
        "map_error": attribution.map_error,
        "step_count": attribution.step_count,
        "stop_reason": attribution.stop_reason,
        "min": statistics.min,
        "max": statistics.max,
        "own_box_sum": sums[own],
        "other_box_sum": sums[other],
    }


def _likeness(result: ExplainResult, kind: str) -> Iterator[tuple[str, dict[str, float]]]:
    """RMS difference and SSIM of the two displayed maps, each on its own scale and both on the joint one."""
    first, second = result.attributions
    joint = result.joint["all"].normalization(kind, VIEW)
    own = (first.normalization(kind, VIEW), second.normalization(kind, VIEW))
    for scale, recipes in (("individual", own), ("joint", (joint, joint))):
        shown = [_shown(a, recipe) for a, recipe in zip((first, second), recipes, strict=True)]
        yield (
            scale,
            {"rms": rms_difference(shown[0], shown[1]), "ssim": ssim(shown[0], shown[1], joint.upper - joint.lower)},
        )


def _shown(attribution: Attribution, recipe: Normalization) -> np.ndarray:
    return np.asarray(recipe.apply(attribution.tensor), np.float64)


def expected_signs(report: dict[str, Any]) -> list[bool]:
    """Per map: its own box is positive and the other digit's box negative."""
    return [line["own_box_sum"] > 0 > line["other_box_sum"] for line in report["maps"]]


def negligible_sums(report: dict[str, Any]) -> list[bool]:
    """Per map: both box sums are negligible."""
    return [max(abs(line["own_box_sum"]), abs(line["other_box_sum"])) < NEGLIGIBLE for line in report["maps"]]


def model_summary(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What holds how often for one model, and medians over its maps."""
    maps = [line for report in reports for line in report["maps"]]
    signs = [ok for report in reports for ok in expected_signs(report)]
    negligible = [ok for report in reports for ok in negligible_sums(report)]
    return {
        "maps": len(maps),
        "expected_signs": sum(signs),
        "negligible_sums": sum(negligible),
        "median_own_box_sum": _median(line["own_box_sum"] for line in maps),
        "median_other_box_sum": _median(line["other_box_sum"] for line in maps),
        "largest_abs_box_sum": max(max(abs(m["own_box_sum"]), abs(m["other_box_sum"])) for m in maps),
        "median_joint_range": _median(report["joint_max"] - report["joint_min"] for report in reports),
        "alike": {
            kind: {
                scale: {name: _median(r["alike"][kind][scale][name] for r in reports) for name in ("rms", "ssim")}
                for scale in ("individual", "joint")
            }
            for kind in KINDS
        },
    }


def exceptions(reports: Sequence[dict[str, Any]], trained: str) -> list[dict[str, Any]]:
    """Maps that do not show what is expected of their model, each with its sums."""
    found = []
    for report in reports:
        holds = expected_signs(report) if report["model"] == trained else negligible_sums(report)
        for line, ok in zip(report["maps"], holds, strict=True):
            if not ok:
                keys = ("class", "own_box_sum", "other_box_sum")
                found.append({"picture": report["picture"], "model": report["model"], **{k: line[k] for k in keys}})
    return found


def table(reports: Sequence[dict[str, Any]]) -> str:
    """One line per picture, model and class."""
    head = (
        "picture  model               class     F(x)    F(x')  sum map  own box  other box    delta      min      max"
        "  steps  as expected"
    )
    lines = [head]
    for report in reports:
        for line, ok in zip(report["maps"], expected_signs(report), strict=True):
            lines.append(
                f"{report['picture']:7d}  {report['model']:18s}  {line['class']:>5s}  {line['output']:7.4f}  "
                f"{line['baseline_output']:7.4f}  {line['sum']:7.3f}  {line['own_box_sum']:7.3f}  "
                f"{line['other_box_sum']:9.3f}  {line['convergence_delta']:7.4f}  {line['min']:7.4f}  "
                f"{line['max']:7.4f}  {line['step_count']:5d}  {'yes' if ok else 'no'}"
            )
    return "\n".join(lines)


def alike_table(summaries: dict[str, dict[str, Any]]) -> str:
    """How alike the two classes' maps look, per model and recipe, scaled each by its own range and jointly."""
    lines = [
        "                                          own scale           joint scale",
        "model               recipe                RMS      SSIM       RMS      SSIM",
    ]
    for model, summary in summaries.items():
        for kind, alike in summary["alike"].items():
            own, joint = alike["individual"], alike["joint"]
            lines.append(
                f"{model:18s}  {kind:18s}  {own['rms']:7.4f}  {own['ssim']:8.4f}   "
                f"{joint['rms']:7.4f}  {joint['ssim']:8.4f}"
            )
    return "\n".join(lines)


def _median(values: Iterator[float]) -> float:
    return float(np.median(list(values)))
