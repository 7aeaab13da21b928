"""How much memory an evaluation takes, by how far the process grows: libraries do not tell what they allocate."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"


def resident_bytes() -> int | None:
    """Bytes of this process in memory, or None where the system does not tell."""
    try:
        pages = int((_PROCESS / "statm").read_text().split()[1])
    except (OSError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_growth(work: Callable[[], object]) -> int | None:
    """By how many bytes the process grows at most while `work` runs, or None where the system does not tell.

    What was freed but is still kept goes back to the system first, or taking it again would not show. What other
    threads take meanwhile counts too.
    """
    _trim()
    before = resident_bytes()
    if before is None or not _reset_peak():
        return None
    work()
    return max(_peak_bytes() - before, 0)


def _trim() -> None:
    """Only glibc keeps what was freed, and has this function."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """See proc(5); not every container may."""
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    assert found is not None, "a system that resets the peak tells it"
    return int(found[1]) * 1024
