"""Tensors of a request to arrays, checked against a model's signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest, LimitExceeded
from explainserve.explanation import Instance
from explainserve.rpc.tensors import decode
from explainserve.settings import Settings
from explainserve.signature import InputSpec, Signature
from explainserve.v1 import tensor_pb2


def inputs(
    tensors: Mapping[str, tensor_pb2.Tensor], signature: Signature, settings: Settings
) -> dict[str, NDArray[np.generic]]:
    """All inputs of a request, checked against the signature.

    Raises:
        InvalidRequest: UNKNOWN_INPUT, MISSING_INPUT, DTYPE_MISMATCH, SHAPE_MISMATCH, TENSOR_SIZE_MISMATCH,
            NON_FINITE_INPUT, EMPTY_BATCH, BATCH_MISMATCH.
        LimitExceeded: too many instances (TOO_MANY_INSTANCES).
    """
    for name in tensors:
        signature.input(name)
    missing = [spec.name for spec in signature.inputs if spec.name not in tensors]
    if missing:
        raise InvalidRequest("MISSING_INPUT", f"input {', '.join(missing)} is missing", inputs=", ".join(missing))
    arrays = {spec.name: _input(spec, tensors[spec.name]) for spec in signature.inputs}
    _check_batch(arrays, signature, settings.max_instances)
    return arrays


def instances(
    arrays: Mapping[str, NDArray[np.generic]], signature: Signature, moving: Sequence[str]
) -> tuple[Instance, ...]:
    """Splits a batch; inputs without a batch axis are the same for every instance."""
    batched = [spec.name for spec in signature.inputs if spec.batched]
    count = arrays[batched[0]].shape[0] if batched else 1

    def of(index: int, name: str) -> NDArray[np.generic]:
        whole = arrays[name]
        return whole[index] if name in batched else whole

    return tuple(
        Instance(
            moving={name: of(index, name) for name in moving},
            fixed={name: of(index, name) for name in arrays if name not in moving},
        )
        for index in range(count)
    )


def _input(spec: InputSpec, tensor: tensor_pb2.Tensor) -> NDArray[np.generic]:
    array = decode(f"input {spec.name!r}", tensor)
    if array.dtype != spec.dtype:
        raise InvalidRequest(
            "DTYPE_MISMATCH",
            f"input {spec.name!r} has element type {array.dtype.name}, expected {spec.dtype.name}",
            input=spec.name,
            expected=spec.dtype.name,
            actual=array.dtype.name,
        )
    _check_shape(spec, array.shape)
    if spec.differentiable and not np.isfinite(array).all():
        raise InvalidRequest(
            "NON_FINITE_INPUT",
            f"input {spec.name!r} has {int((~np.isfinite(array)).sum())} values that are NaN or infinite",
            input=spec.name,
            count=int((~np.isfinite(array)).sum()),
        )
    return array


def _check_shape(spec: InputSpec, shape: tuple[int, ...]) -> None:
    axes = spec.axes
    fits = len(shape) == len(axes) and all(
        axis.size is None or axis.size == extent or (spec.batched and position == 0)
        for position, (axis, extent) in enumerate(zip(axes, shape, strict=True))
    )
    if not fits:
        expected = [axis.name if spec.batched and k == 0 else (axis.size or axis.name) for k, axis in enumerate(axes)]
        raise InvalidRequest(
            "SHAPE_MISMATCH",
            f"input {spec.name!r} has shape {list(shape)}, expected {expected}",
            input=spec.name,
            expected=expected,
            actual=list(shape),
        )
    if 0 in shape[1:]:
        raise InvalidRequest(
            "SHAPE_MISMATCH",
            f"input {spec.name!r} has an empty axis: {list(shape)}",
            input=spec.name,
            actual=list(shape),
        )


def _check_batch(arrays: Mapping[str, NDArray[np.generic]], signature: Signature, limit: int) -> None:
    lengths = {spec.name: arrays[spec.name].shape[0] for spec in signature.inputs if spec.batched}
    if len(set(lengths.values())) > 1:
        raise InvalidRequest(
            "BATCH_MISMATCH",
            "inputs disagree on the number of instances: " + ", ".join(f"{n} has {k}" for n, k in lengths.items()),
            inputs=", ".join(lengths),
            lengths=", ".join(str(length) for length in lengths.values()),
        )
    count = next(iter(lengths.values()), 1)
    if count == 0:
        raise InvalidRequest("EMPTY_BATCH", "the batch holds no instance")
    if count > limit:
        raise LimitExceeded(
            "TOO_MANY_INSTANCES", f"{count} instances are above the limit of {limit}", count=count, limit=limit
        )


def leaves_range(array: NDArray[np.generic], spec: InputSpec) -> bool:
    """Whether values lie outside the stated value range, by more than rounding."""
    if spec.value_range is None:
        return False
    low, high = (spec.model_value(end) if spec.has_preprocessing else np.array([end]) for end in spec.value_range)
    channel_axis = None if spec.channel_axis is None else spec.channel_axis + (1 if spec.batched else 0)
    axes = tuple(axis for axis in range(array.ndim) if axis != channel_axis)
    slack = 1e-5 * (high - low)
    lowest, highest = array.min(axis=axes).astype(np.float64), array.max(axis=axes).astype(np.float64)
    return bool((lowest < low - slack).any() or (highest > high + slack).any())
