"""Networks of the sizes that people serve, with random weights, and how they are written in the three served formats.

ResNet: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016. VGG: Simonyan, Zisserman: Very
Deep Convolutional Networks, ICLR 2015. MobileNetV2: Sandler et al.: Inverted Residuals and Linear Bottlenecks, CVPR
2018. ViT: Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021; the small one is that of Touvron et al.:
Training data-efficient image transformers, 2021; the stem of convolutions is that of Xiao et al.: Early Convolutions
Help Transformers See Better, 2021. Swin: Liu et al.: Swin Transformer, ICCV 2021.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

FORMATS = ("onnx", "pt2", "pt")
"""Suffixes of the three served formats."""


class Residual(nn.Module):
    """relu(shortcut(x) + body(x)), where the shortcut is a 1x1 convolution if shapes differ."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        bottleneck = outputs > width
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        widths = (inputs, width, width, outputs) if bottleneck else (inputs, width, outputs)
        layers: list[nn.Module] = []
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True)):
            layers += [*convolution(widths[i], widths[i + 1], kernel, step), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.body(x))


def convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size at stride 1, and its batch normalization."""
    kernels = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [kernels, nn.BatchNorm2d(outputs)]


class ResNet(nn.Module):
    """Logits, shape (rows, classes), of images, shape (rows, 3, height, width).

    `blocks` counts the blocks of each stage; `expansion` is 4 for bottlenecks (ResNet-50), 1 for two 3x3 (ResNet-18).
    """

    def __init__(self, blocks: tuple[int, ...], expansion: int, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(*convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if stage and not i else 1
                stages.append(Residual(inputs, width << stage, (width << stage) * expansion, stride))
                inputs = (width << stage) * expansion
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(image)).mean((2, 3)))
        return logits


class VGG(nn.Module):
    """Logits, shape (rows, classes), of images, shape (rows, 3, side, side): 3x3 convolutions without normalization.

    `widths` has the output channels of every convolution, stage by stage; a max pooling ends each stage.
    """

    def __init__(self, widths: tuple[tuple[int, ...], ...], side: int, hidden: int = 4096, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage in widths:
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        features = inputs * (side >> len(widths)) ** 2
        self.head = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image).flatten(1))
        return logits


class InvertedResidual(nn.Module):
    """A depthwise 3x3 convolution between two 1x1, the last without activation; added to x where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        layers = [*convolution(inputs, width, 1, 1), nn.ReLU6()] if expansion > 1 else []
        layers += [*convolution(width, width, 3, stride, groups=width), nn.ReLU6(), *convolution(width, outputs, 1, 1)]
        self.body = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """Logits, shape (rows, classes), of images, shape (rows, 3, height, width).

    `stages` has (expansion, channels, blocks, stride of the first block) of each stage.
    """

    def __init__(self, stages: tuple[tuple[int, int, int, int], ...], last: int = 1280, classes: int = 1000) -> None:
        super().__init__()
        inputs = 32
        layers = [*convolution(3, inputs, 3, 2), nn.ReLU6()]
        for expansion, outputs, count, stride in stages:
            for i in range(count):
                layers.append(InvertedResidual(inputs, outputs, 1 if i else stride, expansion))
                inputs = outputs
        self.features = nn.Sequential(*layers, *convolution(inputs, last, 1, 1), nn.ReLU6())
        self.head = nn.Linear(last, classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image).mean((2, 3)))
        return logits


