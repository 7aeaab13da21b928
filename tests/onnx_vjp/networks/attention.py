"""Networks of attention and of token mixing over images and sequences, as their papers wire them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from onnx_vjp.networks.convolutional import InvertedResidual, convolution


class RelativeAttention(nn.Module):
    """Attention inside groups of `side` x `side` tokens, with a learned bias per offset (Liu et al. 2021)."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        offset = places[:, :, None] - places[:, None, :] + side - 1
        self.register_buffer("index", offset[0] * (2 * side - 1) + offset[1])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        groups, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(groups, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)
        scores = scores + self.bias[self.index.view(-1)].view(tokens, tokens, self.heads).permute(2, 0, 1)
        if mask is not None:
            scores = scores.view(-1, len(mask), self.heads, tokens, tokens) + mask[:, None]
            scores = scores.view(-1, self.heads, tokens, tokens)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(groups, tokens, width)
        result: Tensor = self.out(mixed)
        return result


def windows(x: Tensor, side: int) -> Tensor:
    """(rows, height, width, channels) to (rows * windows, side * side, channels)."""
    rows, height, width, channels = x.shape
    blocks = x.view(rows, height // side, side, width // side, side, channels)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, channels)


def from_windows(x: Tensor, side: int, height: int, width: int) -> Tensor:
    """The inverse of `windows`."""
    channels = x.shape[-1]
    blocks = x.view(-1, height // side, width // side, side, side, channels)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def mlp(width: int, inner: int, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), activation(), nn.Linear(inner, width))


class SwinBlock(nn.Module):
    """Liu et al. 2021: attention in windows, every other time shifted by half of one, the wrapped part masked."""

    def __init__(self, width: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.side, self.shift = side, shift
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention, self.mlp = RelativeAttention(width, heads, side), mlp(width, 4 * width)

    def _mask(self, height: int, width: int) -> Tensor:
        regions = torch.zeros(1, height, width, 1)
        parts = (slice(0, -self.side), slice(-self.side, -self.shift), slice(-self.shift, None))
        for number, (rows, columns) in enumerate((a, b) for a in parts for b in parts):
            regions[:, rows, columns] = number
        flat = windows(regions, self.side).squeeze(-1)
        return (flat[:, None] - flat[:, :, None]).ne(0) * -100.0

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        y, mask = self.norms[0](x), None
        if self.shift:
            y, mask = torch.roll(y, (-self.shift, -self.shift), (1, 2)), self._mask(height, width).to(x.dtype)
        y = from_windows(self.attention(windows(y, self.side), mask), self.side, height, width)
        x = x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)
        result: Tensor = x + self.mlp(self.norms[1](x))
        return result


class PatchMerging(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        quarters = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        merged: Tensor = self.reduce(self.norm(torch.cat(quarters, -1)))
        return merged


class Swin(nn.Module):
    """Scores of images whose sides are fixed by the mask: (rows, 3, side, side)."""

    def __init__(
        self,
        width: int = 12,
        heads: tuple[int, ...] = (2, 4),
        window: int = 4,
        depths: tuple[int, ...] = (2, 2),
        classes: int = 5,
    ) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        stages: list[nn.Module] = []
        for stage, (count, depth) in enumerate(zip(heads, depths, strict=True)):
            if stage:
                stages.append(PatchMerging(width))
                width *= 2
            stages += [SwinBlock(width, count, window, i % 2 * (window // 2)) for i in range(depth)]
        self.stages, self.last, self.head = nn.Sequential(*stages), nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stages(self.norm(self.patches(image).permute(0, 2, 3, 1)))
        scores: Tensor = self.head(self.last(x).mean((1, 2)))
        return scores


class MaxViTBlock(nn.Module):
    """Tu et al. 2022: a gated convolution, then attention inside windows and across a grid of equal pitch."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.convolution = InvertedResidual(width, width, 1, activation=nn.GELU, gate=nn.Sigmoid)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.attention = nn.ModuleList(RelativeAttention(width, heads, side) for _ in range(2))
        self.mlps = nn.ModuleList(mlp(width, 2 * width) for _ in range(2))

    def _grid(self, x: Tensor) -> Tensor:
        rows, height, width, channels = x.shape
        blocks = x.view(rows, self.side, height // self.side, self.side, width // self.side, channels)
        return blocks.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.side**2, channels)

    def _from_grid(self, x: Tensor, height: int, width: int) -> Tensor:
        blocks = x.view(-1, height // self.side, width // self.side, self.side, self.side, x.shape[-1])
        return blocks.permute(0, 3, 1, 4, 2, 5).reshape(-1, height, width, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x).permute(0, 2, 3, 1)
        _, height, width, _ = x.shape
        local = self.attention[0](windows(self.norms[0](x), self.side))
        x = x + from_windows(local, self.side, height, width)
        x = x + self.mlps[0](self.norms[1](x))
        x = x + self._from_grid(self.attention[1](self._grid(self.norms[2](x))), height, width)
        x = x + self.mlps[1](self.norms[3](x))
        return x.permute(0, 3, 1, 2)


class MaxViT(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2, window: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, width, 3, 2, activation=nn.GELU), nn.Conv2d(width, width, 3, 2, 1))
        self.block, self.norm, self.head = (
            MaxViTBlock(width, heads, window),
            nn.LayerNorm(width),
            nn.Linear(width, classes),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.block(self.stem(image))
        scores: Tensor = self.head(self.norm(x.mean((2, 3))))
        return scores


class Mixer(nn.Module):
    """Tolstikhin et al. 2021 (MLP-Mixer): one MLP over tokens, one over channels."""

    def __init__(self, side: int = 32, patch: int = 8, width: int = 12, classes: int = 5) -> None:
        super().__init__()
        tokens = (side // patch) ** 2
        self.patches, self.head = nn.Conv2d(3, width, patch, patch), nn.Linear(width, classes)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.tokens, self.channels = mlp(tokens, 2 * tokens), mlp(width, 2 * width)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        scores: Tensor = self.head(self.norms[2](x).mean(1))
        return scores


class EncoderBlock(nn.Module):
    """Post-norm self-attention and MLP over (rows, tokens, width), attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = mlp(width, 2 * width, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norms[0](x + self.out(mixed))
        result: Tensor = self.norms[1](x + self.mlp(x))
        return result


class TabTransformer(nn.Module):
    """Huang et al. 2020: categories, shape (rows, columns), are embedded and attend to each other; numbers join later.

    Scores, shape (rows, classes), of `numbers`, shape (rows, numbers), and `categories` (int64).
    """

    def __init__(self, numbers: int = 6, columns: int = 4, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(10, width) for _ in range(columns))
        self.encoder = nn.Sequential(EncoderBlock(width, 2), EncoderBlock(width, 2))
        self.norm = nn.LayerNorm(numbers)
        self.head = nn.Sequential(nn.Linear(columns * width + numbers, 16), nn.SELU(), nn.Linear(16, classes))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        embedded = [embed(categories[:, column]) for column, embed in enumerate(self.embeddings)]
        mixed = self.encoder(torch.stack(embedded, 1)).flatten(1)
        scores: Tensor = self.head(torch.cat([mixed, self.norm(numbers)], 1))
        return scores


class RootMeanSquareNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Decoder(nn.Module):
    """Touvron et al. 2023 (LLaMA), one block: rotary positions, shared key heads, a gated MLP, causal attention.

    Scores of the next token at each place, shape (rows, length, tokens), of embeddings, shape (rows, length, width).
    """

    def __init__(self, width: int = 16, heads: int = 4, key_heads: int = 2, tokens: int = 11) -> None:
        super().__init__()
        self.heads, self.key_heads, self.size = heads, key_heads, width // heads
        self.norms = nn.ModuleList(RootMeanSquareNorm(width) for _ in range(3))
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, key_heads * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(2 * width, width, bias=False), nn.Linear(width, tokens, bias=False)

    def _rotated(self, x: Tensor) -> Tensor:
        half = self.size // 2
        rate = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * rate
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def _heads(self, x: Tensor, count: int) -> Tensor:
        rows, length, _ = x.shape
        return x.view(rows, length, count, self.size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q = self._rotated(self._heads(self.query(y), self.heads))
        k, v = self._rotated(self._heads(self.key(y), self.key_heads)), self._heads(self.value(y), self.key_heads)
        k, v = (t.repeat_interleave(self.heads // self.key_heads, 1) for t in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        scores: Tensor = self.head(self.norms[2](x))
        return scores
