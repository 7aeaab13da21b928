"""What an ONNX graph declares, and the edits that make its batch axis free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto

from explainserve import onnx_vjp
from explainserve.backends.contract import Layer
from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig
from explainserve.onnx_vjp import Shape
from explainserve.signature import Axis, InputSpec, OutputSpec, Signature

BATCH = "batch"

_DTYPES: dict[int, str] = {
    TensorProto.BOOL: "bool",
    TensorProto.UINT8: "uint8",
    TensorProto.INT8: "int8",
    TensorProto.UINT16: "uint16",
    TensorProto.INT16: "int16",
    TensorProto.UINT32: "uint32",
    TensorProto.INT32: "int32",
    TensorProto.UINT64: "uint64",
    TensorProto.INT64: "int64",
    TensorProto.FLOAT16: "float16",
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
}


def inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller feeds; older files list their weights among the inputs too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def signature(model: onnx.ModelProto, config: ModelConfig) -> tuple[Signature, frozenset[str]]:
    """What the graph says of its inputs and outputs, with the value ranges that `config` states.

    Returns:
        The signature, and the names of the outputs to which a leading batch axis of extent one has to be added.

    Raises:
        ModelRefused: an element type that is not supported (UNSUPPORTED_TYPE).
    """
    ranges = {table.name: table.value_range for table in config.inputs}
    bare: set[str] = set()
    input_specs, output_specs = [], []
    for value in inputs(model):
        dtype, axes = _dtype("input", value), _axes(value)
        spec = InputSpec(value.name, dtype, _named(axes), batched=_has_batch(axes))
        input_specs.append(replace(spec, value_range=ranges.get(value.name)))
    for value in model.graph.output:
        dtype, axes = _dtype("output", value), _axes(value)
        if not _has_batch(axes):
            bare.add(value.name)
            axes = (Axis(BATCH, 1), *axes)
        output_specs.append(OutputSpec(value.name, dtype, _named(axes)))
    return Signature(tuple(input_specs), tuple(output_specs)), frozenset(bare)


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, the most frequent first; domains other than ONNX's own are written out."""
    names = (f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return dict(Counter(names).most_common())


def layers(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """Floating-point tensors between inputs and outputs that a person can pick; none of a graph that is malformed."""
    try:
        found = onnx_vjp.layers(model)
    except ValueError:
        return ()
    return tuple(
        Layer(layer.name, layer.operator, layer.module, _shape_axes(layer.shape), layer.bypassed) for layer in found
    )


def last_activations(model: onnx.ModelProto) -> dict[str, str]:
    """Outputs that are computed by a Softmax or Sigmoid, with its name in lower case."""
    last = {name: node.op_type.lower() for node in model.graph.node for name in node.output}
    names = [value.name for value in model.graph.output]
    return {name: last[name] for name in names if last.get(name) in ("softmax", "sigmoid")}


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """`model`, changed in place, with only these tensors as outputs; onnxruntime then drops what they do not need."""
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    outputs = [known.get(name, onnx.ValueInfoProto(name=name)) for name in names]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return model


def _dtype(what: str, value: onnx.ValueInfoProto) -> np.dtype[np.generic]:
    kind = value.type.WhichOneof("value") or "no type"
    if kind != "tensor_type":
        found = kind.removesuffix("_type")
    elif value.type.tensor_type.elem_type in _DTYPES:
        return np.dtype(_DTYPES[value.type.tensor_type.elem_type])
    else:
        number = value.type.tensor_type.elem_type
        known = number in TensorProto.DataType.values()
        found = TensorProto.DataType.Name(number).lower() if known else f"of type {number}"
    raise ModelRefused(
        "UNSUPPORTED_TYPE",
        f"{what} {value.name!r} is {found}; supported are {', '.join(_DTYPES.values())}",
        name=value.name,
        type=found,
    )


def _axes(value: onnx.ValueInfoProto) -> tuple[Axis, ...]:
    """Some exporters write 0 or -1 for an extent that is open."""
    dims = value.type.tensor_type.shape.dim
    return tuple(Axis("", dim.dim_value) if dim.dim_value > 0 else Axis(dim.dim_param) for dim in dims)


def _shape_axes(shape: Shape | None) -> tuple[Axis, ...]:
    return tuple(Axis("", size) if isinstance(size, int) else Axis(size or "") for size in shape or ())


def _has_batch(axes: tuple[Axis, ...]) -> bool:
    return bool(axes) and axes[0].size in (None, 1)


def _named(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """A first axis of extent one is the batch axis, and files give it no name."""
    if axes and not axes[0].name and axes[0].size in (None, 1):
        return (Axis(BATCH, axes[0].size), *axes[1:])
    return axes
