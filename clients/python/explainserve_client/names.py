"""Short names of the enum values of the contract: "CONVERGED" for STOP_REASON_CONVERGED."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from explainserve_client.errors import RequestTypeError, RequestValueError

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper

V = TypeVar("V", bound=int)


def short_name(enum: _EnumTypeWrapper[V], value: int) -> str:
    """Name without the prefix; a value that this client does not know yet is "UNKNOWN_<number>"."""
    return _short_names(enum).get(value) or f"UNKNOWN_{value}"


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
    values = {own: number for number, own in _short_names(enum).items() if number}
    if name.upper() not in values:
        raise RequestValueError(f"no {enum.DESCRIPTOR.name} {name!r}; there are {', '.join(values)}")
    return cast(V, values[name.upper()])


def optional_value(enum: _EnumTypeWrapper[V], name: str | None) -> V:
    """Value of a short name, the unspecified value for None."""
    return cast(V, 0) if name is None else enum_value(enum, name)


@functools.cache
def _short_names(enum: _EnumTypeWrapper[Any]) -> Mapping[int, str]:
    """By number; kept, for a result asks a hundred times, and descriptors are slow to answer."""
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.DESCRIPTOR.name).upper() + "_"
    return {number: value.name.removeprefix(prefix) for number, value in enum.DESCRIPTOR.values_by_number.items()}
