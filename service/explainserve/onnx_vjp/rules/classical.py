"""ai.onnx.ml: the preprocessing, linear models and kernel machines that converters of scikit-learn write.

Inputs may be of any numeric type and results are float32, so a gradient is cast back to its input's type.
"""

from __future__ import annotations

from itertools import combinations
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
    return (op.cast_like(op.Mul(g, _numbers(node, "scale")), node.inputs[0]),)


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


def _numbers(node: Node, name: str) -> np.ndarray:
    """An attribute that the operator does not work without."""
    return np.array(list(node.attribute(name)), np.float32)


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
    pairs = _pair_coefficients(node, sizes)
    if node.attribute("prob_a"):
        decisions = _calibrated(op, node, g, pairs)
    else:
        decisions = (_only_score if len(sizes) == 2 else _untransformed)(op, node, g, y)
    return (_through_kernel(op, node, op.MatMul(decisions, pairs)),)


def _calibrated(op: Emitter, node: Node, g: str, pairs: np.ndarray) -> str:
    """Through q = 1 / (1 + exp(a s + b)) of every decision s, and the probabilities that are coupled of them."""
    if node.attribute("post_transform", "NONE") != "NONE":
        raise Refusal("probabilities are transformed once more", "export the model without a post transform")
    slopes, shifts, rho = (_numbers(node, name) for name in ("prob_a", "prob_b", "rho"))
    decisions = op.Add(op.MatMul(_kernel(op, node, g), pairs.T), rho)
    q = op.Sigmoid(op.Neg(op.Add(op.Mul(decisions, slopes), shifts)))
    dq = _through_coupling(op, q, g, _class_count(node))
    return op.Neg(op.Mul(dq, op.Mul(op.Mul(q, op.Sub(1, q)), slopes)))


def _through_coupling(op: Emitter, q: str, g: str, classes: int) -> str:
    """From the cotangent of p to that of q, the probability of i in each pair i < j (Wu, Lin and Weng 2004, second
    approach): p minimizes the sum of ((1 - q) p_i - q p_j)^2, so it is w / sum(w) for M w = 1, where M_ii is 1 and
    (1 - q)^2 or q^2 of every pair of i, and M_ij is 1 - q (1 - q).

    Runtimes iterate until they are closer than 0.005 / classes; this is the gradient of what they tend to.
    """
    first, second = (np.eye(classes)[list(ends)] for ends in zip(*combinations(range(classes), 2), strict=True))
    rest = op.Sub(1, q)
    squares = op.Add(op.MatMul(op.Mul(rest, rest), first), op.MatMul(op.Mul(q, q), second))
    both = first[:, :, None] * second[:, None, :] + second[:, :, None] * first[:, None, :]
    products = op.Reshape(op.MatMul(op.Mul(q, rest), both.reshape(len(both), -1)), [-1, classes, classes])
    diagonal = op.Mul(op.Unsqueeze(squares, [2]), np.eye(classes))
    inverse = _inverse(op, op.Add(op.Sub(diagonal, products), 1.0), classes)
    w = op.ReduceSum(inverse, [2], keepdims=0)
    total = op.ReduceSum(w, [1], keepdims=1)
    dw = op.Div(op.Sub(g, op.Div(op.ReduceSum(op.Mul(g, w), [1], keepdims=1), total)), total)
    u = op.Squeeze(op.MatMul(inverse, op.Unsqueeze(dw, [2])), [2])
    (u_i, w_i), (u_j, w_j) = ([op.MatMul(value, ends.T) for value in (u, w)] for ends in (first, second))
    along = op.Sub(op.Mul(rest, op.Mul(u_i, w_i)), op.Mul(q, op.Mul(u_j, w_j)))
    across = op.Add(op.Mul(u_i, w_j), op.Mul(u_j, w_i))
    return op.Add(op.Mul(along, 2), op.Mul(op.Sub(rest, q), across))


def _inverse(op: Emitter, matrices: str, size: int) -> str:
    """The inverses of symmetric, positive definite matrices: Gauss and Jordan's elimination, as sweeps over the
    diagonal that each keep the symmetry and leave minus the inverse in the end.
    """
    for unit in np.eye(size)[:, :, None]:
        column = op.MatMul(matrices, unit)
        apart = op.Sub(column, unit)
        step = op.Div(op.MatMul(apart, op.transposed(apart)), op.MatMul(unit.T, column))
        matrices = op.Sub(op.Sub(matrices, step), 2 * unit @ unit.T)
    return op.Neg(matrices)


