"""Write the trained network and its two random twins as model folders that the service can load.

    python examples/two_digits/export.py --output DIR [--formats onnx pt2 torchscript]

Reads the committed weights, so nothing is trained; the twins come from their seeds.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import torch

from network import MEAN, STD, TWIN_SEEDS, WEIGHTS_FILE, TwoDigits, load_weights, random_network
from pictures import CLASS_COUNT, SIDE

TRAINED_NAME = "two-digits"
# Two rows: an example batch of one would be specialized to a constant.
EXAMPLE = (torch.zeros(2, 3, SIDE, SIDE),)

MODEL_TOML = f"""\
[[inputs]]
name = "image"
dtype = "float32"
shape = ["batch", 3, {SIDE}, {SIDE}]
layout = "NCHW"
channel_order = "RGB"
value_range = [0.0, 1.0]
mean = {list(MEAN)}
std = {list(STD)}

[[outputs]]
name = "logits"
dtype = "float32"
shape = ["batch", {CLASS_COUNT}]
kind = "logits"
activation = "softmax"
class_axis = 1
labels = {[str(label) for label in range(CLASS_COUNT)]}
""".replace("'", '"')


def write_onnx(network: TwoDigits, path: Path) -> None:
    """Opset 18, dynamic batch, weights inside, without the exporter's notes on where the source code lay."""
    program = torch.onnx.export(
        network,
        EXAMPLE,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=18,
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model = program.model_proto
    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del noted.metadata_props[:]
        noted.ClearField("doc_string")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def write_pt2(network: TwoDigits, path: Path) -> None:
    """A `torch.export` program with a dynamic batch."""
    torch.export.save(torch.export.export(network, EXAMPLE, dynamic_shapes=({0: torch.export.Dim("batch")},)), path)


def write_torchscript(network: TwoDigits, path: Path) -> None:
    """Traced and frozen, which folds the batch normalization."""
    torch.jit.freeze(torch.jit.trace(network, EXAMPLE)).save(str(path))


FORMATS: dict[str, tuple[str, str, Callable[[TwoDigits, Path], None]]] = {
    # folder suffix, file, writer
    "onnx": ("", "model.onnx", write_onnx),
    "pt2": ("-pt2", "model.pt2", write_pt2),
    "torchscript": ("-torchscript", "model.pt", write_torchscript),
}


def export_models(trained: TwoDigits, output: Path, formats: Sequence[str] = tuple(FORMATS)) -> None:
    """One folder per network and format under `output`: NAME[-FORMAT]/model.toml and NAME[-FORMAT]/1/model.*."""
    networks = {TRAINED_NAME: trained} | {name: random_network(seed) for name, seed in TWIN_SEEDS.items()}
    for name, network in networks.items():
        for suffix, file_name, write in (FORMATS[key] for key in formats):
            version = output / f"{name}{suffix}" / "1"
            version.mkdir(parents=True, exist_ok=True)
            (version.parent / "model.toml").write_text(MODEL_TOML)
            write(network, version / file_name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FILE, help="weights of the trained network (npz)")
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=tuple(FORMATS))
    arguments = parser.parse_args()
    export_models(load_weights(arguments.weights), arguments.output, arguments.formats)


if __name__ == "__main__":
    main()
