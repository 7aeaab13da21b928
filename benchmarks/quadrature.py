"""How accurate is a map after n gradient evaluations, and how honest is its error estimate?

    python benchmarks/quadrature.py [--images 16] [--reference 1024]

Trains three small classifiers on handwritten digits placed on noisy pictures (one core, seeded, a few minutes),
explains held-out pictures in two scores, and compares quadrature rules at equal numbers of gradient evaluations. Errors
are relative L2 distances of the whole map to a midpoint rule of `--reference` points. Writes
`benchmarks/results/quadrature.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import nn

from explainserve.explanation import Attribution, Baseline, Instance, Question, Subject, Target
from explainserve.methods import IntegratedGradients
from explainserve.plan import Evaluation, Plan, Segment, SegmentEvaluation, Selector
from explainserve.signature import MapSpec, Score, ScoreHead

SIZE = 32
STEP_COUNTS = (16, 32, 64)
HONESTY_COUNTS = (16, 24, 32, 48, 64, 96, 128)
TOLERANCE = 0.05
SCORES = {Score.PROBABILITY: ScoreHead.SOFTMAX, Score.LOGIT: ScoreHead.IDENTITY}
Vector = NDArray[np.float64]


# --- the classifiers -------------------------------------------------------------------------------------------------


def pictures(images: NDArray[np.float64], seed: int) -> torch.Tensor:
    """8x8 digits of 0..16, enlarged three times, at a random place of a 32x32 picture with background noise."""
    random = np.random.default_rng(seed)
    placed = random.uniform(0, 0.3, (len(images), 1, SIZE, SIZE))
    for picture, digit in zip(placed, images, strict=True):
        large = np.kron(digit / 16, np.ones((3, 3)))
        top, left = random.integers(0, SIZE - 24 + 1, 2)
        picture[0, top : top + 24, left : left + 24] += large
    return torch.tensor(placed.clip(0, 1), dtype=torch.float32)


def convolutional(activation: Callable[[], nn.Module]) -> nn.Module:
    """Three blocks of convolution, batch normalization and max pooling."""
    widths = (1, 16, 32, 48)
    blocks: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        blocks += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out), activation(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(widths[-1] * 16, 10))


class Transformer(nn.Module):
    """A two-layer vision transformer on 4x4 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 48, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (rows, 10)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.layers(tokens).mean(1))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ReLU + max pool": (lambda: convolutional(nn.ReLU), 6),
    "GELU + max pool": (lambda: convolutional(nn.GELU), 6),
    "transformer": (Transformer, 20),
}
"""Untrained nets, and the epochs that they are trained for."""


