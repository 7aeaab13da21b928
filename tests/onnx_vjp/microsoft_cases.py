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
    yield from _grouped()
    yield from _experts()
    yield from _layouts()
    yield from _older_forms()
    yield from _sums()
    yield from _moves()


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

    for kind in (0, 1):
        stored, largest = _rng.integers(0, 256, 6 * 32 // 2).astype(np.uint8), np.abs(_x(6 * 32 // 16))
        feeds = {"x": _x(2, 3, 32), "w": stored, "s": largest}
        attributes = {"K": 32, "N": 6, "block_size": 16, "quant_type": kind}
        yield fused("MatMulBnb4", feeds, constants=("w", "s"), **attributes)
    yield from _few_bits_together()


def _few_bits_together() -> Iterator[Fused]:
    """Two or three projections in one, from 32 features to 6."""
    names = ("a", "b", "c")
    stored = {name: _rng.integers(0, 256, (6, 1, 16)).astype(np.uint8) for name in names}
    scales = {name: np.abs(_x(6, 1, scale=0.1)) for name in names}
    weights = {name: (_nibbles(stored[name]) - 8.0) * scales[name] for name in names}
    norm, x, skip, bias = _x(32), _x(2, 3, 32), _x(2, 3, 32), _x(6)
    shared = {"K": 32, "bits": 4, "block_size": 32, "epsilon": 1e-3}
    one, two, three = ({f"{name}w": stored[name], f"{name}s": scales[name]} for name in names)
    constants = [f"{name}{part}" for name in names for part in "ws"]

    def normalized(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale

    yield fused(
        "MatMulNBitsMlp",
        {"x": x, "k": skip, "n": norm, **one, "ab": bias, **two, "_bb": bias},
        constants=constants[:4],
        outputs=2,
        N=6,
        activation="silu",
        function=lambda x, k, n, *rest: (
            _silu(normalized(x + k, n) @ weights["a"].T + rest[2]) * (normalized(x + k, n) @ weights["b"].T),
            x + k,
        ),
        **shared,
    )
    yield fused(
        "MatMulNBitsQkv",
        {"x": x, "_k": skip, "n": norm, **one, "ab": bias, **two, "_bb": bias, **three},
        constants=constants,
        outputs=3,
        Nq=6,
        Nkv=6,
        function=lambda x, n, *rest: (
            normalized(x, n) @ weights["a"].T + rest[2],
            normalized(x, n) @ weights["b"].T,
            normalized(x, n) @ weights["c"].T,
        ),
        **shared,
    )


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


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
    places = np.stack(
        [np.array([[0, 1, 2], [5, 3, 8]]), np.array([[4, 1, 0], [2, 2, 1]]), np.array([[3, 3, 6], [0, 7, 8]])]
    )
    wide = _x(9, 8)
    for layout in (0, 1):
        yield fused(
            "MRotaryEmbedding",
            {"x": _x(2, 3, 16), "p": places, "c": np.cos(wide), "s": np.sin(wide)},
            constants=("c", "s"),
            num_heads=1,
            mrope_section=[3, 3, 2],
            mrope_layout=layout,
        )
    heads = {name: _x(2, 2, 3, 4) for name in ("q", "qr", "k", "kr")}
    yield fused(
        "GemmaRotaryEmbedding",
        {"e": _x(2, 3, 4), **heads},
        outputs=2,
        function=lambda e, q, qr, k, kr: tuple(
            x * np.cos(e)[:, None] + y * np.sin(e)[:, None] for x, y in ((q, qr), (k, kr))
        ),
    )


def _grouped() -> Iterator[Fused]:
    """Four heads of queries on two of keys, sixteen channels each."""
    q, k, v = _x(2, 5, 64), _x(2, 5, 32), _x(2, 5, 32)
    lengths = {"n": _i32(4, 4), "t": np.array(5, np.int32)}
    prompt = {"q": q, "k": k, "v": v, "_pk": q, "_pv": q, **lengths}
    angles = _x(16, 8)
    tables = {"c": np.cos(angles), "s": np.sin(angles)}
    both = {"num_heads": 4, "kv_num_heads": 2}
    query = "GroupQueryAttention"
    yield fused(query, prompt, outputs=3, **both)
    yield fused(query, prompt, outputs=3, dynamic=True, scale=0.3, **both)
    yield fused(query, prompt, outputs=3, local_window_size=2, **both)
    yield fused(query, prompt, outputs=3, softcap=1.5, **both)
    yield fused(query, prompt, outputs=3, smooth_softmax=1, **both)
    yield fused(query, prompt, outputs=3, causal=0, **both)
    packed = {"q": _x(2, 5, 128), "_k": q, "_v": q, "_pk": q, "_pv": q, **lengths}
    yield fused(query, packed, outputs=3, name="packed", **both)
    for interleaved in (0, 1):
        rotary = {"do_rotary": 1, "rotary_interleaved": interleaved, **both}
        yield fused(query, {**packed, **tables}, outputs=3, constants=("c", "s"), **rotary)
    bias = {"_c": q, "_s": q, "_i": q, "a": _x(1, 4, 5, 5)}
    yield fused(query, {**prompt, **bias}, outputs=3, name="bias", **both)
    sink = {"_c": q, "_s": q, "_i": q, "_a": q, "h": _x(4)}
    yield fused(query, {**prompt, **sink}, outputs=3, name="sink", **both)
    for count, batch in ((1, 2), (3, 1)):
        step = {
            "q": _x(batch, count, 64),
            "k": _x(batch, count, 32),
            "v": _x(batch, count, 32),
            "pk": _x(batch, 2, 4, 16),
            "pv": _x(batch, 2, 4, 16),
            "n": _i32(*[count + 3] * batch),
            "t": np.array(count + 4, np.int32),
            **tables,
        }
        for window in (-1, 3):
            yield fused(
                query,
                step,
                outputs=3,
                constants=("c", "s"),
                do_rotary=1,
                local_window_size=window,
                name=f"past of 4, {count} new, window of {window}",
                **both,
            )
    decoder = "DecoderMaskedMultiHeadAttention"
    other = {"q": _x(2, 1, 8), "k": _x(2, 2, 3, 4), "v": _x(2, 2, 3, 4)}
    yield fused(decoder, other, num_heads=2)
    gate = {"q": _x(2, 3, 8), "qb": _x(8), "r": _x(1, 2, 3, 3), "w": _x(4, 6), "b": _x(6), "a": _x(1, 2, 1, 1)}
    yield fused("GatedRelativePositionBias", gate, num_heads=2, function=_gated_bias)


def _gated_bias(
    q: np.ndarray, qb: np.ndarray, r: np.ndarray, w: np.ndarray, b: np.ndarray, a: np.ndarray
) -> np.ndarray:
    heads = (q + qb).reshape(2, 3, 2, 4).transpose(0, 2, 1, 3)
    gates = _sigmoid((heads @ w + b).reshape(2, 2, 3, 2, 3).sum(-1))
    return (gates[..., :1] * (gates[..., 1:] * a - 1) + 2) * r


def _experts() -> Iterator[Fused]:
    """Three experts from six features to five and back."""
    layers = {"w1": _x(3, 5, 6), "b1": _x(3, 5), "w2": _x(3, 6, 5), "b2": _x(3, 6)}
    feeds = {"x": _x(4, 6), "r": _x(4, 3), **layers}
    for kind in ("relu", "gelu", "silu", "identity"):
        for best in (1, 2):
            yield fused("MoE", feeds, activation_type=kind, k=best)
    yield fused("MoE", {**feeds, "x": _x(2, 2, 6)}, k=2, normalize_routing_weights=1)
    wide = {**feeds, "w1": _x(3, 10, 6), "b1": _x(3, 10)}
    swiglu = {"k": 2, "activation_type": "swiglu", "activation_alpha": 1.7, "activation_beta": 1.0, "swiglu_limit": 2.0}
    yield fused("MoE", wide, swiglu_fusion=1, **swiglu)
    yield fused("MoE", wide, swiglu_fusion=2, function=_swiglu_experts, **swiglu)
    apart = {**feeds, "w3": _x(3, 5, 6), "b3": _x(3, 5)}
    yield fused("MoE", apart, function=_swiglu_experts, name="three layers", **swiglu)


def _swiglu_experts(
    x: np.ndarray,
    router: np.ndarray,
    w1: np.ndarray,
    b1: np.ndarray,
    w2: np.ndarray,
    b2: np.ndarray,
    *third: np.ndarray,
) -> np.ndarray:
    """The two best of three experts."""
    shares = _softmax(router)
    shares = np.where(shares > shares.min(1, keepdims=True), shares, 0)
    first = np.einsum("th,eih->eti", x, w1) + b1[:, None]
    second = np.einsum("th,eih->eti", x, third[0]) + third[1][:, None] if third else first[..., 5:]
    g, linear = np.minimum(first[..., :5], 2), np.clip(second, -2, 2)
    results = np.einsum("eti,ehi->eth", g * _sigmoid(1.7 * g) * (linear + 1), w2) + b2[:, None]
    return np.einsum("te,eth->th", shares, results)


def _layouts() -> Iterator[Fused]:
    image = _x(2, 7, 6, 4)
    yield fused("NhwcMaxPool", {"x": image}, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], function=_max_pool)
    kernel, bias = _x(5, 4, 3, 3, scale=0.3), _x(5)
    for operator, addend, activation in (("NhwcConv", False, ""), ("NhwcFusedConv", True, "Relu")):
        more = {"activation": activation} if activation else {}
        yield fused(
            operator,
            {"x": image, "w": kernel, "b": bias, **({"z": _x(2, 5, 4, 5)} if addend else {})},
            function=lambda x, w, b, z=0.0, rectify=bool(activation): (
                np.maximum(_conv(x, w) + b + z, 0) if rectify else _conv(x, w) + b
            ),
            **more,
        )


def _windows(x: np.ndarray, *sizes: int) -> np.ndarray:
    """(N, H', W', C, *sizes)"""
    return np.lib.stride_tricks.sliding_window_view(x, sizes, axis=(1, 2))


def _conv(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.einsum("nhwcij,ocij->nhwo", _windows(x, 3, 3), w)


def _max_pool(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)), constant_values=-np.inf)
    return _windows(padded, 3, 2)[:, ::2].max((4, 5))


