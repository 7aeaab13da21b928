"""Plans of small segments and a device that evaluates them in closed form: every sum tells which rows took part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from explainserve.plan import Differentiation, Plan, Segment, SegmentEvaluation, Selector
from explainserve.scheduling import Batch, Job, Request, RowLimit, Scheduler
from explainserve.signature import ScoreHead

GRADIENT = Differentiation("y", ScoreHead.IDENTITY, ("x",))
FORWARD = Differentiation("y", ScoreHead.IDENTITY)


def segment(
    rows: int,
    value: float = 1.0,
    shape: tuple[int, ...] = (2,),
    function: Differentiation = GRADIENT,
    scales: tuple[float, ...] = (1.0,),
) -> Segment:
    """`scales` are the weights of its selectors, where it has a gradient."""
    point = {"x": np.full(shape, value, np.float32)}
    weights = np.ones(rows) if function.wrt else np.zeros(rows)
    selectors = tuple(Selector(np.array([0]), np.array([scale], np.float32)) for scale in scales if function.wrt)
    return Segment(point, point, {}, function, np.arange(1, rows + 1) / rows, weights, selectors)


def job(*rows: int, model: str = "m", request: Request | None = None, batch: int = 8, **kwargs: object) -> Job:
    segments = tuple(segment(count, **kwargs) for count in rows)  # type: ignore[arg-type]
    return Job(model, Plan(segments), request or Request(), RowLimit(batch))


def evaluate(batch: Batch) -> list[SegmentEvaluation]:
    """F(x) = sum of x; the gradient sum is the sum of alpha x weight over the rows, in each element times x. Both are
    scaled by the selector."""
    return [part for piece in batch.rows.segments for part in _parts(piece)]


def _parts(piece: Segment) -> Iterator[SegmentEvaluation]:
    if not piece.selectors:
        yield SegmentEvaluation(np.empty(0), {}, np.outer(piece.alphas, piece.end["x"]).astype(np.float32))
    for selector in piece.selectors:
        scale = selector.weights[0]
        total = np.float32(scale * (piece.alphas * piece.weights).sum()) * piece.end["x"]
        yield SegmentEvaluation(piece.alphas * float(scale * piece.end["x"].sum()), {"x": total})


def run(scheduler: Scheduler, batch: Batch | None) -> list[Job]:
    """The jobs that are done when the device has evaluated a batch."""
    assert batch is not None
    return scheduler.complete(batch, evaluate(batch), 1.0)


def drain(scheduler: Scheduler) -> list[Job]:
    """The jobs that are done when the device has evaluated all that waits."""
    finished: list[Job] = []
    while (batch := scheduler.next_batch(0.0)) is not None:
        finished += run(scheduler, batch)
    return finished


def rows_by_job(batch: Batch | None) -> Counter[Job]:
    """How many rows of each job a batch holds."""
    assert batch is not None
    counts: Counter[Job] = Counter()
    for piece in batch.slices:
        counts[piece.job] += piece.last - piece.first
    return counts


def assert_own_rows_exactly_once(job: Job) -> None:
    """What came back for a finished job is what its own rows give, each once and in its place."""
    assert job.done
    answers = iter(job.evaluation.segments)
    for part in job.plan.segments:
        x = part.end["x"].astype(np.float64)
        if not part.selectors:
            np.testing.assert_allclose(next(answers).outputs, np.outer(part.alphas, x), rtol=1e-6)
        for selector in part.selectors:
            scaled, answer = x * selector.weights[0], next(answers)
            np.testing.assert_allclose(answer.scores, part.alphas * scaled.sum(), rtol=1e-12)
            np.testing.assert_allclose(
                answer.gradient_sums["x"], (part.alphas * part.weights).sum() * scaled, rtol=1e-5
            )
    assert next(answers, None) is None
