"""The engine: one thread per device that pulls micro-batches from the scheduler. The only threads, futures and
locks."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from explainserve.errors import EvaluationFailed, ExplainServeError, ShuttingDown, first_line, is_out_of_memory
from explainserve.metrics import Metrics
from explainserve.plan import Evaluation, Plan, SegmentEvaluation
from explainserve.repository import ServedModel
from explainserve.scheduling import Batch, Job, Request, RowLimit, Scheduler

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = "OUT_OF_MEMORY"
"""Reason with which any backend says so."""

LAST_BATCH_SECONDS = 10.0
"""Time that the batch on the device gets when the engine stops."""


class Engine:
    """Evaluates plans on one device.

    Args:
        scheduler: decides which rows go next.
        metrics: instruments to feed.
    """

    def __init__(self, scheduler: Scheduler, metrics: Metrics) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._wake = threading.Condition()
        self._futures: dict[Job, asyncio.Future[None]] = {}
        self._limits: WeakKeyDictionary[ServedModel, RowLimit] = WeakKeyDictionary()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)

    def start(self) -> None:
        """Starts the device thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the device thread after the batch it is at; what waits is ended with ShuttingDown.

        A batch that takes longer than LAST_BATCH_SECONDS is left to itself: nothing can interrupt it.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._thread.join(LAST_BATCH_SECONDS)
        for job in list(self._futures):
            job.error = ShuttingDown("SHUTTING_DOWN", "the server is shutting down")
            self._settle([job])

    @contextmanager
    def admitted(self, request: Request, row_count: int, byte_count: int = 0) -> Iterator[None]:
        """A place in the queue for all rows and all memory that a request may need, as long as the context lasts.

        Raises:
            QueueFull: there is none (QUEUE_FULL).
        """
        with self._wake:
            self._scheduler.admit(request, row_count, byte_count)
            self._metrics.reserved_bytes.set(self._scheduler.reserved_bytes)
        try:
            yield
        finally:
            with self._wake:
                self._scheduler.release(request)
                self._metrics.reserved_bytes.set(self._scheduler.reserved_bytes)

    async def evaluate(self, model: ServedModel, plan: Plan, request: Request) -> tuple[Evaluation, float]:
        """Evaluates all rows of a plan of an admitted request; also returns the seconds that its first row waited.

        Cancelling this coroutine drops the rows that still wait.

        Raises:
            DeadlineExceeded: `request.expires_at`, in seconds of `time.monotonic`, passed.
            EvaluationFailed: the model raised.
        """
        future = asyncio.get_running_loop().create_future()
        with self._wake:
            if self._stopping:
                raise ShuttingDown("SHUTTING_DOWN", "the server is shutting down")
            job = Job(model, plan, request, self._limits.setdefault(model, RowLimit(model.max_batch_rows)))
            self._scheduler.submit(job, time.monotonic())
            self._futures[job] = future
            self._wake.notify()
        try:
            await future
        finally:
            with self._wake:
                self._futures.pop(job, None)
                self._scheduler.cancel(job)
        started = job.started_at if job.started_at is not None else job.submitted_at
        queue_seconds = started - job.submitted_at
        self._metrics.queue_seconds.labels(model.name).observe(queue_seconds)
        return job.evaluation, queue_seconds

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                started = time.monotonic()
                parts = _model(batch).loaded.evaluate(batch.rows)
                seconds = time.monotonic() - started
            except Exception as error:  # a model may raise anything; it fails its own requests only
                self._settle(self._failed(batch, _as_evaluation_failure(error)))
            else:
                self._settle(self._completed(batch, parts, seconds))

    def _completed(self, batch: Batch, parts: Sequence[SegmentEvaluation], seconds: float) -> list[Job]:
        """Jobs that are done with a batch; or that it fails, where the model returned nonsense."""
        self._observe(batch, seconds)
        with self._wake:
            try:
                return self._scheduler.complete(batch, parts, seconds)
            except Exception as error:
                return self._scheduler.fail(batch, _as_evaluation_failure(error))

    def _failed(self, batch: Batch, error: ExplainServeError) -> list[Job]:
        """Jobs that a failure ends: those of one request, after it was tried without others and in small enough parts.

        So a request fails for its own rows only, and memory that does not suffice for a batch is enough for its half.
        """
        model = _model(batch)
        self._metrics.failed_batches.labels(model.name, error.reason).inc()
        with self._wake:
            if error.reason == OUT_OF_MEMORY and batch.rows.row_count > 1:
                self._scheduler.retry_in_halves(batch)
                text = "model %s ran out of memory with %d rows; its micro-batches hold %d at most from now on"
                logger.warning(text, model.name, batch.rows.row_count, self._limits[model].rows)
                return []
            if len(batch.requests) > 1:
                self._scheduler.retry_alone(batch)
                return []
            return self._scheduler.fail(batch, error)

    def _next_batch(self) -> Batch | None:
        """Waits for rows; None when the engine stops."""
        with self._wake:
            while not self._stopping:
                now = time.monotonic()
                self._settle(self._scheduler.expire(now))
                batch = self._scheduler.next_batch(now)
                self._metrics.waiting_rows.set(self._scheduler.waiting_row_count)
                if batch is not None:
                    return batch
                self._wake.wait()
        return None

    def _observe(self, batch: Batch, seconds: float) -> None:
        model = _model(batch)
        kind = "gradient" if batch.rows.function.wrt else "forward"
        self._metrics.compute_seconds.labels(model.name).observe(seconds)
        self._metrics.batch_rows.labels(model.name).observe(batch.rows.row_count)
        self._metrics.rows.labels(model.name, kind).inc(batch.rows.row_count)
        self._metrics.backward_evaluations.labels(model.name).inc(batch.rows.backward_count)

    def _settle(self, jobs: list[Job]) -> None:
        """Tells the coroutines that wait for these jobs."""
        for job in jobs:
            future = self._futures.pop(job, None)
            if future is not None and not future.get_loop().is_closed():
                future.get_loop().call_soon_threadsafe(_resolve, future, job.error)


def _model(batch: Batch) -> ServedModel:
    assert isinstance(batch.model, ServedModel)
    return batch.model


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _as_evaluation_failure(error: Exception) -> ExplainServeError:
    if isinstance(error, ExplainServeError):
        return error
    if is_out_of_memory(error):
        return EvaluationFailed("OUT_OF_MEMORY", f"no memory is left: {first_line(error)}")
    return EvaluationFailed("MODEL_RAISED", f"the model raised {type(error).__name__}: {first_line(error)}")
