"""Explain which measurements speak for a diagnosis.

    explainserve serve --models examples/tabular/models
    python examples/tabular/explain_table.py [--row 0]

Integrated Gradients, and KernelSHAP, which needs no gradient; both against the mean of the training data.
"""

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from explainserve_client import Attribution, Client, IntegratedGradients, KernelShap

HELD_OUT = Path(__file__).parent / "held_out.csv"
METHODS = (IntegratedGradients(step_count=64), KernelShap(sample_count=1024, seed=0))
TARGET = "malignant"


@dataclass(frozen=True)
class Rows:
    """Held-out rows: measurements (rows, features) under their names, and what was diagnosed."""

    names: list[str]
    measurements: NDArray[np.float32]
    diagnoses: list[str]


def read_rows() -> Rows:
    """The committed rows."""
    with HELD_OUT.open(encoding="utf-8", newline="") as file:
        (_, *names), *lines = csv.reader(file)
    return Rows(names, np.array([line[1:] for line in lines], np.float32), [line[0] for line in lines])


def explain(client: Client, measurements: NDArray[np.float32]) -> tuple[Attribution, ...]:
    """One attribution of the logit of "malignant" for each method; the baseline is the default of the model."""
    result = client.explain("breast-cancer", measurements, targets=TARGET, method=METHODS)
    return result.attributions


def table(names: list[str], measurements: NDArray[np.float32], found: tuple[Attribution, ...], count: int) -> str:
    """The measurements with the largest shares of Integrated Gradients, then the sums over all of them."""
    by_path, by_samples = (own.tensor.astype(np.float64) for own in found)
    lines = [f"  {'measurement':24s} {'value':>10s} {'IG':>9s} {'SHAP':>9s}"]
    for feature in np.argsort(-abs(by_path))[:count]:
        shares = f"{by_path[feature]:+9.3f} {by_samples[feature]:+9.3f}"
        lines.append(f"  {names[feature]:24s} {measurements[feature]:10.4g} {shares}")
    lines.append(f"  {'sum of all':24s} {'':10s} {by_path.sum():+9.3f} {by_samples.sum():+9.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="localhost:8001", help="HOST:PORT")
    parser.add_argument("--row", type=int, default=0, help="which of the held-out rows, from 0")
    parser.add_argument("--count", type=int, default=10, help="how many measurements are printed")
    arguments = parser.parse_args()
    rows = read_rows()
    measurements = rows.measurements[arguments.row]
    with Client(arguments.server) as client:
        found = explain(client, measurements)
    score, reference = found[0].instance_output_value, found[0].baseline_output_value
    print(f"row {arguments.row}, diagnosed {rows.diagnoses[arguments.row]}: logit of {TARGET!r} {score:+.3f},")
    print(f"of the mean of the training data {reference:+.3f}, difference {score - reference:+.3f}")
    print(table(rows.names, measurements, found, arguments.count))


if __name__ == "__main__":
    main()
