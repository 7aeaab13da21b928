"""The explainer: from a query to raw attributions. Resolves targets and baselines, and runs a method round by round."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from explainserve.baselines import BaselineSpec
from explainserve.devices import Devices
from explainserve.errors import DeadlineExceeded, InvalidRequest, LimitExceeded
from explainserve.explanation import Attribution, Baseline, Instance, Question, StopReason, Subject, Target
from explainserve.memory import Memory
from explainserve.methods import Method
from explainserve.plan import Differentiation, Evaluation, Plan, Segment, SegmentEvaluation, Tensors
from explainserve.repository import ServedModel
from explainserve.scheduling import Request
from explainserve.sharing import shared
from explainserve.signature import ScoreHead
from explainserve.targets import TargetSpec, certain_target_count

T = TypeVar("T")


class Place(NamedTuple):
    """Where a map stands in the answer: positions of the method in the request, of the instance, and of the target and
    the baseline of the instance; no baseline for methods that need none."""

    method: int
    instance: int
    target: int
    baseline: int | None


CONCURRENT_QUESTIONS = 32
"""Most questions of one query whose rounds are in flight together: enough to fill batches."""

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
        """Those of the targets of one instance, each once."""
        return list(dict.fromkeys(self.function(spec) for spec in self.targets_of(instance_index)))

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
        return [
            baseline
            for spec in self.baseline_specs_of(instance_index)
            for baseline in spec.baselines(
                self.model.signature,
                self.instances[instance_index],
                instance_index,
                len(self.instances),
                self.model.data_baselines,
            )
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
        return _input_bytes(self.instances) + (baselines + self.question_count * per_question) * of_one

    @property
    def path_bytes(self) -> int:
        """Memory that the path of one question holds while its rounds are in flight, at most."""
        return max(method.path_bytes(self.subject) for method in self.methods)

    def path_count(self, max_bytes: int) -> int:
        """Questions whose rounds are in flight together: at least one, else as many as fit beside what is held."""
        fitting = (max_bytes - self.held_bytes) // max(1, self.path_bytes)
        return max(1, min(fitting, CONCURRENT_QUESTIONS, self.question_count))


@dataclass(frozen=True, eq=False)
class Explanation:
    """One attribution and its place in the answer."""

    place: Place
    method: Method
    question: Question
    attribution: Attribution


@dataclass(frozen=True, eq=False)
class Round:
    """What became of a path in one round, or when its time ended.

    Attributes:
        outcome: the answer, or the upcoming round, which remembers the earlier ones.
    """

    place: Place
    method: Method
    question: Question
    outcome: Attribution | Plan

    def explanation(self) -> Explanation:
        """The answer, or the best map so far: computed here, so that rounds nobody looks at cost nothing."""
        attribution = self.outcome
        if isinstance(attribution, Plan):
            attribution = replace(self.method.so_far(self.question, attribution), stop_reason=StopReason.UNFINISHED)
        return Explanation(self.place, self.method, self.question, attribution)


Baselines = tuple[tuple[Baseline, ...], ...]
"""Of each instance."""

Observer = Callable[[Round], None]
"""Called on the event loop after each round of each path; the last call of a path has its answer."""


def unobserved(_: Round) -> None:
    """The observer of a query that nobody watches."""


@dataclass(frozen=True)
class Cost:
    """Rows and backward passes of a query on an idle server.

    Attributes:
        question_count: attributions before baselines are folded.
        end_point_rows: forward-only rows.
        min_forward_rows, max_forward_rows: forward-only rows of methods that evaluate some.
        min_gradient_rows: if targets that may share rows share all of them.
        max_gradient_rows: if they share only those that are the same for every target.
        min_backward_count: if targets that may turn out to be the same one do.
        max_backward_count: if they do not.
        path_count: questions whose rounds are in flight together.
        held_bytes: memory of inputs, baselines and maps; see `Query.held_bytes`.
        path_bytes: memory of all paths in flight, at most.
        score_bytes: memory of the score tensors at the end points, axes of free extent counted as 1.
    """

    question_count: int
    end_point_rows: int
    min_forward_rows: int
    max_forward_rows: int
    min_gradient_rows: int
    max_gradient_rows: int
    min_backward_count: int
    max_backward_count: int
    path_count: int
    held_bytes: int
    path_bytes: int
    score_bytes: int

    @property
    def host_bytes(self) -> int:
        """Most memory on the host at once, beside the model."""
        return self.held_bytes + self.path_bytes + self.score_bytes

    @property
    def min_rows(self) -> int:
        """Fewest rows, each with one forward pass."""
        return self.end_point_rows + self.min_forward_rows + self.min_gradient_rows

    @property
    def max_rows(self) -> int:
        """Most rows."""
        return self.end_point_rows + self.max_forward_rows + self.max_gradient_rows


@dataclass(eq=False)
class Usage:
    """What a query used, summed over its rounds.

    Attributes:
        forward_rows: rows without a gradient.
        gradient_rows: rows with one, for any number of targets.
        backward_count: backward passes of rows, one for each target.
        saved_rows: rows, and so forward passes, that sharing made unnecessary.
    """

    forward_rows: int = 0
    gradient_rows: int = 0
    backward_count: int = 0
    saved_rows: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def row_count(self) -> int:
        """Rows, each with one forward pass."""
        return self.forward_rows + self.gradient_rows

    def add(self, plan: Plan, queue_seconds: float) -> None:
        """Counts one evaluated plan."""
        gradient_rows = sum(segment.row_count for segment in plan.segments if segment.function.wrt)
        self.gradient_rows += gradient_rows
        self.forward_rows += plan.row_count - gradient_rows
        self.backward_count += plan.backward_count
        self.queue_seconds += queue_seconds


@dataclass(frozen=True, eq=False)
class Answer:
    """All attributions of a query, ordered by method, instance, target, baseline.

    Attributes:
        query: with the replica of the model that evaluated it.
        baselines: per instance.
    """

    query: Query
    explanations: tuple[Explanation, ...]
    baselines: Baselines
    usage: Usage


@dataclass(frozen=True, eq=False)
class Outputs:
    """Score tensors of instances, forward-only.

    Attributes:
        model: the replica that evaluated them.
        scores: per function one array per instance.
    """

    model: ServedModel
    scores: dict[Differentiation, list[NDArray[np.generic]]]
    usage: Usage


@dataclass(frozen=True, eq=False)
class EndPoints:
    """Forward-only rows of all instances and baselines, each distinct one once.

    Attributes:
        plan: one segment per row.
        positions: in the plan, by (function, instance, baseline or None for the instance itself).
    """

    plan: Plan
    positions: dict[tuple[Differentiation, int, int | None], int]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A query with its baselines, per instance, its end points and its cost."""

    query: Query
    baselines: Baselines
    end_points: EndPoints
    cost: Cost


