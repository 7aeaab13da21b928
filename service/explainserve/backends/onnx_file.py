"""Reading an ONNX file that is not trusted: what it refers to is checked before anything reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from explainserve.backends import pattern_file
from explainserve.backends.onnx_weights import Weights, byte_count, is_reference
from explainserve.containment import inside
from explainserve.errors import ModelRefused
from explainserve.onnx_vjp.inlining import MAX_NODES, node_count
from explainserve.onnx_vjp.opset import import_domains, sort_nodes

PROTOBUF_BYTES = 2**31 - 1
"""Largest message that protobuf serializes; onnxruntime receives graphs, without their weights, as one message."""


DEFAULT_DOMAIN = ("", "ai.onnx")

_ADOPTED = {"LayerNormalization": 17, "SimplifiedLayerNormalization": math.inf}
"""What onnxruntime writes into the default domain before ONNX has it, and the version since which ONNX has it."""


def read(path: Path, weights: Weights) -> onnx.ModelProto:
    """Reads a model and checks it against the ONNX specification. What it refers to in other files is moved to
    `weights` where that is a weight, which may so be larger than protobuf's messages, and into the model else.

    Raises:
        ModelRefused: the file is truncated or no ONNX model (MODEL_FILE_CORRUPT), violates the specification
            (MODEL_INVALID), refers to data outside its folder (EXTERNAL_DATA_ESCAPES), to data that is not there or too
            short (EXTERNAL_DATA_MISSING), exceeds 2 GiB without them (MODEL_TOO_LARGE), or has too many nodes
            (MODEL_TOO_COMPLEX).
    """
    model = _parsed(path)
    _check_size(model, path)
    held = {id(tensor): tensor for tensor in model.graph.initializer if weights.holds(tensor)}
    external = [tensor for tensor in _tensors(model) if _is_external(tensor)]
    located = [_located(tensor, path.parent) for tensor in external]
    for tensor, (file, start, size) in zip(external, located, strict=True):
        if id(tensor) in held and size == byte_count(tensor):
            weights.take_external(tensor, file, start)
        else:
            _embed(tensor, file, start, size)
    if model.ByteSize() > PROTOBUF_BYTES:
        raise ModelRefused(
            "MODEL_TOO_LARGE",
            f"{path.name} holds more than 2 GiB in itself, besides the weights in files of external data",
            file=path.name,
        )
    _check(model, path)
    return model


def files(path: Path) -> tuple[Path, ...]:
    """The model file, then the files of its external data in the order of their names, and the patterns beside it.
    Raises what `read` raises, and `pattern_file.beside`.
    """
    model = _parsed(path)
    external = {_located(tensor, path.parent)[0] for tensor in _tensors(model) if _is_external(tensor)}
    return (path, *sorted(external), *pattern_file.beside(path))


def _parsed(path: Path) -> onnx.ModelProto:
    if path.stat().st_size > PROTOBUF_BYTES:
        raise ModelRefused("MODEL_TOO_LARGE", f"{path.name} exceeds 2 GiB", file=path.name)
    model = onnx.ModelProto()
    content = path.read_bytes()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError derives from Exception directly
        raise _corrupt(path, "it cannot be decoded") from error
    if not model.HasField("graph") or not model.opset_import or not model.graph.output:
        raise _corrupt(path, "it holds no graph")
    return model


def _corrupt(path: Path, why: str) -> ModelRefused:
    return ModelRefused("MODEL_FILE_CORRUPT", f"{path.name} is truncated or not an ONNX model: {why}", file=path.name)


def _check_size(model: onnx.ModelProto, path: Path) -> None:
    try:
        count = node_count(model)
    except ValueError as error:
        raise ModelRefused("MODEL_INVALID", f"{path.name} violates the ONNX specification: {error}") from error
    if count > MAX_NODES:
        raise ModelRefused(
            "MODEL_TOO_COMPLEX",
            f"{path.name} has {count} nodes with its functions written out; {MAX_NODES} are the most",
            file=path.name,
            node_count=count,
            limit=MAX_NODES,
        )


def _check(model: onnx.ModelProto, path: Path) -> None:
    adopted = _adopted(model)
    for node in adopted:
        node.domain = "com.microsoft"  # onnx's checker passes over domains that it does not know
    import_domains(model)
    sort_nodes(model.graph)
    try:
        onnx.checker.check_model(_with_weights_as_inputs(model))
    except onnx.checker.ValidationError as error:
        what = " ".join(str(error).partition("==> Context")[0].split())
        raise ModelRefused("MODEL_INVALID", f"{path.name} violates the ONNX specification: {what}") from error
    except UnicodeDecodeError as error:  # where the checker quotes damaged bytes in its message
        raise ModelRefused("MODEL_INVALID", f"{path.name} holds names that are no text") from error
    finally:
        for node in adopted:
            node.domain = ""


def _with_weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or a copy whose weights that are held elsewhere are inputs: the checker would look for their files."""
    if not any(map(is_reference, model.graph.initializer)):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.initializer[:]
    known = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if not is_reference(tensor):
            copy.graph.initializer.append(tensor)
        elif tensor.name not in known:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return copy


