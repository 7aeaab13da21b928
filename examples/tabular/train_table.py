"""Train a small network on the breast cancer data that ship inside scikit-learn, and write it as ONNX.

    python examples/tabular/train_table.py [--output DIR]

Writes DIR/held_out.csv and DIR/models (DIR defaults to this folder, whose files are committed). Every draw is seeded.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn

SEED = 5
HIDDEN = 16
STEPS = 300
WRITTEN = 8
"""Held-out rows in the file: the first ones, not chosen."""

Table = NDArray[np.float32]

MODEL_TOML = """\
default_target = "malignant"
default_baseline = "training_mean"

[[inputs]]
name = "measurements"
shape = ["batch", 30]

[[outputs]]
name = "logits"
kind = "logits"
activation = "softmax"
labels = ["malignant", "benign"]

[baselines.training_mean]
files = { measurements = "training_mean.npy" }
"""


def train(rows: Table, labels: NDArray[np.int64]) -> nn.Sequential:
    """Adam on all rows at once; the rows are standardized."""
    torch.manual_seed(SEED)
    network = nn.Sequential(
        nn.Linear(rows.shape[1], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2)
    )
    optimizer = torch.optim.Adam(network.parameters(), 0.01, weight_decay=1e-2)
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(network(torch.from_numpy(rows)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def as_onnx(network: nn.Sequential, mean: Table, std: Table) -> onnx.ModelProto:
    """Standardizes within the graph, so that callers and baselines speak in the units of the measurements."""
    first, second, third = (network[position] for position in (0, 2, 4))
    nodes = [
        helper.make_node("Sub", ["measurements", "mean"], ["centered"]),
        helper.make_node("Div", ["centered", "std"], ["standardized"]),
        helper.make_node("Gemm", ["standardized", "w1", "b1"], ["z1"], transB=1),
        helper.make_node("Tanh", ["z1"], ["h1"]),
        helper.make_node("Gemm", ["h1", "w2", "b2"], ["z2"], transB=1),
        helper.make_node("Tanh", ["z2"], ["h2"]),
        helper.make_node("Gemm", ["h2", "w3", "b3"], ["logits"], transB=1),
    ]
    layers = {"1": first, "2": second, "3": third}
    weights = {
        f"{kind}{number}": value.detach().numpy()
        for number, layer in layers.items()
        for kind, value in (("w", layer.weight), ("b", layer.bias))
    }
    graph = helper.make_graph(
        nodes,
        "breast-cancer",
        [helper.make_tensor_value_info("measurements", TensorProto.FLOAT, ["batch", len(mean)])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in {**weights, "mean": mean, "std": std}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def write_rows(path: Path, names: list[str], rows: Table, labels: list[str]) -> None:
    """The label in the first column, then the measurements under their names."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["diagnosis", *names])
        writer.writerows([label, *map(str, row)] for label, row in zip(labels, rows, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    output = parser.parse_args().output
    data = load_breast_cancer()
    rows, labels = data.data.astype(np.float32), data.target.astype(np.int64)
    training, held_out, known, unseen = train_test_split(rows, labels, random_state=SEED, stratify=labels)
    mean, std = training.mean(0), training.std(0)
    network = train((training - mean) / std, known)
    with torch.no_grad():
        found = network(torch.from_numpy((held_out - mean) / std)).argmax(1).numpy()
    print(f"accuracy on {len(unseen)} held-out rows: {(found == unseen).mean():.3f}")

    model = output / "models" / "breast-cancer"
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "model.toml").write_text(MODEL_TOML, encoding="utf-8")
    np.save(model / "training_mean.npy", mean)
    onnx.save(as_onnx(network, mean, std), model / "1" / "model.onnx")
    diagnoses = [str(data.target_names[label]) for label in unseen[:WRITTEN]]
    write_rows(output / "held_out.csv", list(map(str, data.feature_names)), held_out[:WRITTEN], diagnoses)


if __name__ == "__main__":
    main()