def _older_forms() -> Iterator[Fused]:
    x = _x(2, 3, 4)
    yield fused("SampleOp", {"x": x})
    yield fused("Trilu", {"x": x, "k": np.array(1)}, constants="k", upper=0)
    yield fused("Trilu", {"x": x})
    yield fused("GatherND", {"x": x, "i": np.array([[0, 1], [1, 2]], np.int32)}, constants="i")
    yield fused("ExpandDims", {"x": x, "a": np.array(1, np.int32)}, constants="a")
    yield fused("ExpandDims", {"x": x, "a": np.array(-1, np.int32)}, constants="a")
    pads = np.array([0, 1, 2, 0, 1, 0])
    yield fused("Pad", {"x": x, "p": pads, "v": np.array([0.5], np.float32)}, constants=("p", "v"))
    yield fused("Pad", {"x": x, "p": pads}, constants="p", mode="reflect")
    yield fused("GridSample", {"x": _x(2, 3, 4, 5), "g": _x(2, 3, 2, 2, scale=0.4)}, padding_mode="border")
    yield fused("Range", {"a": np.array([0.2], np.float32), "b": np.array([3.1], np.float32)})
    yield fused(
        "TorchEmbedding", {"x": _x(5, 3), "i": np.array([[1, 4], [0, 1]])}, constants="i", function=lambda x, i: x[i]
    )
    transposed = {"x": _x(2, 4, 5, 6), "w": _x(4, 3, 3, 3)}
    crop = np.array([1, 0, 1, 1])
    yield fused(
        "ConvTransposeWithDynamicPads",
        {**transposed, "p": crop, "b": _x(3)},
        constants=("w", "p"),
        strides=[2, 2],
    )


