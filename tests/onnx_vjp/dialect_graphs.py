"""Small networks as converters from TensorFlow and PaddlePaddle write them, in ONNX's own notation.

tf2onnx keeps images channels-last at both ends and moves them by Transpose; it leaves padding to auto_pad, writes
depthwise kernels as Reshape of TensorFlow's and normalization in pieces. paddle2onnx writes heads by Slice, Squeeze and
Reshape with a copied batch, and hard swish as the arithmetic behind it.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

Weights = dict[str, tuple[int, ...]]
Integers = dict[str, list[int]]

TENSORFLOW = """
tensorflow (float[rows, height, width, 3] image) => (float[rows, 5] scores) {
  nchw = Transpose <perm = [0, 3, 1, 2]> (image)
  margin = Pad <mode = "constant"> (nchw, stem_pads)
  stem = Conv <strides = [2, 2], kernel_shape = [3, 3], auto_pad = "VALID"> (margin, stem_kernel)
  nhwc = Transpose <perm = [0, 2, 3, 1]> (stem)
  variance_e = Add (variance, epsilon)
  deviation = Sqrt (variance_e)
  slope = Div (gamma, deviation)
  scaled = Mul (nhwc, slope)
  shift = Mul (mean, slope)
  offset = Sub (beta, shift)
  normal = Add (scaled, offset)
  bounded = Clip (normal, zero, largest)
  back = Transpose <perm = [0, 3, 1, 2]> (bounded)
  depth_kernel = Reshape (tf_kernel, depth_shape)
  depth = Conv <group = 4, strides = [2, 2], kernel_shape = [4, 4], auto_pad = "SAME_UPPER"> (back, depth_kernel)
  lower = Conv <strides = [2, 2], kernel_shape = [3, 3], auto_pad = "SAME_LOWER"> (depth, lower_kernel, lower_bias)
  wide = Conv <dilations = [2, 2], kernel_shape = [3, 3], pads = [2, 2, 2, 2]> (lower, wide_kernel)
  active = LeakyRelu <alpha = 0.25> (wide)
  pooled = MaxPool <strides = [2, 2], kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (active)
  averaged = AveragePool <strides = [1, 1], kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (pooled)
  last = Transpose <perm = [0, 2, 3, 1]> (averaged)
  means = ReduceMean <axes = [1, 2], keepdims = 1> (last)
  flat = Squeeze (means, places)
  product = MatMul (flat, dense)
  scores = Add (product, bias)
}
"""

TENSORFLOW_WEIGHTS: Weights = {
    "stem_kernel": (4, 3, 3, 3),
    "gamma": (4,),
    "beta": (4,),
    "mean": (4,),
    "variance": (4,),
    "tf_kernel": (4, 4, 4, 1),
    "lower_kernel": (6, 4, 3, 3),
    "lower_bias": (6,),
    "wide_kernel": (6, 6, 3, 3),
    "dense": (6, 5),
    "bias": (5,),
}
TENSORFLOW_INTEGERS: Integers = {"stem_pads": [0, 0, 0, 0, 0, 0, 1, 1], "depth_shape": [4, 1, 4, 4], "places": [1, 2]}

PADDLE = """
paddle (float[rows, 3, height, width] image) => (float[rows, 5] scores) {
  stem = Conv <strides = [2, 2], kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 1> (image, stem_kernel)
  normal = BatchNormalization <epsilon = 0.00001, momentum = 0.9> (stem, gamma, beta, mean, variance)
  raised = Add (normal, three)
  gate = Clip (raised, zero, largest)
  product = Mul (normal, gate)
  swish = Div (product, six)
  depth = Conv <group = 4, strides = [1, 2], kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (swish, depth_kernel)
  means = GlobalAveragePool (depth)
  squeezed = Conv <kernel_shape = [1, 1]> (means, squeeze_kernel, squeeze_bias)
  active = Relu (squeezed)
  excited = Conv <kernel_shape = [1, 1]> (active, excite_kernel)
  weight = HardSigmoid <alpha = 0.25, beta = 0.5> (excited)
  gated = Mul (depth, weight)
  all = Shape (swish)
  place = Slice (all, two, four, first)
  stride = Slice (all, none, two, first)
  size = Concat <axis = 0> (stride, place)
  up = Resize <mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"> (gated, , , size)
  joined = Concat <axis = 1> (up, swish)
  left = Slice (joined, one, eight, second)
  columns = Reshape (left, columns_shape)
  rows_first = Transpose <perm = [0, 2, 1]> (columns)
  hidden = MatMul (rows_first, dense)
  hidden_b = Add (hidden, dense_bias)
  soft = HardSwish (hidden_b)
  head = ReduceMean <axes = [1], keepdims = 1> (soft)
  flat = Squeeze (head, second)
  logits = MatMul (flat, classes)
  scores = Softmax <axis = -1> (logits)
}
"""
PADDLE_WEIGHTS: Weights = {
    "stem_kernel": (4, 3, 3, 3),
    "gamma": (4,),
    "beta": (4,),
    "mean": (4,),
    "variance": (4,),
    "depth_kernel": (4, 1, 3, 3),
    "squeeze_kernel": (2, 4, 1, 1),
    "squeeze_bias": (2,),
    "excite_kernel": (4, 2, 1, 1),
    "dense": (7, 6),
    "dense_bias": (6,),
    "classes": (6, 5),
}
PADDLE_INTEGERS: Integers = {
    "none": [0],
    "first": [0],
    "one": [1],
    "second": [1],
    "two": [2],
    "four": [4],
    "eight": [9223372036854775807],
    "columns_shape": [0, 7, -1],
}

SCIKIT_LEARN = """
perceptron (float[rows, 6] image) => (float[rows, 5] scores) {
  centred = Sub (image, mean)
  scaled = Div (centred, variance)
  first = MatMul (scaled, coefficients)
  shifted = Add (first, intercepts)
  hidden = Relu (shifted)
  second = MatMul (hidden, last)
  logits = Add (second, bias)
  scores = Softmax <axis = 1> (logits)
}
"""
SCIKIT_LEARN_WEIGHTS: Weights = {
    "mean": (6,),
    "variance": (6,),
    "coefficients": (6, 8),
    "intercepts": (8,),
    "last": (8, 5),
    "bias": (5,),
}

SCALARS = {"epsilon": 1e-3, "zero": 0.0, "three": 3.0, "six": 6.0, "largest": 6.0}


def graph(text: str, weights: Weights, integers: Integers, version: int) -> onnx.ModelProto:
    """The graph with seeded random weights, scales and variances near 1."""
    generator = np.random.default_rng(4)
    parsed = parser.parse_graph(text)
    for name, shape in weights.items():
        spread = np.sqrt(2 / np.prod(shape[1:] if len(shape) == 4 else shape[:1]))
        value = generator.standard_normal(shape) * spread if len(shape) > 1 else 0.2 * generator.standard_normal(shape)
        value = generator.uniform(0.5, 1.5, shape) if name in ("gamma", "variance") else value
        parsed.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    for name, values in integers.items():
        parsed.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    used = {name for node in parsed.node for name in node.input}
    for name, value in SCALARS.items():
        if name in used:
            parsed.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    return helper.make_model(parsed, opset_imports=[helper.make_opsetid("", version)], ir_version=8)
