"""Cases of the operators of onnxruntime's own domains: every option that its processor kernels support."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from onnx_vjp.microsoft_oracle import Fused, fused

_rng = np.random.default_rng(11)


def _x(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * _rng.standard_normal(shape)).astype(np.float32)


def _i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def cases() -> Iterator[Fused]:
    """One or more per operator with a gradient."""
    yield from _activations()
    yield from _products()
    yield from _normalizations()
    yield from _attention()
    yield from _rotary()


def _activations() -> Iterator[Fused]:
    for dynamic in (False, True):
        yield fused("Gelu", {"x": _x(3, 5)}, dynamic=dynamic)
        yield fused("QuickGelu", {"x": _x(3, 5)}, dynamic=dynamic, alpha=1.3)
        yield fused("FastGelu", {"x": _x(2, 3, 5), "b": _x(5)}, dynamic=dynamic)
        yield fused("BiasGelu", {"x": _x(2, 3, 5), "b": _x(5)}, dynamic=dynamic)
    yield fused("QuickGelu", {"x": _x(3, 5)})
    yield fused("FastGelu", {"x": _x(3, 5)})
    yield fused("ScaledSiLU", {"x": _x(3, 5)}, alpha=0.7)
    yield fused(
        "BiasSplitGelu",
        {"x": _x(2, 3, 8), "b": _x(8)},
        function=lambda x, b: (x + b)[..., :4] * _gelu((x + b)[..., 4:]),
    )
    yield fused(
        "GemmFastGelu", {"x": _x(2, 3, 4), "w": _x(4, 5), "b": _x(5)}, function=lambda x, w, b: _fast_gelu(x @ w + b)
    )
    yield fused("ScaledSiLU", {"x": _x(3, 5), "s": np.array(1.4, np.float32)}, constants="s")


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * np.vectorize(NormalDist().cdf)(x)


def _fast_gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


_ACTIVATIONS: dict[str, tuple[float, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": (0.2,),
    "Clip": (-0.4, 0.7),
    "HardSigmoid": (0.3, 0.4),
}


def _products() -> Iterator[Fused]:
    image, kernel, bias = _x(2, 4, 7, 6), _x(6, 2, 3, 3, scale=0.4), _x(6)
    for name, parameters in _ACTIVATIONS.items():
        more = {"activation_params": parameters} if parameters else {}
        yield fused("FusedConv", {"x": image, "w": kernel, "b": bias}, group=2, activation=name, **more)
    conv = {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2], "kernel_shape": [3, 3]}
    yield fused("FusedConv", {"x": image, "w": kernel, "b": bias, "z": _x(2, 6, 4, 3)}, activation="Relu", **conv)
    yield fused(
        "FusedConv", {"x": image, "w": kernel, "_b": bias, "z": _x(2, 6, 5, 4)}, group=2, dynamic=True, constants="w"
    )
    a, b, c = _x(3, 4), _x(4, 5), _x(5)
    gemm = {
        "Relu": {},
        "Sigmoid": {},
        "Tanh": {},
        "Softplus": {},
        "Softsign": {},
        "Elu": {"activation_alpha": 0.7},
        "LeakyRelu": {"activation_alpha": 0.2},
        "ThresholdedRelu": {"activation_alpha": 0.3},
        "Selu": {"activation_alpha": 1.5, "activation_gamma": 1.1},
        "HardSigmoid": {"activation_alpha": 0.3, "activation_beta": 0.4},
    }
    for name, parameters in gemm.items():
        yield fused("FusedGemm", {"a": a, "b": b, "c": c}, activation=name, **parameters)
    yield fused("FusedGemm", {"a": a.T.copy(), "b": b.T.copy()}, activation="Relu", transA=1, transB=1, alpha=0.5)
    yield fused("FusedGemm", {"a": a, "b": b, "c": c}, beta=0.3, activation="Tanh", dynamic=True)
    for operator in ("FusedMatMul", "TransposeMatMul"):
        yield fused(operator, {"a": _x(2, 4, 3), "b": _x(2, 5, 4)}, transA=1, transB=1, alpha=0.6)
    yield fused("FusedMatMul", {"a": _x(2, 3, 4), "b": _x(4, 5)}, alpha=2.0, dynamic=True)
    yield fused("FusedMatMul", {"a": _x(3, 2, 6, 4), "b": _x(2, 6, 4, 5)}, transBatchA=1)
    yield fused("FusedMatMul", {"a": _x(2, 6, 3, 4), "b": _x(5, 2, 6, 4)}, transBatchB=1, transB=1)
    yield fused("FusedMatMul", {"a": _x(4, 2, 6, 3), "b": _x(4, 2, 6, 5)}, transBatchA=1, transA=1, transBatchB=1)
    yield fused("FusedMatMul", {"a": _x(4), "b": _x(2, 4, 5)}, transA=1)

    for activation, function in {"Tanh": np.tanh, "Softmax": _softmax}.items():
        yield fused(
            "FusedMatMulActivation",
            {"a": _x(2, 4, 3), "b": _x(2, 4, 5)},
            transA=1,
            alpha=0.5,
            activation=activation,
            function=lambda a, b, function=function: function(0.5 * np.swapaxes(a, 1, 2) @ b),
        )
    for bits, block, inner in ((4, 16, 32), (4, 16, 40), (8, 32, 64), (2, 16, 48), (4, 32, 33)):
        yield from _few_bits(bits, block, inner)


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def _few_bits(bits: int, block: int, inner: int) -> Iterator[Fused]:
    rows, count = 6, -(-inner // block)
    stored = _rng.integers(0, 256, (rows, count, block * bits // 8)).astype(np.uint8)
    scales = np.abs(_x(rows, count, scale=0.1))
    zeros = {
        "without": None,
        "packed": _rng.integers(0, 256, (rows, -(-count * bits // 8))).astype(np.uint8),
        "plain": _x(rows, count) + np.float32(2 ** (bits - 1)),
    }
    for name, zero in zeros.items():
        if bits == 8 and name == "plain":
            continue  # the kernel has no such form
        feeds = {"x": _x(2, 3, inner), "w": stored, "s": scales, "z" if zero is not None else "_z": zero, "_g": zero}
        yield fused(
            "MatMulNBits",
            {**feeds, "b": _x(rows)},
            constants=[key for key in ("w", "s", "z") if key in feeds],
            name=f"{bits} bits of {block}, {name} zero points, {inner} columns",
            bits=bits,
            block_size=block,
            K=inner,
            N=rows,
        )


def _normalizations() -> Iterator[Fused]:
    x, skip, gamma, beta, bias = _x(2, 3, 8), _x(2, 3, 8), _x(8), _x(8), _x(8)
    for dynamic in (False, True):
        yield fused("SimplifiedLayerNormalization", {"x": x, "s": gamma}, domain="", dynamic=dynamic)
        yield fused(
            "SkipLayerNormalization",
            {"x": x, "k": skip, "g": gamma, "b": beta, "a": bias},
            outputs="y _ _ s",
            epsilon=1e-3,
            dynamic=dynamic,
        )
        yield fused(
            "SkipSimplifiedLayerNormalization",
            {"x": x, "k": skip, "g": gamma, "a": bias},
            outputs="y _ _ s",
            dynamic=dynamic,
        )
    yield fused("SimplifiedLayerNormalization", {"x": x, "s": _x(3, 8)}, domain="", axis=1, epsilon=1e-2)
    yield fused("SkipLayerNormalization", {"x": x, "k": _x(3, 8), "g": gamma})
    yield fused("SkipLayerNormalization", {"x": x, "k": _x(1, 3, 8), "g": gamma, "b": beta})
    yield fused("SkipSimplifiedLayerNormalization", {"x": _x(4, 8), "k": _x(4, 8), "g": gamma})
    tables = {"w": _x(9, 8), "p": _x(6, 8)}
    tokens, segments = np.array([[1, 4, 0], [8, 2, 2]], np.int32), np.array([[0, 0, 1], [1, 1, 0]], np.int32)
    mask, places = np.array([[1, 1, 0], [1, 1, 1]], np.int32), np.array([[2, 0, 1], [5, 4, 3]], np.int32)
    yield fused(
        "EmbedLayerNormalization",
        {"t": tokens, "s": segments, **tables, "e": _x(2, 8), "g": gamma, "b": beta, "m": mask},
        outputs="y _ sum",
    )
    yield fused(
        "EmbedLayerNormalization",
        {"t": tokens, "_s": segments, **tables, "_e": skip, "g": gamma, "b": beta, "_m": mask, "i": places},
        outputs="y _",
        epsilon=1e-5,
    )
    for scale in ((8,), (2, 8), (16,)):
        yield fused("BranchwiseRMSNorm", {"x": _x(3, 2, 8), "s": _x(*scale)}, name=f"grouped{scale}")
        yield fused("BranchwiseRMSNorm", {"x": _x(3, 16), "s": _x(*scale)}, num_branches=2, name=f"flat{scale}")
    yield fused("BranchwiseRMSNorm", {"x": _x(3, 2, 8)}, epsilon=1e-3)
    for activation in ("silu", "swish", "sigmoid"):
        yield fused("GatedRMSNorm", {"x": _x(2, 3, 8), "s": _x(4), "g": _x(2, 3, 8)}, activation=activation)

    for last in (0, 1):
        yield from _group_normalizations(last)


def _group_normalizations(last: int) -> Iterator[Fused]:
    gamma, beta, bias = _x(6), _x(6), _x(6)
    image, axes = (_x(2, 3, 4, 6), (0, 1, 2, 3)) if last else (_x(2, 6, 3, 4), (0, 2, 3, 1))
    back = tuple(int(axis) for axis in np.argsort(axes))
    for activation in (0, 1):
        attributes = {"groups": 3, "activation": activation, "channels_last": last, "epsilon": 1e-3}

        def normalized(x: np.ndarray, *scales: np.ndarray, activation: int = activation) -> np.ndarray:
            return _group_norm(x.transpose(axes), *scales, activation).transpose(back)

        yield fused("GroupNorm", {"x": image, "g": gamma, "b": beta}, function=normalized, **attributes)
        for skip in (_x(*image.shape), _x(2, 6)):

            def total(x: np.ndarray, s: np.ndarray, b: np.ndarray | float = 0.0) -> np.ndarray:
                wide = s[:, None, None, :] if s.ndim == 2 else s.transpose(axes)
                return (x.transpose(axes) + wide + b).transpose(back)

            for extra in ({"a": bias}, {}):
                yield fused(
                    "SkipGroupNorm",
                    {"x": image, "g": gamma, "b": beta, "s": skip, **extra},
                    outputs=2,
                    function=lambda x, g, b, *rest, n=normalized, t=total: (n(t(x, *rest), g, b), t(x, *rest)),
                    **attributes,
                )


def _group_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, activation: int) -> np.ndarray:
    """Three groups of channels, which come last."""
    rows = x.reshape(len(x), -1, 3, x.shape[-1] // 3)
    centered = rows - rows.mean((1, 3), keepdims=True)
    normal = centered / np.sqrt((centered**2).mean((1, 3), keepdims=True) + 1e-3)
    y = normal.reshape(x.shape) * gamma + beta
    return y * _sigmoid(y) if activation else y


def _attention() -> Iterator[Fused]:
    x, w, b = _x(2, 5, 8), _x(8, 24, scale=0.5), _x(24)
    yield fused("Attention", {"x": x, "w": w, "b": b}, num_heads=2)
    yield fused("Attention", {"x": x, "w": w, "b": b}, num_heads=2, dynamic=True)
    yield fused("Attention", {"x": x, "w": w, "b": b}, num_heads=4, scale=0.3, unidirectional=1)
    yield fused("Attention", {"x": x, "w": _x(8, 28, scale=0.5), "b": _x(28)}, num_heads=2, qkv_hidden_sizes=[8, 8, 12])
    masks = {
        "ends": _i32(3, 5),
        "ends and starts": _i32(4, 5, 1, 0),
        "keys": np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], np.int32),
        "pairs": (_rng.random((2, 5, 5)) > 0.3).astype(np.int32),
    }
    for name, mask in masks.items():
        for constants in ((), ("m",)):
            yield fused(
                "Attention",
                {"x": x, "w": w, "b": b, "m": mask},
                num_heads=2,
                constants=constants,
                name=f"mask of {name}",
            )
    yield fused(
        "Attention",
        {"x": x, "w": w, "b": b, "m": masks["keys"]},
        num_heads=2,
        unidirectional=1,
        mask_filter_value=-50.0,
        dynamic=True,
    )
    yield fused("Attention", {"x": x, "w": w, "b": b, "_m": x, "_p": x, "a": _x(1, 2, 5, 5)}, num_heads=2)
    past = _x(2, 2, 2, 3, 4)
    for causal in (0, 1):
        yield fused(
            "Attention",
            {"x": x, "w": w, "b": b, "_m": x, "p": past},
            outputs=2,
            num_heads=2,
            unidirectional=causal,
            name=f"past-{causal}",
        )
    q, k, v = _x(2, 5, 8), _x(2, 4, 8), _x(2, 4, 12)
    yield fused("MultiHeadAttention", {"q": q, "k": k, "v": v}, num_heads=2)
    yield fused("MultiHeadAttention", {"q": q, "k": k, "v": v, "b": _x(28)}, num_heads=2, dynamic=True, scale=0.2)
    for name, mask in {
        "ends": _i32(3, 4),
        "keys": np.array([[1, 1, 0, 1], [1, 0, 1, 1]], np.int32),
        "pairs": (_rng.random((2, 5, 4)) > 0.3).astype(np.int32),
    }.items():
        yield fused(
            "MultiHeadAttention", {"q": q, "k": k, "v": v, "_b": q, "m": mask}, num_heads=2, name=f"mask of {name}"
        )
    yield fused(
        "MultiHeadAttention", {"q": q, "k": k, "v": v, "_b": q, "_m": q, "a": _x(2, 1, 5, 4)}, num_heads=2, outputs=3
    )
    yield fused("MultiHeadAttention", {"q": q, "k": q, "v": q}, num_heads=2, unidirectional=1)
    yield fused(
        "MultiHeadAttention",
        {"q": _x(2, 5, 2, 3, 4)},
        num_heads=2,
        name="packed query, key and value",
        function=lambda x: _attended(*(x[:, :, :, index] for index in range(3))),
    )
    yield fused(
        "MultiHeadAttention",
        {"q": q, "k": _x(2, 4, 2, 2, 4)},
        num_heads=2,
        name="packed key and value",
        function=lambda x, y: _attended(x.reshape(2, 5, 2, 4), y[:, :, :, 0], y[:, :, :, 1]),
    )
    yield fused("MultiHeadAttention", {"q": q, "k": _x(2, 2, 4, 4), "v": _x(2, 2, 4, 4)}, num_heads=2, name="heads")
    yield fused(
        "MultiHeadAttention",
        {"q": q, "k": q, "v": q, "_b": q, "_m": q, "_a": q, "pk": _x(2, 2, 3, 4), "pv": _x(2, 2, 3, 4)},
        num_heads=2,
        outputs=3,
        unidirectional=1,
        name="past",
    )


def _attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of (batch, length, heads, head size)."""
    scores = np.exp(np.einsum("bsnh,btnh->bnst", q, k) / np.sqrt(q.shape[-1]))
    probabilities = scores / scores.sum(-1, keepdims=True)
    return np.einsum("bnst,btnh->bsnh", probabilities, v).reshape(*q.shape[:2], -1)


def _rotary() -> Iterator[Fused]:
    angles = _x(9, 2)
    tables = {"c": np.cos(angles), "s": np.sin(angles)}
    for interleaved in (0, 1):
        for name, places in {"offset": np.array([2]), "places": np.array([[0, 1, 2], [5, 3, 8]])}.items():
            yield fused(
                "RotaryEmbedding",
                {"x": _x(2, 3, 8), "p": places, **tables},
                constants=("c", "s"),
                interleaved=interleaved,
                name=f"{name}-{interleaved}",
            )
        yield fused(
            "RotaryEmbedding",
            {"x": _x(2, 2, 3, 8), "p": np.array([1]), **tables},
            constants=("c", "s"),
            interleaved=interleaved,
            num_heads=2,
            rotary_embedding_dim=4,
        )
    yield fused("RotaryEmbedding", {"x": _x(2, 3, 8), "p": np.array([0]), **tables}, constants=("c", "s"), dynamic=True)
    yield fused(
        "RotaryEmbedding", {"x": _x(2, 3, 16), "p": np.array([0]), **tables}, num_heads=2, rotary_embedding_dim=4
    )
