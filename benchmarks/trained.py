"""Two classifiers of the two-digits pictures at 224x224, trained here in minutes: a ReLU network and a transformer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "two_digits"))

from network import MEAN, STD, normalized
from networks import ResNet, VisionTransformer, served
from pictures import CLASS_COUNT, Digits, digit_split, load_pairs, single_pictures
from train import epoch_pictures, epoch_targets

SIDE = 224
LEVEL, CONTRAST = MEAN[0], STD[0]
"""Mean and standard deviation of pixels, the same in all channels."""
BATCH_SIZE = 16


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained."""

    build: Callable[[], nn.Module]
    epochs: int
    peak_learning_rate: float


RECIPES = {
    "convolutional": Recipe(lambda: ResNet((1, 1, 1, 1), 1, width=24, classes=CLASS_COUNT), 6, 4e-3),
    "transformer": Recipe(lambda: VisionTransformer(SIDE, 16, 96, 3, 3, CLASS_COUNT, True), 20, 2e-3),
}
"""A ReLU network with max pooling and residual blocks; a GELU transformer with a stem of convolutions."""


def enlarged(pictures: Tensor) -> Tensor:
    """Bilinear, shape (rows, 3, 224, 224)."""
    return functional.interpolate(pictures, (SIDE, SIDE), mode="bilinear", align_corners=False)


def explained_pictures() -> NDArray[np.float32]:
    """The two-digit pictures of the demo as model inputs, shape (count, 3, 224, 224)."""
    return enlarged(normalized(np.stack([pair.picture.image for pair in load_pairs()]))).numpy()


def gray() -> NDArray[np.float32]:
    """The mid-gray picture as a model input, shape (3, 224, 224)."""
    return np.full((3, SIDE, SIDE), (0.5 - LEVEL) / CONTRAST, np.float32)


def load_or_train(name: str, folder: Path) -> tuple[nn.Module, float]:
    """A network of RECIPES in evaluation mode and its accuracy on held-out digits; weights are kept in `folder`."""
    path = folder / f"{name}.pt"
    training, held_out = digit_split()
    if not path.exists():
        torch.save(train(name, training).state_dict(), path)
    net = RECIPES[name].build()
    net.load_state_dict(torch.load(path, weights_only=True))
    net = served(net)
    return net, accuracy(net, held_out)


def train(name: str, digits: Digits) -> nn.Module:
    """AdamW on a one-cycle schedule, seeded; every epoch lays every digit into a new picture."""
    recipe = RECIPES[name]
    torch.manual_seed(7)
    random = np.random.default_rng(7)
    net = recipe.build().train()
    targets = epoch_targets(digits)
    step_count = -(-len(targets) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak_learning_rate, recipe.epochs * step_count)
    for epoch in range(recipe.epochs):
        pictures, losses = epoch_pictures(random, digits), []
        for rows in torch.from_numpy(random.permutation(len(targets))).split(BATCH_SIZE):
            loss = functional.cross_entropy(net(enlarged(pictures[rows])), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"training {name}: epoch {epoch + 1} of {recipe.epochs}, loss {np.mean(losses):.3f}", flush=True)
    return net


def accuracy(net: nn.Module, held_out: Digits) -> float:
    """The share of held-out digits, each in a picture of its own, whose logit is the largest."""
    pictures = normalized(single_pictures(np.random.default_rng(5), held_out))
    with torch.no_grad():
        predicted = torch.cat([net(enlarged(rows)).argmax(1) for rows in pictures.split(BATCH_SIZE)])
    return float((predicted.numpy() == held_out.labels).mean())
