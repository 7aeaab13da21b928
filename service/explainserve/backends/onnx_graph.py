"""What an ONNX graph declares, and the edits that make its batch axis free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto

from explainserve import onnx_vjp
from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig
from explainserve.onnx_vjp import Shape
from explainserve.onnx_vjp.subgraphs import subgraphs
from explainserve.signature import Activation, Axis, InputSpec, Layer, OutputKind, OutputSpec, Signature

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
    """What the graph says of its inputs and outputs, with the value ranges that `config` states. Outputs that end in a
    Softmax over classes, along the axis that `config` states or 1, or in a Sigmoid are probabilities, and no other is
    taken for more than values.

    Returns:
        The signature, and the names of the outputs to which a leading batch axis of extent one has to be added.

    Raises:
        ModelRefused: an element type that is not supported (UNSUPPORTED_TYPE).
    """
    ranges = {table.name: table.value_range for table in config.inputs}
    class_axes = {table.name: table.class_axis for table in config.outputs}
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
        class_axis = (class_axes.get(value.name) or 1) - (value.name in bare)
        output_specs.append(_with_kind(OutputSpec(value.name, dtype, _named(axes)), model, value, class_axis))
    return Signature(tuple(input_specs), tuple(output_specs)), frozenset(bare)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Gives the nodes of a graph and of its subgraphs that have no name that of their first output, in place, so that
    whoever complains of one names it.
    """
    taken = {node.name for node in graph.node}
    for node in graph.node:
        name = next(iter(node.output), "")
        if not node.name and name not in taken:
            node.name = name
            taken.add(name)
        for subgraph in subgraphs(node):
            name_nodes(subgraph)


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, the most frequent first; domains other than ONNX's own are written out."""
    names = (f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return dict(Counter(names).most_common())


def layers(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """Floating-point tensors between inputs and outputs that a person can pick; none of a graph that is malformed or
    holds nodes of old operator sets that newer ones have no form of.
    """
    try:
        found = onnx_vjp.layers(model)
    except (ValueError, onnx_vjp.UnsupportedOperators):
        return ()
    return tuple(
        Layer(layer.name, layer.operator, layer.module, _shape_axes(layer.shape), layer.bypassed) for layer in found
    )


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """`model`, changed in place, with only these tensors as outputs; onnxruntime then drops what they do not need."""
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    outputs = [known.get(name, onnx.ValueInfoProto(name=name)) for name in names]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return model


def _with_kind(spec: OutputSpec, model: onnx.ModelProto, value: onnx.ValueInfoProto, class_axis: int) -> OutputSpec:
    """An output with what its numbers are, by the operator in which it ends; `class_axis` is that of the file."""
    found = onnx_vjp.final_activation(model, value.name)
    rank = len(value.type.tensor_type.shape.dim)
    if found is None or (found.operator == "Softmax" and (not rank or found.axis(rank) != class_axis)):
        return spec
    activation = Activation(found.operator.lower())
    return replace(spec, kind=OutputKind.PROBABILITIES, activation=activation, pre_activation=found.source)


def element_type(value: onnx.ValueInfoProto) -> np.dtype[np.generic]:
    """Of a tensor of the graph.

    Raises:
        ModelRefused: one that is not supported (UNSUPPORTED_TYPE).
    """
    return _dtype("layer", value)


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
