"""A sign of life on long work."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from explainserve_client import AttributionSelector, Progress

_DELAY_SECONDS = 1.0


@contextmanager
def working(label: str) -> Iterator[Callable[[Progress], None]]:
    """Shows a bar, how far the paths are, and the elapsed time on standard error once the work takes a second; only on
    a terminal.

    Yields what takes the progress of a path. Paths count when they have ended: how many rounds an adaptive one takes is
    known then, so that the bar of a single path moves without an end.
    """
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Display

    console = Console(stderr=True)
    display = Display(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    )
    task, paths = display.add_task(label, total=None), Paths()

    def show(progress: Progress) -> None:
        paths.add(progress)
        total = progress.path_count if progress.path_count > 1 else None
        display.update(task, description=f"{label}: {paths}", completed=paths.finished_count, total=total)

    timer = threading.Timer(_DELAY_SECONDS, display.start)
    timer.daemon = True
    timer.start()
    try:
        yield show
    finally:
        timer.cancel()
        timer.join()
        display.stop()


class Paths:
    """How far the paths of a request are."""

    def __init__(self) -> None:
        self._newest: dict[AttributionSelector, Progress] = {}

    def add(self, progress: Progress) -> None:
        """Takes what is new of one path."""
        self._newest[progress.position] = progress

    @property
    def finished_count(self) -> int:
        """Paths that have ended."""
        return sum(progress.finished for progress in self._newest.values())

    def __str__(self) -> str:
        """Such as: 3 of 12 maps, error up to 0.07."""
        count = max((progress.path_count for progress in self._newest.values()), default=0)
        errors = [progress.map_error for progress in self._newest.values() if progress.map_error is not None]
        worst = f", error up to {max(errors):.2g}" if errors else ""
        return f"{self.finished_count} of {count} maps{worst}"
