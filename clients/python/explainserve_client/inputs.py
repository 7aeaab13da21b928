"""Instances: arrays fitted to the signature of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from explainserve.v1 import tensor_pb2
from explainserve_client.errors import RequestTypeError, RequestValueError
from explainserve_client.models import InputSpec, ModelInfo
from explainserve_client.preprocess import Geometry, Preprocessed
from explainserve_client.tensors import Array, cast, to_tensor


@dataclass(frozen=True, slots=True)
class Instances:
    """Tensors by input name, batch axis included, and the geometry of preprocessed images, one per instance."""

    tensors: Mapping[str, tensor_pb2.Tensor]
    geometries: Mapping[str, tuple[Geometry, ...]]


def fit(inputs: Any, info: ModelInfo) -> Instances:
    """Names, casts and batches arrays as the model's signature says.

    Args:
        inputs: an array (or Preprocessed, or a list of Preprocessed) for a model with one input, or a dict by input
            name.

    Raises:
        RequestValueError: a missing or unknown input, a wrong rank, instances that differ in shape, different
            numbers of instances.
        RequestTypeError: an element type that cannot become the input's.
    """
    named = _named(inputs, info)
    arrays = {name: _batch(value, info.inputs[name]) for name, value in named.items()}
    _require_same_length(arrays, info)
    return Instances(
        tensors={name: to_tensor(array, info.inputs[name].dtype) for name, array in arrays.items()},
        geometries={name: found for name, value in named.items() if (found := _geometries(value))},
    )


def _named(inputs: Any, info: ModelInfo) -> dict[str, Any]:
    if not isinstance(inputs, Mapping):
        if len(info.inputs) != 1:
            raise RequestValueError(f"the model has several inputs; pass a dict by name: {', '.join(info.inputs)}")
        return {next(iter(info.inputs)): inputs}
    if set(inputs) != set(info.inputs):
        raise RequestValueError(f"inputs are {', '.join(inputs) or 'none'}, expected {', '.join(info.inputs)}")
    return dict(inputs)


def _batch(value: Any, spec: InputSpec) -> Array:
    """The array with its batch axis, in the element type of the input."""
    array = _array(value, spec.name)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise RequestTypeError(f"input {spec.name!r}: expected {spec.dtype}, not {array.dtype}")
    array = cast(array, spec.dtype, f"input {spec.name!r}")
    if array.ndim == len(spec.axes):
        return array
    if array.ndim == spec.instance_rank:
        return array[np.newaxis]
    axes = ", ".join(axis.name if axis.size is None else f"{axis.name} {axis.size}" for axis in spec.axes)
    raise RequestValueError(f"input {spec.name!r}: expected axes [{axes}], or one instance of them, not {array.shape}")


def _array(value: Any, name: str) -> Array:
    if isinstance(value, Preprocessed):
        return value.tensor
    parts = [image.tensor for image in value] if _is_preprocessed_list(value) else value
    try:
        return np.asarray(parts)
    except ValueError as error:
        raise RequestValueError(
            f"input {name!r}: its instances differ in shape, so they form no batch; send a request for each shape"
        ) from error


def _geometries(value: Any) -> tuple[Geometry, ...]:
    if isinstance(value, Preprocessed):
        return (value.geometry,)
    return tuple(image.geometry for image in value) if _is_preprocessed_list(value) else ()


def _is_preprocessed_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(image, Preprocessed) for image in value)


def _require_same_length(arrays: Mapping[str, Array], info: ModelInfo) -> None:
    lengths = {name: len(array) for name, array in arrays.items() if info.inputs[name].batch_axis is not None}
    if len(set(lengths.values())) > 1:
        stated = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise RequestValueError(f"inputs have different numbers of instances: {stated}")