class Explainer:
    """Answers queries, each on one device.

    Args:
        memory: from which each query takes what it needs while it is computed.
        max_request_rows: cap of rows of one query.
        max_request_bytes: cap of memory for the inputs, baselines and maps of one query.
    """

    def __init__(
        self, devices: Devices, max_request_rows: int, max_request_bytes: int, memory: Memory | None = None
    ) -> None:
        self._devices = devices
        self._memory = memory or Memory()
        self._max_request_rows = max_request_rows
        self._max_request_bytes = max_request_bytes

    def cost(self, query: Query) -> Cost:
        """Rows of a query. Where it would be refused, every end point counts as distinct.

        Raises:
            InvalidRequest: as `prepare`.
        """
        refused = self._cost(query, 0).max_rows > self._max_request_rows or query.held_bytes > self._max_request_bytes
        if refused:
            return self._cost(query, _end_point_bound(query))
        return self._cost(query, _first_rows(query, _all_baselines(query)))

    def prepare(self, query: Query) -> Prepared:
        """Makes the baselines, finds the distinct end points and states the cost, without evaluating anything.

        Raises:
            InvalidRequest: a baseline does not fit, or an instance has no target or no baseline.
            LimitExceeded: more rows (REQUEST_ROWS_EXCEEDED) or memory (REQUEST_BYTES_EXCEEDED) than a request may have.
        """
        self._admit(query, self._cost(query, 0))  # before baselines take memory
        baselines = _all_baselines(query)
        end_points = _taps(query, baselines) if query.subject.cut else _end_points(query, baselines)
        cost = self._cost(query, _first_rows(query, baselines))
        self._admit(query, cost)
        return Prepared(query, baselines, end_points, cost)

    async def explain(self, prepared: Prepared, observe: Observer = unobserved) -> Answer:
        """Computes all attributions, round by round.

        Raises:
            QueueFull: the server has no room for it now (QUEUE_FULL), before anything is evaluated.
            DeadlineExceeded: the deadline passed, or not even the first round fits into the time budget
                (TIME_BUDGET_TOO_SHORT).
            EvaluationFailed: the model raised.
        """
        query, usage = prepared.query, Usage()
        with (
            self._memory.reserved(prepared.cost.host_bytes),
            self._devices.admitted(query.model, query.request, prepared.cost.max_rows) as replica,
        ):
            query = replace(query, model=replica)
            asked, baselines, end_points = query, prepared.baselines, prepared.end_points
            if query.subject.cut:
                asked, baselines, end_points = await self._at_layers(query, baselines, end_points, usage)
            scores = await self._scores(asked, end_points, usage)
            questions = await asyncio.to_thread(_questions, asked, baselines, scores)
            ends = sum(1 if question.baseline is None else 2 for _, question in questions)
            usage.saved_rows = ends * (2 if query.subject.cut else 1) - usage.forward_rows
            inquiries = [
                _Inquiry(place, query.methods[place.method], question, observe) for place, question in questions
            ]
            explanations = await self._explanations(query, inquiries, prepared.cost.path_count, usage)
        return Answer(query, explanations, prepared.baselines, usage)

    async def outputs(
        self, model: ServedModel, instances: Sequence[Instance], functions: Sequence[Differentiation], request: Request
    ) -> Outputs:
        """Score tensors of instances.

        Raises:
            LimitExceeded: more rows than a request may have (REQUEST_ROWS_EXCEEDED).
            QueueFull: the server has no room for it now (QUEUE_FULL).
            DeadlineExceeded: the deadline passed.
            EvaluationFailed: the model raised.
        """
        usage = Usage()
        plan = Plan(tuple(_point(i.moving, i.fixed, function) for function in functions for i in instances))
        self._admit_rows(plan.row_count)
        with (
            self._memory.reserved(_input_bytes(instances)),
            self._devices.admitted(model, request, plan.row_count) as replica,
        ):
            evaluation = await self._evaluate(replica, plan, request, usage)
        arrays = [_only_output(segment) for segment in evaluation.segments]
        count = len(instances)
        scores = {f: arrays[k * count : (k + 1) * count] for k, f in enumerate(functions)}
        return Outputs(replica, scores, usage)

    def _cost(self, query: Query, end_point_rows: int) -> Cost:
        return _cost(query, end_point_rows, query.path_count(self._max_request_bytes))

    def _admit_rows(self, row_count: int) -> None:
        if row_count > self._max_request_rows:
            raise LimitExceeded(
                "REQUEST_ROWS_EXCEEDED",
                f"the request needs up to {row_count} rows, the limit is {self._max_request_rows}; ask for fewer "
                "instances, targets, baselines or steps",
                rows=row_count,
                limit=self._max_request_rows,
            )

    def _admit(self, query: Query, cost: Cost) -> None:
        self._admit_rows(cost.max_rows)
        if query.held_bytes > self._max_request_bytes:
            raise LimitExceeded(
                "REQUEST_BYTES_EXCEEDED",
                "inputs, baselines and maps of the request, and with a time budget their first rounds, need "
                f"{query.held_bytes} bytes of memory, the limit is {self._max_request_bytes}; ask for fewer instances, "
                "targets or baselines",
                bytes=query.held_bytes,
                limit=self._max_request_bytes,
            )

    async def _at_layers(
        self, query: Query, baselines: Baselines, taps: EndPoints, usage: Usage
    ) -> tuple[Query, Baselines, EndPoints]:
        """The same question at the layers that are explained: their values stand where those of inputs stood."""
        evaluation = await self._in_time(query, taps.plan, usage)
        values = [{name: array[0] for name, array in part.values.items()} for part in evaluation.segments]

        def at(instance_index: int, baseline_index: int | None) -> Tensors:
            return values[taps.positions[query.tap, instance_index, baseline_index]]

        instances = tuple(Instance(at(i, None), {**one.fixed, **one.moving}) for i, one in enumerate(query.instances))
        own = tuple(
            tuple(replace(one, moving=at(i, b)) for b, one in enumerate(of_instance))
            for i, of_instance in enumerate(baselines)
        )
        asked = replace(query, instances=instances)
        return asked, own, await asyncio.to_thread(_end_points, asked, own)

    async def _in_time(self, query: Query, plan: Plan, usage: Usage) -> Evaluation:
        """Raises DeadlineExceeded (TIME_BUDGET_TOO_SHORT)."""
        try:
            async with asyncio.timeout_at(query.budget_ends_at):
                return await self._evaluate(query.model, plan, query.request, usage)
        except TimeoutError:
            raise _too_short() from None

    async def _scores(self, query: Query, end_points: EndPoints, usage: Usage) -> _Scores:
        evaluation = await self._in_time(query, end_points.plan, usage)
        return _Scores(end_points, [_only_output(segment) for segment in evaluation.segments])

    async def _explanations(
        self, query: Query, inquiries: Sequence[_Inquiry], path_count: int, usage: Usage
    ) -> tuple[Explanation, ...]:
        """With a time budget the first round of all questions comes first, so that each has a map when it ends."""
        limit = _sharing_limit(path_count, len(query.methods))
        groups, gate = _sharing_groups(inquiries, limit), _Gate(path_count)
        if query.budget_ends_at is not None:
            await _all([self._begin(query, group, usage, gate) for group in groups])
        await _all([self._answer(query, group, usage, gate) for group in groups])
        return tuple(inquiry.explanation for inquiry in inquiries)

    async def _begin(self, query: Query, group: _Group, usage: Usage, gate: _Gate) -> None:
        async with gate.places(len(group)):
            await self._first_round(query, group, usage)

    async def _answer(self, query: Query, group: _Group, usage: Usage, gate: _Gate) -> None:
        """Evaluates rounds until the method answers every question or the time budget ends."""
        async with gate.places(len(group)):
            if group[0].outcome is None:
                await self._first_round(query, group, usage)
            while upcoming := [(one, one.outcome) for one in group if isinstance(one.outcome, Plan)]:
                if not await self._round(query, upcoming, usage):
                    await _all([one.settle(partial(one.method.so_far, one.question, plan)) for one, plan in upcoming])

    async def _first_round(self, query: Query, group: _Group, usage: Usage) -> None:
        plans = await _all([asyncio.to_thread(one.method.plan, one.question) for one in group])
        if not await self._round(query, list(zip(group, plans, strict=True)), usage):
            raise _too_short()

    async def _round(self, query: Query, upcoming: Sequence[tuple[_Inquiry, Plan]], usage: Usage) -> bool:
        """Evaluates a plan per question, equal rows once, and lets the method judge; False where the time budget ends
        before."""
        plans = [plan for _, plan in upcoming]
        together = shared(plans)
        try:
            async with asyncio.timeout_at(query.budget_ends_at):
                evaluation = await self._evaluate(query.model, together.plan, query.request, usage)
        except TimeoutError:
            return False
        usage.saved_rows += sum(plan.row_count for plan in plans) - together.plan.row_count
        judged = [
            one.settle(partial(one.method.attribution, one.question, plan, own))
            for (one, plan), own in zip(upcoming, together.dealt(evaluation), strict=True)
        ]
        await _all(judged)
        return True

    async def _evaluate(self, model: ServedModel, plan: Plan, request: Request, usage: Usage) -> Evaluation:
        evaluation, queue_seconds = await self._devices.evaluate(model, plan, request)
        usage.add(plan, queue_seconds)
        usage.compute_seconds = request.compute_seconds  # plans share batches, so theirs do not add up
        return evaluation


