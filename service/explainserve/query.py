"""What a client wants explained: methods, instances, targets and baselines, and how many questions they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from explainserve.baselines import BaselineSpec
from explainserve.errors import InvalidRequest
from explainserve.explanation import Baseline, Instance, Subject
from explainserve.methods import Method
from explainserve.plan import Differentiation
from explainserve.scheduling import Request
from explainserve.served_model import ServedModel
from explainserve.signature import ScoreHead
from explainserve.targets import TargetSpec


class Place(NamedTuple):
    """Where a map stands in the answer: positions of the method in the request, of the instance, and of the target and
    the baseline of the instance; no baseline for methods that need none."""

    method: int
    instance: int
    target: int
    baseline: int | None


CONCURRENT_QUESTIONS = 32
"""Questions of one query whose rounds are in flight together: enough to fill batches."""

MAX_SHARING_TARGETS = 16
"""Targets whose rows share a forward pass: more would save little, and a micro-batch takes longer with each."""

FIRST_ROUND_ARRAYS = 12
"""Arrays of the size of its inputs that a path keeps after its first round, at most."""


@dataclass(frozen=True, eq=False)
class Query:
    """What a client wants explained, checked against the model's signature.

    Attributes:
        methods: resolved for the subject, in the order of the request.
        baselines: where no method needs one, they are left out of account.
        request: priority and hard deadline of its rows.
        budget_ends_at: time of `time.monotonic` after which the best map so far is the answer, or None.
    """

    model: ServedModel
    instances: tuple[Instance, ...]
    targets: tuple[TargetSpec, ...]
    baselines: tuple[BaselineSpec, ...]
    methods: tuple[Method, ...]
    subject: Subject
    request: Request = field(default_factory=Request)
    budget_ends_at: float | None = None

    @property
    def tap(self) -> Differentiation:
        """Forward-only rows that give the values of the layers that are explained."""
        output = self.model.signature.output(self.targets[0].output).name
        return Differentiation(output, ScoreHead.IDENTITY, taps=self.subject.cut)

    def function(self, spec: TargetSpec) -> Differentiation:
        """What a target is a form of."""
        return replace(spec.function(self.model.signature), cut=self.subject.cut)

    def functions_of(self, instance_index: int) -> list[Differentiation]:
        """Those of the targets of one instance, as each method explains them, each once."""
        specs = (spec for method in self.methods for spec in self.scored_targets_of(method, instance_index))
        return list(dict.fromkeys(map(self.function, specs)))

    def scored_targets(self, method: Method) -> list[TargetSpec]:
        """All targets in the order of the request, with the scores that a method explains."""
        before = method.reading_guide.score_before_activation
        return [spec.scored(self.model.signature, before_activation=before) for spec in self.targets]

    def scored_targets_of(self, method: Method, instance_index: int) -> list[TargetSpec]:
        """Those of one instance."""
        return [spec for spec in self.scored_targets(method) if spec.instance_index in (None, instance_index)]

    def targets_of(self, instance_index: int) -> list[TargetSpec]:
        """Targets of one instance, in the order of the request."""
        return [spec for spec in self.targets if spec.instance_index in (None, instance_index)]

    @property
    def needs_baselines(self) -> bool:
        """Whether any method does."""
        return any(method.reading_guide.needs_baseline for method in self.methods)

    def baseline_specs_of(self, instance_index: int) -> list[BaselineSpec]:
        """Baselines of one instance that a method needs, in the order of the request."""
        own = [spec for spec in self.baselines if spec.instance_index in (None, instance_index)]
        return own if self.needs_baselines else []

    def baselines_of(self, instance_index: int) -> list[Baseline]:
        """The same, made, noise counts expanded."""
        instance, count = self.instances[instance_index], len(self.instances)
        signature, data = self.model.signature, self.model.data_baselines
        return [
            replace(baseline, layers=spec.at_layers(self.subject, instance_index, count))
            for spec in self.baseline_specs_of(instance_index)
            for baseline in spec.baselines(signature, instance, instance_index, count, data)
        ]

    def target_count(self, instance_index: int) -> int:
        """Number of targets of one instance."""
        return sum(spec.target_count for spec in self.targets_of(instance_index))

    def baseline_count(self, instance_index: int) -> int:
        """Number of baselines of one instance that a method needs, noise counts expanded."""
        moving = tuple(self.instances[instance_index].moving)
        return sum(spec.baseline_count(moving) for spec in self.baseline_specs_of(instance_index))

    def path_count_of(self, method: Method, instance_index: int) -> int:
        """Questions of one method about one instance and target: one per baseline, or one in all."""
        return self.baseline_count(instance_index) if method.reading_guide.one_map_per_baseline else 1

    @property
    def question_count(self) -> int:
        """Number of (method, instance, target, baseline)."""
        return sum(
            self.target_count(index) * self.path_count_of(method, index)
            for method in self.methods
            for index in range(len(self.instances))
        )

    @property
    def held_bytes(self) -> int:
        """Memory of inputs, baselines and maps, and with a time budget of all first rounds, which are kept together."""
        baselines = sum(self.baseline_count(index) for index in range(len(self.instances)))
        of_one = sum(array.nbytes for array in self.instances[0].moving.values())
        per_question = 1 if self.budget_ends_at is None else 1 + FIRST_ROUND_ARRAYS
        return input_bytes(self.instances) + (baselines + self.question_count * per_question) * of_one

    @property
    def case_count(self) -> int:
        """Number of cases (instance, target, baseline): each is a question of every method, whose rows are shared."""
        return sum(
            self.target_count(index) * max(self.path_count_of(method, index) for method in self.methods)
            for index in range(len(self.instances))
        )

    @property
    def case_bytes(self) -> int:
        """Memory that the paths of all methods in one case hold while their rounds are in flight, at most."""
        return sum(method.path_bytes(self.subject) for method in self.methods)

    def concurrent_case_count(self, max_bytes: int) -> int:
        """Cases whose rounds are in flight together: as many as fit beside what is held, and at least one; enough for
        all targets that may share rows, whatever the number of methods."""
        fitting = (max_bytes - self.held_bytes) // max(1, self.case_bytes)
        enough = max(MAX_SHARING_TARGETS, CONCURRENT_QUESTIONS // len(self.methods))
        return max(1, min(fitting, enough, self.case_count))


Baselines = tuple[tuple[Baseline, ...], ...]
"""Of each instance."""


def all_baselines(query: Query) -> Baselines:
    """Baselines of every instance.

    Raises:
        InvalidRequest: an instance has no target (INSTANCE_WITHOUT_TARGETS) or no baseline
            (INSTANCE_WITHOUT_BASELINES).
    """
    baselines = tuple(tuple(query.baselines_of(index)) for index in range(len(query.instances)))
    for index, own in enumerate(baselines):
        if query.needs_baselines and not own:
            text = f"instance {index} has no baseline: each of them names another instance"
            raise InvalidRequest("INSTANCE_WITHOUT_BASELINES", text, instance=index)
        if not query.targets_of(index):
            text = f"instance {index} has no target: each of them names another instance"
            raise InvalidRequest("INSTANCE_WITHOUT_TARGETS", text, instance=index)
    return baselines


def input_bytes(instances: Sequence[Instance]) -> int:
    """Memory of all inputs of these instances."""
    return sum(array.nbytes for one in instances for array in (*one.moving.values(), *one.fixed.values()))
