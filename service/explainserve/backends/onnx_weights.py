"""The weights of ONNX graphs, held once, however many sessions read them.

A graph refers to a weight as external data whose location is the digest of its content; the content is here. So a
gradient graph weighs what it adds, and onnxruntime is handed the same memory for each session.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from explainserve.onnx_vjp.subgraphs import subgraphs

Array = NDArray[np.generic]

SMALLEST_BYTES = 1 << 10
"""Smaller tensors stay in their graph: shapes, and what optimizers fold."""

_HELD = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8}


@dataclass(frozen=True)
class _Held:
    array: Array
    value: onnxruntime.OrtValue


class Weights:
    """Content by digest. Used by one thread at a time."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    @property
    def byte_count(self) -> int:
        """Bytes of all that is held."""
        return sum(held.array.nbytes for held in self._held.values())

    @staticmethod
    def holds(tensor: TensorProto) -> bool:
        """Whether a tensor is of a type and size that is held here."""
        return tensor.data_type in _HELD and byte_count(tensor) >= SMALLEST_BYTES

    def take(self, model: onnx.ModelProto) -> None:
        """Moves the large initializers of `model` here; references take their place."""
        for tensor in model.graph.initializer:
            if self.holds(tensor) and not is_reference(tensor):
                _refer(tensor, self._hold(numpy_helper.to_array(tensor)))

    def take_external(self, tensor: TensorProto, file: Path, start: int) -> None:
        """Moves the content of a tensor here from a file, without a second copy in memory."""
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        _refer(tensor, self._hold(np.memmap(file, dtype, "r", start, tuple(tensor.dims))))

    def of(self, model: onnx.ModelProto) -> Mapping[str, Array]:
        """The arrays that `model` refers to, by name."""
        return {tensor.name: self._held[reference(tensor)].array for tensor in _references(model)}

    def values(self, model: onnx.ModelProto) -> dict[str, onnxruntime.OrtValue]:
        """The same as onnxruntime takes them."""
        return {tensor.name: self._held[reference(tensor)].value for tensor in _references(model)}

    def embedded(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of `model` that holds what it refers to."""
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        for tensor in _references(copy):
            tensor.CopyFrom(numpy_helper.from_array(self._held[reference(tensor)].array, tensor.name))
        return copy

    def _hold(self, array: Array) -> str:
        owned = np.array(array)  # protobuf's buffer goes away with the message
        digest = hashlib.blake2b(f"{owned.dtype.str}{owned.shape}".encode(), digest_size=20)
        digest.update(owned.data if owned.ndim else owned.tobytes())
        key = digest.hexdigest()
        if key not in self._held:
            self._held[key] = _Held(owned, onnxruntime.OrtValue.ortvalue_from_numpy(owned))
        return key


def byte_count(tensor: TensorProto) -> int:
    """Bytes of the elements of a tensor, as its shape and type say."""
    return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def stored_bytes(graph: onnx.GraphProto) -> int:
    """Bytes of the initializers whose content a graph and its subgraphs hold themselves."""
    own = sum(byte_count(tensor) for tensor in graph.initializer if not is_reference(tensor))
    return own + sum(stored_bytes(inner) for node in graph.node for inner in subgraphs(node))


def is_reference(tensor: TensorProto) -> bool:
    """Whether the content of a tensor is held elsewhere."""
    return tensor.data_location == TensorProto.EXTERNAL


def reference(tensor: TensorProto) -> str:
    """The digest that a reference holds."""
    return next(entry.value for entry in tensor.external_data if entry.key == "location")


def _references(model: onnx.ModelProto) -> Iterator[TensorProto]:
    return (tensor for tensor in model.graph.initializer if is_reference(tensor))


def _refer(tensor: TensorProto, digest: str) -> None:
    kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    kept.data_location = TensorProto.EXTERNAL
    kept.external_data.add(key="location", value=digest)
    tensor.CopyFrom(kept)