@dataclass(eq=False)
class _Inquiry:
    """A question on its way to an answer.

    Attributes:
        observe: is told of every outcome.
        outcome: what the method made of the last round: the answer or the next round; None before the first.
    """

    place: Place
    method: Method
    question: Question
    observe: Observer
    outcome: Attribution | Plan | None = None

    async def settle(self, judge: Callable[[], Attribution | Plan]) -> None:
        """Lets the method say what follows from a round, beside the event loop."""
        self.outcome = await asyncio.to_thread(judge)
        self.observe(Round(self.place, self.method, self.question, self.outcome))

    @property
    def explanation(self) -> Explanation:
        """The answer."""
        assert isinstance(self.outcome, Attribution), "A question was left before its answer. This is a bug."
        return Explanation(self.place, self.method, self.question, self.outcome)


_Group = Sequence[_Inquiry]
"""Questions that go round by round together, and share the rows that are the same for them."""


class _Gate:
    """A number of places, taken by groups in the order in which they come; a larger group takes all."""

    def __init__(self, place_count: int) -> None:
        self._count = place_count
        self._free = asyncio.Semaphore(place_count)
        self._entrance = asyncio.Lock()

    @asynccontextmanager
    async def places(self, count: int) -> AsyncIterator[None]:
        """Waits for that many places; one group at a time, or two could hold what each other waits for."""
        async with AsyncExitStack() as taken:
            async with self._entrance:
                for _ in range(min(count, self._count)):
                    await taken.enter_async_context(self._free)
            yield


