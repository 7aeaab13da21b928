"""Packs rows of many requests into device batches: no thread, no clock, no I/O."""

from explainserve.scheduling.job import Job, Request, RowLimit
from explainserve.scheduling.scheduler import Batch, Scheduler

__all__ = ["Batch", "Job", "Request", "RowLimit", "Scheduler"]
