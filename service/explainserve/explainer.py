"""The explainer: from a query to raw attributions. Resolves targets and baselines, and runs a method round by round."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from explainserve.devices import Devices
from explainserve.end_points import (
    EndPoints,
    distinct_end_points,
    end_point_bound,
    first_points,
    first_rows,
    point,
    score_tensor,
)
from explainserve.errors import DeadlineExceeded, LimitExceeded
from explainserve.explanation import Attribution, Instance, Question, StopReason
from explainserve.memory import Memory
from explainserve.methods import Method
from explainserve.plan import Differentiation, Evaluation, Plan, Tensors
from explainserve.query import Baselines, Place, Query, all_baselines, input_bytes
from explainserve.query_cost import Cost, cost_of, sharing_limit
from explainserve.questions import Scores, all_questions
from explainserve.scheduling import Request
from explainserve.served_model import ServedModel
from explainserve.sharing import shared

T = TypeVar("T")


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


Observer = Callable[[Round], None]
"""Called on the event loop after each round of each path; the last call of a path has its answer."""


def unobserved(_: Round) -> None:
    """The observer of a query that nobody watches."""


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
            return self._cost(query, end_point_bound(query))
        baselines = all_baselines(query)
        return self._cost(query, first_rows(query, baselines, first_points(query, baselines)))

    def prepare(self, query: Query) -> Prepared:
        """Makes the baselines, finds the distinct end points and states the cost, without evaluating anything.

        Raises:
            InvalidRequest: a baseline does not fit, or an instance has no target or no baseline.
            LimitExceeded: more rows (REQUEST_ROWS_EXCEEDED) or memory (REQUEST_BYTES_EXCEEDED) than a request may have.
        """
        self._admit(query, self._cost(query, 0))  # before baselines take memory
        baselines = all_baselines(query)
        end_points = first_points(query, baselines)
        cost = self._cost(query, first_rows(query, baselines, end_points))
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
            questions = await asyncio.to_thread(all_questions, asked, baselines, scores)
            ends = sum(1 if question.baseline is None else 2 for _, question in questions)
            usage.saved_rows = ends * (2 if query.subject.cut else 1) - usage.forward_rows
            inquiries = [
                _Inquiry(place, query.methods[place.method], question, observe) for place, question in questions
            ]
            explanations = await self._explanations(query, inquiries, prepared.cost.case_count, usage)
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
        plan = Plan(tuple(point(i.moving, i.fixed, function) for function in functions for i in instances))
        self._admit_rows(plan.row_count)
        with (
            self._memory.reserved(input_bytes(instances)),
            self._devices.admitted(model, request, plan.row_count) as replica,
        ):
            evaluation = await self._evaluate(replica, plan, request, usage)
        arrays = [score_tensor(segment) for segment in evaluation.segments]
        count = len(instances)
        scores = {f: arrays[k * count : (k + 1) * count] for k, f in enumerate(functions)}
        return Outputs(replica, scores, usage)

    def _cost(self, query: Query, end_point_rows: int) -> Cost:
        return cost_of(query, end_point_rows, query.concurrent_case_count(self._max_request_bytes))

    def _admit_rows(self, row_count: int) -> None:
        if row_count > self._max_request_rows:
            raise LimitExceeded(
                "REQUEST_ROWS_EXCEEDED",
                f"the request needs up to {row_count} rows, the limit is {self._max_request_rows}; ask for fewer "
                "instances, targets, baselines, steps or samples",
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
            tuple(replace(one, moving=one.at_layers(at(i, b))) for b, one in enumerate(of_instance))
            for i, of_instance in enumerate(baselines)
        )
        asked = replace(query, instances=instances)
        return asked, own, await asyncio.to_thread(distinct_end_points, asked, own)

    async def _in_time(self, query: Query, plan: Plan, usage: Usage) -> Evaluation:
        """Raises DeadlineExceeded (TIME_BUDGET_TOO_SHORT)."""
        try:
            async with asyncio.timeout_at(query.budget_ends_at):
                return await self._evaluate(query.model, plan, query.request, usage)
        except TimeoutError:
            raise _too_short() from None

    async def _scores(self, query: Query, end_points: EndPoints, usage: Usage) -> Scores:
        evaluation = await self._in_time(query, end_points.plan, usage)
        return Scores(end_points, [score_tensor(segment) for segment in evaluation.segments])

    async def _explanations(
        self, query: Query, inquiries: Sequence[_Inquiry], case_count: int, usage: Usage
    ) -> tuple[Explanation, ...]:
        """With a time budget the first round of all questions comes first, so that each has a map when it ends."""
        groups, gate = _sharing_groups(inquiries, sharing_limit(case_count)), _Gate(case_count)
        if query.budget_ends_at is not None:
            await _all([self._begin(query, group, usage, gate) for group in groups])
        await _all([self._answer(query, group, usage, gate) for group in groups])
        return tuple(inquiry.explanation for inquiry in inquiries)

    async def _begin(self, query: Query, group: _Group, usage: Usage, gate: _Gate) -> None:
        async with gate.places(_case_count(group)):
            await self._first_round(query, group, usage)

    async def _answer(self, query: Query, group: _Group, usage: Usage, gate: _Gate) -> None:
        """Evaluates rounds until the method answers every question or the time budget ends."""
        async with gate.places(_case_count(group)):
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


def _case_count(group: _Group) -> int:
    """Number of cases in a group, which is that of its targets."""
    return len({inquiry.place.target for inquiry in group})


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


async def _all(coroutines: Sequence[Coroutine[object, object, T]]) -> tuple[T, ...]:
    """Runs them together; the first error cancels the others and is raised alone."""
    if len(coroutines) == 1:  # as usual, and without the cost of a task
        return (await coroutines[0],)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return tuple(task.result() for task in tasks)


def _too_short() -> DeadlineExceeded:
    return DeadlineExceeded(
        "TIME_BUDGET_TOO_SHORT", "not even the first round of rows fits into time_budget; allow more time"
    )
