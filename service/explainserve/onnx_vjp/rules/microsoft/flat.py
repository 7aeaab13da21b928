"""Operators of onnxruntime that carry no gradient on purpose, and those that are refused for a lasting reason."""

from explainserve.onnx_vjp.registry import refused, zero_gradient
from explainserve.onnx_vjp.rules.microsoft.activations import DOMAIN

zero_gradient(
    "BifurcationDetector",
    "DynamicTimeWarping",
    "IsAllFinite",
    "MurmurHash3",
    "NGramHashMapping",
    "Tokenizer",
    "VarlenNGramHashMapping",
    reason="the output is integer, boolean or text",
    domain=DOMAIN,
)

refused(
    "DequantizeBFP",
    "DequantizeLinear",
    "DequantizeWithOrder",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "GatherBlockQuantized",
    "GemmFloat8",
    "MatMulInteger16",
    "MatMulIntegerToFloat",
    "MulInteger",
    "QAttention",
    "QEmbedLayerNormalization",
    "QGemm",
    "QLinearAdd",
    "QLinearAveragePool",
    "QLinearConcat",
    "QLinearConv",
    "QLinearGlobalAveragePool",
    "QLinearLeakyRelu",
    "QLinearMul",
    "QLinearReduceMean",
    "QLinearSigmoid",
    "QLinearSoftmax",
    "QLinearWhere",
    "QMoE",
    "QOrderedAttention",
    "QOrderedGelu",
    "QOrderedLayerNormalization",
    "QOrderedLongformerAttention",
    "QOrderedMatMul",
    "QuantizeBFP",
    "QuantizeLinear",
    "QuantizeWithOrder",
    "ReduceSumInteger",
    reason="quantization is a staircase whose true gradient is zero",
    remedy="explain the float model that this one was quantized from",
    domain=DOMAIN,
)

refused(
    "MatMulBlockQuantizedFp4Weight",
    "MatMulBlockQuantizedFp8Weight",
    "MatMulFpQ4",
    reason="its weights are packed for one processor's kernel",
    remedy="quantize the weights as MatMulNBits, or explain the float model",
    domain=DOMAIN,
)

refused(
    "BeamSearch",
    "GreedySearch",
    "Sampling",
    "WhisperBeamSearch",
    reason="a search over tokens is no differentiable function",
    remedy="explain the decoder itself, on the tokens that were found",
    domain=DOMAIN,
)

refused(
    "EPContext",
    "Snpe",
    reason="it holds a graph that was compiled for one device",
    remedy="explain the model that it was compiled from",
    domain=DOMAIN,
)

refused(
    "DecoderMaskedSelfAttention",
    "DynamicSparseAttention",
    "PackedSparseAttentionIndexer",
    "PagedAttention",
    "SparseAttentionIndexer",
    "SparsePagedAttention",
    reason="it serves one step of a generation from stored keys and values",
    remedy="export the model for whole sequences, without a cache",
    domain=DOMAIN,
)

refused(
    "AttnLSTM",
    "DecoderAttention",
    "MaxpoolWithMask",
    "SparseToDenseMatMul",
    "Unique",
    "WordConvEmbedding",
    "GatedDeltaNet",
    "LinearAttention",
    "LongformerAttention",
    "SparseAttention",
    "VarlenCausalConvWithState",
    reason="it has no gradient rule yet",
    remedy="export the model with standard operators",
    domain=DOMAIN,
)

refused(
    "PackedAttention",
    "PackedMultiHeadAttention",
    "RelativePositionBias",
    "RemovePadding",
    "RestorePadding",
    reason="it has a kernel for graphics processors only, against which no gradient was verified",
    remedy="export the model without packing, or optimize it for the processor",
    domain=DOMAIN,
)
