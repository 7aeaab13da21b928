"""What a server process sets once, for all of its threads; `docs/threads.md` has the whole picture and the figures.

The threads are: the event loop, which only moves messages; WORKER_COUNT workers, which read, check, compute figures and
write; one per device, which evaluates micro-batches with the threads of onnxruntime or torch; one that loads models;
and gRPC's own. Few of them hold Python's lock at a time, and those that compute give way to those that answer.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import ThreadpoolController

WORKER_COUNT = 4
"""Threads for what would hold up the event loop. More would wait for each other: most of it holds Python's lock."""

_SWITCH_SECONDS = 0.001
"""How long a thread may keep Python's lock while another waits: a health check needs it several times, and Python's
own 5 milliseconds each time are more than the rest of its way."""

_NICENESS = 5
"""Of threads that compute for long, above that of the others. Only threads of one machine notice, when it is busy."""


def prepare(loop: asyncio.AbstractEventLoop) -> None:
    """Sets the threads of a server whose event loop is `loop`, before it answers."""
    # numpy's own BLAS threads spin beside the model's: measured, they doubled the processor time of small models
    ThreadpoolController().select(internal_api="openblas").limit(limits=1)
    sys.setswitchinterval(_SWITCH_SECONDS)
    loop.set_default_executor(ThreadPoolExecutor(WORKER_COUNT, "worker"))


def give_way() -> None:
    """Lets other threads go before the calling one and those that it starts, where the system knows such threads."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)


def settle() -> None:
    """Keeps what is alive now, such as loaded models, out of later garbage collections, which stop every thread.

    To be called again after each change of what is loaded, so that nothing of it stays for good.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