@dataclass(frozen=True, eq=False)
class _Scores:
    """Score tensors at the end points."""

    end_points: EndPoints
    tensors: list[NDArray[np.generic]]

    def at(self, function: Differentiation, instance_index: int, baseline_index: int | None) -> NDArray[np.generic]:
        return self.tensors[self.end_points.positions[function, instance_index, baseline_index]]


def _all_baselines(query: Query) -> Baselines:
    baselines = tuple(tuple(query.baselines_of(index)) for index in range(len(query.instances)))
    for index, own in enumerate(baselines):
        if query.needs_baselines and not own:
            text = f"instance {index} has no baseline: each of them names another instance"
            raise InvalidRequest("INSTANCE_WITHOUT_BASELINES", text, instance=index)
        if not query.targets_of(index):
            text = f"instance {index} has no target: each of them names another instance"
            raise InvalidRequest("INSTANCE_WITHOUT_TARGETS", text, instance=index)
    return baselines


def _first_rows(query: Query, baselines: Baselines) -> int:
    """Rows at the ends of all paths; where layers are explained, those that give their values there come on top."""
    if not query.subject.cut:
        return _end_points(query, baselines).plan.row_count
    behind = replace(query, instances=tuple(map(_kept_beside_layers, query.instances)))
    return _taps(query, baselines).plan.row_count + _end_points(behind, baselines).plan.row_count


