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


class PackedRecurrent(nn.Module):
    """Scores of the last states of a GRU over sequences, shape (rows, length, channels), padded behind `lengths`."""

    def __init__(self, channels: int = 3, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.layer = nn.GRU(channels, width, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, signal: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(signal, lengths, batch_first=True)
        last = self.layer(packed)[1]
        scores: Tensor = self.head(torch.cat([last[-2], last[-1]], -1))
        return scores


class StateSpace(nn.Module):
    """Gu and Dao 2023 (Mamba): states decay and are written at rates that depend on the signal, step by step."""

    def __init__(self, channels: int = 3, width: int = 6, states: int = 4) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(channels, 2 * width), nn.Linear(width, channels)
        self.local = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.rates = nn.Linear(width, 2 * states + width)
        self.decay, self.skip = nn.Parameter(torch.rand(width, states)), nn.Parameter(torch.ones(width))
        self.sizes = [states, states, width]

    def forward(self, signal: Tensor) -> Tensor:
        steps = signal.shape[1]
        x, gate = self.enter(signal).chunk(2, -1)
        x = functional.silu(self.local(x.transpose(1, 2))[..., :steps].transpose(1, 2))
        write, read, rate = self.rates(x).split(self.sizes, -1)
        rate = functional.softplus(rate)
        state, seen = x.new_zeros(x.shape[0], *self.decay.shape), []
        for t in range(steps):
            written = (rate * x)[:, t, :, None] * write[:, t, None]
            state = torch.exp(-rate[:, t, :, None] * self.decay) * state + written
            seen.append((state * read[:, t, None]).sum(-1))
        result: Tensor = self.leave((torch.stack(seen, 1) + self.skip * x) * functional.silu(gate))
        return result


class RelativePositions(nn.Module):
    """Dai et al. 2019 (Transformer-XL): scores of distances, from a table of fixed size, shifted to their places."""

    def __init__(self, channels: int = 3, width: int = 8, longest: int = 30) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(channels, 3 * width), nn.Linear(width, channels)
        self.distances = nn.Parameter(torch.randn(2 * longest - 1, width))
        self.longest = longest

    def forward(self, signal: Tensor) -> Tensor:
        rows, length, _ = signal.shape
        query, key, value = self.project(signal).chunk(3, -1)
        by_distance = query @ self.distances.t()  # (rows, length, 2 longest - 1)
        count = by_distance.shape[-1]
        shifted = by_distance.reshape(rows, count, length)[:, 1:].reshape(rows, length, count - 1)[..., :length]
        weights = (query @ key.transpose(1, 2) + shifted).mul(0.3).softmax(-1)
        result: Tensor = self.out(weights @ value)
        return result


class TabNet(nn.Module):
    """Arik and Pfister 2021: steps that attend to few of the columns, by a sparse softmax over (rows, columns)."""

    def __init__(self, columns: int = 8, width: int = 6, classes: int = 3, steps: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(columns)
        self.shared = nn.Linear(columns, 2 * width)
        self.attend = nn.ModuleList(nn.Linear(width, columns) for _ in range(steps))
        self.head = nn.Linear(width, classes)

    @staticmethod
    def sparsemax(x: Tensor) -> Tensor:
        """Martins and Astudillo 2016: the nearest distribution, zero for all but a few columns."""
        descending, _ = x.sort(-1, descending=True)
        sums, ranks = descending.cumsum(-1), torch.arange(1, x.shape[-1] + 1)
        kept = (1 + ranks * descending > sums).sum(-1, keepdim=True)
        return (x - (sums.gather(1, kept - 1) - 1) / kept).clamp(min=0)

    def forward(self, table: Tensor) -> Tensor:
        x = self.norm(table)
        hidden = functional.glu(self.shared(x))
        free, total = torch.ones_like(x), torch.zeros_like(hidden)
        for attend in self.attend:
            mask = self.sparsemax(attend(hidden) * free)
            free = free * (1.3 - mask)
            hidden = functional.glu(self.shared(mask * x))
            total = total + functional.elu(hidden)
        scores: Tensor = self.head(total)
        return scores


class SplineFlow(nn.Module):
    """Durkan et al. 2019: each column of (rows, columns) goes through a rational quadratic spline of the other half."""

    def __init__(self, columns: int = 4, bins: int = 4) -> None:
        super().__init__()
        self.half, self.bins = columns // 2, bins
        self.knots = nn.Sequential(nn.Linear(self.half, 16), nn.Tanh(), nn.Linear(16, self.half * (3 * bins + 1)))

    def _edges(self, sizes: Tensor) -> Tensor:
        return functional.pad(sizes.softmax(-1).cumsum(-1), (1, 0)) * 6 - 3

    def forward(self, table: Tensor) -> Tensor:
        known, x = table.tanh().mul(2).chunk(2, -1)
        parts = self.knots(known).reshape(-1, self.half, 3 * self.bins + 1)
        widths, heights, slopes = parts.split([self.bins, self.bins, self.bins + 1], -1)
        left, bottom, slopes = self._edges(widths), self._edges(heights), functional.softplus(slopes)
        at = (x[..., None] >= left[..., :-1]).sum(-1, keepdim=True) - 1
        low, high = ([edges.gather(2, at + step) for edges in (left, bottom, slopes)] for step in (0, 1))
        width, height = high[0] - low[0], high[1] - low[1]
        place, slope = (x[..., None] - low[0]) / width, height / width
        curve = slope * place**2 + low[2] * place * (1 - place)
        y = low[1] + height * curve / (slope + (high[2] + low[2] - 2 * slope) * place * (1 - place))
        return torch.cat([known, y[..., 0]], -1)


class EdgeConvolution(nn.Module):
    """Wang et al. 2019 (DGCNN): the largest message to each point, shape (rows, points, 3), from its nearest ones."""

    def __init__(self, neighbours: int = 4, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.message, self.head = nn.Linear(6, width), nn.Linear(width, classes)

    def forward(self, points: Tensor) -> Tensor:
        count, axes = points.shape[1:]
        squares = points.square().sum(-1)
        apart = squares[:, :, None] - 2 * points @ points.transpose(1, 2) + squares[:, None]
        nearest = apart.topk(self.neighbours, largest=False)[1][..., None].expand(-1, -1, -1, axes)
        around = points[:, None].expand(-1, count, -1, -1).gather(2, nearest)
        own = points[:, :, None].expand_as(around)
        messages = functional.leaky_relu(self.message(torch.cat([around - own, own], -1)))
        scores: Tensor = self.head(messages.amax(2).mean(1))
        return scores


class Capsules(nn.Module):
    """Sabour et al. 2017: capsules, shape (rows, capsules, parts), agree with those above them, whose lengths are the
    scores.
    """

    def __init__(self, capsules: int = 6, parts: int = 8, classes: int = 3, rounds: int = 3) -> None:
        super().__init__()
        self.predict, self.rounds = nn.Parameter(0.3 * torch.randn(capsules, classes, 4, parts)), rounds

    def forward(self, capsules: Tensor) -> Tensor:
        votes = torch.einsum("ikdp,nip->nikd", self.predict, capsules)
        agreement = torch.zeros_like(votes[..., 0])
        for _ in range(self.rounds):
            above = (agreement.softmax(2)[..., None] * votes).sum(1)
            squares = above.square().sum(-1, keepdim=True)
            above = above * squares.sqrt() / (1 + squares)
            agreement = agreement + (votes * above[:, None]).sum(-1)
        return above.norm(dim=-1)
