"""Memory that is reserved, refused and given back, and when to try again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from explainserve.errors import LONGEST_RETRY_SECONDS, SHORTEST_RETRY_SECONDS, QueueFull
from explainserve.memory import Memory
from explainserve.metrics import Metrics


def refused(memory: Memory, byte_count: int) -> QueueFull:
    with pytest.raises(QueueFull) as caught, memory.reserved(byte_count):
        pass
    return caught.value


def clock(*seconds: float) -> Iterator[float]:
    """Says these times, and from then on the last."""
    yield from seconds
    while True:
        yield seconds[-1]


def test_it_is_reserved_as_long_as_the_context_lasts() -> None:
    registry = CollectorRegistry()
    memory = Memory(100, Metrics(registry))

    with memory.reserved(60):
        assert refused(memory, 41).metadata == {"bound": "bytes", "reserved": "60", "needed": "41", "limit": "100"}
        with memory.reserved(40):
            assert registry.get_sample_value("explainserve_reserved_bytes") == 100
        assert registry.get_sample_value("explainserve_reserved_bytes") == 60
    with memory.reserved(100):
        pass


def test_it_is_given_back_after_an_error() -> None:
    memory = Memory(100)

    with pytest.raises(ValueError, match="wrong"), memory.reserved(100):
        raise ValueError("wrong")
    with memory.reserved(100):
        pass


def test_time_to_try_again_follows_from_how_long_memory_is_kept() -> None:
    """It was kept for eight seconds, and half of what is reserved must go."""
    memory = Memory(100, clock=clock(0.0, 8.0).__next__)
    with memory.reserved(1):
        pass

    with memory.reserved(100):
        assert refused(memory, 50).retry_after_seconds == pytest.approx(4.0)


@pytest.mark.parametrize(("kept", "told"), [(0.0, SHORTEST_RETRY_SECONDS), (1e6, LONGEST_RETRY_SECONDS)])
def test_time_to_try_again_is_bounded(kept: float, told: float) -> None:
    memory = Memory(100, clock=clock(0.0, kept).__next__)
    with memory.reserved(1):
        pass

    with memory.reserved(100):
        assert refused(memory, 50).retry_after_seconds == told
