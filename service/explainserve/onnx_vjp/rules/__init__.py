"""The derivative table, one module per family of operators. Importing it fills the registry."""

from explainserve.onnx_vjp.rules import (
    arithmetic,
    convolution,
    elementwise,
    flat,
    indexing,
    linear,
    microsoft,
    normalization,
    pooling,
    reductions,
    resizing,
    sampling,
    shape,
)

__all__ = [
    "arithmetic",
    "convolution",
    "elementwise",
    "flat",
    "indexing",
    "linear",
    "microsoft",
    "normalization",
    "pooling",
    "reductions",
    "resizing",
    "sampling",
    "shape",
]
