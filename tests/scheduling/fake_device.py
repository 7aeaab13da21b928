"""Plans of small segments and a device that evaluates them in closed form: every sum tells which rows took part."""

from __future__ import annotations

from collections import Counter

import numpy as np

from explainserve.plan import Differentiation, Plan, Segment, SegmentEvaluation, Selector
from explainserve.scheduling import Batch, Job, Request, Scheduler
from explainserve.signature import ScoreHead

GRADIENT = Differentiation("y", ScoreHead.IDENTITY, ("x",))
FORWARD = Differentiation("y", ScoreHead.IDENTITY)
SELECTOR = Selector(np.array([0]), np.ones(1, np.float32))


def segment(
    rows: int, value: float = 1.0, shape: tuple[int, ...] = (2,), function: Differentiation = GRADIENT
) -> Segment:
    point = {"x": np.full(shape, value, np.float32)}
    weights = np.ones(rows) if function.wrt else np.zeros(rows)
    selector = SELECTOR if function.wrt else None
    return Segment(point, point, {}, function, np.arange(1, rows + 1) / rows, weights, selector)


def job(*rows: int, model: str = "m", request: Request | None = None, batch: int = 8, **kwargs: object) -> Job:
    segments = tuple(segment(count, **kwargs) for count in rows)  # type: ignore[arg-type]
    return Job(model, Plan(segments), request or Request(), batch)


def evaluate(batch: Batch) -> list[SegmentEvaluation]:
    """F(x) = sum of x; the gradient sum is the sum of alpha x weight over the rows, in each element times x."""
    return [_evaluation(piece) for piece in batch.rows.segments]


def _evaluation(piece: Segment) -> SegmentEvaluation:
    if piece.selector is None:
        return SegmentEvaluation(np.empty(0), {}, np.outer(piece.alphas, piece.end["x"]).astype(np.float32))
    total = np.float32((piece.alphas * piece.weights).sum()) * piece.end["x"]
    return SegmentEvaluation(piece.alphas * float(piece.end["x"].sum()), {"x": total})


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
    for part, answer in zip(job.plan.segments, job.evaluation.segments, strict=True):
        x = part.end["x"].astype(np.float64)
        if part.selector is None:
            np.testing.assert_allclose(answer.outputs, np.outer(part.alphas, x), rtol=1e-6)
        else:
            np.testing.assert_allclose(answer.scores, part.alphas * x.sum(), rtol=1e-12)
            np.testing.assert_allclose(answer.gradient_sums["x"], (part.alphas * part.weights).sum() * x, rtol=1e-5)
