"""ai.onnx.ml: the preprocessing, linear models and kernel machines that converters of scikit-learn write.

Inputs may be of any numeric type and results are float32, so a gradient is cast back to its input's type.
"""

from __future__ import annotations

from math import pi, sqrt

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, refused, rule, zero_gradient
from explainserve.onnx_vjp.rules.indexing import place, positive

_DOMAIN = "ai.onnx.ml"

zero_gradient("Binarizer", reason="piecewise constant", domain=_DOMAIN)
zero_gradient(
    "CategoryMapper", "LabelEncoder", "OneHotEncoder", reason="a table is looked up by exact values", domain=_DOMAIN
)
refused(
    "CastMap",
    "DictVectorizer",
    reason="the input is a map",
    remedy="export the model with tensors as inputs",
    domain=_DOMAIN,
)
refused(
    "ZipMap",
    reason="the output is a sequence of maps",
    remedy="take the gradient of its input, the tensor of probabilities",
    domain=_DOMAIN,
)


# -- preprocessing
# -----------------------------------------------------------------------------------------------------------------


@rule("Scaler", domain=_DOMAIN)
def scaler(op: Emitter, node: Node, g: str) -> Gradients:
    """y = (x - offset) scale, along the last axis."""
    return (op.cast_like(op.Mul(g, np.array(node.attribute("scale"))), node.inputs[0]),)


@rule("Normalizer", domain=_DOMAIN)
def normalizer(op: Emitter, node: Node, g: str) -> Gradients:
    """y = x / |x| along the last axis, so dx = (g - u sum(g y)) / |x| with u the gradient of the norm; a row of zeros
    is left as it is. MAX divides by the largest element, sign and all.
    """
    kind, y = node.attribute("norm", "MAX"), node.outputs[0]
    x = op.cast_like(node.inputs[0], g)
    if kind == "MAX":
        norm = op.ReduceMax(x, [-1], keepdims=1)
        hits = op.mask(op.Equal(x, norm), g)
        slope = op.Div(hits, op.ReduceSum(hits, [-1], keepdims=1))
    else:
        norm = (op.ReduceL1 if kind == "L1" else op.ReduceL2)(x, [-1], keepdims=1)
        slope = op.Sign(x) if kind == "L1" else y
    along = op.ReduceSum(op.Mul(g, y), [-1], keepdims=1)
    dx = op.Div(op.Sub(g, op.Mul(slope, along)), op.Where(op.Equal(norm, 0), 1, norm))
    return (op.cast_like(dx, node.inputs[0]),)


@rule("Imputer", domain=_DOMAIN)
def imputer(op: Emitter, node: Node, g: str) -> Gradients:
    """What is replaced has no gradient."""
    x, replaced = node.inputs[0], node.attribute("replaced_value_float", 0.0)
    missing = op.IsNaN(x) if np.isnan(replaced) else op.Equal(x, replaced)
    return (op.Where(missing, 0, g),)


@rule("ArrayFeatureExtractor", domain=_DOMAIN)
def array_feature_extractor(op: Emitter, node: Node, g: str) -> Gradients:
    """Columns of the last axis; a vector is read as a row."""
    x, indices = node.inputs
    rank = op.rank(x)
    columns = op.Reshape(g, [-1]) if rank == 1 else g
    return place(op, columns, x, rank - 1, positive(op, op.Reshape(indices, [-1]), op.dim(x, rank - 1))), None


@rule("FeatureVectorizer", domain=_DOMAIN)
def feature_vectorizer(op: Emitter, node: Node, g: str) -> Gradients:
    """Rows of several tensors side by side."""
    widths = node.attribute("inputdimensions")
    parts = op.emit("Split", g, widths, outputs=len(widths), axis=-1)
    pairs = zip(parts, node.inputs, strict=True)
    return [op.cast_like(op.reshape_like(part, name), name) for part, name in pairs]


# -- linear models
# -----------------------------------------------------------------------------------------------------------------


def _untransformed(op: Emitter, node: Node, g: str, y: str) -> str:
    """Back through the post transform, by its result. SOFTMAX_ZERO leaves scores of zero out, where y is zero."""
    kind = node.attribute("post_transform", "NONE")
    if kind == "NONE":
        return g
    if kind == "LOGISTIC":
        return op.Mul(g, op.Mul(y, op.Sub(1, y)))
    if kind == "PROBIT":
        return op.Mul(g, op.Mul(op.Exp(op.Mul(op.Mul(y, y), 0.5)), sqrt(2 * pi)))
    return op.Mul(y, op.Sub(g, op.ReduceSum(op.Mul(g, y), [-1], keepdims=1)))


def _only_score(op: Emitter, node: Node, g: str, y: str) -> str:
    """The cotangent of the one score from which both classes' are made: (1 - s, s) or (-s, s)."""
    kind = node.attribute("post_transform", "NONE")
    if kind == "PROBIT":
        raise Refusal(f"{node.proto.op_type} makes two probits of one score", "export the model with scores")
    first, second = (op.Slice(g, [column], [column + 1], [-1]) for column in (0, 1))
    difference = op.Sub(second, first)
    if kind != "LOGISTIC":
        return difference
    p = op.Slice(y, [1], [2], [-1])
    return op.Mul(difference, op.Mul(p, op.Sub(1, p)))


def _through_coefficients(op: Emitter, node: Node, g: str, rows: int) -> str:
    """Scores are x times the transposed coefficients."""
    x = node.inputs[0]
    coefficients = np.array(node.attribute("coefficients"), np.float32).reshape(rows, -1)
    return op.cast_like(op.reshape_like(op.MatMul(g, coefficients), x), x)