def _pair_coefficients(node: Node, sizes: list[int]) -> np.ndarray:
    """A row per pair i < j: row j - 1 of the coefficients for the vectors of class i, row i for those of class j."""
    table = np.array(node.attribute("coefficients"), np.float32).reshape(len(sizes) - 1, -1)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    pairs = combinations(range(len(sizes)), 2)
    return np.stack([np.where(owner == i, table[j - 1], np.where(owner == j, table[i], 0)) for i, j in pairs])


def _kernel(op: Emitter, node: Node, like: str) -> str:
    """K(x, v) per row and support vector, in the type of `like`."""
    kind, (gamma, offset, degree) = node.attribute("kernel_type", "LINEAR"), _parameters(node)
    products = _products(op, node, like)
    if kind == "RBF":
        return op.Exp(op.Mul(_distances(op, node, like), -gamma))
    if kind == "LINEAR":
        return products
    inner = op.Add(op.Mul(products, gamma), offset)
    return op.Pow(inner, degree) if kind == "POLY" else op.Tanh(inner)


def _through_kernel(op: Emitter, node: Node, g: str) -> str:
    """From the cotangents of K(x, v) per row and support vector to that of x."""
    x, kind, vectors = node.inputs[0], node.attribute("kernel_type", "LINEAR"), _vectors(node)
    gamma, offset, degree = _parameters(node)
    if kind == "RBF":
        weights = op.Mul(op.Mul(g, _kernel(op, node, g)), -2 * gamma)
        rows, vectors = _centered(op, node, g)
        dx = op.Sub(op.Mul(rows, op.ReduceSum(weights, [1])), op.MatMul(weights, vectors))
    else:
        slope = None if kind == "LINEAR" else _kernel_slope(op, kind, _products(op, node, g), gamma, offset, degree)
        dx = op.MatMul(op.Mul(g, slope) if slope else g, vectors)
    return op.cast_like(op.reshape_like(dx, x), x)


def _rows(op: Emitter, node: Node, like: str) -> str:
    return op.cast_like(op.Reshape(node.inputs[0], [-1, _vectors(node).shape[1]]), like)


def _products(op: Emitter, node: Node, like: str) -> str:
    return op.MatMul(_rows(op, node, like), _vectors(node).T)


def _distances(op: Emitter, node: Node, like: str) -> str:
    """|x - v|^2 = |x|^2 - 2 x v + |v|^2."""
    rows, vectors = _centered(op, node, like)
    squares = op.Add(op.ReduceSumSquare(rows, [1]), np.sum(vectors**2, axis=1))
    return op.Max(op.Sub(squares, op.Mul(op.MatMul(rows, vectors.T), 2)), 0)


def _centered(op: Emitter, node: Node, like: str) -> tuple[str, np.ndarray]:
    """Rows and support vectors less the mean vector: the squares of features far from zero would hide differences."""
    vectors = _vectors(node)
    middle = vectors.mean(axis=0)
    return op.Sub(_rows(op, node, like), middle), vectors - middle


def _vectors(node: Node) -> np.ndarray:
    return np.array(node.attribute("support_vectors"), np.float32).reshape(_vector_count(node), -1)


def _parameters(node: Node) -> tuple[float, float, float]:
    """gamma, offset and degree."""
    gamma, offset, degree = (float(value) for value in node.attribute("kernel_params") or (0, 0, 0))
    return gamma, offset, degree


def _vector_count(node: Node) -> int:
    return int(node.attribute("n_supports") or sum(node.attribute("vectors_per_class")))


def _kernel_slope(op: Emitter, kind: str, products: str, gamma: float, offset: float, degree: float) -> str:
    """dK / d(x v) of (gamma x v + offset)^degree or of tanh(gamma x v + offset)."""
    inner = op.Add(op.Mul(products, gamma), offset)
    if kind == "POLY":
        return op.Mul(op.Pow(inner, degree - 1), degree * gamma)
    k = op.Tanh(inner)
    return op.Mul(op.Sub(1, op.Mul(k, k)), gamma)
