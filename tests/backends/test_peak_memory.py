"""What an evaluation takes, measured by the growth of the process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from explainserve import backends
from explainserve.backends import LoadedModel, LoadOptions
from explainserve.backends.batch_size import fastest
from explainserve.backends.resident_memory import peak_growth
from explainserve.backends.timing import random_row, repeated
from explainserve.model_config import ModelConfig
from explainserve.plan import Rows
from onnx_graphs import model, node, save

MIB = 1024 * 1024

CHANNELS, SIDE, ROWS = 32, 64, 16
ACTIVATION_BYTES = ROWS * CHANNELS * SIDE * SIDE * 4
"""Of one layer of the network below, in a batch of ROWS."""

pytestmark = pytest.mark.skipif(peak_growth(lambda: None) is None, reason="the system does not tell")


def wide_network(folder: Path) -> Path:
    """Few weights, large activations: two layers that the backward pass needs, and what they are computed with."""
    random = np.random.default_rng(5)
    weights = {
        "k": (random.standard_normal((CHANNELS, 3, 3, 3)) / 5).astype(np.float32),
        "l": (random.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 17).astype(np.float32),
    }
    nodes = [
        node("Conv", ["x", "k"], ["a"], pads=[1, 1, 1, 1]),
        node("Tanh", ["a"], ["b"]),
        node("Conv", ["b", "l"], ["c"], pads=[1, 1, 1, 1]),
        node("Tanh", ["c"], ["d"]),
        node("GlobalAveragePool", ["d"], ["p"]),
        node("Flatten", ["p"], ["y"]),
    ]
    return save(model(nodes, [("x", ["batch", 3, SIDE, SIDE])], [("y", ["batch", CHANNELS])], weights), folder)


def least_peak(loaded: LoadedModel, rows: Rows) -> int:
    """Without what other threads took meanwhile, and what the system gave back late."""
    return min(found for _ in range(4) if (found := loaded.peak_bytes(rows)) is not None)


def test_growth_is_what_was_taken_and_not_what_is_left() -> None:
    def take() -> int:
        return int(np.ones(64 * MIB, np.uint8).sum())

    growths = [growth for _ in range(6) if (growth := peak_growth(take)) is not None]

    assert min(growths) > 63 * MIB, "what was freed shows again"
    assert min(growths) < 96 * MIB, "other threads take too, but not every time"


def test_a_micro_batch_takes_its_activations(tmp_path: Path) -> None:
    """Twice those of a layer at least, since the backward pass needs both, and not ten times; in proportion to rows."""
    loaded = backends.load(wide_network(tmp_path), ModelConfig(), LoadOptions(thread_count=1))
    row = random_row(loaded)
    whole, half = (least_peak(loaded, repeated(row, count)) for count in (ROWS, ROWS // 2))

    assert 2 * ACTIVATION_BYTES <= whole < 10 * ACTIVATION_BYTES
    assert 1.5 * half < whole < 2.5 * half


def test_it_is_measured_with_the_size_of_micro_batches(tmp_path: Path) -> None:
    loaded = backends.load(wide_network(tmp_path), ModelConfig(), LoadOptions(thread_count=1))
    found = fastest(loaded, limit=2, seconds=60)

    assert found.peak_bytes is not None
    least = least_peak(loaded, repeated(random_row(loaded), found.rows))
    assert least / 3 < found.peak_bytes < 3 * least, "what is free already is not told alike by every run"
    assert fastest(loaded, limit=2, seconds=0).peak_bytes is None


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_micro_batch_of_torch_takes_its_activations(tmp_path: Path) -> None:
    import torch

    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, CHANNELS, 3, padding=1),
        torch.nn.Tanh(),
        torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        torch.nn.Tanh(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )
    path = tmp_path / "model.pt"
    torch.jit.trace(network.eval(), torch.zeros(2, 3, SIDE, SIDE)).save(path)
    config = ModelConfig.model_validate(
        {
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3, SIDE, SIDE]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", CHANNELS]}],
        }
    )
    loaded = backends.load(path, config, LoadOptions(thread_count=1))
    found = least_peak(loaded, repeated(random_row(loaded), ROWS))

    assert 2 * ACTIVATION_BYTES <= found < 10 * ACTIVATION_BYTES
