"""Methods from and to their messages: an option of a method and its field have one name.

A field that is not set is the method's default. Names of enum values are lower-case without their prefix, tensors are
arrays, repeated fields tuples, and a MethodSpec within a method is another method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from explainserve.errors import InvalidRequest, Unimplemented
from explainserve.methods import METHODS, Method, name_of
from explainserve.rpc.tensors import decode
from explainserve.v1.method_pb2 import MethodSpec
from explainserve.v1.tensor_pb2 import Tensor


def read(spec: MethodSpec) -> Method:
    """The method of a message with its options.

    Raises:
        InvalidRequest: no method is chosen (METHOD_REQUIRED), an enum value is unknown (ENUM_UNKNOWN), a tensor is
            malformed, or an option is out of its range.
        Unimplemented: the server does not have the method yet (METHOD_UNIMPLEMENTED).
    """
    name = spec.WhichOneof("method")
    if name is None:
        raise InvalidRequest("METHOD_REQUIRED", "the method message names no method")
    if name not in METHODS:
        raise Unimplemented("METHOD_UNIMPLEMENTED", f"method {name} is not built yet", method=name)
    message: Message = getattr(spec, name)
    options = {field.name: _option(field, value) for field, value in message.ListFields()}
    return cast(Callable[..., Method], METHODS[name])(**{k: v for k, v in options.items() if v is not None})


def write(method: Method) -> MethodSpec:
    """A method with all its options, but for tensors, which the client has."""
    spec = MethodSpec()
    message: Message = getattr(spec, name_of(method))
    message.SetInParent()
    fields: Mapping[str, Any] = message.DESCRIPTOR.fields_by_name
    for option in dataclasses.fields(cast(Any, method)):
        value = getattr(method, option.name)
        if value is not None:
            _set(message, fields[option.name], value)
    return spec


def _option(field: FieldDescriptor, value: Any) -> Any:
    """What a method gets for a field; None for an enum's zero, which leaves the choice to the method."""
    if hasattr(value, "items"):
        return {key: _single(field, item) for key, item in value.items()}
    return tuple(_single(field, item) for item in value) if hasattr(value, "extend") else _single(field, value)


def _single(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Tensor):
        return decode(field.name, value)
    if isinstance(value, MethodSpec):
        return read(value)
    return value if field.enum_type is None else _enum_name(field.name, field.enum_type, value)


def _set(message: Message, field: FieldDescriptor, value: Any) -> None:
    if isinstance(value, np.ndarray | Mapping):
        return
    if isinstance(value, tuple):
        getattr(message, field.name).extend(value)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(write(value))
    else:
        setattr(message, field.name, value if field.enum_type is None else _enum_number(field.enum_type, value))


def _enum_name(field: str, kind: EnumDescriptor, value: int) -> str | None:
    known = kind.values_by_number.get(value)
    if known is None:
        raise InvalidRequest("ENUM_UNKNOWN", f"{field} {value} is unknown", field=field, value=value)
    return known.name.removeprefix(_prefix(kind)).lower() if value else None


def _enum_number(kind: EnumDescriptor, name: str) -> int:
    return int(kind.values_by_name[_prefix(kind) + name.upper()].number)


def _prefix(kind: EnumDescriptor) -> str:
    return str(kind.values_by_number[0].name).removesuffix("UNSPECIFIED")