def _sums() -> Iterator[Fused]:
    x, skip, bias = _x(2, 3, 4), _x(2, 3, 4), _x(4)
    yield fused("BiasAdd", {"x": x, "b": bias, "s": skip}, function=lambda x, b, s: x + b + s)
    for operator in ("BiasDropout", "BitmaskBiasDropout"):
        yield fused(operator, {"x": x, "b": bias, "s": skip}, function=lambda x, b, s: x + b + s)
        yield fused(operator, {"x": x, "b": bias}, name="no residual", function=lambda x, b: x + b)
    yield fused("BitmaskDropout", {"x": x}, function=lambda x: x)
    scores = _x(2, 3, 4, 5)
    for inner, shape in ((1, (2, 1, 1, 5)), (0, (3, 4, 5)), (1, (2, 1, 4, 5))):
        yield fused(
            "BiasSoftmax",
            {"x": scores, "b": _x(*shape)},
            axis=3,
            is_inner_broadcast=inner,
            name=f"{shape}",
            function=lambda x, b: _softmax(x + b),
        )
    yield fused("GatedAdd", {"x": x, "y": skip, "g": _x(2, 3, 1)})
    gate = {"a": x, "d": bias, "s": -np.abs(_x(4)), "b": skip}
    yield fused("LinearAttentionGate", gate, outputs=2)
    keys = {"k": _x(2, 3, 2, 4), "q": _x(2, 3, 2, 4), "v": _x(2, 3, 4), "ks": _x(2, 4), "qs": _x(2, 4)}
    yield fused("EngramGate", keys)
    yield fused("EngramGate", {**keys, "cs": _x(2, 4)}, outputs=2)
    for shape in ((3, 2), (3, 2, 1), (3, 2, 4)):
        yield fused("HyperConnectionPreMix", {"x": _x(3, 2, 4), "p": _x(*shape)}, name=f"{shape}", reduction_scale=0.5)
        yield fused("HyperConnectionPostMix", {"x": _x(3, 2, 4), "y": _x(3, 4), "p": _x(*shape)}, name=f"{shape}")
    yield fused("HyperConnectionPreMix", {"x": _x(3, 8), "p": _x(3, 2)}, num_branches=2)
    yield fused("HyperConnectionPreMix", {"x": _x(3, 8), "p": _x(3, 8)}, num_branches=2, name="flat gates")
    yield fused(
        "HyperConnectionPostMix", {"x": _x(3, 8), "y": _x(3, 4), "p": _x(3, 2), "m": _x(3, 2, 2)}, num_branches=2
    )
    for operator, sign in (("ComplexMul", 1), ("ComplexMulConj", -1)):

        def product(a: np.ndarray, b: np.ndarray, sign: int = sign) -> np.ndarray:
            y = (a[..., :1] + 1j * a[..., 1:]) * (b[..., :1] + 1j * sign * b[..., 1:])
            return np.concatenate([y.real, y.imag], -1)

        yield fused(operator, {"a": _x(3, 4, 2), "b": _x(3, 4, 2)}, function=product)


