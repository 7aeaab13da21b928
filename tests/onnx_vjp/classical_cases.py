"""Cases of ai.onnx.ml, with onnxruntime's reading of the operators written out: the reference evaluator differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np

from onnx_vjp.vjp_oracle import Case, Function, single

_rng = np.random.default_rng(5)
X = _rng.standard_normal((4, 3)).astype(np.float32)
VECTORS = _rng.standard_normal((6, 3))
COEFFICIENTS = np.array([[0.1, 0.2, 0.3], [0.3, -0.2, 0.1]])


def _ml(operator: str, function: Function, outputs: int = 1, x: np.ndarray = X, **attributes: Any) -> Case:
    case = single(operator, {"x": x}, outputs=outputs, domain="ai.onnx.ml", version=3, function=function, **attributes)
    if outputs == 2:
        case.model.graph.output[0].name = "y1"  # The first output is the label.
    return case


def _softmax(s: np.ndarray) -> np.ndarray:
    return np.exp(s) / np.exp(s).sum(axis=1, keepdims=True)


def _logistic(s: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-s))


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "NONE": lambda s: s,
    "LOGISTIC": _logistic,
    "SOFTMAX": _softmax,
    "SOFTMAX_ZERO": _softmax,
    "PROBIT": np.vectorize(NormalDist().inv_cdf),
}

NORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "MAX": lambda x: x.max(axis=1, keepdims=True),
    "L1": lambda x: np.abs(x).sum(axis=1, keepdims=True),
    "L2": lambda x: np.sqrt((x**2).sum(axis=1, keepdims=True)),
}

KERNELS: dict[str, tuple[list[float], Callable[[np.ndarray], np.ndarray]]] = {
    "LINEAR": ([0.0, 0.0, 0.0], lambda x: x @ VECTORS.T),
    "POLY": ([0.5, 1.0, 3.0], lambda x: (0.5 * x @ VECTORS.T + 1) ** 3),
    "RBF": ([0.5, 0.0, 0.0], lambda x: np.exp(-0.5 * ((x[:, None] - VECTORS) ** 2).sum(axis=2))),
    "SIGMOID": ([0.5, 0.2, 0.0], lambda x: np.tanh(0.5 * x @ VECTORS.T + 0.2)),
}


def classical_cases() -> Iterator[Case]:
    """Every operator, post transform, norm and kernel."""
    yield from _preprocessing()
    for transform in TRANSFORMS:
        yield from _linear(transform)
    for kernel in KERNELS:
        yield from _kernel_machines(kernel)


def _preprocessing() -> Iterator[Case]:
    scale, offset = np.array([2.0, 0.5, -1.0]), np.array([1.0, 2.0, 3.0])
    yield _ml("Scaler", lambda x: (x - offset) * scale, offset=list(offset), scale=list(scale))
    yield _ml("Scaler", lambda x: (x - 1) * 2, offset=[1.0], scale=[2.0])
    for name, norm in NORMS.items():
        yield _ml("Normalizer", lambda x, norm=norm: x / norm(x), norm=name)
    yield _ml("Imputer", lambda x: x, imputed_value_floats=[1.0, 2.0, 3.0], replaced_value_float=float("nan"))
    ml: dict[str, Any] = {"domain": "ai.onnx.ml", "version": 1}
    columns = np.array([2, 0, 2])
    for x in (X, X[0]):
        yield single(
            "ArrayFeatureExtractor", {"x": x, "i": columns}, function=lambda x: x.reshape(-1, 3)[:, columns], **ml
        )
    wide = {"x": X, "z": X[:, :2] * 2}
    yield single("FeatureVectorizer", wide, function=lambda x, z: np.hstack([x, z]), inputdimensions=[3, 2], **ml)


def _linear(transform: str) -> Iterator[Case]:
    apply, labels = TRANSFORMS[transform], {"classlabels_ints": [3, 5], "post_transform": transform}
    x = X / 10 if transform == "PROBIT" else X  # whose scores are probabilities
    scores = lambda x: apply(x @ COEFFICIENTS.T + [0.5, 0.4])
    attributes: dict[str, Any] = {"coefficients": list(COEFFICIENTS.ravel()), "intercepts": [0.5, 0.4]}
    yield _ml("LinearRegressor", scores, x=x, targets=2, post_transform=transform, **attributes)
    yield _ml("LinearClassifier", scores, 2, x, **attributes, **labels)
    if transform != "PROBIT":
        alone = lambda x: _both(x @ COEFFICIENTS[0] + 0.5, transform)
        yield _ml("LinearClassifier", alone, 2, coefficients=list(COEFFICIENTS[0]), intercepts=[0.5], **labels)


def _both(s: np.ndarray, transform: str) -> np.ndarray:
    """Two scores of one, as a linear classifier makes them."""
    second = _logistic(s) if transform == "LOGISTIC" else s
    return np.stack([1 - second, second], axis=1)


def _kernel_machines(kernel: str) -> Iterator[Case]:
    parameters, k = KERNELS[kernel]
    table = np.random.default_rng(0).standard_normal((2, 6))
    shared: dict[str, Any] = {
        "kernel_type": kernel,
        "kernel_params": parameters,
        "support_vectors": list(VECTORS.ravel()),
    }
    one = {"coefficients": list(table[0]), "rho": [0.25], **shared}
    decide = lambda x: k(x) @ table[0] + 0.25
    yield _ml("SVMRegressor", lambda x: decide(x)[:, None], n_supports=6, **one)
    two: dict[str, Any] = {"classlabels_ints": [0, 1], "vectors_per_class": [2, 4], **one}
    yield _ml("SVMClassifier", lambda x: np.stack([-decide(x), decide(x)], axis=1), 2, **two)
    yield _ml("SVMClassifier", lambda x: _both(decide(x), "LOGISTIC"), 2, post_transform="LOGISTIC", **two)
    three = {"classlabels_ints": [0, 1, 2], "vectors_per_class": [2, 1, 3], "rho": [0.25, 0.1, -0.3], **shared}
    pairs = lambda x: np.stack([_pair(k(x), table, i, j) for i, j in combinations(range(3), 2)], axis=1) + three["rho"]
    yield _ml("SVMClassifier", pairs, 2, coefficients=list(table.ravel()), **three)
    if kernel == "LINEAR":
        flat = {"coefficients": list(COEFFICIENTS[0]), "rho": [0.25], "kernel_params": parameters}
        yield _ml("SVMRegressor", lambda x: x @ COEFFICIENTS[:1].T + 0.25, n_supports=0, **flat)
        flat |= {"coefficients": list(COEFFICIENTS.ravel())}
        yield _ml("SVMClassifier", lambda x: x @ COEFFICIENTS.T + 0.25, 2, classlabels_ints=[0, 1], **flat)


def _pair(k: np.ndarray, table: np.ndarray, i: int, j: int) -> np.ndarray:
    """The decision between two of three classes that have 2, 1 and 3 support vectors."""
    own = [slice(0, 2), slice(2, 3), slice(3, 6)]
    return k[:, own[i]] @ table[j - 1, own[i]] + k[:, own[j]] @ table[i, own[j]]
