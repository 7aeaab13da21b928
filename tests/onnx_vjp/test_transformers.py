"""Networks of the transformers library, reduced, against autograd: images, text by its embeddings, sound.

The embeddings of text are an input or, where the model reads token numbers, a tensor inside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from explainserve.onnx_vjp import input_gradient
from onnx_vjp.vjp_oracle import run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import Tensor, nn  # noqa: E402  (they need torch)

from onnx_vjp.exports import Axes, Inputs, autograd, distance, exported, in_float64  # noqa: E402

pytestmark = pytest.mark.torch

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STAGES = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "strides": [4, 2], "mlp_ratios": [2, 2]}
BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


class Scores(nn.Module):
    """One tensor of a model's answer as a function of one of its inputs, and of a mask where it takes one."""

    def __init__(self, model: nn.Module, source: str, answer: str) -> None:
        super().__init__()
        self.model, self.source, self.answer = model, source, answer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        masks = {} if mask is None else {"attention_mask": mask}
        result: Tensor = getattr(self.model(**{self.source: x}, **masks), self.answer)
        return result


@dataclass(frozen=True)
class Kind:
    """A configuration, the class it belongs to, what is asked of it, and its inputs at two sizes."""

    configuration: str
    model: str
    options: dict[str, object]
    inputs: Callable[[tuple[int, ...]], Inputs]
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    dynamic: Axes
    source: str = "pixel_values"
    answer: str = "logits"


def image(size: tuple[int, ...]) -> Inputs:
    return {"x": torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(sum(size)))}


def signal(size: tuple[int, ...]) -> Inputs:
    return {"x": torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))}


def embeddings(size: tuple[int, ...]) -> Inputs:
    mask = torch.ones(size, dtype=torch.int64)
    mask[0, -2:] = 0
    return {"x": torch.randn(*size, 16, generator=torch.Generator().manual_seed(sum(size))), "mask": mask}


def fixed(configuration: str, model: str, answer: str = "logits", **options: object) -> Kind:
    """A network over images of one size."""
    options = {"image_size": 32, **options}
    return Kind(configuration, model, options, image, ((2, 32, 32), (3, 32, 32)), {"x": {0: "rows"}}, answer=answer)


def free(configuration: str, model: str, **options: object) -> Kind:
    """A network over images of any size."""
    dynamic = {"x": {0: "rows", 2: "height", 3: "width"}}
    return Kind(configuration, model, options, image, ((2, 32, 32), (3, 64, 48)), dynamic)


def text(configuration: str, model: str, answer: str = "logits", **options: object) -> Kind:
    """A network over sequences of any length."""
    dynamic = {name: {0: "rows", 1: "length"} for name in ("x", "mask")}
    sizes = ((2, 10), (3, 14))
    options = {"vocab_size": 50, **options}
    return Kind(configuration, model, options, embeddings, sizes, dynamic, "inputs_embeds", answer)


