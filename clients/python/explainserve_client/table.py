"""A read-only mapping whose failed look-ups say what there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from explainserve_client.errors import MissingEntryError

V = TypeVar("V")


class Table(Mapping[str, V]):
    """Entries by name, in order.

    Raises:
        MissingEntryError: (a KeyError) no entry of that name; the message lists the names.
    """

    __slots__ = ("_entries", "_noun")

    def __init__(self, noun: str, entries: Iterable[tuple[str, V]]) -> None:
        self._noun = noun
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> V:
        if name not in self._entries:
            raise MissingEntryError(f"no {self._noun} {name!r}; {self._listing()}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{self._noun}: {', '.join(self._entries) or 'none'}>"

    def only(self) -> V:
        """The single entry.

        Raises:
            MissingEntryError: there are several, or none.
        """
        if len(self._entries) != 1:
            raise MissingEntryError(f"there is not one {self._noun} here; {self._listing()}")
        return next(iter(self._entries.values()))

    def _listing(self) -> str:
        return f"there are {', '.join(map(repr, self._entries))}" if self._entries else "there are none"
