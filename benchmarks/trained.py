"""Classifiers of the two-digits pictures, trained here in minutes: ReLU networks and transformers, small and large."""

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

LEVEL, CONTRAST = MEAN[0], STD[0]
"""Mean and standard deviation of pixels, the same in all channels."""
BATCH_SIZE = 16


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained."""

    side: int
    build: Callable[[], nn.Module]
    epochs: int
    peak_learning_rate: float


RECIPES = {
    "convolutional-28": Recipe(28, lambda: ResNet((1, 1), 1, width=24, classes=CLASS_COUNT), 10, 4e-3),
    "transformer-28": Recipe(28, lambda: VisionTransformer(28, 4, 96, 3, 3, CLASS_COUNT, True), 20, 2e-3),
    "convolutional-224": Recipe(224, lambda: ResNet((1, 1, 1, 1), 1, width=24, classes=CLASS_COUNT), 6, 4e-3),
    "transformer-224": Recipe(224, lambda: VisionTransformer(224, 16, 96, 3, 3, CLASS_COUNT, True), 20, 2e-3),
}
"""ReLU networks with max pooling and residual blocks; GELU transformers with a stem of convolutions."""


def resized(pictures: Tensor, side: int) -> Tensor:
    """Bilinear, shape (rows, 3, side, side); without aliasing where pictures shrink."""
    return functional.interpolate(pictures, (side, side), mode="bilinear", align_corners=False, antialias=True)


def explained_pictures(side: int) -> NDArray[np.float32]:
    """The two-digit pictures of the demo as model inputs, shape (count, 3, side, side)."""
    return resized(normalized(np.stack([pair.picture.image for pair in load_pairs()])), side).numpy()


def gray(side: int) -> NDArray[np.float32]:
    """The mid-gray picture as a model input, shape (3, side, side)."""
    return np.full((3, side, side), (0.5 - LEVEL) / CONTRAST, np.float32)


def load_or_train(name: str, folder: Path) -> nn.Module:
    """A network of RECIPES in evaluation mode; weights are kept in `folder`."""
    path = folder / f"{name}.pt"
    if not path.exists():
        training, held_out = digit_split()
        net = train(name, training)
        torch.save(net.state_dict(), path)
        print(f"accuracy of {name} on held-out digits: {accuracy(name, served(net), held_out):.3f}", flush=True)
    net = RECIPES[name].build()
    net.load_state_dict(torch.load(path, weights_only=True))
    return served(net)


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
            loss = functional.cross_entropy(net(resized(pictures[rows], recipe.side)), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"training {name}: epoch {epoch + 1} of {recipe.epochs}, loss {np.mean(losses):.3f}", flush=True)
    return net


def accuracy(name: str, net: nn.Module, held_out: Digits) -> float:
    """The share of held-out digits, each in a picture of its own, whose logit is the largest."""
    pictures = normalized(single_pictures(np.random.default_rng(5), held_out))
    side = RECIPES[name].side
    with torch.no_grad():
        predicted = torch.cat([net(resized(rows, side)).argmax(1) for rows in pictures.split(BATCH_SIZE)])
    return float((predicted.numpy() == held_out.labels).mean())
