"""Short names of the enum values of the contract: "CONVERGED" for STOP_REASON_CONVERGED."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar, cast

from explainserve_client.errors import RequestTypeError, RequestValueError

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper

V = TypeVar("V", bound=int)


def short_name(enum: _EnumTypeWrapper[V], value: int) -> str:
    """Name without the prefix; a value that this client does not know yet is "UNKNOWN_<number>"."""
    by_number = enum.DESCRIPTOR.values_by_number
    return by_number[value].name.removeprefix(_prefix(enum)) if value in by_number else f"UNKNOWN_{value}"


def optional_name(enum: _EnumTypeWrapper[V], value: int) -> str | None:
    """Name without the prefix, None for the unspecified value."""
    return short_name(enum, value) if value else None


def enum_value(enum: _EnumTypeWrapper[V], name: str) -> V:
    """Value of a short name, in any case of letters.

    Raises:
        RequestTypeError: not a string.
        RequestValueError: no such name; the message lists the names.
    """
    if not isinstance(name, str):
        raise RequestTypeError(f"{enum.DESCRIPTOR.name} is named by a string, not {name!r}")
    values = {short_name(enum, number): number for number in enum.DESCRIPTOR.values_by_number if number}
    if name.upper() not in values:
        raise RequestValueError(f"no {enum.DESCRIPTOR.name} {name!r}; there are {', '.join(values)}")
    return cast(V, values[name.upper()])


def optional_value(enum: _EnumTypeWrapper[V], name: str | None) -> V:
    """Value of a short name, the unspecified value for None."""
    return cast(V, 0) if name is None else enum_value(enum, name)


def _prefix(enum: _EnumTypeWrapper[V]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", enum.DESCRIPTOR.name).upper() + "_"
