"""Convolutional networks over images of any size, as their papers wire them, with widths that a test can afford.

All map images, shape (rows, 3, height, width), to scores, shape (rows, classes), except where a docstring says else.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


def convolution(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int] = 3,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] = nn.ReLU,
    dilation: int = 1,
) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, batch normalization and an activation."""
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(dilation * (side - 1) // 2 for side in sides)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), activation())


class Pooled(nn.Module):
    """Scores of the mean over all places of a feature map."""

    def __init__(self, features: nn.Module, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.features, self.head = features, nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.head(functional.adaptive_avg_pool2d(self.features(image), 1).flatten(1))
        return scores


def vgg(widths: tuple[int, ...] = (8, 16, 16), classes: int = 5, side: int = 32) -> nn.Module:
    """Simonyan and Zisserman 2014: pairs of 3x3 convolutions between poolings; fully connected layers with dropout."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, *widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    flat = widths[-1] * (side >> len(widths)) ** 2
    head = (nn.Flatten(), nn.Linear(flat, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, classes))
    return nn.Sequential(*layers, *head)


class DenseLayer(nn.Module):
    """Normalization, ReLU and convolution, twice; what comes in is kept beside what comes out."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet(blocks: tuple[int, ...] = (2, 3), growth: int = 4, width: int = 8, classes: int = 5) -> nn.Module:
    """Huang et al. 2017."""
    layers: list[nn.Module] = [*convolution(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate(blocks):
        if stage:
            half = width // 2
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, half, 1, bias=False), nn.AvgPool2d(2, 2)]
            width = half
        for _ in range(count):
            layers.append(DenseLayer(width, growth))
            width += growth
    return Pooled(nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU()), width, classes)


class InceptionBlock(nn.Module):
    """Four branches side by side: 1x1, 5x5 in two steps, a factored 7x7, and average pooling that counts no margin."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.single = convolution(inputs, width, 1)
        self.twice = nn.Sequential(convolution(inputs, width, 1), convolution(width, width), convolution(width, width))
        self.factored = nn.Sequential(
            convolution(inputs, width, 1), convolution(width, width, (1, 7)), convolution(width, width, (7, 1))
        )
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), convolution(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.single(x), self.twice(x), self.factored(x), self.pooled(x)], 1)


class Reduction(nn.Module):
    """Half the size: a strided convolution beside the maximum, neither padded."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.strided = nn.Sequential(nn.Conv2d(inputs, width, 3, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.strided(x), functional.max_pool2d(x, 3, 2)], 1)


def inception(width: int = 4, classes: int = 5) -> nn.Module:
    """Szegedy et al. 2016 (Inception-v3)."""
    features = nn.Sequential(
        nn.Conv2d(3, width, 3, 2, bias=False),
        nn.BatchNorm2d(width, eps=1e-3),
        nn.ReLU(),
        InceptionBlock(width, width),
        Reduction(4 * width, width),
        InceptionBlock(5 * width, width),
    )
    return Pooled(features, 4 * width, classes)


class SqueezeExcite(nn.Module):
    """Channels weighed by a gate of their means (Hu et al. 2018)."""

    def __init__(self, width: int, hidden: int, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(width, hidden, 1), activation(), nn.Conv2d(hidden, width, 1), gate())

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.gate(functional.adaptive_avg_pool2d(x, 1))
        return x * weight


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, an optional gate, linear projection."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        kernel: int = 3,
        activation: type[nn.Module] = nn.ReLU6,
        gate: type[nn.Module] | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        width = width or 3 * inputs
        layers = [convolution(inputs, width, 1, activation=activation)]
        layers.append(convolution(width, width, kernel, stride, width, activation))
        if gate is not None:
            inner = nn.SiLU if activation is nn.SiLU else nn.ReLU
            layers.append(nn.Sequential(SqueezeExcite(width, max(inputs // 4, 2), inner, gate)))
        layers.append(convolution(width, outputs, 1, activation=nn.Identity))
        self.body, self.keeps = nn.Sequential(*layers), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return x + result if self.keeps else result


def _inverted(width: int, classes: int, activation: type[nn.Module], gate: type[nn.Module] | None) -> nn.Module:
    kinds = {"activation": activation, "gate": gate}
    features = nn.Sequential(
        convolution(3, width, 3, 2, activation=activation),
        InvertedResidual(width, width, 1, **kinds),
        InvertedResidual(width, 2 * width, 2, 5, **kinds),
        InvertedResidual(2 * width, 2 * width, 1, 5, **kinds),
        InvertedResidual(2 * width, 3 * width, 2, 3, **kinds),
        convolution(3 * width, 8 * width, 1, activation=activation),
    )
    return Pooled(features, 8 * width, classes)


def mobilenet_v2(width: int = 8, classes: int = 5) -> nn.Module:
    """Sandler et al. 2018: linear bottlenecks, ReLU6."""
    return _inverted(width, classes, nn.ReLU6, None)


def mobilenet_v3(width: int = 8, classes: int = 5) -> nn.Module:
    """Howard et al. 2019: hard swish, gates of hard sigmoid."""
    return _inverted(width, classes, nn.Hardswish, nn.Hardsigmoid)


def efficientnet(width: int = 8, classes: int = 5) -> nn.Module:
    """Tan and Le 2019: SiLU, gates of sigmoid."""
    return _inverted(width, classes, nn.SiLU, nn.Sigmoid)


_LARGE = (  # kernel, expanded width, outputs, gated, hard swish, stride
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)


def mobilenet_v3_large(classes: int = 1000) -> nn.Module:
    """MobileNetV3-Large as its paper's table has it."""
    layers: list[nn.Module] = [convolution(3, 16, 3, 2, activation=nn.Hardswish)]
    inputs = 16
    for kernel, width, outputs, gated, hard, stride in _LARGE:
        activation, gate = nn.Hardswish if hard else nn.ReLU, nn.Hardsigmoid if gated else None
        layers.append(InvertedResidual(inputs, outputs, stride, kernel, activation, gate, width))
        inputs = outputs
    layers.append(convolution(inputs, 960, 1, activation=nn.Hardswish))
    features = Pooled(nn.Sequential(*layers), 960, 1280)
    return nn.Sequential(features, nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, classes))


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022: 7x7 depthwise, layer normalization and a scaled MLP over channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.mlp(self.norm(self.depth(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.Module):
    """Layer normalization over the channels of each place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return result.permute(0, 3, 1, 2)


def convnext(width: int = 8, depths: tuple[int, ...] = (1, 2), classes: int = 5) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), ChannelNorm(width)]
    for stage, count in enumerate(depths):
        if stage:
            layers += [ChannelNorm(width), nn.Conv2d(width, 2 * width, 2, 2)]
            width *= 2
        layers += [ConvNeXtBlock(width) for _ in range(count)]
    return Pooled(nn.Sequential(*layers), width, classes)


class UNet(nn.Module):
    """Ronneberger et al. 2015: a score per class and place, shape (rows, classes, height, width).

    `learned` upsamples by transposed convolutions, otherwise bilinearly.
    """

    def __init__(self, width: int = 8, classes: int = 4, learned: bool = True) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(self._double(a, b) for a, b in pairwise((3, *widths)))
        self.up = nn.ModuleList(self._upsampling(b, a, learned) for a, b in reversed(list(pairwise(widths))))
        self.merge = nn.ModuleList(self._double(2 * a, a) for a in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs))

    @staticmethod
    def _upsampling(inputs: int, outputs: int, learned: bool) -> nn.Module:
        if learned:
            return nn.ConvTranspose2d(inputs, outputs, 2, 2)
        bilinear = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        return nn.Sequential(bilinear, nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for upsample, merge, skip in zip(self.up, self.merge, reversed(kept[:-1]), strict=True):
            x = merge(torch.cat([skip, upsample(x)], 1))
        scores: Tensor = self.head(x)
        return scores


class GroupedResidual(nn.Module):
    """Radosavovic et al. 2020 (RegNetY): a grouped bottleneck with a gate."""

    def __init__(self, inputs: int, outputs: int, stride: int, group_width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs, 1),
            convolution(outputs, outputs, 3, stride, outputs // group_width),
            SqueezeExcite(outputs, max(inputs // 4, 2), nn.ReLU, nn.Sigmoid),
            convolution(outputs, outputs, 1, activation=nn.Identity),
        )
        self.shortcut = convolution(inputs, outputs, 1, stride, activation=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.body(x))


def regnet(width: int = 8, classes: int = 5) -> nn.Module:
    features = nn.Sequential(
        convolution(3, width, 3, 2), GroupedResidual(width, width, 1), GroupedResidual(width, 2 * width, 2)
    )
    return Pooled(features, 2 * width, classes)


class ShuffleBlock(nn.Module):
    """Ma et al. 2018 (ShuffleNetV2): half of the channels are convolved, and the halves interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(
            convolution(half, half, 1),
            convolution(half, half, 3, groups=half, activation=nn.Identity),
            convolution(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        joined = torch.cat([kept, self.body(changed)], 1)
        rows, channels, height, width = joined.shape
        blocks = joined.view(rows, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return blocks.view(rows, channels, height, width)


def shufflenet(width: int = 8, classes: int = 5) -> nn.Module:
    stem = convolution(3, width, 3, 2)
    features = nn.Sequential(stem, nn.MaxPool2d(3, 2, 1), ShuffleBlock(width), ShuffleBlock(width))
    return Pooled(features, width, classes)


class GhostModule(nn.Module):
    """Han et al. 2020 (GhostNet): half of the channels are cheap depthwise copies; an odd rest is cut off."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = (outputs + 1) // 2
        self.outputs, self.primary = outputs, convolution(inputs, half, 1)
        self.cheap = convolution(half, half, 3, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], 1)[:, : self.outputs]


def ghostnet(width: int = 7, classes: int = 5) -> nn.Module:
    features = nn.Sequential(
        convolution(3, width, 3, 2, activation=nn.Hardswish),
        GhostModule(width, 2 * width),
        convolution(2 * width, 2 * width, 3, 2, 2 * width, nn.Identity),
        GhostModule(2 * width, 2 * width + 1),
    )
    return Pooled(features, 2 * width + 1, classes)


class PoolFormerBlock(nn.Module):
    """Yu et al. 2022: tokens are mixed by average pooling less the token itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))
        self.mix = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1))
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norms[0](x)
        x = x + self.scale * (self.mix(tokens) - tokens)
        mixed: Tensor = self.scale * self.mlp(self.norms[1](x))
        return x + mixed


def poolformer(width: int = 8, classes: int = 5) -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, width, 7, 4, 2),
        PoolFormerBlock(width),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        PoolFormerBlock(2 * width),
    )
    return Pooled(features, 2 * width, classes)


class PyramidPooling(nn.Module):
    """The maxima over ever larger windows beside each other, by the same pooling three times (SPPF)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.join = convolution(width, width // 2, 1, activation=nn.SiLU), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.reduce(x)]
        for _ in range(3):
            levels.append(functional.max_pool2d(levels[-1], 5, 1, 2))
        result: Tensor = self.join(torch.cat(levels, 1))
        return result


class Detector(nn.Module):
    """A one-stage detector as Redmon and Farhadi 2018 and their followers wire it.

    Three scales meet by nearest upsampling and strided convolutions; boxes and classes of all places, shape
    (rows, places, 4 + classes), boxes decoded on the grid of their scale.
    """

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        silu = nn.SiLU
        self.stem = nn.Sequential(*(convolution(a, b, 3, 2, activation=silu) for a, b in ((3, width), (width, width))))
        self.down = convolution(width, 2 * width, 3, 2, activation=silu)
        self.pyramid = PyramidPooling(2 * width)
        self.lateral = convolution(3 * width, width, 3, activation=silu)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.back = convolution(width, 2 * width, 3, 2, activation=silu)
        self.heads = nn.ModuleList(nn.Conv2d(w, 4 + classes, 1) for w in (width, 4 * width))

    def forward(self, image: Tensor) -> Tensor:
        fine = self.stem(image)
        coarse = self.pyramid(self.down(fine))
        fine = self.lateral(torch.cat([self.up(coarse), fine], 1))
        coarse = torch.cat([self.back(fine), coarse], 1)
        scales = (self._decoded(head(x), s) for head, x, s in zip(self.heads, (fine, coarse), (4, 8), strict=True))
        return torch.cat(list(scales), 1)

    @staticmethod
    def _decoded(raw: Tensor, stride: int) -> Tensor:
        height, width = raw.shape[2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack([x, y], -1).reshape(1, -1, 2).to(raw.dtype)
        flat = raw.flatten(2).transpose(1, 2)
        centre = (flat[..., :2].sigmoid() * 2 - 0.5 + grid) * stride
        size = (flat[..., 2:4].sigmoid() * 2) ** 2 * stride
        return torch.cat([centre, size, flat[..., 4:].sigmoid()], -1)


class StandardizedConvolution(nn.Conv2d):
    """A convolution by weights of mean 0 and variance 1, by way of batch normalization in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        channels = self.weight.shape[0]
        flat = self.weight.reshape(1, channels, -1)
        weight = functional.batch_norm(flat, None, None, training=True, eps=1e-6).reshape_as(self.weight)
        fan_in = weight[0].numel()
        return functional.conv2d(x, weight / fan_in**0.5, self.bias, self.stride, self.padding, groups=self.groups)


class NormalizerFreeBlock(nn.Module):
    """A residual whose branch sees the input at the expected scale."""

    def __init__(self, channels: int, expected: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.SiLU(),
            StandardizedConvolution(channels, channels, 3, 1, 1, groups=2),
            SqueezeExcite(channels, 2, nn.ReLU, nn.Sigmoid),
        )
        self.expected = expected

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = x + 0.2 * self.branch(x / self.expected)
        return grown


def nfnet(width: int = 8, classes: int = 5) -> nn.Module:
    """Brock et al. 2021: no normalization of activations, standardized weights instead."""
    layers = [StandardizedConvolution(3, width, 3, 2, 1), NormalizerFreeBlock(width, 1.0)]
    return Pooled(nn.Sequential(*layers, NormalizerFreeBlock(width, 1.02), nn.SiLU()), width, classes)


class ConvolutionalLSTM(nn.Module):
    """Shi et al. 2015: states that are images; a map per frame of (rows, frames, 3, height, width)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.gates, self.head, self.width = nn.Conv2d(3 + width, 4 * width, 3, 1, 1), nn.Conv2d(width, 1, 1), width

    def forward(self, video: Tensor) -> Tensor:
        hidden = cell = video.new_zeros(video.shape[0], self.width, *video.shape[-2:])
        maps = []
        for frame in video.unbind(1):
            enter, keep, leave, new = self.gates(torch.cat([frame, hidden], 1)).chunk(4, 1)
            cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = leave.sigmoid() * cell.tanh()
            maps.append(self.head(hidden))
        return torch.cat(maps, 1)


class VolumeUNet(nn.Module):
    """Çiçek et al. 2016: classes of every voxel of volumes, shape (rows, 2, depth, height, width)."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Conv3d(2, width, 3, 1, 1), nn.InstanceNorm3d(width, affine=True), nn.ELU())
        self.down = nn.Sequential(nn.MaxPool3d((1, 2, 2)), nn.Conv3d(width, 2 * width, 3, (2, 1, 1), 1), nn.ELU())
        self.up = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.head = nn.Conv3d(2 * width, classes, 1)

    def forward(self, volume: Tensor) -> Tensor:
        outer = self.outer(volume)
        scores: Tensor = self.head(torch.cat([self.up(self.down(outer)), outer], 1))
        return scores


class SpatialTransformer(nn.Module):
    """Jaderberg et al. 2015: images are sampled where a network of their own, and affine in the place, says."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = Pooled(nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.Tanh()), 8, 6)

    def forward(self, image: Tensor) -> Tensor:
        rows, _, height, width = image.shape
        y, x = (torch.linspace(-1, 1, side, dtype=image.dtype) * 0.93 for side in (height, width))
        places = torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width)], -1)
        affine = torch.eye(2, 3) + 0.3 * self.locate(image).tanh().reshape(rows, 2, 3)
        grid = torch.einsum("hwk,ndk->nhwd", places.to(image.dtype), affine.to(image.dtype))
        return functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