KINDS = {
    "vit": fixed("ViTConfig", "ViTForImageClassification", **SMALL, patch_size=8),
    "deit": fixed("DeiTConfig", "DeiTForImageClassification", **SMALL, patch_size=8),
    "beit": fixed("BeitConfig", "BeitForImageClassification", **SMALL, patch_size=8, use_relative_position_bias=True),
    "swin": fixed(
        "SwinConfig",
        "SwinForImageClassification",
        patch_size=2,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
    "clip_vision": fixed("CLIPVisionConfig", "CLIPVisionModel", "pooler_output", **SMALL, patch_size=8),
    "siglip": fixed("SiglipVisionConfig", "SiglipVisionModel", "pooler_output", **SMALL, patch_size=8),
    "convnextv2": free(
        "ConvNextV2Config", "ConvNextV2ForImageClassification", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2
    ),
    "resnet": free("ResNetConfig", "ResNetForImageClassification", **BACKBONE),
    "segformer": free(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        **STAGES,
        patch_sizes=[7, 3],
        sr_ratios=[4, 1],
        num_attention_heads=[1, 2],
        decoder_hidden_size=16,
    ),
    "bert": text("BertConfig", "BertForSequenceClassification", **SMALL),
    "gpt2": text("GPT2Config", "GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, use_cache=False),
    "llama": text("LlamaConfig", "LlamaForCausalLM", **SMALL, num_key_value_heads=1, use_cache=False),
    "t5": text(
        "T5Config", "T5EncoderModel", "last_hidden_state", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    ),
    "wav2vec2": Kind(
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        SMALL
        | {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 12},
        signal,
        ((2, 200), (3, 260)),
        {"x": {0: "rows", 1: "length"}},
        "input_values",
    ),
}


def randomized(model: nn.Module) -> nn.Module:
    """Weights of the spread that keeps activations near 1, whatever the library starts from; affine maps that are not
    the identity.
    """
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                weight.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
            elif weight.ndim == 2:
                weight.copy_(noise / weight.shape[1] ** 0.5)
        for name, statistic in model.named_buffers():
            if name.endswith("running_var"):
                statistic.uniform_(0.5, 1.5, generator=generator)
    for weight in model.parameters():
        weight.requires_grad_(False)
    return model


# The others take about a second each, and are of one kind with these.
QUICK = ("vit", "clip_vision", "convnextv2", "resnet", "bert", "gpt2", "llama", "t5")


def network(kind: Kind) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # configurations announce what they will stop to accept
        configuration = getattr(transformers, kind.configuration)(**kind.options)
        model = randomized(getattr(transformers, kind.model)(configuration))
    return Scores(model, kind.source, kind.answer).eval()


@pytest.mark.parametrize("exporter", ["legacy17", pytest.param("dynamo18", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_a_transformer_has_the_gradient_of_autograd(name: str, exporter: str) -> None:
    kind = KINDS[name]
    net = network(kind)
    gradient = input_gradient(exported(net, kind.inputs(kind.sizes[0]), exporter, kind.dynamic), ["x"], "y")
    for size in kind.sizes:
        inputs = kind.inputs(size)
        scores = net(*inputs.values())
        g = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))
        wide = in_float64(net, inputs)
        (expected,) = autograd(*wide, g, ["x"], torch.contiguous_format)
        theirs = [
            distance(autograd(net, inputs, g, ["x"], layout)[0], expected)
            for layout in (torch.contiguous_format, torch.channels_last)
        ]
        feeds = {key: value.numpy() for key, value in inputs.items()} | {gradient.cotangent: g.numpy()}
        y, dx = run(gradient.model, feeds, ["y", gradient.gradients["x"]])
        assert distance(y, scores.numpy()) < 1e-4
        assert distance(dx, expected) <= max(2 * max(theirs), 1e-4), f"torch in float32: {theirs}"


@pytest.mark.parametrize("exporter", ["legacy17", pytest.param("dynamo18", marks=pytest.mark.slow)])
def test_a_text_encoder_is_differentiated_by_the_embeddings_inside_it(exporter: str) -> None:
    options = SMALL | {"vocab_size": 50, "max_position_embeddings": 20}
    model = randomized(transformers.CLIPTextModel(transformers.CLIPTextConfig(**options)))
    net = Scores(model, "input_ids", "last_hidden_state").eval()
    tokens = torch.randint(0, 49, (3, 9), generator=torch.Generator().manual_seed(1))
    dynamic = {"x": {0: "rows", 1: "length"}}
    onnx_model = exported(net, {"x": tokens[:2, :7]}, exporter, dynamic)
    table = model.get_input_embeddings().weight
    sizes = {tensor.name: list(tensor.dims) for tensor in onnx_model.graph.initializer}
    (embedded,) = [
        node.output[0]
        for node in onnx_model.graph.node
        if node.op_type == "Gather" and sizes.get(node.input[0]) == list(table.shape)
    ]
    gradient = input_gradient(onnx_model, [embedded], "y")
    captured: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        captured.append(output.requires_grad_(True))
        return captured[0]

    wide = in_float64(net, {})[0]
    wide.get_submodule("model").get_input_embeddings().register_forward_hook(keep)
    scores = wide(tokens)
    g = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))
    (expected,) = torch.autograd.grad(scores, captured[0], g.double())
    feeds = {"x": tokens.numpy(), gradient.cotangent: g.numpy()}
    (dx,) = run(gradient.model, feeds, [gradient.gradients[embedded]])
    assert distance(dx, expected.numpy()) < 1e-4
