"""Values of enumerations to nouns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from explainserve.errors import InvalidRequest

T = TypeVar("T")


def looked_up(table: Mapping[int, T], value: int, field: str) -> T:
    """Raises InvalidRequest (ENUM_UNKNOWN) for a value that the table lacks."""
    if value not in table:
        raise InvalidRequest("ENUM_UNKNOWN", f"{field} {value} is unknown", field=field, value=value)
    return table[value]
