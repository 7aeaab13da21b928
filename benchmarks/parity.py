"""Do our methods say what other libraries say, with the same options on the same networks?

    python benchmarks/parity.py

Exports small networks in every format, serves them, and compares our maps over gRPC with those that `references.py`
gets from other libraries in this process. Writes `docs/parity.md`.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from explainserve.methods import METHODS
from explainserve_client import Client
from explainserve_client.methods import METHODS as CLIENT_METHODS
from explainserve_client.methods import Method
from networks import FORMATS, write_model
from references import CLASSES, LIBRARIES, SIDE, TARGET, Case, Comparison, cases, comparisons, missing_libraries
from serving import serving

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
TOLERANCE = 1e-4
"""Largest relative L2 distance of maps without random numbers."""
SIGMAS = 3.0
"""Largest distance of sampled maps, in standard errors of their difference."""
REPEATS = 8
"""Seeds of sampled maps, of which the standard errors come."""

Maps = NDArray[np.float64]
"""Shape (seeds, elements)."""


@dataclass(frozen=True)
class Agreement:
    """How far apart our map and theirs are.

    Attributes:
        distance: relative L2 distance, or, of sampled maps, in standard errors; None where the model does not carry the
            method.
    """

    comparison: Comparison
    network: str
    file_format: str
    distance: float | None

    @property
    def limit(self) -> float:
        """Of the distance."""
        return SIGMAS if self.comparison.sampled else TOLERANCE

    @property
    def as_stated(self) -> bool:
        """Whether maps agree that have to."""
        return bool(self.comparison.deviation) or self.distance is None or self.distance <= self.limit


@contextmanager
def served(networks: Mapping[str, Case], formats: Iterable[str]) -> Iterator[Client]:
    """A client of a server with every network in every format."""
    with tempfile.TemporaryDirectory() as place:
        for name, case in networks.items():
            for file_format in formats:
                write_model(
                    case.module, file_format, Path(place) / "models" / model_name(name, file_format), SIDE, CLASSES
                )
        with serving(Path(place) / "models", 1, Path(place) / "log") as server:
            yield server.client


def model_name(network: str, file_format: str) -> str:
    """As it is served."""
    return f"{network.replace(' ', '-')}-{file_format}"


def agreements(
    client: Client, networks: Mapping[str, Case], formats: Iterable[str], wanted: Iterable[Comparison]
) -> Iterator[Agreement]:
    """Each comparison on each network; the references are asked once."""
    for comparison in wanted:
        for name in [own for own in networks if own in (comparison.networks or networks)]:
            case = networks[name]
            carriers = [
                own for own in formats if client.model(model_name(name, own)).methods[comparison.method].supported
            ]
            theirs = _theirs(comparison, case) if carriers else None
            for file_format in formats:
                distance = None
                if theirs is not None and file_format in carriers:
                    ours = _ours(client, model_name(name, file_format), comparison, case)
                    distance = (_in_standard_errors if comparison.sampled else _relative)(ours, theirs)
                yield Agreement(comparison, name, file_format, distance)


def _theirs(comparison: Comparison, case: Case) -> Maps:
    maps = []
    for seed in range(REPEATS if comparison.sampled else 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # what libraries draw from
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries announce their hooks, and that they ask inputs for gradients
            found = comparison.reference(case)
        maps.append(found.detach().numpy() if isinstance(found, torch.Tensor) else found)
    return _stacked(maps)


def _ours(client: Client, model: str, comparison: Comparison, case: Case) -> Maps:
    method = _method(comparison, case)
    seeds: Sequence[Any] = [method]
    if comparison.sampled:
        seeds = [replace(cast(Any, method), seed=seed) for seed in range(REPEATS)]
    result = client.explain(
        model, case.x.numpy(), method=seeds, targets=TARGET, baselines=_baselines(comparison, case), score="LOGIT"
    )
    return _stacked([own.tensor for own in result.attributions if own.tensor is not None])


def _stacked(maps: Sequence[NDArray[np.generic]]) -> Maps:
    return np.stack([np.asarray(own, np.float64).reshape(-1) for own in maps])


def _method(comparison: Comparison, case: Case) -> Method:
    """Ours, with its options for the case."""
    options = {name: value(case) if callable(value) else value for name, value in comparison.options.items()}
    return CLIENT_METHODS[comparison.method](**options)


def _baselines(comparison: Comparison, case: Case) -> list[NDArray[np.float32]] | None:
    guide = METHODS[comparison.method]().reading_guide
    count = 2 if guide.pools_baselines else int(guide.needs_baseline)
    return list(case.baselines[:count].numpy()) or None


def _relative(ours: Maps, theirs: Maps) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _in_standard_errors(ours: Maps, theirs: Maps) -> float:
    """The root mean square over elements; about 1 where nothing but chance differs."""
    variance = (ours.var(axis=0, ddof=1) + theirs.var(axis=0, ddof=1)) / REPEATS
    return float(np.linalg.norm(ours.mean(axis=0) - theirs.mean(axis=0)) / np.sqrt(variance.sum()))


# --- the page --------------------------------------------------------------------------------------------------------


def page(found: Sequence[Agreement]) -> str:
    """Of all agreements."""
    compared = dict.fromkeys(own.comparison for own in found)
    agreeing = [own for own in compared if not own.deviation]
    deviating = [own for own in compared if own.deviation]
    return TEMPLATE.format(
        command="python benchmarks/parity.py",
        versions=", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES if name not in missing_libraries()
        ),
        missing=", ".join(f"`{name}`" for name in missing_libraries()) or "none",
        networks=", ".join(dict.fromkeys(own.network for own in found)),
        tolerance=TOLERANCE,
        sigmas=SIGMAS,
        repeats=REPEATS,
        agreeing=_table(agreeing, found),
        deviating=_table(deviating, found) + "\n" + "\n".join(_explained(deviating)),
        alone=", ".join(f"`{name}`" for name in METHODS if name not in {own.method for own in compared}) or "none",
    )


def _table(compared: Sequence[Comparison], found: Sequence[Agreement]) -> str:
    lines = [f"| method | beside | {' | '.join(FORMATS)} | |", f"|---|---|{'---|' * len(FORMATS)}---|"]
    for own in compared:
        cells = [_cell([one for one in found if one.comparison is own and one.file_format == name]) for name in FORMATS]
        options = ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in own.options.items())
        ours = f"`{own.method}`" + (f" {options}" if options else "")
        lines.append(f"| {ours} | {own.library}: {own.call} | {' | '.join(cells)} | {own.reading} |")
    return "\n".join(lines) + "\n"


def _cell(found: Sequence[Agreement]) -> str:
    """The largest distance over networks, and how many of these carry the method."""
    distances = [own.distance for own in found if own.distance is not None]
    if not distances:
        return "not supported"
    worst = max(distances)
    shown = f"{worst:.1f} SE" if found[0].comparison.sampled else f"{worst:.0e}"
    mark = "" if all(own.as_stated for own in found) else " **differs**"
    return shown + mark + (f" ({len(distances)} of {len(found)})" if len(distances) < len(found) else "")


def _explained(deviating: Sequence[Comparison]) -> Iterator[str]:
    for own in deviating:
        yield f"- `{own.method}` beside {own.library}'s {own.call}. {own.deviation}"


TEMPLATE = """\
# Parity with other libraries

