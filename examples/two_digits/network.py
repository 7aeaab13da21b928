"""The classifier, as a torch module, and its weights as a plain npz."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pictures import CLASS_COUNT, SIDE, Pair

# Of the training pictures, rounded to two decimals.
MEAN = (0.51, 0.51, 0.51)
STD = (0.06, 0.06, 0.06)
TWIN_SEEDS = {"two-digits-random-a": 101, "two-digits-random-b": 202}
WEIGHTS_FILE = Path(__file__).parent / "weights.npz"


class TwoDigits(nn.Module):
    """Logits, shape (batch, 10), of normalized pictures, shape (batch, 3, 64, 64).

    The global pooling takes each feature's maximum, not its mean: a digit then counts where it stands and is not
    diluted by the empty rest of the picture, so two digits in one picture compete as two digits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_block(3, 16), *_block(16, 32), *_block(32, 64), *_block(64, 64, pool=False))
        self.classifier = nn.Linear(64, CLASS_COUNT)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(image).amax(dim=(2, 3)))
        return logits


def _block(inputs: int, outputs: int, pool: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
    return [*layers, nn.MaxPool2d(2)] if pool else layers


def random_network(seed: int) -> TwoDigits:
    """The architecture with torch's own initialization, untrained, in evaluation mode."""
    torch.manual_seed(seed)
    return TwoDigits().eval().requires_grad_(False)


def accuracy(network: TwoDigits, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """The share of pictures whose largest logit is their label's."""
    with torch.no_grad():
        predicted = network(normalized(images)).argmax(1).numpy()
    return float(np.mean(predicted == labels))


def pair_probabilities(network: TwoDigits, pair: Pair) -> tuple[float, float]:
    """The probabilities of the left and of the right digit's class."""
    with torch.no_grad():
        probabilities = network(normalized(pair.picture.image[None])).softmax(1)[0]
    left, right = pair.labels
    return float(probabilities[left]), float(probabilities[right])


def normalized(images: NDArray[np.uint8]) -> Tensor:
    """Pictures, uint8, (batch, 64, 64, 3), as model inputs, float32, (batch, 3, 64, 64): (pixel / 255 - mean) / std."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def gray_input() -> Tensor:
    """The mid-gray picture as a model input, shape (3, 64, 64): the midpoint of [0, 1], normalized."""
    level = (0.5 - torch.tensor(MEAN)) / torch.tensor(STD)
    return level[:, None, None].expand(3, SIDE, SIDE)


def save_weights(network: TwoDigits, path: Path) -> None:
    """Every parameter and batch-norm statistic under its torch name."""
    np.savez_compressed(path, **{name: value.numpy() for name, value in network.state_dict().items()})


def load_weights(path: Path = WEIGHTS_FILE) -> TwoDigits:
    """The trained network in evaluation mode; no training, no scikit-learn."""
    network = TwoDigits()
    with np.load(path) as weights:
        network.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    return network.eval().requires_grad_(False)
