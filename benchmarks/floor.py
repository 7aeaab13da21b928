"""The least time that a row of gradients can take on a device: its arithmetic at the peak that torch's own products
reach there, its traffic at the speed of a plain copy, whichever is longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Element types by precision."""

ROWS = 4
"""Rows of the batch whose work is counted; weights are read once for all of them."""


@dataclass(frozen=True)
class Work:
    """Of one row forward and backward.

    Attributes:
        operations: multiplications and additions of products and convolutions.
        elements: numbers that these read and write, weights included; all between them is taken to be fused.
    """

    operations: float
    elements: float


@dataclass(frozen=True)
class Extent:
    """How large the products and copies are that a device is measured with, and for how long."""

    side: int
    images: int
    copied_bytes: int
    seconds: float


LARGE, SMALL = Extent(8192, 64, 1 << 30, 0.5), Extent(256, 1, 1 << 22, 0.02)


@dataclass(frozen=True)
class Peak:
    """What a device does in a second in one precision.

    Attributes:
        operations: the most of a square product and of a 3x3 convolution.
        bytes: read and written by a copy.
    """

    operations: float
    bytes: float

    def seconds(self, work: Work, precision: str) -> tuple[float, float]:
        """The least time of a row: for its arithmetic, and for its traffic."""
        return work.operations / self.operations, work.elements * DTYPES[precision].itemsize / self.bytes


def work_of(net: nn.Module, row: Tensor) -> Work:
    """What the gradient of one output takes, counted on the CPU.

    Args:
        row: shape of one instance.
    """
    x = row.expand(ROWS, *row.shape).clone().requires_grad_()
    with _Counter() as counter, sdpa_kernel(SDPBackend.MATH):
        torch.autograd.grad(net(x).flatten(1)[:, 0].sum(), x)
    return Work(counter.operations / ROWS, counter.elements / ROWS)


def peak_of(device: str, precision: str, extent: Extent) -> Peak:
    """Measured now."""
    with _tensorfloat(precision == "tf32"):
        products = max(_product_rate(device, precision, extent), _convolution_rate(device, precision, extent))
    return Peak(products, _copy_rate(device, extent))


class _Counter(TorchDispatchMode):
    """Counts the operations of products, and what they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            backward = func._overloadpacket is torch.ops.aten.convolution_backward
            read = (args[0], args[2]) if backward else args  # the input itself is for gradients of weights
            self.elements += sum(leaf.numel() for leaf in tree_leaves((read, result)) if isinstance(leaf, Tensor))
        return result


def _product_rate(device: str, precision: str, extent: Extent) -> float:
    a, b = (torch.randn(extent.side, extent.side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    return 2 * extent.side**3 / _seconds(lambda: a @ b, device, extent)


def _convolution_rate(device: str, precision: str, extent: Extent) -> float:
    channels, side = 256, 56
    options = {"device": device, "dtype": DTYPES[precision]}
    x = torch.randn(extent.images, channels, side, side, **options).contiguous(memory_format=torch.channels_last)
    kernels = torch.randn(channels, channels, 3, 3, **options).contiguous(memory_format=torch.channels_last)
    operations = 2 * extent.images * side**2 * channels**2 * 9
    return operations / _seconds(lambda: nn.functional.conv2d(x, kernels, padding=1), device, extent)


def _copy_rate(device: str, extent: Extent) -> float:
    source = torch.empty(extent.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * extent.copied_bytes / _seconds(lambda: target.copy_(source), device, extent)


def _seconds(run: Callable[[], Any], device: str, extent: Extent) -> float:
    """The least of several runs, after one that does not count."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < extent.seconds:
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


@contextmanager
def _tensorfloat(allowed: bool) -> Iterator[None]:
    """Whether float32 products may be in TensorFloat-32 on CUDA."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