Written by `{command}`, which exports small networks ({networks}) as ONNX, `.pt2` and
TorchScript, serves them, and compares maps over gRPC with those that other libraries make of the torch modules, with
the same options. Libraries: {versions}. Not installed where the page was written: {missing}.
Quantus measures maps and makes none, and this server has none of its measures yet (`Evaluate` answers UNIMPLEMENTED):
there is nothing to compare. Lime's tabular explainer draws its samples from the distribution of training data, which a
served model does not have.

A figure is the largest over the networks: the relative L2 distance of the whole map, where the limit is
{tolerance:.0e}; or, of methods that draw samples, the distance in standard errors (SE) of the difference of the means
of {repeats} seeds each, as root mean square over elements, where the limit is {sigmas:g} and about 1 is chance. "(2 of
3)" says that one of the networks does not carry the method, such as a rule of rectifiers in a network without any; such
requests are refused by name.

## Where maps agree

{agreeing}
## Where they do not, and why

{deviating}

## Methods without a counterpart here

{alone}. Their own tests hold these.
"""


def main() -> None:
    """Writes the page; the exit status is 1 where maps differ that have to agree."""
    torch.set_num_threads(1)
    networks = cases()
    with served(networks, FORMATS) as client:
        found = list(agreements(client, networks, FORMATS, comparisons()))
    PAGE.write_text(page(found), encoding="utf-8")
    sys.exit(any(not own.as_stated for own in found))


if __name__ == "__main__":
    main()