def _kept_beside_layers(instance: Instance) -> Instance:
    """Inputs keep the instance's values beside layers, so rows of different instances differ even at one baseline."""
    return Instance(instance.moving, {f"{name} beside layers": array for name, array in instance.moving.items()})


def _taps(query: Query, baselines: Baselines) -> EndPoints:
    """Rows at the instances and baselines of the inputs that give the values of the layers."""
    return _points(query, baselines, lambda _: [query.tap])


def _end_points(query: Query, baselines: Baselines) -> EndPoints:
    """Rows at the ends of all paths that give their scores."""
    return _points(query, baselines, query.functions_of)


def _points(query: Query, baselines: Baselines, functions_of: Callable[[int], Sequence[Differentiation]]) -> EndPoints:
    points: dict[tuple[Differentiation, bytes], Segment] = {}
    wanted: dict[tuple[Differentiation, int, int | None], tuple[Differentiation, bytes]] = {}
    for i, instance in enumerate(query.instances):
        functions = functions_of(i)
        ends: dict[int | None, Tensors] = {None: instance.moving, **{b: e.moving for b, e in enumerate(baselines[i])}}
        for b, moving in ends.items():
            identity = _identity(moving, instance.fixed)
            for function in functions:
                wanted[function, i, b] = function, identity
                points.setdefault((function, identity), _point(moving, instance.fixed, function))
    place = {key: position for position, key in enumerate(points)}
    return EndPoints(Plan(tuple(points.values())), {end: place[key] for end, key in wanted.items()})


