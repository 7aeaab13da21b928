"""Warnings that the literature or the server has for a method, a model or a comparison: which apply, in which words.

`docs/reading-attributions.md` explains each at length.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace


class CautionKind(enum.Enum):
    """Kinds of caution; values are the wire's."""

    WHERE_NOT_WHY = 1
    SINGLE_CASE = 2
    JOINT_SCALE_ONLY = 3
    PLAUSIBLE_NOT_CORRECT = 4
    BASELINE_DEPENDENT = 5
    FRAGILE = 6
    FAILS_RANDOMIZATION = 7
    OUT_OF_RANGE_INPUT = 8
    NEGLIGIBLE_CHANGE = 9
    NOT_CONVERGED = 10
    ROW_BY_ROW = 11
    BLIND_TO_BASELINE = 12
    COMPLETE_BY_CONSTRUCTION = 13
    BEHIND_ACTIVATION = 14
    INCOMPLETE = 15


@dataclass(frozen=True)
class Caution:
    """A caution in words; `source` is the paper it comes from, empty for the server's own observation."""

    kind: CautionKind
    text: str
    source: str


_SUNDARARAJAN = "Sundararajan, Taly, Yan 2017, Axiomatic Attribution for Deep Networks, ICML"
_ADEBAYO = "Adebayo et al. 2018, Sanity Checks for Saliency Maps, NeurIPS"
_SIXT = "Sixt, Granz, Landgraf 2020, When Explanations Lie: Why Many Modified BP Attributions Fail, ICML"
_KINDERMANS = "Kindermans et al. 2019, The (Un)reliability of Saliency Methods, in Explainable AI, Springer"
_GHORBANI = "Ghorbani, Abid, Zou 2019, Interpretation of Neural Networks Is Fragile, AAAI"
_STURMFELS = "Sturmfels, Lundberg, Lee 2020, Visualizing the Impact of Feature Attribution Baselines, Distill"
_RUDIN = (
    "Rudin 2019, Stop Explaining Black Box Machine Learning Models for High Stakes Decisions and Use Interpretable "
    "Models Instead, Nature Machine Intelligence"
)
_BILODEAU = "Bilodeau et al. 2024, Impossibility Theorems for Feature Attribution, PNAS"
_YANG = "Yang, Wang, Bilgic 2023, IDGI: A Framework to Eliminate Explanation Noise from Integrated Gradients, CVPR"
_SELVARAJU = "Selvaraju et al. 2017, Grad-CAM, ICCV; Shrikumar, Greenside, Kundaje 2017, DeepLIFT, ICML, section 3.6"
_FIDDLER = "Fiddler AI, Making Image Explanations Human-Centric: Decisions Beyond Heatmaps"

