"""The examples of a text classifier and of a tabular model, against a server of their committed models."""

import csv
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime")

from explainserve.settings import Settings  # noqa: E402
from rpc.loopback import Loopback  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def text_server() -> Iterator[Loopback]:
    loopback = Loopback(Settings(models=EXAMPLES / "text" / "models", thread_count=1, port=0, http_port=0))
    yield loopback
    loopback.stop()


@pytest.fixture(scope="module")
def tabular_server() -> Iterator[Loopback]:
    loopback = Loopback(Settings(models=EXAMPLES / "tabular" / "models", thread_count=1, port=0, http_port=0))
    yield loopback
    loopback.stop()


def printed(script: str, server: Loopback, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), "--server", server.address, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def word_sums(text: str) -> dict[str, float]:
    """The numbers that are printed beside words."""
    return {word: float(value) for word, value in re.findall(r"^  (\S+) +([+-][\d.]+)", text, re.MULTILINE)}


@cache
def scorer(model: str, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Logits by inputs, of a committed model in onnxruntime alone."""
    path = EXAMPLES / model / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(["logits"], {name: rows})[0]


def test_sums_of_words_are_the_difference_to_pad_tokens(text_server: Loopback) -> None:
    text = "the food was not good"
    words = (EXAMPLES / "text" / "vocabulary.txt").read_text().split()
    ids = np.array([[words.index(word) for word in text.split()]])
    score, reference = (scorer("text/models/reviews", "ids")(own)[0, 1] for own in (ids, 0 * ids))
    sums = word_sums(printed("text/explain_text.py", text_server, text))

    assert list(sums) == [*text.split(), "sum"]
    assert sums["sum"] == pytest.approx(score - reference, abs=0.02)
    assert sum(value for word, value in sums.items() if word != "sum") == pytest.approx(sums["sum"], abs=0.01)


def test_not_turns_the_words_behind_it_around(text_server: Loopback) -> None:
    """The two together, for what they only say together is shared between them."""
    praise, denied, cleared = (
        word_sums(printed("text/explain_text.py", text_server, text))
        for text in ("the food was good", "the food was not good", "the food was not awful")
    )
    assert praise["good"] > 0 > denied["not"] + denied["good"]
    assert cleared["not"] + cleared["awful"] > 0


def test_every_text_of_the_example_is_explained(text_server: Loopback) -> None:
    assert printed("text/explain_text.py", text_server).count("of pad tokens") == 4


@pytest.mark.parametrize("row", [0, 3])
def test_measurements_are_named_and_both_methods_sum_to_the_difference(tabular_server: Loopback, row: int) -> None:
    text, columns = measured(tabular_server, row)
    score, reference = malignant(np.stack([held_out(row), training_mean()]))

    assert f"diagnosed {held_out_table()[1][row][0]}" in text
    assert np.sum(list(columns.values()), axis=0) == pytest.approx(score - reference, abs=0.05)


def test_shapley_values_are_the_mean_of_what_measurements_add_in_any_order(tabular_server: Loopback) -> None:
    """Against orders that are drawn here: both are means over samples, with standard errors."""
    _, columns = measured(tabular_server, 0)
    random = np.random.default_rng(0)
    added = np.stack([added_in_order(held_out(0), random.permutation(30)) for _ in range(300)])
    errors = added.std(axis=0) / np.sqrt(len(added))

    found = np.array([columns[name][1] for name in held_out_table()[0]])
    assert (abs(found - added.mean(axis=0)) < 0.05 + 6 * errors).all()


def added_in_order(instance: np.ndarray, order: np.ndarray) -> np.ndarray:
    """What the logit gains by each measurement, where they take the place of the mean one after the other."""
    present = np.zeros((31, 30), bool)
    for count, feature in enumerate(order, start=1):
        present[count:, feature] = True
    gains = np.zeros(30)
    gains[order] = np.diff(malignant(np.where(present, instance, training_mean())))
    return gains


def measured(server: Loopback, row: int) -> tuple[str, dict[str, tuple[float, float]]]:
    """What is printed of a held-out row, and the two numbers of each measurement; all are there, by name."""
    text = printed("tabular/explain_table.py", server, "--row", str(row), "--count", "30")
    found = re.findall(r"^  (\S.{23}) .{10} +([+-]\S+) +([+-]\S+)$", text, re.MULTILINE)
    columns = {name.strip(): (float(path), float(samples)) for name, path, samples in found}
    del columns["sum of all"]
    assert set(columns) == set(held_out_table()[0])
    return text, columns


def held_out_table() -> tuple[list[str], list[list[str]]]:
    """Names of the measurements, and rows of a diagnosis and its measurements."""
    with (EXAMPLES / "tabular" / "held_out.csv").open() as file:
        (_, *names), *rows = csv.reader(file)
    return names, rows


def held_out(row: int) -> np.ndarray:
    return np.array(held_out_table()[1][row][1:], np.float32)


def training_mean() -> np.ndarray:
    return np.load(EXAMPLES / "tabular" / "models" / "breast-cancer" / "training_mean.npy")


def malignant(measurements: np.ndarray) -> np.ndarray:
    return scorer("tabular/models/breast-cancer", "measurements")(measurements)[:, 0].astype(np.float64)


def test_committed_files_are_small() -> None:
    files = [path for name in ("text", "tabular") for path in (EXAMPLES / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) < 100_000
