"""The precision in which torch evaluates a model.

Sixteen bits are autocast's: products and convolutions in them, what sums or exponentiates many numbers in float32.
Weights stay in float32, and inputs and outputs are. Only so do graphs run in sixteen bits that name float32 themselves,
as exported ones do wherever they make a tensor.

TensorFloat-32 is a mode of the process, not of a call. Models of several precisions on several devices therefore take
turns where their modes differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from explainserve.errors import ModelRefused
from explainserve.model_config import Precision
from explainserve.signature import Signature

_NARROW = {Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT16: torch.float16}
_LARGEST_EXPONENT = 4
"""Cotangents are scaled to at most 2 to the power of this: gradients more often shrink than grow on their way down, and
float16 ends at 6e-8 and at 2 to the power of 16."""


@dataclass(frozen=True)
class Arithmetic:
    """How one model computes on one device."""

    precision: Precision
    device: torch.device

    @classmethod
    def of(cls, precision: Precision, device: torch.device, signature: Signature) -> Arithmetic:
        """The arithmetic of a precision.

        Raises:
            ModelRefused: the device or the model lacks it (PRECISION_UNAVAILABLE).
        """
        reason = _lacking(precision, device, signature)
        if reason:
            text = f"precision {precision.value!r} is not available: {reason}"
            raise ModelRefused("PRECISION_UNAVAILABLE", text, precision=precision.value, device=str(device))
        return cls(precision, device)

    @property
    def is_narrow(self) -> bool:
        """Whether it has sixteen bits."""
        return self.precision in _NARROW

    def forward(self) -> AbstractContextManager[object]:
        """The context of forward passes; backward passes follow them."""
        if not self.is_narrow:
            return nullcontext()
        return torch.autocast(self.device.type, _NARROW[self.precision], cache_enabled=False)

    def evaluation(self) -> AbstractContextManager[object]:
        """The context of forward and backward passes."""
        return _MODE.set_to(self.precision) if self.device.type == "cuda" else nullcontext()


def row_scales(cotangent: Tensor) -> Tensor:
    """A power of two for each row, shape (rows,), which brings its largest number to 2 ** 4 or just below.

    The gradient is linear in its cotangent, so what is scaled before a backward pass can be scaled back after it, and
    nothing but underflow changes. Rows of zeros, and those that are not finite, are left as they are.
    """
    largest = cotangent.abs().reshape(len(cotangent), -1).amax(1)
    _, exponents = torch.frexp(largest)
    scalable = torch.isfinite(largest) & (largest > 0)
    ones = torch.ones_like(largest)
    return torch.where(scalable, torch.ldexp(ones, _LARGEST_EXPONENT - exponents), ones)


def _lacking(precision: Precision, device: torch.device, signature: Signature) -> str:
    """Why a precision cannot be had, or ""."""
    if precision is Precision.FLOAT32:
        return ""
    others = [spec.name for spec in signature.inputs if spec.differentiable and spec.dtype.name != "float32"]
    if others:
        return f"{', '.join(others)} is not float32 in the file, which is evaluated as it is"
    if precision is Precision.TF32 and device.type != "cuda":
        return f"TensorFloat-32 is a mode of CUDA devices, and this is {device.type}"
    if (
        precision is not Precision.FLOAT16
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return ""


class _Float32Mode:
    """What float32 products on CUDA are made of, in this process. Evaluations of one mode may overlap."""

    def __init__(self, set_mode: Callable[[bool], None]) -> None:
        self._set_mode = set_mode
        self._free = threading.Condition()
        self._tf32: bool | None = None
        self._users = 0

    @contextmanager
    def set_to(self, precision: Precision) -> Iterator[None]:
        """Waits for evaluations in the other mode to end, and keeps others from beginning."""
        tf32 = precision is Precision.TF32
        with self._free:
            self._free.wait_for(lambda: self._users == 0 or self._tf32 is tf32)
            if self._tf32 is not tf32:
                self._set_mode(tf32)
            self._tf32 = tf32
            self._users += 1
        try:
            yield
        finally:
            with self._free:
                self._users -= 1
                self._free.notify_all()


def _set_tf32(allowed: bool) -> None:
    """torch's own default allows it in convolutions, where float32 is asked for."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


_MODE = _Float32Mode(_set_tf32)
