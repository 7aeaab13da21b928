"""Architectures, each with its inputs at two sizes and the axes that stay dynamic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onnx_vjp.exports import Axes, Inputs
from onnx_vjp.networks import attention, convolutional, sequences

Size = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """A network and what it is tried on.

    `inputs` makes its inputs of a size; `legacy` lists the operator sets of the older exporter that can express it,
    `dynamo` tells whether the newer one can.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[Size], Inputs]
    sizes: tuple[Size, Size]
    dynamic: Axes
    legacy: tuple[int, ...] = (9, 17)
    dynamo: bool = True


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _image(size: Size) -> Inputs:
    rows, height, width = size
    return {"x": _normal(rows, 3, height, width)}


def _signal(channels: int) -> Callable[[Size], Inputs]:
    return lambda size: {"x": _normal(size[0], channels, size[1])}


def _sequence(width: int) -> Callable[[Size], Inputs]:
    return lambda size: {"x": _normal(size[0], size[1], width)}


def _table(columns: int) -> Callable[[Size], Inputs]:
    return lambda size: {"x": _normal(size[0], columns)}


def _mixed_table(size: Size) -> Inputs:
    categories = torch.randint(0, 10, (size[0], 4), generator=torch.Generator().manual_seed(5))
    return {"x": _normal(size[0], 6), "categories": categories}


def _padded(size: Size) -> Inputs:
    rows, length = size
    return {"x": _normal(rows, length, 3), "lengths": torch.arange(length, length - 2 * rows, -2)}


def _shaped(*shape: int) -> Callable[[Size], Inputs]:
    """Rows of one shape."""
    return lambda size: {"x": _normal(size[0], *shape)}


def _graph(size: Size) -> Inputs:
    nodes, edges = size
    ends = torch.randint(0, nodes, (2, edges), generator=torch.Generator().manual_seed(5))
    return {"x": _normal(nodes, 5), "edges": ends}


_ROWS: Axes = {"x": {0: "rows"}}
_PLACES: Axes = {"x": {0: "rows", 2: "height", 3: "width"}}
_LENGTH: Axes = {"x": {0: "rows", 2: "length"}}
_STEPS: Axes = {"x": {0: "rows", 1: "length"}}
_SQUARE: tuple[Size, Size] = ((2, 32, 32), (3, 32, 32))
_FREE: tuple[Size, Size] = ((2, 32, 32), (3, 64, 48))
_SHORT: tuple[Size, Size] = ((2, 16), (3, 25))
_FEW: tuple[Size, Size] = ((2,), (3,))


def _free(build: Callable[[], nn.Module]) -> Architecture:
    """A network over images of any size."""
    return Architecture(build, _image, _FREE, _PLACES)


ARCHITECTURES: dict[str, Architecture] = {
    "convnext": _free(convolutional.convnext),
    "densenet": _free(convolutional.densenet),
    "efficientnet": _free(convolutional.efficientnet),
    "ghostnet": _free(convolutional.ghostnet),
    "inception": _free(convolutional.inception),
    "mobilenet_v2": _free(convolutional.mobilenet_v2),
    "mobilenet_v3": _free(convolutional.mobilenet_v3),
    "poolformer": _free(convolutional.poolformer),
    "regnet": _free(convolutional.regnet),
    "shufflenet": _free(convolutional.shufflenet),
    "unet": _free(convolutional.UNet),
    "unet_bilinear": Architecture(lambda: convolutional.UNet(learned=False), _image, _FREE, _PLACES, (11, 17)),
    "detector": Architecture(convolutional.Detector, _image, _FREE, _PLACES, (10, 17)),
    "nfnet": _free(convolutional.nfnet),
    # onnx's reference evaluator knows how grids are sampled by its newer names only.
    "spatial_transformer": Architecture(convolutional.SpatialTransformer, _image, _SQUARE, _ROWS, legacy=()),
    "convolutional_lstm": Architecture(convolutional.ConvolutionalLSTM, _shaped(4, 3, 6, 6), _FEW, _ROWS),
    "volume_unet": Architecture(convolutional.VolumeUNet, _shaped(2, 4, 8, 8), _FEW, _ROWS),
    "vgg": Architecture(convolutional.vgg, _image, _SQUARE, _ROWS, (7, 13)),
    "swin": Architecture(attention.Swin, _image, _SQUARE, _ROWS, (11, 17)),
    "maxvit": Architecture(attention.MaxViT, _image, _FREE, _PLACES),
    "mixer": Architecture(attention.Mixer, _image, _SQUARE, _ROWS),
    "decoder": Architecture(attention.Decoder, _sequence(16), _SHORT, _STEPS, (14, 17)),
    "lstm": Architecture(sequences.Recurrent, _sequence(3), _SHORT, _STEPS),
    "gru": Architecture(lambda: sequences.Recurrent(nn.GRU), _sequence(3), _SHORT, _STEPS),
    "packed_gru": Architecture(
        sequences.PackedRecurrent, _padded, ((2, 7), (3, 9)), {**_STEPS, "lengths": {0: "rows"}}, dynamo=False
    ),
    "state_space": Architecture(sequences.StateSpace, _shaped(7, 3), _FEW, _ROWS, (11, 17)),
    "relative_positions": Architecture(sequences.RelativePositions, _sequence(3), _SHORT, _STEPS, (11, 17)),
    "unrolled_lstm": Architecture(sequences.UnrolledLSTM, _sequence(3), ((2, 6), (3, 6)), _ROWS),
    "signal_convolution": Architecture(sequences.SignalConvolution, _signal(2), _SHORT, _LENGTH),
    "temporal_convolution": Architecture(sequences.TemporalConvolution, _signal(2), _SHORT, _LENGTH),
    "wavenet": Architecture(sequences.WaveNet, _signal(1), _SHORT, _LENGTH),
    "tabular": Architecture(sequences.tabular, _table(8), ((4,), (9,)), _ROWS),
    "tab_transformer": Architecture(
        attention.TabTransformer,
        _mixed_table,
        ((3,), (5,)),
        {**_ROWS, "categories": {0: "rows"}},
        legacy=(14, 17),
    ),
    "tab_net": Architecture(sequences.TabNet, _table(8), ((4,), (9,)), _ROWS, (11, 17)),
    "spline_flow": Architecture(sequences.SplineFlow, _table(4), ((4,), (9,)), _ROWS, (11, 17)),
    "capsules": Architecture(sequences.Capsules, _shaped(6, 8), _FEW, _ROWS, (12, 17)),
    "edge_convolution": Architecture(sequences.EdgeConvolution, _shaped(12, 3), _FEW, _ROWS, (11, 17)),
    "radiance_field": Architecture(sequences.RadianceField, _table(3), ((4,), (9,)), _ROWS, (7, 13)),
    # The older exporter writes index_add with duplicates wrongly.
    "graph_convolution": Architecture(
        sequences.GraphConvolution, _graph, ((6, 14), (9, 20)), {"x": {0: "nodes"}, "edges": {1: "edges"}}, legacy=()
    ),
}