class Block(nn.Module):
    """A pre-norm transformer block with GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        packed = self.qkv(self.norm1(x)).reshape(rows, tokens, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, tokens, width))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class VisionTransformer(nn.Module):
    """Logits, shape (rows, classes), of images, shape (rows, 3, side, side), read from the mean of all tokens.

    `convolutional` replaces the patches by a stem of convolutions with GELU, which learns from little data.
    """

    def __init__(
        self,
        side: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        classes: int = 1000,
        convolutional: bool = False,
    ) -> None:
        super().__init__()
        self.patches = _stem(patch, width) if convolutional else nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(tokens + self.positions)).mean(1))
        return logits


def _stem(patch: int, width: int) -> nn.Module:
    """A quarter of the area and twice the channels at each step, one token per patch in the end."""
    step_count = patch.bit_length() - 1
    widths = [3, *(width >> (step_count - 1 - step) for step in range(step_count))]
    layers = [[*convolution(a, b, 3, 2), nn.GELU()] for a, b in pairwise(widths)]
    return nn.Sequential(*(layer for pair in layers for layer in pair), nn.Conv2d(width, width, 1))


class WindowAttention(nn.Module):
    """Attention among the tokens of each window, with a bias learned per relative position.

    `shift` moves the windows over the grid, cyclically; tokens that were not neighbours before are masked.
    """

    def __init__(self, grid: int, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.grid, self.heads, self.window, self.shift = grid, heads, window, shift
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        rows, columns = (x.flatten()[:, None] - x.flatten()[None] + window - 1 for x in (rows, columns))
        self.register_buffer("relative", rows * (2 * window - 1) + columns)
        self.register_buffer("mask", self._mask() if shift else None)

    def _mask(self) -> Tensor:
        """Shape (windows, 1, tokens, tokens): -100 where the two tokens come from different regions of the grid."""
        stretch = torch.zeros(self.grid)
        stretch[-self.window :], stretch[-self.shift :] = 1, 2
        regions = self._windows((3 * stretch[:, None] + stretch[None])[None, :, :, None]).squeeze(-1)
        return -100.0 * (regions[:, None, :, None] != regions[:, None, None, :])

    def _windows(self, x: Tensor) -> Tensor:
        """(rows, grid, grid, width) to (rows * windows, tokens, width)."""
        count, side, width = self.grid // self.window, self.window, x.shape[-1]
        return x.reshape(-1, count, side, count, side, width).transpose(2, 3).reshape(-1, side * side, width)

    def _grid(self, x: Tensor) -> Tensor:
        count, side, width = self.grid // self.window, self.window, x.shape[-1]
        return x.reshape(-1, count, count, side, side, width).transpose(2, 3).reshape(-1, self.grid, self.grid, width)

    def forward(self, x: Tensor) -> Tensor:
        width, tokens, shift = x.shape[-1], self.window**2, self.shift
        windows = self._windows(torch.roll(x, (-shift, -shift), (1, 2)) if shift else x)
        packed = self.qkv(windows).reshape(-1, tokens, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (query * (width // self.heads) ** -0.5) @ key.transpose(-2, -1)
        scores = scores + self.bias[self.relative].permute(2, 0, 1)
        if shift:
            shape = scores.shape
            scores = (scores.reshape(-1, *self.mask.shape[:1], *shape[1:]) + self.mask).reshape(-1, *shape[1:])
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(-1, tokens, width)
        grid = self._grid(self.out(mixed))
        return torch.roll(grid, (shift, shift), (1, 2)) if shift else grid


class SwinBlock(nn.Module):
    """A pre-norm block of window attention and a perceptron with GELU."""

    def __init__(self, grid: int, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(grid, width, heads, window, shift)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return merged


class SwinTransformer(nn.Module):
    """Logits, shape (rows, classes), of images, shape (rows, 3, side, side): patches of 4x4, windows of 7x7 tokens."""

    def __init__(self, side: int, width: int, depths: tuple[int, ...], heads: tuple[int, ...], classes: int = 1000):
        super().__init__()
        self.patches, self.norm0 = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        stages: list[nn.Module] = []
        grid, window = side // 4, 7
        for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            if stage:
                stages.append(PatchMerging(width))
                grid, width = grid // 2, 2 * width
            shifts = [window // 2 if i % 2 and grid > window else 0 for i in range(depth)]
            stages += [SwinBlock(grid, width, count, window, shift) for shift in shifts]
        self.stages = nn.Sequential(*stages)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.norm0(self.patches(image).permute(0, 2, 3, 1))
        logits: Tensor = self.head(self.norm(self.stages(tokens)).mean((1, 2)))
        return logits


def resnet50(side: int = 224) -> nn.Module:
    """ResNet-50 with seeded random weights: 25.6 M parameters, 4.1 G multiplications at 224x224."""
    torch.manual_seed(50)
    return calibrated(ResNet((3, 4, 6, 3), 4), side)


def resnet18(side: int = 224) -> nn.Module:
    """ResNet-18 with seeded random weights."""
    torch.manual_seed(18)
    return calibrated(ResNet((2, 2, 2, 2), 1), side)


def vit_small(side: int = 224) -> nn.Module:
    """ViT-S/16 with seeded random weights: 22 M parameters, 4.6 G multiplications at 224x224."""
    torch.manual_seed(16)
    return served(VisionTransformer(side, 16, 384, 12, 6))


def vgg16(side: int = 224) -> nn.Module:
    """VGG-16 with seeded random weights: 138 M parameters, 15.5 G multiplications at 224x224."""
    torch.manual_seed(19)
    return served(VGG(((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3), side))


def mobilenet_v2(side: int = 224) -> nn.Module:
    """MobileNetV2 with seeded random weights: 3.5 M parameters, 0.3 G multiplications at 224x224."""
    torch.manual_seed(2)
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    return calibrated(MobileNetV2(stages), side)


def swin_tiny(side: int = 224) -> nn.Module:
    """Swin-T with seeded random weights: 28 M parameters, 4.5 G multiplications at 224x224."""
    torch.manual_seed(7)
    return served(SwinTransformer(side, 96, (2, 2, 6, 2), (3, 6, 12, 24)))


def calibrated(net: nn.Module, side: int) -> nn.Module:
    """Batch statistics of noise: without them activations of an untrained residual network grow with its depth."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean of what it sees
    with torch.no_grad():
        net.train()(torch.randn(8, 3, side, side))
    return served(net)


def served(net: nn.Module) -> nn.Module:
    """In evaluation mode, without parameter gradients: as every sensible user of Captum has it."""
    return net.eval().requires_grad_(False)


def write_model(
    net: nn.Module, file_format: str, folder: Path, side: int, classes: int = 1000, mean: float = 0.5, std: float = 0.25
) -> None:
    """`folder/model.toml` and `folder/1/model.*` in one of FORMATS, with a dynamic batch."""
    path = folder / "1" / f"model.{file_format}"
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(
        _MODEL_TOML.format(side=side, classes=classes, mean=mean, std=std), encoding="utf-8"
    )
    example = (torch.zeros(2, 3, side, side),)
    batch = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript, and what its exporters do
        if file_format == "onnx":
            torch.onnx.export(
                net,
                example,
                path,
                dynamo=True,
                verbose=False,
                external_data=False,
                dynamic_shapes=batch,
                input_names=["image"],
                output_names=["logits"],
            )
        elif file_format == "pt2":
            torch.export.save(torch.export.export(net, example, dynamic_shapes=batch), path)
        else:
            torch.jit.trace(net, example).save(str(path))


_MODEL_TOML = """\
[[inputs]]
name = "image"
dtype = "float32"
shape = ["batch", 3, {side}, {side}]
layout = "NCHW"
value_range = [0.0, 1.0]
mean = [{mean}, {mean}, {mean}]
std = [{std}, {std}, {std}]

[[outputs]]
name = "logits"
dtype = "float32"
shape = ["batch", {classes}]
kind = "logits"
"""
