"""A cache of byte strings that is bounded by their bytes; the least recently used ones leave first."""

from __future__ import annotations

from collections import OrderedDict

ENTRY_BYTES = 512
"""What an entry takes beside its key and its value: objects and tables. Bounds the number of entries, however small."""


class ByteCache:
    """Values in, the same values out, or nothing. Used by one thread at a time.

    Args:
        capacity_bytes: of all entries together, keys and ENTRY_BYTES for each included; 0 keeps nothing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        self._byte_count = 0

    @property
    def byte_count(self) -> int:
        """What all entries take, never above the capacity."""
        return self._byte_count

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> bytes | None:
        """The value that was put last under the key, which is now the most recently used; None where it has left."""
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def fits(self, key: bytes, value_bytes: int) -> bool:
        """Whether a value of that size would be kept."""
        return _size(key, value_bytes) <= self._capacity_bytes

    def put(self, key: bytes, value: bytes) -> None:
        """Keeps a value in place of the key's earlier one; one that would not fit alone is not kept."""
        self._drop(key)
        if not self.fits(key, len(value)):
            return
        self._entries[key] = value
        self._byte_count += _size(key, len(value))
        while self._byte_count > self._capacity_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        value = self._entries.pop(key, None)
        if value is not None:
            self._byte_count -= _size(key, len(value))


def _size(key: bytes, value_bytes: int) -> int:
    return len(key) + value_bytes + ENTRY_BYTES
