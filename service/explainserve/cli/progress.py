"""A sign of life on long work."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_DELAY_SECONDS = 1.0


@contextmanager
def working(label: str) -> Iterator[None]:
    """Shows a moving bar and the elapsed time on standard error once the work takes a second; only on a terminal.

    The bar has no end: how many rounds an adaptive path takes is known when it stops.
    """
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    )
    progress.add_task(label, total=None)
    timer = threading.Timer(_DELAY_SECONDS, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        progress.stop()
