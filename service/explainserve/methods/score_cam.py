"""Score-CAM (Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu: Score-CAM, CVPR workshops 2020, equations 5 to 8)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Attribution, Instance, Question, StopReason, Subject
from explainserve.methods.activation_map import LayerMap, finished
from explainserve.methods.contract import FLOAT32_BYTES, Cost, Needs, ReadingGuide
from explainserve.methods.grids import Grid, grid, upsampled
from explainserve.methods.planes import extent, laid_over
from explainserve.methods.rows import point
from explainserve.methods.sampling import MIN_ROUND, next_round, round_size
from explainserve.plan import Evaluation, Plan


@dataclass(frozen=True, eq=False)
class MasksPlan(Plan):
    """A round of masked instances.

    Attributes:
        instances: those of this round, held so that other targets find the same ones.
        activation: of the layer, (channels, rows, columns).
        scores: of the channels of earlier rounds.
    """

    instances: tuple[Instance, ...]
    activation: NDArray[np.float64]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class ScoreCam(LayerMap):
    """The sum over channels of activation times the softmax over channels of the score of the instance masked by it."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="activation",
        units="activation of the layer",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Wang et al.: Score-CAM, CVPR workshops 2020, arXiv:1910.01279",
        tier="T2",
    )

    @property
    def needs(self) -> Needs:
        """Activations, which lie over an image; no gradient."""
        return Needs(rule="", layers=True, spatial_axes=True)

    def cost(self, subject: Subject) -> Cost:
        """One row for the activations, and one for each channel."""
        return Cost.fixed(forward_rows=1 + grid(subject, self.layer).channels)

    def path_bytes(self, subject: Subject) -> int:
        """The masked instances of one round, and the activations in float64."""
        own = grid(subject, self.layer)
        held = 4 * own.channels * own.rows * own.columns
        return FLOAT32_BYTES * (held + (2 + round_size(subject.element_count)) * subject.element_count)

    def plan(self, question: Question) -> Plan:
        """The instance, with the layer's value."""
        function = replace(question.score, taps=(str(self.layer),))
        return Plan((point(question, question.instance.moving, function),))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The next channels, or the map."""
        own = grid(question.subject, self.layer)
        if not isinstance(plan, MasksPlan):
            value = np.asarray(evaluation.segments[0].values[own.layer][0])
            return self._round(question, own, own.channels_first(value), ())
        scores = (*plan.scores, *(float(part.scores[0]) for part in evaluation.segments))
        if len(scores) < own.channels:
            return self._round(question, own, plan.activation, scores)
        return self._answer(question, own, plan.activation, scores)

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The map of the channels that were masked with, as if there were no others; zeros before any."""
        assert isinstance(upcoming, MasksPlan), "Not a plan of this method. This is a bug."
        own = grid(question.subject, self.layer)
        answer = self._answer(question, own, upcoming.activation, upcoming.scores)
        return replace(answer, stop_reason=StopReason.TIME_BUDGET)

    def _round(self, question: Question, own: Grid, activation: NDArray[np.float64], scores: tuple[float, ...]) -> Plan:
        channels = next_round(question, len(scores), own.channels, MIN_ROUND)
        instances = tuple(_masked(question, own, activation, channel) for channel in channels)
        rows = tuple(point(question, instance.moving, question.score) for instance in instances)
        return MasksPlan(rows, instances, activation, scores)

    def _answer(
        self, question: Question, own: Grid, activation: NDArray[np.float64], scores: tuple[float, ...]
    ) -> Attribution:
        """Channels without contrast mask nothing, and have no weight."""
        activation = activation[: len(scores)]
        varies = np.ptp(activation, axis=(1, 2)) > 0
        logits = np.where(varies, np.array(scores), -np.inf)
        weights = np.exp(logits - logits.max(initial=0)) if varies.any() else np.zeros(len(scores))
        shares = weights / weights.sum() if weights.sum() else weights
        values = np.asarray(np.tensordot(shares, activation, axes=1))
        answer = finished(values, own, question.subject, relu=self.relu, upsampling=self.upsampling)
        return replace(answer, step_count=1 + len(scores))


def _masked(question: Question, own: Grid, activation: NDArray[np.float64], channel: int) -> Instance:
    """The instance times one channel, brought to its size and then scaled to [0, 1]; the same for all targets."""
    instance, subject = question.instance, question.subject

    def make() -> Instance:
        mask = _scaled(upsampled(activation[channel], extent(subject, own.covers), "bilinear")).astype(np.float32)
        masked = instance.moving[own.covers].astype(np.float32) * laid_over(mask, subject, own.covers)
        return Instance({**instance.moving, own.covers: masked}, instance.fixed)

    return instance.derived(("score_cam", own.layer, channel), make)


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0 to 1; zeros where they are all equal."""
    contrast = np.ptp(values)
    return (values - values.min()) / contrast if contrast else np.zeros_like(values)
