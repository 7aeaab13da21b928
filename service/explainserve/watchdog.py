"""What is learned of a model while it is served, and when a run of it has taken too long.

Plain values: times come in as arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from explainserve.backends import Collect
from explainserve.errors import ExplainServeError
from explainserve.scheduling import Batch, RowLimit
from explainserve.served_model import ServedModel

BATCHES = 20
"""A run that takes as long as so many usual micro-batches of its model is no slow one."""

HANGS = 3
"""So many runs of a model may have to be ended before it is served no longer: each keeps the device from all others."""

INTERRUPTION_SECONDS = 5.0
"""Time that a run gets to end after it was asked to, or the watchdog's own time where that is shorter."""

_KEPT = 0.9
"""Share of the usual time that stays when a further batch is counted."""


@dataclass
class Conduct:
    """How one model has behaved.

    Attributes:
        limit: rows of its micro-batches, halved where memory ran out.
        batch_seconds: time of a micro-batch of late.
        seconds_per_row: the same for each of its rows; 0 before anything is known.
        hangs: runs that had to be ended.
        disowned: whether it is evaluated no longer.
    """

    limit: RowLimit
    batch_seconds: float = 0.0
    seconds_per_row: float = 0.0
    hangs: int = 0
    disowned: bool = False

    @classmethod
    def at_load(cls, model: ServedModel) -> Conduct:
        """What is known when it was loaded."""
        seconds = model.seconds_per_row or 0.0
        return cls(RowLimit(model.max_batch_rows), seconds * model.max_batch_rows, seconds)

    def completed(self, row_count: int, seconds: float) -> None:
        """Counts the time of a batch that came back."""
        kept = _KEPT if self.batch_seconds else 0.0
        self.batch_seconds = kept * self.batch_seconds + (1 - kept) * seconds
        self.seconds_per_row = kept * self.seconds_per_row + (1 - kept) * seconds / row_count

    def hung(self) -> bool:
        """Counts a run that had to be ended; whether it was one too many."""
        self.hangs += 1
        return self.hangs >= HANGS


@dataclass(eq=False)
class Run:
    """A batch on the device, or submitted behind the one that is.

    Attributes:
        model: that is evaluated.
        started_at: time at which the device was free for it.
        due_at: time at which something must be done about it.
        interrupted: whether it was asked to end.
        collect: waits for its results, or the error with which it could not be submitted; None before it is.
    """

    batch: Batch
    model: ServedModel
    started_at: float = math.inf
    due_at: float = math.inf
    interrupted: bool = False
    collect: Collect | ExplainServeError | None = None

    @property
    def submitted(self) -> bool:
        """Whether the model has been given it."""
        return self.collect is not None


class Watchdog:
    """Says when runs are overdue.

    Args:
        seconds: that any run may take; 0 lets all take for ever.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds or math.inf

    def due_at(self, conduct: Conduct, now: float) -> float:
        """When a run that begins now has taken too long."""
        return now + max(self.seconds, BATCHES * conduct.batch_seconds)

    def given_up_at(self, now: float) -> float:
        """When a run that is asked to end now is given up."""
        return now + min(self.seconds, INTERRUPTION_SECONDS)
