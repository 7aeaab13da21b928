"""The engine: one thread per device that pulls micro-batches from the scheduler, and one that watches it. The only
threads, futures and locks.

A model may raise, return nonsense, run out of memory or hang; it fails its own requests only. A run that hangs is asked
to end. Where its library cannot do that, nothing can: its thread is lost, another takes its place, and the model is
disowned, for the lost one may still be at work in it.

A device that works behind the thread is given the next batch while it works on this one, so that it never waits for the
thread. Only one, since what it has been given no priority and no cancellation can call back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from explainserve.errors import EvaluationFailed, ExplainServeError, ShuttingDown, first_line, is_out_of_memory
from explainserve.metrics import Metrics
from explainserve.plan import Evaluation, Plan, SegmentEvaluation
from explainserve.process import give_way
from explainserve.scheduling import Job, Request, Scheduler
from explainserve.served_model import ServedModel
from explainserve.watchdog import Conduct, Run, Watchdog

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = "OUT_OF_MEMORY"
"""Reason with which any backend says so."""

LAST_BATCH_SECONDS = 10.0
"""Time that the batch on the device gets when the engine stops and somebody waits for it."""

INTERRUPTED_BATCH_SECONDS = 1.0
"""Time that it gets to end when it was asked to."""

Tell = Callable[[ServedModel, ExplainServeError], None]


class Engine:
    """Evaluates plans on one device.

    Args:
        scheduler: decides which rows go next.
        metrics: instruments to feed.
        watchdog: decides how long a run may take.
        tell_disowned: called with a model that is evaluated no longer and the reason; it must not block.
        device: its name, for people.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        metrics: Metrics,
        watchdog: Watchdog | None = None,
        tell_disowned: Tell = lambda model, error: None,
        device: str = "cpu",
    ) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._watchdog = watchdog or Watchdog(0)
        self._tell_disowned = tell_disowned
        self._device = device
        lock = threading.Lock()
        self._wake = threading.Condition(lock)
        self._wake_watcher = threading.Condition(lock)
        self._futures: dict[Job, asyncio.Future[None]] = {}
        self._conducts: WeakKeyDictionary[ServedModel, Conduct] = WeakKeyDictionary()
        self._run: Run | None = None
        self._ahead: Run | None = None
        self._stopping = False
        self._thread = self._device_thread()
        self._watcher = threading.Thread(target=self._watch, name=f"watchdog {device}", daemon=True)

    def start(self) -> None:
        """Starts the threads."""
        self._thread.start()
        self._watcher.start()

    def stop(self) -> None:
        """Ends the threads after the batch on the device; what waits is ended with ShuttingDown.

        A batch that nobody waits for, or that takes longer than LAST_BATCH_SECONDS, is asked to end, and left to itself
        where it does not.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
            self._wake_watcher.notify_all()
            run = self._run
            wanted = run is not None and self._scheduler.wants(run.batch)
        self._watcher.join()
        if wanted:
            self._thread.join(LAST_BATCH_SECONDS)
        if run is not None:
            self._interrupt(run)
        self._thread.join(INTERRUPTED_BATCH_SECONDS)
        for job in list(self._futures):
            job.error = ShuttingDown("SHUTTING_DOWN", "the server is shutting down")
            self._settle([job])

    def seconds_per_row(self, model: ServedModel) -> float:
        """What a row of a model took of late, or when it was loaded; 0 where that is not known."""
        with self._wake:
            return self._conduct(model).seconds_per_row

    def expected(self, model: ServedModel, row_count: int) -> tuple[float, int]:
        """When so many more rows of a model would be done, by which devices are compared: in seconds, as far as those
        of rows are known, and in rows. A run that takes long is expected to take as long again, so that nobody is sent
        to a device that hangs.
        """
        with self._wake:
            seconds = self._scheduler.reserved_seconds + row_count * self._conduct(model).seconds_per_row
            rows = self._scheduler.reserved_rows + row_count
            if self._run is None:
                return seconds, rows
            running = self._run.batch.rows.row_count
            usual = running * self._conduct(self._run.model).seconds_per_row
            return seconds + max(usual, time.monotonic() - self._run.started_at), rows + running

    @contextmanager
    def admitted(self, request: Request, row_count: int) -> Iterator[None]:
        """A place in the queue for all rows that a request may need, as long as the context lasts.

        Raises:
            QueueFull: there is none (QUEUE_FULL).
        """
        with self._wake:
            self._scheduler.admit(request, row_count)
            self._observe_queue()
        try:
            yield
        finally:
            with self._wake:
                self._scheduler.release(request)
                self._observe_queue()

    async def evaluate(self, model: ServedModel, plan: Plan, request: Request) -> tuple[Evaluation, float]:
        """Evaluates all rows of a plan of an admitted request; also returns the seconds that its first row waited.

        Cancelling this coroutine drops the rows that still wait.

        Raises:
            DeadlineExceeded: `request.expires_at`, in seconds of `time.monotonic`, passed.
            EvaluationFailed: the model raised (MODEL_RAISED), one row does not fit into memory (OUT_OF_MEMORY), or the
                model does not return (MODEL_HANGS).
        """
        future = asyncio.get_running_loop().create_future()
        with self._wake:
            if self._stopping:
                raise ShuttingDown("SHUTTING_DOWN", "the server is shutting down")
            conduct = self._conduct(model)
            if conduct.disowned:
                raise _hangs(model)
            job = Job(model, plan, request, conduct.limit)
            self._scheduler.submit(job, time.monotonic())
            self._futures[job] = future
            self._observe_queue()
            self._wake.notify()
        try:
            await future
        finally:
            with self._wake:
                self._futures.pop(job, None)
                self._scheduler.cancel(job)
                self._observe_queue()
        started = job.started_at if job.started_at is not None else job.submitted_at
        queue_seconds = started - job.submitted_at
        self._metrics.queue_seconds.labels(model.name, self._device).observe(queue_seconds)
        return job.evaluation, queue_seconds

    def _device_thread(self) -> threading.Thread:
        return threading.Thread(target=self._work, name=f"device {self._device}", daemon=True)

    def _work(self) -> None:
        give_way()
        while (run := self._next_run()) is not None:
            _submit(run)
            if (ahead := self._run_ahead(run)) is not None:
                _submit(ahead)
            outcome = _outcome(run)
            with self._wake:
                if self._run is not run:
                    self._came_back(run)
                    return
                self._run = None
                self._settle(self._concluded(run, outcome))
            del run, ahead, outcome  # else an unloaded model would stay until the next batch

    def _next_run(self) -> Run | None:
        """The one that was submitted ahead, or waits for rows; None when the engine stops."""
        with self._wake:
            while not self._stopping:
                self._run, self._ahead = self._ahead or self._packed(), None
                if self._run is not None:
                    self._begin(self._run)
                    return self._run
                self._wake.wait()
        return None

    def _run_ahead(self, run: Run) -> Run | None:
        """A further run, to be submitted while this one is on the device, where that can be and a full batch waits.

        With fewer rows nothing would be won: those that come until the device is free would have to wait for the next.
        """
        with self._wake:
            if not run.model.loaded.runs_ahead or self._stopping or self._run is not run:
                return None
            if self._scheduler.waiting_row_count >= self._conduct(run.model).limit.rows:
                self._ahead = self._packed()
            return self._ahead

    def _packed(self) -> Run | None:
        """A run of rows that wait, or None."""
        now = time.monotonic()
        self._settle(self._scheduler.expire(now))
        batch = self._scheduler.next_batch(now)
        self._observe_queue()
        if batch is None:
            return None
        assert isinstance(batch.model, ServedModel)
        return Run(batch, batch.model)

    def _begin(self, run: Run) -> None:
        """Its time begins when the device is free for it."""
        run.started_at = time.monotonic()
        run.due_at = self._watchdog.due_at(self._conduct(run.model), run.started_at)

    def _concluded(self, run: Run, outcome: Sequence[SegmentEvaluation] | ExplainServeError) -> list[Job]:
        """Jobs that end with a run."""
        if not isinstance(outcome, ExplainServeError):
            return self._completed(run, outcome)
        if run.interrupted:
            return self._hung(run)
        return self._failed(run, outcome)

    def _completed(self, run: Run, parts: Sequence[SegmentEvaluation]) -> list[Job]:
        """Jobs that are done now; all of the batch's where the model returned nonsense."""
        seconds = time.monotonic() - run.started_at
        self._conduct(run.model).completed(run.batch.rows.row_count, seconds)
        self._observe(run, seconds)
        try:
            return self._scheduler.complete(run.batch, parts, seconds)
        except Exception as error:
            return self._scheduler.fail(run.batch, _as_evaluation_failure(error))

    def _failed(self, run: Run, error: ExplainServeError) -> list[Job]:
        """Jobs that a failure ends: those of one request, after it was tried without others and in small enough parts.

        So a request fails for its own rows only, and memory that does not suffice for a batch is enough for its half.
        """
        batch = run.batch
        self._metrics.failed_batches.labels(run.model.name, self._device, error.reason).inc()
        if error.reason == OUT_OF_MEMORY and batch.rows.row_count > 1:
            self._scheduler.retry_in_halves(batch)
            text = "model %s ran out of memory on %s with %d rows; its micro-batches hold %d at most from now on"
            rows, limit = batch.rows.row_count, self._conduct(run.model).limit.rows
            logger.warning(text, run.model.name, self._device, rows, limit)
            return []
        if len(batch.requests) > 1:
            self._scheduler.retry_alone(batch)
            return []
        return self._scheduler.fail(batch, error)

    def _hung(self, run: Run) -> list[Job]:
        """Jobs that end with a run that had to be ended: as with any failure, until it is one too many."""
        ended = self._failed(run, _hangs(run.model))
        logger.warning("a run of model %s on %s took too long and was ended", run.model.name, self._device)
        if self._conduct(run.model).hung():
            ended += self._disown(run.model)
        return ended

    def _disown(self, model: ServedModel) -> list[Job]:
        """Evaluates a model no longer; its jobs end."""
        self._conduct(model).disowned = True
        self._tell_disowned(model, _hangs(model))
        return self._scheduler.drop(model, _hangs(model))

    def _watch(self) -> None:
        """Asks a run that is overdue to end, and gives it up where it does not."""
        while (run := self._overdue()) is not None:
            if run.interrupted:
                self._give_up(run)
            else:
                self._interrupt(run)
            del run  # as above

    def _overdue(self) -> Run | None:
        """Waits for a run that is overdue; None when the engine stops."""
        with self._wake_watcher:
            while not self._stopping:
                if (seconds := self._seconds_left()) <= 0:
                    return self._run
                self._wake_watcher.wait(min(seconds, threading.TIMEOUT_MAX))
        return None

    def _seconds_left(self) -> float:
        """Time until a run can be overdue; one that begins from now on is not before the watchdog's own time."""
        return self._watchdog.seconds if self._run is None else self._run.due_at - time.monotonic()

    def _interrupt(self, run: Run) -> None:
        with self._wake:
            if self._run is run:  # else another has begun, which must not be hit
                run.interrupted = True
                run.due_at = self._watchdog.given_up_at(time.monotonic())
                run.model.loaded.interrupt()

    def _give_up(self, run: Run) -> None:
        """Leaves a thread to itself and puts another in its place, which runs again what else the first one had."""
        with self._wake:
            if self._run is not run:
                return
            stuck, other = (run, self._ahead) if self._ahead is None or self._ahead.submitted else (self._ahead, run)
            self._run = self._ahead = None
            if other is not None:
                self._scheduler.retry_alone(other.batch)
            self._metrics.failed_batches.labels(stuck.model.name, self._device, _hangs(stuck.model).reason).inc()
            self._metrics.lost_threads.labels(self._device).inc()
            self._settle(self._disown(stuck.model))
            self._thread = self._device_thread()
            self._thread.start()
        text = "a run of model %s on %s cannot be ended; the server goes on without its thread"
        logger.error(text, stuck.model.name, self._device)

    def _came_back(self, run: Run) -> None:
        """A thread that was lost ends; what it brings is nobody's any more."""
        self._metrics.lost_threads.labels(self._device).dec()
        logger.warning("a run of model %s on %s that was given up has ended", run.model.name, self._device)

    def _conduct(self, model: ServedModel) -> Conduct:
        if model not in self._conducts:
            self._conducts[model] = Conduct.at_load(model)
        return self._conducts[model]

    def _observe_queue(self) -> None:
        self._metrics.waiting_rows.labels(self._device).set(self._scheduler.waiting_row_count)

    def _observe(self, run: Run, seconds: float) -> None:
        rows, place = run.batch.rows, (run.model.name, self._device)
        self._metrics.compute_seconds.labels(*place).observe(seconds)
        self._metrics.batch_rows.labels(*place).observe(rows.row_count)
        self._metrics.rows.labels(*place, "gradient" if rows.function.wrt else "forward").inc(rows.row_count)
        self._metrics.backward_evaluations.labels(*place).inc(rows.backward_count)

    def _settle(self, jobs: list[Job]) -> None:
        """Tells the coroutines that wait for these jobs."""
        for job in jobs:
            future = self._futures.pop(job, None)
            if future is not None and not future.get_loop().is_closed():
                future.get_loop().call_soon_threadsafe(_resolve, future, job.error)


def _submit(run: Run) -> None:
    """Hands a batch to its model, unless that has it. A model may raise anything, and fails its own requests only."""
    if run.submitted:
        return
    try:
        run.collect = run.model.loaded.submit(run.batch.rows)
    except Exception as error:
        run.collect = _as_evaluation_failure(error)


def _outcome(run: Run) -> Sequence[SegmentEvaluation] | ExplainServeError:
    """What the device makes of a batch."""
    if isinstance(run.collect, ExplainServeError):
        return run.collect
    assert run.collect is not None, "it was submitted"
    try:
        return run.collect()
    except Exception as error:
        return _as_evaluation_failure(error)


def _hangs(model: ServedModel) -> EvaluationFailed:
    return EvaluationFailed(
        "MODEL_HANGS", f"model {model.name!r} did not return in time", model=model.name, version=model.version
    )


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
