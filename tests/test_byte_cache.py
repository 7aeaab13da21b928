"""The cache beside a plain list of what was used, in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from explainserve.byte_cache import ENTRY_BYTES, ByteCache

KEYS = st.sampled_from([b"a", b"b", b"c", b"dddd"])
STEPS = st.lists(st.tuples(KEYS, st.none() | st.binary(max_size=6).map(lambda data: data * 100)), max_size=60)


def size(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_BYTES


@given(STEPS, st.integers(0, 4 * ENTRY_BYTES))
def test_keeps_the_most_recently_used_that_fit(steps: list[tuple[bytes, bytes | None]], capacity: int) -> None:
    """A step with a value puts it, one without looks."""
    cache = ByteCache(capacity)
    used: list[tuple[bytes, bytes]] = []  # the most recently used last
    for key, value in steps:
        known = dict(used).get(key)
        if value is None:
            assert cache.get(key) == known
        else:
            cache.put(key, value)
            assert cache.fits(key, len(value)) == (size(key, value) <= capacity)
        used = [entry for entry in used if entry[0] != key]
        newest = known if value is None else value
        if newest is not None and size(key, newest) <= capacity:
            used.append((key, newest))
        while sum(size(*entry) for entry in used) > capacity:
            del used[0]
        assert (len(cache), cache.byte_count) == (len(used), sum(size(*entry) for entry in used))
    assert {key: cache.get(key) for key, _ in steps} == {key: dict(used).get(key) for key, _ in steps}


def test_a_value_that_does_not_fit_alone_leaves_the_others() -> None:
    cache = ByteCache(size(b"a", b"1") + 100)
    cache.put(b"a", b"1")
    cache.put(b"b", b"2" * 200)

    assert (cache.get(b"a"), cache.get(b"b")) == (b"1", None)


def test_a_value_that_does_not_fit_takes_the_place_of_the_earlier_one() -> None:
    """The earlier one is no longer what was put last."""
    cache = ByteCache(size(b"a", b"1"))
    cache.put(b"a", b"1")
    cache.put(b"a", b"2" * 200)

    assert (cache.get(b"a"), cache.byte_count) == (None, 0)