def _questions(query: Query, baselines: Baselines, scores: _Scores) -> list[tuple[Place, Question]]:
    """Every question with its place, in the order of the answer. Methods are asked the same ones, so that they share
    what they evaluate."""
    asked = [list(_questions_of(query, i, baselines[i], scores)) for i in range(len(query.instances))]
    return [
        (Place(m, i, t, b), question)
        for m, method in enumerate(query.methods)
        for i, own in enumerate(asked)
        for t, b, question in own
        if (b is not None) == method.reading_guide.one_map_per_baseline
    ]


def _questions_of(
    query: Query, i: int, baselines: Sequence[Baseline], scores: _Scores
) -> Iterator[tuple[int, int | None, Question]]:
    """Questions about one instance with positions of target and baseline: for each target one without a baseline, for
    methods that need none or take all, and one with each."""
    instance, subject, every = query.instances[i], query.subject, tuple(baselines)
    for t, (function, target) in enumerate(_resolved(query, i, scores)):
        at_instance = target.selector.value(scores.at(function, i, None))
        ends = [target.selector.value(scores.at(function, i, b)) for b in range(len(baselines))]
        mean = float(np.mean(ends)) if ends else None
        yield t, None, Question(subject, instance, target, None, at_instance, mean, every)
        for b, baseline in enumerate(baselines):
            yield t, b, Question(subject, instance, target, baseline, at_instance, ends[b])


def _resolved(query: Query, instance_index: int, scores: _Scores) -> Iterator[tuple[Differentiation, Target]]:
    for spec in query.targets_of(instance_index):
        function = query.function(spec)
        for target in spec.resolve(query.model.signature, scores.at(function, instance_index, None)):
            yield function, target


def _end_point_bound(query: Query) -> int:
    """End points if all were distinct."""
    return sum(
        (len(query.functions_of(index)) + bool(query.subject.cut)) * (1 + query.baseline_count(index))
        for index in range(len(query.instances))
    )