def train(build: Callable[[], nn.Module], epochs: int, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Adam with a one-cycle learning rate, seeded; returns the net for evaluation, without parameter gradients."""
    torch.manual_seed(0)
    net = build()
    batches = len(x) // 64
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: batches * 64].view(batches, 64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def classifiers() -> Iterator[tuple[str, nn.Module, float, torch.Tensor]]:
    """Names, trained nets, accuracies, and the held-out pictures that every net is tested on."""
    digits = load_digits()
    labels = torch.tensor(digits.target)
    x = torch.cat([pictures(digits.images[:1500], seed) for seed in range(4)])
    held_out = pictures(digits.images[1500:], seed=99)
    for name, (build, epochs) in NETS.items():
        net = train(build, epochs, x, labels[:1500].repeat(4))
        with torch.no_grad():
            accuracy = (net(held_out).argmax(1) == labels[1500:]).double().mean().item()
        yield name, net, accuracy, held_out


# --- evaluating plans ------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A net that evaluates plans, and the number of gradients it took."""

    net: nn.Module
    gradient_count: int = field(default=0)

    def scores(self, x: torch.Tensor, head: ScoreHead) -> torch.Tensor:
        """Shape (rows, classes)."""
        logits = self.net(x)
        return logits.softmax(1) if head is ScoreHead.SOFTMAX else logits

    def evaluate(self, plan: Plan) -> Evaluation:
        """All rows of the plan, 64 at a time."""
        rows = torch.cat([_rows(segment) for segment in plan.segments])
        first = plan.segments[0]
        index, head = int(first.selectors[0].indices[0]), first.function.head
        values, gradients = zip(
            *(self._values_and_gradients(part, index, head) for part in rows.split(64)), strict=True
        )
        counts = [segment.row_count for segment in plan.segments]
        pieces = zip(plan.segments, torch.cat(values).split(counts), torch.cat(gradients).split(counts), strict=True)
        return Evaluation(tuple(_segment_evaluation(*piece) for piece in pieces))

    def _values_and_gradients(
        self, rows: torch.Tensor, index: int, head: ScoreHead
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.gradient_count += len(rows)
        rows = rows.requires_grad_(True)
        values = self.scores(rows, head)[:, index]
        return values.detach(), torch.autograd.grad(values.sum(), rows)[0]

    def question(self, x: torch.Tensor, baseline: torch.Tensor, score: Score) -> Question:
        """Why this picture's most probable class?"""
        head = SCORES[score]
        with torch.no_grad():
            at_x, at_baseline = self.scores(torch.stack([x, baseline]), head).double().numpy()
        index = int(at_x.argmax())
        target = Target("y", score, head, Selector(np.array([index]), np.ones(1, np.float32)))
        instance, start = Instance({"x": x.numpy()}, {}), Baseline({"x": baseline.numpy()})
        subject = Subject({"x": MapSpec("x", "CHW", 0)}, {"x": tuple(x.shape)})
        return Question(subject, instance, target, start, float(at_x[index]), float(at_baseline[index]))

    def explain(self, question: Question, method: IntegratedGradients) -> Attribution:
        """Rounds until the method answers."""
        answer: Attribution | Plan = method.plan(question)
        while isinstance(answer, Plan):
            answer = method.attribution(question, answer, self.evaluate(answer))
        return answer


def _rows(segment: Segment) -> torch.Tensor:
    start, end = (torch.tensor(side["x"], dtype=torch.float64) for side in (segment.start, segment.end))
    alphas = torch.tensor(segment.alphas)[:, None, None, None]
    return ((1 - alphas) * start + alphas * end).float()


def _segment_evaluation(segment: Segment, values: torch.Tensor, gradients: torch.Tensor) -> SegmentEvaluation:
    weights = torch.tensor(segment.weights, dtype=torch.float32)
    return SegmentEvaluation(values.double().numpy(), {"x": torch.tensordot(weights, gradients, 1).numpy()})


# --- the rules that are compared -------------------------------------------------------------------------------------


def fixed(name: str) -> Callable[[Model, Question, int], Vector]:
    """A fixed rule."""

    def rule(model: Model, question: Question, n: int) -> Vector:
        return _map(model.explain(question, IntegratedGradients(step_count=n, quadrature=name)))

    return rule


def adaptive(model: Model, question: Question, n: int) -> Vector:
    """The default rule, not allowed to stop before n."""
    return _map(exhausted(model, question, n))


def exhausted(model: Model, question: Question, n: int) -> Attribution:
    """The default rule with tolerances that it cannot meet."""
    method = IntegratedGradients(tolerance=1e-12, completeness_tolerance=1e-12, max_step_count=n)
    return model.explain(question, method)


def by_change_of_score(model: Model, question: Question, n: int) -> Vector:
    """8 intervals, midpoints in proportion to the square root of |change of F|; 9 more forward passes, not counted."""
    edges = np.linspace(0, 1, 9)
    scores = model.evaluate(Plan((_segment(question, edges, np.ones(9)),))).segments[0].scores
    model.gradient_count -= len(edges)
    share = np.sqrt(np.abs(np.diff(scores)))
    return _composite(model, question, _apportion(share, n, step=1))


def pilot_and_refine(model: Model, question: Question, n: int) -> Vector:
    """8 midpoints, then an odd number per interval in proportion to the gradient's difference to its neighbours."""
    alphas = (np.arange(8) + 0.5) / 8
    pilots = Plan(tuple(_segment(question, np.array([alpha]), np.ones(1)) for alpha in alphas))
    products = [_product(question, part) for part in model.evaluate(pilots).segments]
    differences = [float(np.linalg.norm(b - a)) for a, b in pairwise(products)]
    roughness = np.array([np.mean(differences[max(0, k - 1) : k + 1]) for k in range(8)])
    model.gradient_count -= 8  # evaluated again below, to keep this short
    return _composite(model, question, _apportion(roughness, n, step=2))


RULES: dict[str, Callable[[Model, Question, int], Vector]] = {
    "Gauss-Legendre": fixed("gauss_legendre"),
    "midpoint": fixed("midpoint"),
    "placed by change of score": by_change_of_score,
    "pilot and refine, two rounds": pilot_and_refine,
    "adaptive (default)": adaptive,
}


def _apportion(share: Vector, n: int, step: int) -> list[int]:
    """At least one point per interval, `step` more at a time where the share per point is largest."""
    counts = np.ones(len(share), int)
    while counts.sum() + step <= n:
        counts[np.argmax(share / counts)] += step
    return counts.tolist()


def _composite(model: Model, question: Question, counts: list[int]) -> Vector:
    pieces = [(k + (np.arange(m) + 0.5) / m) / len(counts) for k, m in enumerate(counts)]
    weights = [np.full(m, 1 / m / len(counts)) for m in counts]
    plan = Plan((_segment(question, np.concatenate(pieces), np.concatenate(weights)),))
    return _product(question, model.evaluate(plan).segments[0])


def _segment(question: Question, alphas: Vector, weights: Vector) -> Segment:
    start, end = question.baseline.moving, question.instance.moving
    return Segment(start, end, {}, question.gradient, alphas, weights, (question.target.selector,))


def _product(question: Question, evaluation: SegmentEvaluation) -> Vector:
    displacement = question.instance.moving["x"].astype(np.float64) - question.baseline.moving["x"]
    return np.asarray(displacement * evaluation.gradient_sums["x"], np.float64)


def _map(attribution: Attribution) -> Vector:
    return attribution.tensors["x"].astype(np.float64)


# --- measuring and writing -------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What was measured for one net and score, over pictures.

    Attributes:
        errors: by rule and number of gradients.
        honesty: estimated over true error where the true one exceeds 1e-3, by number of gradients.
        stops: (gradients, true error) of the default rule at its default tolerances, and its stop reasons.
    """

    errors: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    honesty: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    stops: list[tuple[int, float]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, model: Model, question: Question, reference_count: int) -> None:
        """Measures one picture."""
        reference = fixed("midpoint")(model, question, reference_count)

        def error(values: Vector) -> float:
            return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))

        for (name, rule), n in product(RULES.items(), STEP_COUNTS):
            before = model.gradient_count
            self.errors[name, n].append(error(rule(model, question, n)))
            assert model.gradient_count - before <= n, name
        for n in HONESTY_COUNTS:
            attribution = exhausted(model, question, n)
            true, estimate = error(_map(attribution)), attribution.map_error
            if true > 1e-3 and estimate is not None:
                self.honesty[n].append(estimate / true)
        stopped = model.explain(question, IntegratedGradients())
        self.stops.append((stopped.step_count, error(_map(stopped))))
        self.reasons.append(stopped.stop_reason.name)


Measured = dict[tuple[str, str], Figures]
"""By net and score."""


def report(measured: Measured, accuracies: dict[str, float], images: int, reference: int) -> str:
    """The markdown page."""
    nets = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in accuracies.items())
    lines = [
        "# Quadrature: error of the map, honesty of its estimate, stopping",
        "",
        f"Written by `benchmarks/quadrature.py`. {images} held-out pictures per net, 32x32, black and gray baselines",
        f"in turn; reference: {reference}-point midpoint rule. Accuracies: {nets}.",
        "",
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch",
        f"{torch.__version__} with {torch.get_num_threads()} thread, numpy {np.__version__}, scikit-learn "
        f"{sklearn.__version__}.",
        "",
        "## Relative L2 error of the whole map, median / 90th percentile",
        "",
        *_error_table(measured),
        "",
        "## Estimated over true error of the default rule, where the true one exceeds .001",
        "",
        f"Maps after {', '.join(map(str, HONESTY_COUNTS))} gradients together. Honest: one half to five times.",
        "",
        *_honesty_table(measured),
        "",
        f"## Where the default rule stops (tolerances {TOLERANCE}, at most 128 gradients)",
        "",
        *_stop_table(measured),
    ]
    return "\n".join(lines) + "\n"


def _error_table(measured: Measured) -> Iterator[str]:
    yield "| net, score | rule | " + " | ".join(f"{n} gradients" for n in STEP_COUNTS) + " |"
    yield "|---|---|" + "---|" * len(STEP_COUNTS)
    for ((net, score), figures), rule in product(measured.items(), RULES):
        cells = [_quantiles(figures.errors[rule, n], (0.5, 0.9)) for n in STEP_COUNTS]
        yield f"| {net}, {score} | {rule} | " + " | ".join(cells) + " |"


def _honesty_table(measured: Measured) -> Iterator[str]:
    yield "| net, score | maps | 5th / 50th / 95th percentile | honest |"
    yield "|---|---|---|---|"
    everything: list[float] = []
    for (net, score), figures in measured.items():
        ratios = [ratio for by_count in figures.honesty.values() for ratio in by_count]
        everything += ratios
        yield f"| {net}, {score} | {_honesty(ratios)} |"
    yield f"| all | {_honesty(everything)} |"


def _stop_table(measured: Measured) -> Iterator[str]:
    yield "| net, score | gradients, median / 90th | true error, median / 90th / largest | reasons |"
    yield "|---|---|---|---|"
    for (net, score), figures in measured.items():
        counts, errors = (list(column) for column in zip(*figures.stops, strict=True))
        reasons = ", ".join(f"{figures.reasons.count(reason)} {reason}" for reason in sorted(set(figures.reasons)))
        stops = f"{np.median(counts):.0f} / {np.quantile(counts, 0.9):.0f}"
        yield f"| {net}, {score} | {stops} | {_quantiles(errors, (0.5, 0.9, 1))} | {reasons} |"


def _quantiles(values: list[float], probabilities: tuple[float, ...], digits: int = 4) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in np.quantile(values, probabilities))


def _honesty(ratios: list[float]) -> str:
    if not ratios:
        return "0 | | "
    share = np.mean([0.5 <= ratio <= 5 for ratio in ratios])
    return f"{len(ratios)} | {_quantiles(ratios, (0.05, 0.5, 0.95), 2)} | {share:.1%}"


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--reference", type=int, default=1024, help="points of the reference")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quadrature.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: Measured = {}
    accuracies: dict[str, float] = {}
    for name, net, accuracies[name], held_out in classifiers():
        for score in SCORES:
            measured = figures[name, score.value] = Figures()
            for k, x in enumerate(held_out[:: len(held_out) // options.images][: options.images]):
                model = Model(net)
                baseline = torch.full_like(x, 0.5 * (k % 2))
                measured.add(model, model.question(x, baseline, score), options.reference)
            print(f"{name}, {score.value}: measured", flush=True)
    page = report(figures, accuracies, options.images, options.reference)
    options.output.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
