"""Train the text classifier and write it as ONNX.

    python examples/text/train_text.py [--output DIR]

Writes DIR/vocabulary.txt and DIR/models (DIR defaults to this folder, whose files are committed). Every draw is seeded.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from reviews import LABELS, PAD, draw_reviews, encode, every_word

SEED = 3
EMBEDDING, CHANNELS, WIDTH = 12, 24, 3
STEPS, BATCH = 300, 64
SMOOTHING = 0.1
"""Share of each label that is spread over both, so that logits stay small."""

UNCOMMITTED = torch.tensor([[0.5, 0.5]])
"""What pad tokens mean, against which texts are explained."""

MODEL_TOML = f"""\
default_target = "positive"

[[inputs]]
name = "ids"
shape = ["batch", "length"]
value_range = [0, {len(every_word()) - 1}]

[[outputs]]
name = "logits"
kind = "logits"
activation = "softmax"
labels = {list(LABELS)}
""".replace("'", '"')


class TextClassifier(nn.Module):
    """Embeddings, a convolution over three words, the mean over the text: so that "not" acts on what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(every_word()), EMBEDDING, padding_idx=PAD)
        self.convolution = nn.Conv1d(EMBEDDING, CHANNELS, WIDTH, padding=WIDTH // 2)
        self.head = nn.Linear(CHANNELS, len(LABELS))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, 2) of token ids (batch, length)."""
        hidden = torch.relu(self.convolution(self.embedding(ids).transpose(1, 2)))
        return self.head(hidden.mean(2))


def train(words: dict[str, int]) -> TextClassifier:
    """Adam on reviews of the grammar."""
    torch.manual_seed(SEED)
    network = TextClassifier()
    optimizer = torch.optim.Adam(network.parameters(), 0.02, weight_decay=1e-4)
    for step in range(STEPS):
        texts, labels = draw_reviews(seed=step, count=BATCH)
        ids = torch.from_numpy(encode(texts, words))
        loss = nn.functional.cross_entropy(network(ids), torch.from_numpy(labels), label_smoothing=SMOOTHING)
        loss += nn.functional.cross_entropy(network(torch.full_like(ids[:1], PAD)), UNCOMMITTED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def accuracy(network: TextClassifier, words: dict[str, int]) -> float:
    """On reviews that were not trained on, each by itself."""
    texts, labels = draw_reviews(seed=10_000, count=500)
    with torch.no_grad():
        found = [network(torch.from_numpy(encode([text], words))).argmax().item() for text in texts]
    return float(np.mean(found == labels))


def as_onnx(network: TextClassifier) -> onnx.ModelProto:
    """Written out by hand, so that the tensor to explain has a name: `embedding`."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedding"], axis=0),
        helper.make_node("Transpose", ["embedding"], ["channels"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["channels", "kernel", "bias"], ["convolved"], pads=[WIDTH // 2] * 2),
        helper.make_node("Relu", ["convolved"], ["phrases"]),
        helper.make_node("ReduceMean", ["phrases", "words"], ["text"], keepdims=0),
        helper.make_node("Gemm", ["text", "head", "head_bias"], ["logits"], transB=1),
    ]
    tensors = {
        "table": network.embedding.weight,
        "kernel": network.convolution.weight,
        "bias": network.convolution.bias,
        "head": network.head.weight,
        "head_bias": network.head.bias,
    }
    weights = [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in tensors.items()]
    graph = helper.make_graph(
        nodes,
        "reviews",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS)])],
        [*weights, numpy_helper.from_array(np.array([2]), "words")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    output = parser.parse_args().output
    words = {word: position for position, word in enumerate(every_word())}
    network = train(words)
    print(f"accuracy on new reviews: {accuracy(network, words):.3f}")
    version = output / "models" / "reviews" / "1"
    version.mkdir(parents=True, exist_ok=True)
    (output / "vocabulary.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (version.parent / "model.toml").write_text(MODEL_TOML, encoding="utf-8")
    onnx.save(as_onnx(network), version / "model.onnx")


if __name__ == "__main__":
    main()