def _sharing_limit(path_count: int, method_count: int) -> int:
    """Most targets that share rows: their paths are in flight together, those of all methods."""
    return max(1, min(MAX_SHARING_TARGETS, path_count // method_count))


def _sharing_groups(inquiries: Sequence[_Inquiry], limit: int) -> list[_Group]:
    """Questions of the same instance, baseline and function, of at most `limit` targets together, by all methods; those
    without a baseline go with the first one."""
    groups: dict[tuple[int, int, Differentiation], dict[int, list[_Inquiry]]] = {}
    for inquiry in inquiries:
        place, function = inquiry.place, inquiry.question.score
        by_target = groups.setdefault((place.instance, place.baseline or 0, function), {})
        by_target.setdefault(place.target, []).append(inquiry)
    return [
        [inquiry for of_target in part for inquiry in of_target]
        for by_target in groups.values()
        for part in _parts(list(by_target.values()), limit)
    ]


def _parts(whole: Sequence[T], limit: int) -> Iterator[Sequence[T]]:
    for first in range(0, len(whole), limit):
        yield whole[first : first + limit]


def _cost(query: Query, end_point_rows: int, path_count: int) -> Cost:
    limit = _sharing_limit(path_count, len(query.methods))
    paths = [
        (method.cost(query.subject), path)
        for method in query.methods
        for index in range(len(query.instances))
        for path in _paths(query, method, index, limit)
    ]
    return Cost(
        question_count=query.question_count,
        end_point_rows=end_point_rows,
        min_forward_rows=sum(one.min_forward_rows * p.count * p.groups for one, p in paths),
        max_forward_rows=sum(one.max_forward_rows * p.count * p.groups for one, p in paths),
        min_gradient_rows=sum(one.min_gradient_rows * p.count * p.groups for one, p in paths),
        max_gradient_rows=sum(
            one.common_gradient_rows * p.count * p.groups
            + (one.max_gradient_rows - one.common_gradient_rows) * p.count * p.targets
            for one, p in paths
        ),
        min_backward_count=sum(one.min_gradient_rows * p.count * p.certain_targets for one, p in paths),
        max_backward_count=sum(one.max_gradient_rows * p.count * p.targets for one, p in paths),
        path_count=path_count,
        held_bytes=query.held_bytes,
        path_bytes=path_count * query.path_bytes,
        score_bytes=end_point_rows * max(spec.output_bytes(query.model.signature) for spec in query.targets),
    )


@dataclass(frozen=True)
class _Paths:
    """Paths of one method to one instance, under one function.

    Attributes:
        count: number of baselines, or 1 where the method needs none.
        targets: number of targets, of which `certain_targets` certainly differ.
        groups: of targets that share rows.
    """

    count: int
    targets: int
    certain_targets: int
    groups: int


def _paths(query: Query, method: Method, instance_index: int, sharing_limit: int) -> Iterator[_Paths]:
    specs: dict[Differentiation, list[TargetSpec]] = {}
    for spec in query.targets_of(instance_index):
        specs.setdefault(spec.function(query.model.signature), []).append(spec)
    for own in specs.values():
        target_count = sum(spec.target_count for spec in own)
        groups = -(-target_count // sharing_limit)
        yield _Paths(query.path_count_of(method, instance_index), target_count, certain_target_count(own), groups)


def _input_bytes(instances: Sequence[Instance]) -> int:
    return sum(array.nbytes for one in instances for array in (*one.moving.values(), *one.fixed.values()))


async def _all(coroutines: Sequence[Coroutine[object, object, T]]) -> tuple[T, ...]:
    """Runs them together; the first error cancels the others and is raised alone."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return tuple(task.result() for task in tasks)


def _point(moving: Tensors, fixed: Tensors, function: Differentiation) -> Segment:
    """One forward-only row."""
    return Segment(moving, moving, fixed, function, np.ones(1), np.zeros(1))


def _identity(moving: Tensors, fixed: Tensors) -> bytes:
    """Digest of all inputs of one row."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, array in sorted({**fixed, **moving}.items()):
        hashed.update(f"{name}{array.dtype.str}{array.shape}".encode())
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.digest()


def _only_output(evaluation: SegmentEvaluation) -> NDArray[np.generic]:
    """The score tensor of a one-row forward-only segment."""
    assert evaluation.outputs is not None, "A forward-only segment came back without outputs. This is a bug."
    output: NDArray[np.generic] = evaluation.outputs[0]
    return output


def _too_short() -> DeadlineExceeded:
    return DeadlineExceeded(
        "TIME_BUDGET_TOO_SHORT", "not even the first round of rows fits into time_budget; allow more time"
    )
