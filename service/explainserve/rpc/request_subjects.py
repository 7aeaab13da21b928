"""What a request explains: inputs that move, or layers in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import Unsupported
from explainserve.explanation import Instance, Subject
from explainserve.served_model import ServedModel
from explainserve.signature import NAMED_LAYERS, Layer, MapSpec, explained_layers, unknown_layer


def input_subject(model: ServedModel, instance: Instance) -> Subject:
    """The inputs that move, with the shapes of one instance."""
    specs = {spec.name: spec.map_spec for spec in model.signature.inputs}
    return Subject(
        maps={name: specs[name] for name in instance.moving},
        shapes={name: array.shape for name, array in instance.moving.items()},
        layers=model.layers,
        configured_layers=model.config.layers,
        pre_activations=tuple(spec.pre_activation for spec in model.signature.outputs if spec.pre_activation),
    )


def layer_subject(model: ServedModel, names: tuple[str, ...], arrays: Mapping[str, NDArray[np.generic]]) -> Subject:
    """Layers in the place of inputs. Extents that the file leaves open are those of the inputs' axes of that name.

    Raises:
        InvalidRequest: there is no such layer (UNKNOWN_LAYER).
        Unsupported: the extents of a layer are not known (LAYER_SHAPE_UNKNOWN).
    """
    known = {layer.name: layer for layer in model.layers}
    extents = {
        axis.name: extent
        for spec in model.signature.inputs
        for axis, extent in zip(spec.axes, arrays[spec.name].shape, strict=True)
    }
    for name in names:
        if name not in known:
            raise unknown_layer(name, model.layers, _likely_layers(model))
    shapes = {name: _layer_shape(known[name], extents) for name in names}
    return Subject({name: _layer_map(name, shape) for name, shape in shapes.items()}, shapes, cut=names)


def _layer_shape(layer: Layer, extents: Mapping[str, int]) -> tuple[int, ...]:
    """Of one instance."""
    sizes = [axis.size or extents.get(axis.name) for axis in layer.axes[1:]]
    known = tuple(size for size in sizes if size is not None)
    if not layer.axes or len(known) != len(sizes):
        text = f"the file does not tell the shape of layer {layer.name!r}"
        raise Unsupported("LAYER_SHAPE_UNKNOWN", text, layer=layer.name)
    return known


def _layer_map(name: str, shape: tuple[int, ...]) -> MapSpec:
    """Two axes are positions with features, such as tokens with their embedding: sums over channels are per token."""
    return MapSpec(name, "TC", 1) if len(shape) == 2 else MapSpec(name)


def moving_inputs(model: ServedModel, fixed_inputs: Sequence[str], *, explains_layers: bool = False) -> tuple[str, ...]:
    """Inputs that move: the floating-point ones, and where layers are explained all from which these are computed."""
    signature = model.signature
    for name in fixed_inputs:
        signature.input(name)
    if explains_layers:
        return tuple(spec.name for spec in signature.inputs if spec.name not in fixed_inputs)
    moving = tuple(name for name in signature.differentiable_inputs if name not in fixed_inputs)
    if not moving:
        raise Unsupported(
            "NO_DIFFERENTIABLE_INPUT",
            "no floating-point input moves; explain a floating-point tensor of the graph instead, such as an embedding"
            if not signature.differentiable_inputs
            else "every floating-point input is in fixed_inputs",
            inputs=", ".join(spec.name for spec in signature.inputs),
            layers=", ".join(_likely_layers(model)),
        )
    return moving


def _likely_layers(model: ServedModel) -> tuple[str, ...]:
    """Names of some to explain in the place of inputs."""
    return explained_layers(model.loaded.layers, model.config.layers)[:NAMED_LAYERS]
