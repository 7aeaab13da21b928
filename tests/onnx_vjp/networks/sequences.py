"""Networks over signals, rows of a table, points and graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Recurrent(nn.Module):
    """Scores, shape (rows, classes), of the last state of a recurrent layer over (rows, length, channels)."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, channels: int = 3, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.layer = kind(channels, width, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, signal: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(signal)[0][:, -1])
        return scores


class UnrolledLSTM(nn.Module):
    """An LSTM written with matrix products, as a cell over a fixed number of steps."""

    def __init__(self, channels: int = 3, width: int = 8, classes: int = 4, steps: int = 6) -> None:
        super().__init__()
        self.cell, self.head, self.width, self.steps = (
            nn.LSTMCell(channels, width),
            nn.Linear(width, classes),
            width,
            steps,
        )

    def forward(self, signal: Tensor) -> Tensor:
        hidden = cell = signal.new_zeros(signal.shape[0], self.width)
        for step in range(self.steps):
            hidden, cell = self.cell(signal[:, step], (hidden, cell))
        scores: Tensor = self.head(hidden)
        return scores


class SignalConvolution(nn.Module):
    """Strided 1-D convolutions with pooling over (rows, channels, length), as for electrocardiograms."""

    def __init__(self, channels: int = 2, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(channels, width, 7, 2, 3),
            nn.BatchNorm1d(width),
            nn.ELU(),
            nn.MaxPool1d(3, 2, 1),
            nn.Conv1d(width, 2 * width, 5, padding=2, groups=2),
            nn.BatchNorm1d(2 * width),
            nn.LeakyReLU(0.1),
            nn.AvgPool1d(2),
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, signal: Tensor) -> Tensor:
        x = self.features(signal)
        scores: Tensor = self.head(torch.cat([x.mean(-1), x.amax(-1)], 1))
        return scores


class Causal(nn.Module):
    """A dilated convolution that sees the past only: padded on the left."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.margin = dilation
        self.layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(inputs, outputs, 2, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(functional.pad(x, (self.margin, 0)))
        return result


class TemporalConvolution(nn.Module):
    """Bai et al. 2018 (TCN): causal convolutions cut off on the right, residual; scores of the last place."""

    def __init__(self, channels: int = 2, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, width, 1)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=2 * dilation, dilation=dilation) for dilation in (1, 2, 4)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, signal: Tensor) -> Tensor:
        x = self.first(signal)
        for layer in self.layers:
            x = functional.relu(x + functional.relu(layer(x)[:, :, : -layer.padding[0]]))
        scores: Tensor = self.head(x[:, :, -1])
        return scores


class WaveNet(nn.Module):
    """van den Oord et al. 2016: gated causal convolutions; scores of every place, shape (rows, classes, length)."""

    def __init__(self, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.gated = nn.ModuleList(Causal(width, 2 * width, dilation) for dilation in (1, 2, 4))
        self.mix = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(3))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, classes, 1))

    def forward(self, signal: Tensor) -> Tensor:
        x, skips = self.first(signal), torch.zeros(())
        for gated, mix in zip(self.gated, self.mix, strict=True):
            value, gate = gated(x).chunk(2, 1)
            residual, skip = mix(value.tanh() * gate.sigmoid()).chunk(2, 1)
            x, skips = x + residual, skips + skip
        scores: Tensor = self.head(skips)
        return scores


def tabular(columns: int = 8, classes: int = 3) -> nn.Module:
    """A multilayer perceptron with the activations that tables are trained with."""
    return nn.Sequential(
        nn.BatchNorm1d(columns),
        nn.Linear(columns, 16),
        nn.SELU(),
        nn.Linear(16, 16),
        nn.Softplus(),
        nn.Linear(16, 16),
        nn.Mish(),
        nn.Linear(16, classes),
        nn.Softmax(dim=1),
    )


class RadianceField(nn.Module):
    """Mildenhall et al. 2020 (NeRF): sines and cosines of points, shape (rows, 3), then an MLP with a skip."""

    def __init__(self, frequencies: int = 4, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("scales", 2.0 ** torch.arange(frequencies))
        inputs = 3 + 6 * frequencies
        self.before = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.after = nn.Sequential(nn.Linear(width + inputs, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, points: Tensor) -> Tensor:
        angles = (points[:, :, None] * self.scales).flatten(1)
        encoded = torch.cat([points, angles.sin(), angles.cos()], -1)
        raw = self.after(torch.cat([self.before(encoded), encoded], -1))
        return torch.cat([raw[:, :3].sigmoid(), functional.softplus(raw[:, 3:])], -1)


class GraphConvolution(nn.Module):
    """Messages along edges, shape (2, edges) int64, added at their targets; scores of every node."""

    def __init__(self, features: int = 5, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.first, self.second, self.own = (
            nn.Linear(features, width),
            nn.Linear(width, classes),
            nn.Linear(features, width),
        )

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        ones = torch.ones(target.shape, dtype=nodes.dtype)
        degree = torch.zeros(nodes.shape[0], dtype=nodes.dtype).index_add(0, target, ones).clamp(min=1.0)
        sent = self.first(nodes)[source]
        summed = torch.zeros(nodes.shape[0], sent.shape[1], dtype=nodes.dtype).index_add(0, target, sent)
        hidden = functional.relu(self.own(nodes) + summed / degree[:, None])
        scores: Tensor = self.second(hidden)
        return scores
