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
    (other,) = (name for name in BOXES if name != own)
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
        "own_box_sum": attribution.regions[own][VIEW].sum,
        "other_box_sum": attribution.regions[other][VIEW].sum,
        "own_box_error": _box_error(attribution, own),
        "other_box_error": _box_error(attribution, other),
    }


def _box_error(attribution: Attribution, box: str) -> float:
    """Expected error of a box sum from the map's own error estimate, if errors of elements are independent:
    map_error x L2 norm of the map x sqrt(elements in the box / elements of the map)."""
    whole, part = attribution.statistics["ELEMENTS"], attribution.regions[box]["ELEMENTS"]
    assert attribution.map_error is not None and whole.l2_norm is not None, "the adaptive rule estimates its error"
    return float(attribution.map_error * whole.l2_norm * np.sqrt(part.element_count / whole.element_count))


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


def outcomes(report: dict[str, Any], trained: str) -> list[str]:
    """Per map "yes", "no" or "undecided": whether it shows what is expected of its model.

    Of the trained one: the digit's own box positive and the other box negative, undecided where a sum is within twice
    its expected error of zero. Of a random twin: both sums negligible.
    """
    return [_signs(line) if report["model"] == trained else _negligible(line) for line in report["maps"]]


def _signs(line: dict[str, Any]) -> str:
    sums = ((line["own_box_sum"], line["own_box_error"]), (-line["other_box_sum"], line["other_box_error"]))
    if any(value < -2 * error for value, error in sums):
        return "no"
    return "yes" if all(value > 2 * error for value, error in sums) else "undecided"


def _negligible(line: dict[str, Any]) -> str:
    return "yes" if max(abs(line["own_box_sum"]), abs(line["other_box_sum"])) < NEGLIGIBLE else "no"


def spans(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much of a scale each map of one picture fills: its own range, that of both classes, that of all models."""
    low = min(report["joint_min"] for report in reports)
    high = max(report["joint_max"] for report in reports)
    return [
        {
            "model": report["model"],
            "class": line["class"],
            "of_classes": (line["max"] - line["min"]) / (report["joint_max"] - report["joint_min"]),
            "of_models": (line["max"] - line["min"]) / (high - low),
        }
        for report in reports
        for line in report["maps"]
    ]


def model_summary(reports: Sequence[dict[str, Any]], trained: str) -> dict[str, Any]:
    """What holds how often for one model, and medians over its maps and pictures."""
    maps = [line for report in reports for line in report["maps"]]
    found = [outcome for report in reports for outcome in outcomes(report, trained)]
    return {
        "maps": len(maps),
        "as_expected": {outcome: found.count(outcome) for outcome in ("yes", "no", "undecided")},
        "median_own_box_sum": _median(line["own_box_sum"] for line in maps),
        "median_other_box_sum": _median(line["other_box_sum"] for line in maps),
        "largest_abs_box_sum": max(max(abs(m["own_box_sum"]), abs(m["other_box_sum"])) for m in maps),
        "median_joint_range": _median(report["joint_max"] - report["joint_min"] for report in reports),
        "more_alike_on_own_scales": {
            kind: {
                "rms": sum(r["alike"][kind]["individual"]["rms"] < r["alike"][kind]["joint"]["rms"] for r in reports),
                "ssim": sum(
                    r["alike"][kind]["individual"]["ssim"] > r["alike"][kind]["joint"]["ssim"] for r in reports
                ),
            }
            for kind in KINDS
        },
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
    keys = ("class", "own_box_sum", "other_box_sum", "own_box_error", "other_box_error")
    return [
        {"picture": report["picture"], "model": report["model"], "outcome": outcome, **{k: line[k] for k in keys}}
        for report in reports
        for line, outcome in zip(report["maps"], outcomes(report, trained), strict=True)
        if outcome != "yes"
    ]


def table(reports: Sequence[dict[str, Any]], trained: str) -> str:
    """One line per picture, model and class."""
    lines = [
        "picture model               class    F(x)   F(x') sum map own box other box   delta     min     max joint min "
        "joint max steps as expected"
    ]
    for report in reports:
        for line, outcome in zip(report["maps"], outcomes(report, trained), strict=True):
            lines.append(
                f"{report['picture']:7d} {report['model']:19s} {line['class']:>5s} {line['output']:7.4f} "
                f"{line['baseline_output']:7.4f} {line['sum']:7.3f} {line['own_box_sum']:7.3f} "
                f"{line['other_box_sum']:9.3f} {line['convergence_delta']:7.4f} {line['min']:7.4f} {line['max']:7.4f} "
                f"{report['joint_min']:9.4f} {report['joint_max']:9.4f} {line['step_count']:5d} {outcome}"
            )
    return "\n".join(lines)


def alike_table(summaries: dict[str, dict[str, Any]]) -> str:
    """How alike the two classes' maps look, per model and recipe, scaled each by its own range and jointly."""
    lines = [
        "                                          own scale        joint scale    pictures more alike on own scales",
        "model               recipe                RMS    SSIM       RMS    SSIM   by RMS  by SSIM",
    ]
    for model, summary in summaries.items():
        for kind, alike in summary["alike"].items():
            own, joint, more = alike["individual"], alike["joint"], summary["more_alike_on_own_scales"][kind]
            lines.append(
                f"{model:19s} {kind:18s} {own['rms']:6.4f}  {own['ssim']:6.4f}    {joint['rms']:6.4f}  "
                f"{joint['ssim']:6.4f}   {more['rms']:6d}  {more['ssim']:7d}"
            )
    return "\n".join(lines)


def span_table(found: Sequence[dict[str, Any]]) -> str:
    """Medians of how much of each scale a map fills, the more and the less likely class apart."""
    lines = ["model               own range   range of both classes   range of all models"]
    for model in dict.fromkeys(line["model"] for line in found):
        of_model = [line for line in found if line["model"] == model]
        pairs = list(zip(of_model[::2], of_model[1::2], strict=True))
        for name, choose in (("wider map", max), ("narrower map", min)):
            classes, models = (_median(choose(a[key], b[key]) for a, b in pairs) for key in ("of_classes", "of_models"))
            lines.append(f"{model:19s} {'100 %':>9s} {classes:21.1%} {models:21.1%}   {name}")
    return "\n".join(lines)


def _median(values: Iterator[float]) -> float:
    return float(np.median(list(values)))
