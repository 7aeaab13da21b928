"""What every attribution method provides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from explainserve.explanation import Attribution, Question, Subject
from explainserve.plan import STANDARD, Evaluation, Plan
from explainserve.signature import MapSpec

FLOAT32_BYTES = 4
WORKING_ARRAYS = 8
"""Arrays of the size of the moving inputs that a method of one round takes at most."""


@dataclass(frozen=True)
class ReadingGuide:
    """How to read a value of a map.

    Attributes:
        family: "gradient" (what a change of an element changes), "path" (relative to a baseline), "activation",
            "backward rule" (an altered backward pass), "perturbation" or "region".
        units: "output", "output per unit of input", "relevance" or "score of the samples".
        complete: whether attributions sum to F(x) - F(x').
        complete_by_construction: whether they do for any number of steps, so that the sum says nothing of accuracy.
        needs_baseline: whether it asks for one.
        pools_baselines: whether all baselines of an instance make one map.
        deterministic: whether it draws no random numbers.
        tier: what it needs of a model: "T0" values, "T1" also input gradients, "T2" also activations within, "T3" also
            altered backward rules.
        fails_randomization: whether the literature found that its maps hardly change when weights are randomized.
        score_before_activation: whether it is defined on the score before the softmax or sigmoid, which it then
            explains where a request names no score and the model file shows that one.
    """

    family: str
    units: str
    complete: bool
    needs_baseline: bool
    deterministic: bool
    paper: str
    tier: str = "T1"
    fails_randomization: bool = False
    pools_baselines: bool = False
    complete_by_construction: bool = False
    score_before_activation: bool = False

    @property
    def one_map_per_baseline(self) -> bool:
        """Whether each baseline makes a map of its own."""
        return self.needs_baseline and not self.pools_baselines


@dataclass(frozen=True)
class Needs:
    """What a method asks of a model.

    Attributes:
        rule: name of the gradient rule, or "" for a method that takes no gradient.
        layers: whether it reads activations within the model, or differentiates with respect to them.
        spatial_axes: whether an input that moves must have H and W axes.
        segmentation: whether it has segments found in inputs that have H and W axes, which takes scikit-image.
    """

    rule: str = STANDARD.name
    layers: bool = False
    spatial_axes: bool = False
    segmentation: bool = False


@dataclass(frozen=True)
class Cost:
    """Rows that a method needs for one question, end points not counted.

    Attributes:
        min_gradient_rows, max_gradient_rows: rows with one forward and one backward evaluation each.
        common_gradient_rows: those among them that are the same for every target of an instance and a baseline.
        min_forward_rows, max_forward_rows: forward-only rows, all of them the same for every target.
    """

    min_gradient_rows: int = 0
    max_gradient_rows: int = 0
    common_gradient_rows: int = 0
    min_forward_rows: int = 0
    max_forward_rows: int = 0

    @classmethod
    def fixed(cls, gradient_rows: int = 0, forward_rows: int = 0) -> Cost:
        """Of a method whose rows depend on nothing that it evaluates."""
        return cls(gradient_rows, gradient_rows, gradient_rows, forward_rows, forward_rows)

    @property
    def max_step_count(self) -> int:
        """Most evaluations of one path: of gradients, or forward ones of a method that takes none."""
        return self.max_gradient_rows or self.max_forward_rows


class Method(Protocol):
    """A frozen dataclass of options with pure functions around a question.

    Every option has a default, and the name of its field in the method's message. What is said here holds where a
    method says nothing else: it takes one round of derivatives, and leaves nothing to the model.
    """

    @property
    def reading_guide(self) -> ReadingGuide:
        """How to read a value of its maps."""
        ...

    @property
    def needs(self) -> Needs:
        """What it asks of a model."""
        return Needs()

    def resolved(self, subject: Subject) -> Self:
        """The same method with what it leaves to the model filled in: what is echoed, and planned.

        Raises:
            InvalidRequest: an option does not fit the model or the shapes of its inputs.
            Unsupported: the model lacks something that the method needs.
        """
        return self

    def maps(self, subject: Subject) -> Mapping[str, MapSpec]:
        """How the maps of a resolved method are laid out, by name."""
        return subject.maps

    def cost(self, subject: Subject) -> Cost:
        """Rows that one question needs, of a resolved method."""
        ...

    def path_bytes(self, subject: Subject) -> int:
        """Memory that one question takes at most between its first round and its answer."""
        return WORKING_ARRAYS * FLOAT32_BYTES * subject.element_count

    def plan(self, question: Question) -> Plan:
        """The first round of rows."""
        ...

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The answer, or the next round of rows: a subclass of Plan that remembers the earlier ones.

        Args:
            plan: the plan that was evaluated.
            evaluation: what came back for it.
        """
        ...

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The answer if time ended before `upcoming`, which `attribution` returned: the best map of the rounds."""
        raise AssertionError(f"{type(self).__name__} has one round. This is a bug.")
