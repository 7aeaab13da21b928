"""What is set once per process: workers, priorities, and what garbage collections leave out."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import weakref

import pytest

from explainserve import process


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def in_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


class Knot:
    """Garbage that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


def test_no_more_workers_run_than_stated():
    together = threading.Barrier(process.WORKER_COUNT + 1)

    async def meet() -> None:
        process.prepare(asyncio.get_running_loop())
        with pytest.raises(threading.BrokenBarrierError):
            await asyncio.gather(*(asyncio.to_thread(together.wait, 0.2) for _ in range(process.WORKER_COUNT + 1)))

    asyncio.run(meet())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own elsewhere")
def test_a_thread_that_gives_way_takes_those_it_starts_along_and_no_other():
    before = niceness()

    def give_way() -> tuple[int, int]:
        process.give_way()
        return niceness(), in_thread(niceness)

    assert in_thread(give_way) == (min(before + 5, 19),) * 2
    assert niceness() == in_thread(niceness) == before


def test_what_is_alive_is_left_out_of_collections_until_it_is_settled_again():
    knot = Knot()
    gone = weakref.ref(knot)
    try:
        process.settle()
        del knot
        gc.collect()
        assert gone() is not None

        process.settle()
        assert gone() is None
    finally:
        gc.unfreeze()
