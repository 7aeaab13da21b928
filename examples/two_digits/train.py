"""Train the two-digits classifier on pictures of *one* digit, and choose the two-digit pictures to explain.

    python examples/two_digits/train.py [--output DIR]

Writes DIR/weights.npz, DIR/pictures.npz and the ONNX model folder DIR/models (DIR defaults to this folder, whose files
are committed). Every draw is seeded.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from box_sums import box_sums, own_positive_other_negative
from export import FORMATS, export_models
from network import TWIN_SEEDS, TwoDigits, accuracy, gray_input, normalized, random_network, save_weights
from pictures import CLASS_COUNT, Digits, Pair, digit_split, empty_pictures, save_pairs, single_pictures
from selection import select

TRAINING_SEED = 7
TEST_SEED = 5
EPOCHS = 35
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 5e-3
WEIGHT_DECAY = 1e-2
EMPTY_SHARE = 1 / 8
TEST_ROUNDS = 4
PROBE_COUNT = 200


def train(digits: Digits) -> TwoDigits:
    """AdamW on a one-cycle schedule; every epoch lays every digit into a new picture."""
    rng = np.random.default_rng(TRAINING_SEED)
    network = random_network(TRAINING_SEED).train().requires_grad_(True)
    step_count = -(-len(epoch_targets(digits)) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, EPOCHS * step_count)
    for epoch in range(1, EPOCHS + 1):
        images, targets = epoch_pictures(rng, digits), epoch_targets(digits)
        losses = []
        for rows in torch.from_numpy(rng.permutation(len(images))).split(BATCH_SIZE):
            loss = functional.cross_entropy(network(images[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch:2d}  loss {np.mean(losses):.4f}", flush=True)
    return network.eval().requires_grad_(False)


def epoch_pictures(rng: np.random.Generator, digits: Digits) -> Tensor:
    """Every digit once, each in a picture of its own, then the empty backgrounds; normalized."""
    return normalized(np.concatenate([single_pictures(rng, digits), empty_pictures(rng, empty_count(digits))]))


def epoch_targets(digits: Digits) -> Tensor:
    """Class probabilities: certain for a digit, uniform for a picture without one.

    Without the uniform rows a flat gray picture gets whatever class the biases favor, and every explanation against
    the gray baseline would start from that accident.
    """
    certain = functional.one_hot(torch.from_numpy(digits.labels), CLASS_COUNT).float()
    return torch.cat([certain, torch.full((empty_count(digits), CLASS_COUNT), 1 / CLASS_COUNT)])


def empty_count(digits: Digits) -> int:
    return round(EMPTY_SHARE * len(digits.labels))


def held_out_accuracy(network: TwoDigits, held_out: Digits) -> float:
    """Over several new pictures of every held-out digit."""
    rng = np.random.default_rng(TEST_SEED)
    rounds = (single_pictures(rng, held_out) for _ in range(TEST_ROUNDS))
    return float(np.mean([accuracy(network, images, held_out.labels) for images in rounds]))


def print_box_sums(name: str, network: TwoDigits, chosen: list[Pair]) -> None:
    """How often a digit's box speaks for its own class and against the other one."""
    sums = np.stack([box_sums(network, pair) for pair in chosen])
    holds = own_positive_other_negative(sums)
    both = holds.all(axis=1)
    print(f"{name}: own box positive and other box negative for {holds.sum()} of {holds.size} maps,")
    print(f"  for both maps of {both.sum()} of {both.size} pictures; largest |sum| {np.abs(sums).max():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=("onnx",))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    training, held_out = digit_split()
    network = train(training)
    print(f"accuracy on held-out digits: {held_out_accuracy(network, held_out):.4f} ({len(held_out.labels)} digits)")
    gray = network(gray_input()[None]).softmax(1)[0].numpy()
    print(f"probabilities of the gray picture: {gray.min():.3f} to {gray.max():.3f}")

    chosen, candidate_count = select(network, held_out)
    print(f"two-digit pictures: {len(chosen)} kept of {candidate_count} drawn")
    probes, probe_candidates = select(network, held_out, PROBE_COUNT)
    print(f"box sums, over {len(probes)} pictures of {probe_candidates} drawn by the same rule:")
    print_box_sums("trained", network, probes)
    for name, seed in TWIN_SEEDS.items():
        print_box_sums(name, random_network(seed), probes)

    save_weights(network, arguments.output / "weights.npz")
    save_pairs(arguments.output / "pictures.npz", chosen, candidate_count)
    export_models(network, arguments.output / "models", arguments.formats)


if __name__ == "__main__":
    main()