def _moves() -> Iterator[Fused]:
    yield fused("Inverse", {"x": _x(2, 3, 3) + 3 * np.eye(3, dtype=np.float32)})
    yield fused("CDist", {"a": _x(3, 4), "b": _x(5, 4)})
    yield fused("CDist", {"a": _x(3, 4), "b": _x(5, 4)}, metric="euclidean")
    yield fused("Rfft", {"x": _x(2, 3, 8)}, function=lambda x: _parts(np.fft.rfft(x)))
    yield fused(
        "Irfft", {"x": _x(2, 3, 5, 2)}, signal_ndim=1, function=lambda x: np.fft.irfft(x[..., 0] + 1j * x[..., 1])
    )
    for dynamic in (False, True):
        yield fused("UnfoldTensor", {"x": _x(2, 7, 3)}, dim=1, size=3, step=2, dynamic=dynamic)
    yield fused("UnfoldTensor", {"x": _x(2, 7)}, size=4)
    boxes = np.array([[0.13, 0.2, 0.8, 0.7], [-0.2, 0.3, 1.3, 0.9], [0.93, 0.6, 0.2, 0.1]], np.float32)
    rows = _i32(1, 0, 1)
    for size, mode in ((_i32(3, 4), "bilinear"), (_i32(1, 1), "bilinear"), (_i32(3, 2), "nearest")):
        yield fused(
            "CropAndResize",
            {"x": _x(2, 3, 6, 5), "b": boxes, "i": rows, "s": size},
            constants=("b", "i", "s"),
            mode=mode,
            extrapolation_value=0.7,
            name=f"{mode} of {size}",
        )
    yield fused("NGramRepeatBlock", {"i": np.array([[1, 2, 3, 1, 2], [0, 1, 0, 1, 0]]), "s": _x(2, 6)}, ngram_size=3)
    kernel = {"w": _x(3, 1, 4), "b": _x(3)}
    for activation in ("none", "silu"):
        yield fused("CausalConvWithState", {"x": _x(2, 3, 5), **kernel}, outputs=2, activation=activation)
    yield fused("CausalConvWithState", {"x": _x(2, 3, 5), **kernel, "p": _x(2, 3, 6)}, outputs=2, dilation=2)


def _parts(x: np.ndarray) -> np.ndarray:
    return np.stack([x.real, x.imag], -1)