CAUTIONS: dict[CautionKind, Caution] = {
    caution.kind: caution
    for caution in (
        Caution(
            CautionKind.WHERE_NOT_WHY,
            "An attribution says where the score comes from, not why: it names no concept, no rule and no cause.",
            _RUDIN,
        ),
        Caution(
            CautionKind.SINGLE_CASE,
            "It holds for this model, this input and this baseline only. It does not say how the model behaves on "
            "other inputs, or what would happen if a feature changed.",
            _BILODEAU,
        ),
        Caution(
            CautionKind.JOINT_SCALE_ONLY,
            "Compare these maps on a joint scale only: scaled each by its own range, maps of very different size look "
            "alike.",
            _FIDDLER,
        ),
        Caution(
            CautionKind.PLAUSIBLE_NOT_CORRECT,
            "A map that looks plausible is not thereby correct: maps can follow the edges of the input whatever the "
            "model has learned.",
            _ADEBAYO,
        ),
        Caution(
            CautionKind.BASELINE_DEPENDENT,
            "The baseline is a hyperparameter: another baseline gives another map. Look at more than one before you "
            "conclude.",
            f"{_STURMFELS}; {_SUNDARARAJAN}",
        ),
        Caution(
            CautionKind.FRAGILE,
            "Small changes of the input that keep the prediction can change the map, and so can a constant shift that "
            "the model compensates.",
            f"{_GHORBANI}; {_KINDERMANS}",
        ),
        Caution(
            CautionKind.FAILS_RANDOMIZATION,
            "This method fails the parameter randomization check: its map hardly changes when the weights of the model "
            "are replaced by random ones, so it says little about this model.",
            f"{_ADEBAYO}; {_SIXT}",
        ),
        Caution(
            CautionKind.OUT_OF_RANGE_INPUT,
            "The instance has values outside the value range that the model states; it was explained as sent.",
            "",
        ),
        Caution(
            CautionKind.NEGLIGIBLE_CHANGE,
            "The score does not change from baseline to instance beyond the noise of the arithmetic, so the sum of the "
            "attributions and every share of it is noise. Single attributions may still be large: they cancel.",
            "",
        ),
        Caution(
            CautionKind.NOT_CONVERGED,
            "The map did not reach the tolerances that were asked for: read it with its map error and its convergence "
            "delta.",
            "",
        ),
        Caution(
            CautionKind.ROW_BY_ROW,
            "Rows of a batch influence each other in this model, so they are evaluated one at a time: the map is that "
            "of the instance alone, and takes longer.",
            "",
        ),
        Caution(
            CautionKind.BLIND_TO_BASELINE,
            "Elements equal to the baseline get exactly zero, whatever they mean to the model: a black object is "
            "invisible with a black baseline.",
            _STURMFELS,
        ),
        Caution(
            CautionKind.COMPLETE_BY_CONSTRUCTION,
            "The attributions sum to the change of the score by construction, however few the steps: that the "
            "convergence delta is zero says nothing about the accuracy of this map.",
            _YANG,
        ),
        Caution(
            CautionKind.BEHIND_ACTIVATION,
            "This method is defined on the score before the softmax or sigmoid, and this score lies behind it: a "
            "softmax mixes in the evidence for other classes, and what is saturated has hardly a gradient.",
            _SELVARAJU,
        ),
        Caution(
            CautionKind.INCOMPLETE,
            "The attributions miss the change of the score by more than 5%, so shares of their sum are not shares of "
            "it. More steps or samples may help, or another path.",
            _SUNDARARAJAN,
        ),
    )
}

# Names of StopReason that mean that tolerances were asked for and not reached.
_UNREACHED = frozenset({"MAX_STEPS", "TIME_BUDGET", "NON_CONVERGENT", "NON_FINITE", "UNFINISHED"})


def cautions_for_response(*, map_count: int, needs_baseline: bool = True) -> list[Caution]:
    """Cautions that hold for every map of a response of `map_count` maps, in the order of the kinds."""
    applies = {
        CautionKind.WHERE_NOT_WHY: True,
        CautionKind.SINGLE_CASE: True,
        CautionKind.JOINT_SCALE_ONLY: map_count > 1,
        CautionKind.PLAUSIBLE_NOT_CORRECT: True,
        CautionKind.BASELINE_DEPENDENT: needs_baseline,
        CautionKind.FRAGILE: True,
    }
    return [CAUTIONS[kind] for kind, holds in applies.items() if holds]


def cautions_for_map(
    *,
    out_of_range_inputs: Sequence[str] = (),
    stop_reason: str = "",
    negligible_change: bool = False,
    row_by_row: bool = False,
    constant_baseline: bool = False,
    fails_randomization: bool = False,
    complete_by_construction: bool = False,
    behind_activation: bool = False,
    incomplete: bool = False,
) -> list[Caution]:
    """Cautions that hold for one map, in the order of the kinds.

    `out_of_range_inputs` names the inputs with values outside their stated range and `stop_reason` is the name of a
    StopReason, empty for a method without an integral; both are spelled out in the text.
    """
    unreached = stop_reason in _UNREACHED
    applies = {
        CautionKind.FAILS_RANDOMIZATION: (fails_randomization, ""),
        CautionKind.OUT_OF_RANGE_INPUT: (bool(out_of_range_inputs), f" Inputs: {', '.join(out_of_range_inputs)}."),
        CautionKind.NEGLIGIBLE_CHANGE: (negligible_change, ""),
        CautionKind.NOT_CONVERGED: (unreached, f" Stop reason: {stop_reason}."),
        CautionKind.ROW_BY_ROW: (row_by_row, ""),
        CautionKind.BLIND_TO_BASELINE: (constant_baseline, ""),
        CautionKind.COMPLETE_BY_CONSTRUCTION: (complete_by_construction, ""),
        CautionKind.BEHIND_ACTIVATION: (behind_activation, ""),
        CautionKind.INCOMPLETE: (incomplete, ""),
    }
    return [_with_detail(CAUTIONS[kind], detail) for kind, (holds, detail) in applies.items() if holds]


def _with_detail(caution: Caution, detail: str) -> Caution:
    return replace(caution, text=caution.text + detail)
