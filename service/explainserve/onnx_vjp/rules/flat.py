"""Operators that carry no gradient on purpose, and those that are refused for a lasting reason."""

from explainserve.onnx_vjp.registry import refused, zero_gradient

zero_gradient("Ceil", "Floor", "Round", "Sign", reason="piecewise constant")
zero_gradient(
    "And",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "IsInf",
    "IsNaN",
    "Less",
    "LessOrEqual",
    "Not",
    "Or",
    "Xor",
    reason="the output is boolean",
)
zero_gradient(
    "ArgMax",
    "ArgMin",
    "BitShift",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "NonMaxSuppression",
    "NonZero",
    "Shape",
    "Size",
    reason="the output is integer",
)
zero_gradient("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", reason="the input is text")
zero_gradient("TfIdfVectorizer", reason="the input is integer or text")
zero_gradient("ImageDecoder", reason="the input is an encoded picture")
zero_gradient("Hardmax", reason="the position of the one is piecewise constant")
zero_gradient(
    "BlackmanWindow",
    "Constant",
    "ConstantOfShape",
    "EyeLike",
    "HammingWindow",
    "HannWindow",
    reason="the output depends on sizes only",
)
zero_gradient("MelWeightMatrix", reason="the edges of its bands are rounded to whole bins")
zero_gradient(
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    reason="random, whatever the input is",
)
zero_gradient("Bernoulli", "Multinomial", reason="drawn by the probabilities of the input: piecewise constant")

refused(
    "BitCast",
    reason="the bits of a number are read as another type",
    remedy="use Cast, or a method that needs no gradient",
)
refused(
    "ConvInteger",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "QuantizeLinear",
    reason="quantization is a staircase whose true gradient is zero",
    remedy="explain the float model that this one was quantized from",
)
refused(
    "TreeEnsemble",
    "TreeEnsembleClassifier",
    "TreeEnsembleRegressor",
    domain="ai.onnx.ml",
    reason="a sum of trees is a staircase whose true gradient is zero",
    remedy="use a method that needs no gradient",
)
refused(
    "Adagrad",
    "Adam",
    "Gradient",
    "Momentum",
    domain="ai.onnx.preview.training",
    reason="a training step is no prediction",
    remedy="export the model for inference",
)