@rule("LinearRegressor", domain=_DOMAIN)
def linear_regressor(op: Emitter, node: Node, g: str) -> Gradients:
    scores = _untransformed(op, node, g, node.outputs[0])
    return (_through_coefficients(op, node, scores, node.attribute("targets", 1)),)


@rule("LinearClassifier", domain=_DOMAIN, every_output=True)
def linear_classifier(op: Emitter, node: Node, cotangents: list[str]) -> Gradients:
    classes = _class_count(node)
    rows = len(node.attribute("intercepts") or []) or classes
    transform = _only_score if (rows, classes) == (1, 2) else _untransformed
    return (_through_coefficients(op, node, transform(op, node, cotangents[1], node.outputs[1]), rows),)


def _class_count(node: Node) -> int:
    return len(node.attribute("classlabels_ints") or node.attribute("classlabels_strings") or [])


# -- kernel machines
# -----------------------------------------------------------------------------------------------------------------


@rule("SVMRegressor", domain=_DOMAIN)
def svm_regressor(op: Emitter, node: Node, g: str) -> Gradients:
    """y = sum_i c_i K(x, v_i) + rho over the support vectors v."""
    if node.attribute("one_class", 0):
        raise Refusal("a one-class SVM returns a sign, whose gradient is zero", "use a method that needs no gradient")
    if node.attribute("post_transform", "NONE") != "NONE":
        raise Refusal("runtimes disagree about post transforms of SVMRegressor", "export the model with scores")
    count = node.attribute("n_supports", 0)
    if not count:
        return (_through_coefficients(op, node, g, 1),)
    coefficients = np.array(node.attribute("coefficients"), np.float32).reshape(1, count)
    return (_through_kernel(op, node, op.MatMul(g, coefficients)),)


@rule("SVMClassifier", domain=_DOMAIN, every_output=True)
def svm_classifier(op: Emitter, node: Node, cotangents: list[str]) -> Gradients:
    """One decision per pair of classes, each like a regressor over the support vectors of the two."""
    g, y = cotangents[1], node.outputs[1]
    sizes = node.attribute("vectors_per_class")
    if not sizes:
        return (_through_coefficients(op, node, _untransformed(op, node, g, y), _class_count(node)),)
    if node.attribute("prob_a"):
        decisions = _calibrated(op, node, g, y)
    else:
        decisions = (_only_score if len(sizes) == 2 else _untransformed)(op, node, g, y)
    return (_through_kernel(op, node, op.MatMul(decisions, _pair_coefficients(node, sizes))),)


def _calibrated(op: Emitter, node: Node, g: str, y: str) -> str:
    """Two probabilities p = 1 / (1 + exp(a s + b)) and 1 - p."""
    slopes = node.attribute("prob_a")
    if len(slopes) > 1 or node.attribute("post_transform", "NONE") != "NONE":
        raise Refusal(
            "probabilities of an SVM with more than two classes are found by iteration",
            "export the model with decision values",
        )
    first, second = (op.Slice(g, [column], [column + 1], [-1]) for column in (0, 1))
    p = op.Slice(y, [0], [1], [-1])
    return op.Mul(op.Mul(op.Sub(second, first), op.Mul(p, op.Sub(1, p))), float(slopes[0]))


def _pair_coefficients(node: Node, sizes: list[int]) -> np.ndarray:
    """A row per pair i < j: row j - 1 of the coefficients for the vectors of class i, row i for those of class j."""
    table = np.array(node.attribute("coefficients"), np.float32).reshape(len(sizes) - 1, -1)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    pairs = [(i, j) for i in range(len(sizes)) for j in range(i + 1, len(sizes))]
    return np.stack([np.where(owner == i, table[j - 1], np.where(owner == j, table[i], 0)) for i, j in pairs])


def _through_kernel(op: Emitter, node: Node, g: str) -> str:
    """From the cotangents of K(x, v) per row and support vector to that of x."""
    x, kind = node.inputs[0], node.attribute("kernel_type", "LINEAR")
    vectors = np.array(node.attribute("support_vectors"), np.float32)
    gamma, offset, degree = (float(value) for value in node.attribute("kernel_params") or (0, 0, 0))
    vectors = vectors.reshape(_vector_count(node), -1)
    rows = op.cast_like(op.Reshape(x, [-1, vectors.shape[1]]), g)
    products = op.MatMul(rows, vectors.T)
    if kind == "RBF":
        squares = op.Add(op.ReduceSumSquare(rows, [1]), np.sum(vectors**2, axis=1))
        distances = op.Max(op.Sub(squares, op.Mul(products, 2)), 0)
        weights = op.Mul(op.Mul(g, op.Exp(op.Mul(distances, -gamma))), -2 * gamma)
        dx = op.Sub(op.Mul(rows, op.ReduceSum(weights, [1])), op.MatMul(weights, vectors))
    else:
        weights = op.Mul(g, _kernel_slope(op, kind, products, gamma, offset, degree)) if kind != "LINEAR" else g
        dx = op.MatMul(weights, vectors)
    return op.cast_like(op.reshape_like(dx, x), x)


def _vector_count(node: Node) -> int:
    return int(node.attribute("n_supports") or sum(node.attribute("vectors_per_class")))


def _kernel_slope(op: Emitter, kind: str, products: str, gamma: float, offset: float, degree: float) -> str:
    """dK / d(x v) of (gamma x v + offset)^degree or of tanh(gamma x v + offset)."""
    inner = op.Add(op.Mul(products, gamma), offset)
    if kind == "POLY":
        return op.Mul(op.Pow(inner, degree - 1), degree * gamma)
    k = op.Tanh(inner)
    return op.Mul(op.Sub(1, op.Mul(k, k)), gamma)
