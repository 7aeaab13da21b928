"""Networks of the sizes that people serve, with random weights, and how they are written in the three served formats.

ResNet: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016. ViT: Dosovitskiy et al.: An Image
is Worth 16x16 Words, ICLR 2021; the small one is that of Touvron et al.: Training data-efficient image transformers,
2021; the stem of convolutions is that of Xiao et al.: Early Convolutions Help Transformers See Better, 2021.
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


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    """A convolution that keeps the size at stride 1, and its batch normalization."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


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
