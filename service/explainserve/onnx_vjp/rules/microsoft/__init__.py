"""The operators of onnxruntime's own domains: what its optimizer and its tools write into files.

Most are several standard operators in one and are written as such again; the gradient then follows from theirs.
"""

from explainserve.onnx_vjp.rules.microsoft import (
    activations,
    attention,
    flat,
    grouped,
    layouts,
    mixtures,
    normalization,
    products,
    rest,
    rotary,
)

__all__ = [
    "activations",
    "attention",
    "flat",
    "grouped",
    "layouts",
    "mixtures",
    "normalization",
    "products",
    "rest",
    "rotary",
]