def _adopted(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of the main graph that onnxruntime knows in the default domain and ONNX does not."""
    version = next((entry.version for entry in model.opset_import if entry.domain in DEFAULT_DOMAIN), 1)
    return [
        node for node in model.graph.node if node.domain in DEFAULT_DOMAIN and version < _ADOPTED.get(node.op_type, 0)
    ]


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere in a message: initializers, attributes, subgraphs, functions, sparse tensors."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in [value] if hasattr(value, "ListFields") else value:
            if isinstance(child, onnx.TensorProto):
                yield child
            else:
                yield from _tensors(child)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL or bool(tensor.external_data)


def _located(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int]:
    """File, first byte and byte count of a tensor's data, all known to exist inside `folder`."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = _inside(folder, entries.get("location", ""), tensor.name)
    start, size = _span(entries, tensor)
    available = file.stat().st_size
    if start + size > available:
        raise ModelRefused(
            "EXTERNAL_DATA_MISSING",
            f"tensor {tensor.name!r} ends at byte {start + size} of {file.name}, which has {available}",
            tensor=tensor.name,
            expected_bytes=start + size,
            actual_bytes=available,
        )
    return file, start, size


def _inside(folder: Path, location: str, tensor: str) -> Path:
    file = inside(folder, location)
    if file is None:
        raise ModelRefused(
            "EXTERNAL_DATA_ESCAPES",
            f"tensor {tensor!r} refers to {location!r}, which is not inside the model's folder",
            tensor=tensor,
            location=location,
        )
    if not file.is_file():
        raise ModelRefused(
            "EXTERNAL_DATA_MISSING",
            f"tensor {tensor!r} refers to {location!r}, which is no file of the model's folder",
            tensor=tensor,
            location=location,
        )
    return file


def _span(entries: dict[str, str], tensor: onnx.TensorProto) -> tuple[int, int]:
    """First byte and byte count, which default to the start of the file and to what the tensor's shape needs."""
    try:
        item_size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        start = int(entries.get("offset", 0))
        size = int(entries.get("length", math.prod(tensor.dims) * item_size))
    except (KeyError, ValueError, TypeError) as error:
        raise ModelRefused("MODEL_INVALID", f"tensor {tensor.name!r}: external data is malformed: {error}") from error
    if start < 0 or size < 0:
        raise ModelRefused("MODEL_INVALID", f"tensor {tensor.name!r}: negative offset or length of external data")
    return start, size


def _embed(tensor: onnx.TensorProto, file: Path, start: int, size: int) -> None:
    with file.open("rb") as data:
        data.seek(start)
        tensor.raw_data = data.read(size)
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT
