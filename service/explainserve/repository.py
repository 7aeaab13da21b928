"""The model folder: finds model versions, checks each, and holds those that can be served.

    models/<name>/[model.toml]  models/<name>/<version>/model.onnx | model.pt2 | model.pt | model.ts

A version's own model.toml replaces the one beside the versions; the two are never merged. A bad model is kept with its
reason and never stops the others.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from explainserve import backends, placement
from explainserve.backends import LOADERS, LoadedModel, LoadOptions, batch_size, precision, probe
from explainserve.backends.batch_size import BatchSize
from explainserve.backends.probe import ProbeResult
from explainserve.backends.trial import TrialLimits, Trials
from explainserve.backends.tried import Tried
from explainserve.baselines import NAMED, Data, InputBaseline
from explainserve.errors import ExplainServeError, ModelRefused, NotFound, Unsupported
from explainserve.fingerprint import fingerprint
from explainserve.model_config import BaselineConfig, ModelConfig, Precision, read_model_config
from explainserve.signature import InputSpec, Layer, Signature

logger = logging.getLogger(__name__)

CONFIG_NAME = "model.toml"
DEFAULT_BATCH_ROWS = 64
NO_VERSION = 0
"""Stands in for the version of a model folder that has none."""

FORMATS = {".onnx": "onnx", ".pt2": "torch_export", ".pt": "torchscript", ".ts": "torchscript"}
"""Names of file formats, by suffix."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")

Baselines = Mapping[str, Mapping[str, NDArray[np.float32]]]


@dataclass(frozen=True)
class ModelFolder:
    """One version's folder, as found; nothing in it has been read.

    Attributes:
        name: of the model's folder; bytes that are no UTF-8 are written as \\xNN.
        version: at least 1, or NO_VERSION where the model's folder holds no version.
        files: the model files in it; one where all is well.
        config_path: the model.toml that applies, or None.
        unreadable: why the folder cannot be read, or "".
    """

    name: str
    version: int
    folder: Path
    files: tuple[Path, ...] = ()
    config_path: Path | None = None
    unreadable: str = ""

    @property
    def path(self) -> Path | None:
        """The model file, or None where there is not exactly one."""
        return self.files[0] if len(self.files) == 1 else None

    @property
    def format(self) -> str:
        """A value of FORMATS, or "" where there is not exactly one model file."""
        return FORMATS[self.path.suffix] if self.path else ""

    def config(self) -> ModelConfig:
        """What its model.toml says; raises ModelRefused as `read_model_config` does."""
        return ModelConfig() if self.config_path is None else read_model_config(self.config_path)

    def model_file(self) -> Path:
        """The model file.

        Raises:
            ModelRefused: NO_MODEL_FILE, AMBIGUOUS_MODEL_FILE, MODEL_FOLDER_UNREADABLE, or BAD_MODEL_NAME.
        """
        if not _NAME.fullmatch(self.name):
            raise ModelRefused(
                "BAD_MODEL_NAME",
                f"'{self.name}' is no model name: at most 128 of A-Z a-z 0-9 . _ -, a letter or digit first",
                name=self.name,
            )
        if self.unreadable:
            raise ModelRefused(
                "MODEL_FOLDER_UNREADABLE", f"the folder cannot be read: {self.unreadable}", folder=self.folder.name
            )
        if self.path is not None:
            return self.path
        names = ", ".join(path.name for path in self.files)
        if names:
            raise ModelRefused("AMBIGUOUS_MODEL_FILE", f"{self.folder.name} holds {names}; keep one", files=names)
        expected = " or ".join(f"model{suffix}" for suffix in FORMATS)
        where = "VERSION/" if self.version == NO_VERSION else ""
        raise ModelRefused("NO_MODEL_FILE", f"{self.folder.name} holds no {where}{expected}", folder=self.folder.name)


@dataclass(frozen=True)
class MissingCapability:
    """What a method needs and a model lacks: "gradient", "layers", or "rule:" and the name of a gradient rule."""

    capability: str
    reason: str


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model version that answers requests, on one of the devices that hold it: a replica.

    Attributes:
        device: name of the device whose engine evaluates it.
        file_bytes: size of the model file and of its external data files.
        sha256: of the model file followed by its external data files in the order of their names, and the patterns
            beside it, hexadecimal.
        format: a value of FORMATS.
        max_batch_rows: rows that may share a micro-batch; 1 where the model sees its rows together.
        seconds_per_row: of a full micro-batch, measured at load; None where it was not.
        micro_batch_bytes: memory that one takes at most on its device; None where it was not measured.
        default_target: position in the class axis of the first output, or None where argmax is explained.
        data_baselines: by name, for each input, float32 in MODEL space and in the shape of one instance.
    """

    name: str
    version: int
    device: str
    path: Path
    file_bytes: int
    sha256: str
    format: str
    config: ModelConfig
    loaded: LoadedModel
    probe: ProbeResult
    max_batch_rows: int
    default_target: int | None = None
    data_baselines: Baselines = field(default_factory=dict)
    seconds_per_row: float | None = None
    micro_batch_bytes: int | None = None

    @property
    def signature(self) -> Signature:
        """Inputs and outputs."""
        return self.loaded.signature

    @cached_property
    def identity(self) -> bytes:
        """Digest of all of it that decides answers: its files, its model.toml, and the files that one names."""
        stated = self.config.model_dump_json()
        return fingerprint((self.name, self.version, self.sha256, stated, self.signature, self.data_baselines))

    @property
    def precision(self) -> str:
        """The precision that model.toml chooses, or else the element type of the file."""
        if self.config.precision is not Precision.FLOAT32:
            return str(self.config.precision.value)
        types = [spec.dtype.name for spec in self.signature.inputs if spec.differentiable]
        return str(types[0]) if types else "float32"

    @property
    def row_by_row(self) -> bool:
        """Whether rows cannot be evaluated together."""
        return _row_by_row(self.loaded, self.probe)

    @property
    def runs_on(self) -> str:
        """The device that evaluates it: another one where its own is missing and the server may fall back."""
        return placement.where_it_runs(self.device, self.loaded.device)

    @property
    def default_baseline(self) -> InputBaseline:
        """The baseline where a request names none."""
        name = self.config.default_baseline
        return Data(name) if name in self.data_baselines else NAMED[name]

    @property
    def differentiable(self) -> bool:
        """Whether gradients of the model can be taken."""
        return not self.undifferentiable_reason

    @property
    def undifferentiable_reason(self) -> str:
        """Why no gradient can be taken, or ""."""
        if self.loaded.gaps:
            first, others = self.loaded.gaps[:3], len(self.loaded.gaps[3:])
            return "; ".join([*map(str, first), *([f"and {others} more"] if others else [])])
        return self.signature.undifferentiable_reason

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Those of the graph, then those that only the configuration names."""
        known = {layer.name for layer in self.loaded.layers}
        return (*self.loaded.layers, *(Layer(name) for name in self.config.layers if name not in known))

    def missing(self, rule: str, *, layers: bool, cut: bool = False) -> MissingCapability | None:
        """What keeps methods with these needs from explaining it, or None.

        Args:
            rule: name of the gradient rule, or "" for none.
            layers: whether layers are reached.
            cut: whether layers are explained in the place of inputs, which then need no gradient.
        """
        if rule and not (self.differentiable or cut):
            return MissingCapability("gradient", self.undifferentiable_reason)
        unknown = self.loaded.layers_refusal or f"backend {self.loaded.backend} has no gradient rule {rule!r}"
        reason = self.loaded.gradient_rules.get(rule, unknown) if rule else ""
        if reason:
            return MissingCapability(f"rule:{rule}", reason)
        if layers and self.loaded.layers_refusal:
            return MissingCapability("layers", self.loaded.layers_refusal)
        return None

    def check_supports(self, rule: str, *, layers: bool, cut: bool = False) -> None:
        """Raises Unsupported where a capability is missing: a gradient (NOT_DIFFERENTIABLE), or a gradient rule or
        layers (CAPABILITY_MISSING). GetModel says so beforehand.
        """
        missing = self.missing(rule, layers=layers, cut=cut)
        if missing is None:
            return
        if missing.capability == "gradient":
            self._check_differentiable()
        raise Unsupported(
            "CAPABILITY_MISSING",
            f"model {self.name!r} lacks {missing.capability}: {missing.reason}",
            model=self.name,
            capability=missing.capability,
        )

    def _check_differentiable(self) -> None:
        if not self.differentiable:
            raise Unsupported(
                "NOT_DIFFERENTIABLE",
                f"model {self.name!r} has no gradient: {self.undifferentiable_reason}",
                model=self.name,
                gap_count=len(self.loaded.gaps),
                gaps="; ".join(f"{gap.operator} {gap.node}".strip() for gap in self.loaded.gaps[:8]),
            )


class ModelState(enum.Enum):
    """Life of a model version."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    UNLOADED = "unloaded"


@dataclass(frozen=True, eq=False)
class ModelEntry:
    """What is known of one version.

    Attributes:
        reason: a sentence why it failed; "" otherwise.
        error_reason: the UPPER_SNAKE reason why it failed; "" otherwise.
        replicas: the model on each device that holds it, where READY; in the server's order of devices.
    """

    name: str
    version: int
    format: str
    state: ModelState
    reason: str = ""
    error_reason: str = ""
    replicas: tuple[ServedModel, ...] = ()


def discover(root: Path) -> list[ModelFolder]:
    """Every version of every model below `root`, by name and version. Hidden folders and plain files are passed over.

    Raises:
        NotFound: `root` is no folder, or cannot be read (NO_MODELS_FOLDER).
    """
    if not root.is_dir():
        raise _no_models_folder(root, "is not there")
    try:
        models = _subfolders(root)
    except OSError as error:
        raise _no_models_folder(root, f"cannot be read: {_cause(error)}") from error
    return [version for model in models for version in _versions(model)]


def open_model(
    folder: ModelFolder,
    options: LoadOptions,
    max_batch_rows: int = DEFAULT_BATCH_ROWS,
    trials: Trials | None = None,
    warm_up_seconds: float = 0.0,
) -> ServedModel:
    """Reads, checks, probes and times one version on the device of the options.

    Args:
        max_batch_rows: where the model states no limit of its own.
        trials: try the model in another process before it is loaded in this one; None trusts it.
        warm_up_seconds: to find the fastest size of micro-batches; see `batch_size.fastest`.

    Raises:
        ModelRefused: it cannot be served; the reason says why.
    """
    path, config = folder.model_file(), folder.config()
    files = model_files(path, trials)
    # Before loading: a backend may run what a file holds.
    sha256 = digest(files)
    _check_sha256(config.sha256, sha256, path)
    _check_default_baseline(config)
    if trials is not None:
        trials.check(files, sha256, config, options)
    loaded = backends.load(path, config, options)
    _check_default_baseline_inputs(config, loaded.signature)
    found = _checked(loaded, path, config, options)
    size = _batch_size(loaded, found, config.limits.max_batch_rows or max_batch_rows, warm_up_seconds)
    return ServedModel(
        name=folder.name,
        version=folder.version,
        device=options.device,
        path=path,
        file_bytes=sum(file.stat().st_size for file in files),
        sha256=sha256,
        format=folder.format,
        config=config,
        loaded=loaded,
        probe=found,
        max_batch_rows=size.rows,
        seconds_per_row=size.seconds_per_row,
        micro_batch_bytes=size.peak_bytes,
        default_target=_default_target(config.default_target, loaded.signature),
        data_baselines={
            name: _data_baseline(name, table, folder, loaded.signature) for name, table in config.baselines.items()
        },
    )


def _checked(loaded: LoadedModel, path: Path, config: ModelConfig, options: LoadOptions) -> ProbeResult:
    """What is found out about a model, beside itself in float32 where it is served in another precision."""
    if config.precision is Precision.FLOAT32:
        return probe.check(loaded)
    in_float32 = config.model_copy(update={"precision": Precision.FLOAT32})
    reference = backends.load(path, in_float32, precision.reference_options(options))
    return precision.check(loaded, reference, config.precision.value)


def model_files(path: Path, trials: Trials | None = None) -> tuple[Path, ...]:
    """A model file, then its external data files in the order of their names, and the patterns beside it.

    Args:
        trials: have another process read the file; None trusts it.

    Raises:
        ModelRefused: the file is not readable (MODEL_FILE_UNREADABLE) or not as its suffix says, or its backend is not
            installed.
    """
    if path.suffix != ".onnx":
        return (path,)
    backends.loader(path.suffix)  # says what to install where onnx is missing
    from explainserve.backends import onnx_file

    with _told_unreadable(path):
        return onnx_file.files(path) if trials is None else trials.files(path)


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of these files, one after the other, hexadecimal.

    Raises:
        ModelRefused: one is not readable (MODEL_FILE_UNREADABLE).
    """
    total = hashlib.sha256()
    with _told_unreadable(files[0]):
        for file in files:
            with file.open("rb") as data:
                while block := data.read(1 << 20):
                    total.update(block)
    return total.hexdigest()


@contextmanager
def _told_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = Path(error.filename or path).name
        raise ModelRefused("MODEL_FILE_UNREADABLE", f"{name} cannot be read: {_cause(error)}", file=name) from error


Report = Callable[[ModelEntry], None]
"""Told of each new state of each version."""


class Repository:
    """The versions below a folder and what became of each.

    Entries are replaced, never changed, so that readers on other threads see one state or the next. A model that is
    replaced or unloaded still serves who holds it, and is freed with its last request. Loads and unloads come from one
    thread at a time.

    Args:
        root: the model folder.
        max_batch_rows: most rows of a micro-batch where a model states no limit of its own.
        trial_limits: of the process in which each model is tried before it is loaded in this one; None trusts all.
        tried: models that need no trial any more.
        warm_up_seconds: in which the fastest size of a model's micro-batches is found; 0 does without.
        report: told of every new state.
        devices: of the server; by default that of the options alone.
    """

    def __init__(
        self,
        root: Path,
        options: LoadOptions,
        max_batch_rows: int = DEFAULT_BATCH_ROWS,
        trial_limits: TrialLimits | None = None,
        tried: Tried | None = None,
        warm_up_seconds: float = 0.0,
        report: Report = lambda entry: None,
        devices: Sequence[str] = (),
    ) -> None:
        self._root = root
        self._options = options
        self._max_batch_rows = max_batch_rows
        self._trial_limits = trial_limits
        self._tried = tried or Tried()
        self._warm_up_seconds = warm_up_seconds
        self._report = report
        self._devices = tuple(devices) or (options.device,)
        self._entries: dict[tuple[str, int], ModelEntry] = {}

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """All versions, by name and version."""
        return tuple(entry for _, entry in sorted(self._entries.copy().items()))

    def load_all(self) -> None:
        """Loads every version that is there.

        Raises:
            NotFound: as `find_all`.
        """
        self.load_found(self.find_all())

    def find_all(self) -> list[ModelFolder]:
        """Every version that is there; each is LOADING from now on.

        Raises:
            NotFound: the model folder is not there (NO_MODELS_FOLDER).
        """
        folders = discover(self._root)
        for folder in folders:
            self._put(_entry(folder, ModelState.LOADING))
        return folders

    def load_found(self, folders: Sequence[ModelFolder]) -> None:
        """Loads versions that were found; one that cannot be served keeps its reason."""
        with self._trials() as trials:
            for folder in folders:
                with suppress(ExplainServeError):
                    self._load(folder, trials)

    def load(self, name: str, version: int | None = None) -> ModelEntry:
        """Loads a version from the folder as it is now, by default the highest that is there.

        A version that is served already answers until the new one is ready, and goes on where that cannot be served.

        Raises:
            NotFound: the folder holds no such model (UNKNOWN_MODEL) or version (UNKNOWN_VERSION), or is not there.
            ModelRefused: it cannot be served; the reason says why.
        """
        versions = {folder.version: folder for folder in discover(self._root) if folder.name == name}
        self._forget(name, versions)
        _check_known(name, version, versions, (folder.name for folder in discover(self._root)))
        folder = versions[max(versions) if version is None else version]
        if not self._serves(folder):
            self._put(_entry(folder, ModelState.LOADING))
        with self._trials() as trials:
            return self._load(folder, trials)

    def unload(self, name: str, version: int | None = None) -> ModelEntry:
        """Serves a version no longer, by default the highest that is ready; requests that have it finish.

        Raises:
            NotFound: UNKNOWN_MODEL or UNKNOWN_VERSION.
        """
        entry = self._known(name, version)
        self._put(ModelEntry(entry.name, entry.version, entry.format, ModelState.UNLOADED))
        return self._entries[entry.name, entry.version]

    def fail(self, model: ServedModel, error: ExplainServeError) -> None:
        """Serves a replica no longer because of what it did, until the model is loaded again; others are served on."""
        entry = self._entries.get((model.name, model.version))
        if entry is None or model not in entry.replicas:  # others have replaced it
            return
        left = tuple(replica for replica in entry.replicas if replica is not model)
        if left:
            self._put(replace(entry, replicas=left))
        else:
            state, reason = ModelState.FAILED, error.message
            self._put(replace(entry, state=state, reason=reason, error_reason=error.reason, replicas=()))

    def index(self) -> tuple[ModelEntry, ...]:
        """All versions, and those in the folder that were never loaded, by name and version.

        Raises:
            NotFound: the model folder is not there (NO_MODELS_FOLDER).
        """
        found = {(folder.name, folder.version): _entry(folder, ModelState.UNLOADED) for folder in discover(self._root)}
        return tuple(entry for _, entry in sorted((found | self._entries).items()))

    def entry(self, model: ServedModel) -> ModelEntry:
        """The entry of a served model."""
        return self._entries[model.name, model.version]

    def replicas(self, model: ServedModel) -> tuple[ServedModel, ...]:
        """The model on each device that holds it now; itself alone where it has been replaced."""
        entry = self._entries.get((model.name, model.version))
        return entry.replicas if entry is not None and model in entry.replicas else (model,)

    def get(self, name: str, version: int | None = None) -> ServedModel:
        """The model of that name, by default its highest version that is ready, on the first device that holds it.

        Raises:
            NotFound: UNKNOWN_MODEL or UNKNOWN_VERSION; metadata tell what there is. That version, or all of them, were
                unloaded (MODEL_UNLOADED).
            Unsupported: that version, or all of them, failed to load (MODEL_FAILED) or still load (MODEL_LOADING).
        """
        return _served(self._known(name, version))

    def _known(self, name: str, version: int | None) -> ModelEntry:
        """The entry of a version, by default of the highest that is ready."""
        versions = {entry.version: entry for entry in self.entries if entry.name == name}
        _check_known(name, version, versions, (entry.name for entry in self.entries))
        return _highest_ready(versions) if version is None else versions[version]

    def _load(self, folder: ModelFolder, trials: Trials | None) -> ModelEntry:
        """Opens a version beside the one that is served; a reader of entries sees the old one or the new one."""
        try:
            replicas = self._opened(folder, trials)
        except ExplainServeError as error:
            failed = _failed(folder, error)
            if not self._serves(folder):
                self._put(failed)
            raise
        self._put(replace(_entry(folder, ModelState.READY), replicas=replicas))
        return self._entries[folder.name, folder.version]

    def _opened(self, folder: ModelFolder, trials: Trials | None) -> tuple[ServedModel, ...]:
        try:
            devices = placement.placed(folder.config(), self._held_bytes(folder))
            replicas = tuple(self._replica(folder, device, trials) for device in devices)
        except ExplainServeError:
            raise
        except Exception as error:  # whatever a library raises on a bad file, the other models are served
            logger.exception("model %s version %d failed to load", folder.name, folder.version)
            raise ModelRefused("LOAD_FAILED", f"{type(error).__name__}: {error}") from error
        _check_alike(replicas)
        return replicas

    def _replica(self, folder: ModelFolder, device: str, trials: Trials | None) -> ServedModel:
        options = replace(self._options, device=device)
        return open_model(folder, options, self._max_batch_rows, trials, self._warm_up_seconds)

    def _held_bytes(self, folder: ModelFolder) -> dict[str, int]:
        """Bytes of models on each device, without those of a version that is about to be replaced."""
        held = dict.fromkeys(self._devices, 0)
        for entry in self.entries:
            for replica in entry.replicas:
                if (entry.name, entry.version) != (folder.name, folder.version):
                    held[replica.device] += replica.file_bytes
        return held

    def _serves(self, folder: ModelFolder) -> bool:
        known = self._entries.get((folder.name, folder.version))
        return known is not None and bool(known.replicas)

    def _trials(self) -> AbstractContextManager[Trials | None]:
        return nullcontext() if self._trial_limits is None else Trials(self._trial_limits, self._tried)

    def _forget(self, name: str, versions: Collection[int]) -> None:
        """Drops what is known of versions of a model that have left the folder and are not served."""
        for entry in self.entries:
            if entry.name == name and entry.version not in versions and not entry.replicas:
                del self._entries[entry.name, entry.version]

    def _put(self, entry: ModelEntry) -> None:
        self._entries[entry.name, entry.version] = entry
        self._report(entry)


def _no_models_folder(root: Path, cause: str) -> NotFound:
    """Where the folder is stands in the log alone: a client may be anybody."""
    logger.error("the model folder %s %s", root, cause)
    return NotFound("NO_MODELS_FOLDER", f"the server's model folder {cause}")


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith(".") and _may_be_folder(child))


def _may_be_folder(path: Path) -> bool:
    """What cannot be looked at is taken for a folder, so that it is told of."""
    try:
        return path.is_dir()
    except OSError:
        return True


def _versions(model: Path) -> Iterator[ModelFolder]:
    """Version folders are named by whole numbers from 1; a model without any is told of, not passed over."""
    name = os.fsencode(model.name).decode(errors="backslashreplace")
    try:
        folders = [child for child in _subfolders(model) if _VERSION.fullmatch(child.name)]
    except OSError as error:
        yield ModelFolder(name, NO_VERSION, model, unreadable=_cause(error))
        return
    if not folders:
        yield ModelFolder(name, NO_VERSION, model)
    for folder in sorted(folders, key=lambda child: int(child.name)):
        yield _version(name, folder)


def _version(name: str, folder: Path) -> ModelFolder:
    try:
        files = sorted(folder / f"model{suffix}" for suffix in LOADERS if (folder / f"model{suffix}").is_file())
        configs = [path for path in (folder / CONFIG_NAME, folder.parent / CONFIG_NAME) if path.is_file()]
    except OSError as error:
        return ModelFolder(name, int(folder.name), folder, unreadable=_cause(error))
    return ModelFolder(name, int(folder.name), folder, tuple(files), configs[0] if configs else None)


def _cause(error: OSError) -> str:
    """Without the path, which is the server's own business."""
    return error.strerror or type(error).__name__


def _check_alike(replicas: Sequence[ServedModel]) -> None:
    """A request is checked against one replica and evaluated by any."""
    first = replicas[0]
    for other in replicas[1:]:
        if (other.identity, other.differentiable) != (first.identity, first.differentiable):
            raise ModelRefused(
                "REPLICAS_DIFFER",
                f"on {other.device} the model is another one than on {first.device}: its file changed while it was "
                "read, or it has a gradient on one of them only; then model.toml should name one kind of devices",
                devices=f"{first.device}, {other.device}",
            )


def _check_sha256(expected: str | None, actual: str, path: Path) -> None:
    if expected is not None and expected != actual:
        raise ModelRefused(
            "SHA256_MISMATCH",
            f"{path.name} has sha256 {actual}, model.toml expects {expected}",
            expected=expected,
            actual=actual,
        )


def _check_default_baseline(config: ModelConfig) -> None:
    if config.default_baseline not in NAMED and config.default_baseline not in config.baselines:
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"default_baseline {config.default_baseline!r} is none of {', '.join(NAMED)} and no [baselines] table",
            default_baseline=config.default_baseline,
        )


def _check_default_baseline_inputs(config: ModelConfig, signature: Signature) -> None:
    """Requests that name no baseline would all fail where the default one lacks an input."""
    table = config.baselines.get(config.default_baseline)
    lacking = sorted(set(signature.differentiable_inputs) - table.files.keys()) if table is not None else []
    if lacking:
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"default_baseline {config.default_baseline!r} has no file for {', '.join(lacking)}; "
            "it needs one for every floating-point input, such as one of zeros",
            default_baseline=config.default_baseline,
            inputs=", ".join(lacking),
        )


def _batch_size(loaded: LoadedModel, found: ProbeResult, limit: int, seconds: float) -> BatchSize:
    return batch_size.fastest(loaded, 1 if _row_by_row(loaded, found) else limit, seconds)


def _row_by_row(loaded: LoadedModel, found: ProbeResult) -> bool:
    batched = all(spec.batched for spec in loaded.signature.inputs)
    return not (batched and found.rows_independent) or loaded.fixed_batch


def _default_target(stated: int | str | None, signature: Signature) -> int | None:
    """Resolves a label to its position; "argmax", or nothing, is None."""
    output = signature.outputs[0]
    if stated is None or (stated == "argmax" and stated not in output.labels):
        return None
    if isinstance(stated, str):
        if stated not in output.labels:
            raise ModelRefused(
                "CONFIG_MISMATCH",
                f"default_target {stated!r} is no label of output {output.name!r}",
                default_target=stated,
            )
        return output.labels.index(stated)
    size = None if output.class_axis is None else output.axes[output.class_axis].size
    if stated < 0 or (size is not None and stated >= size):
        raise ModelRefused(
            "CONFIG_MISMATCH", f"default_target {stated} of {size} classes", default_target=stated, class_count=size
        )
    return stated


def _data_baseline(
    name: str, table: BaselineConfig, folder: ModelFolder, signature: Signature
) -> dict[str, NDArray[np.float32]]:
    """Reads the .npy files of one `[baselines.NAME]` table; they lie in the folder of its model.toml."""
    assert folder.config_path is not None, "a baseline is stated by a model.toml"
    specs = {spec.name: spec for spec in signature.inputs if spec.differentiable}
    unknown = ", ".join(sorted(table.files.keys() - specs.keys()))
    if unknown:
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"baseline {name!r} names {unknown}, no floating-point input",
            baseline=name,
            input=unknown,
        )
    return {i: _read_baseline(name, folder.config_path.parent / file, specs[i]) for i, file in table.files.items()}


def _read_baseline(name: str, file: Path, spec: InputSpec) -> NDArray[np.float32]:
    try:
        values: NDArray[np.generic] = np.load(file, allow_pickle=False)
        array = np.asarray(values, np.float32, order="C")
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ModelRefused(
            "BASELINE_UNREADABLE", f"baseline {name!r}: {file.name} is no .npy file of numbers: {error}", baseline=name
        ) from error
    expected = tuple(axis.size for axis in spec.instance_axes)
    fits = len(expected) == array.ndim and all(
        size in (None, extent) for size, extent in zip(expected, array.shape, strict=True)
    )
    if not fits or not np.isfinite(array).all():
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"baseline {name!r}: {file.name} has shape {array.shape}, "
            f"input {spec.name!r} takes finite values of {expected}",
            baseline=name,
            expected=expected,
            actual=array.shape,
        )
    array.setflags(write=False)
    return array


def _entry(folder: ModelFolder, state: ModelState) -> ModelEntry:
    return ModelEntry(folder.name, folder.version, folder.format, state)


def _check_known(name: str, version: int | None, versions: Collection[int], names: Iterable[str]) -> None:
    """Raises NotFound (UNKNOWN_MODEL, UNKNOWN_VERSION) where a model has no versions, or not this one."""
    if not versions:
        known = ", ".join(sorted(set(names)))
        raise NotFound("UNKNOWN_MODEL", f"no model {name!r}; there are {known or 'none'}", model=name, models=known)
    if version is not None and version not in versions:
        known = ", ".join(map(str, versions))
        raise NotFound(
            "UNKNOWN_VERSION",
            f"model {name!r} has no version {version}; it has {known}",
            model=name,
            version=version,
            versions=known,
        )


def _highest_ready(versions: Mapping[int, ModelEntry]) -> ModelEntry:
    """The highest version that is ready; where none is, the highest, so that its reason is told."""
    ready = [number for number, entry in versions.items() if entry.state is ModelState.READY]
    return versions[max(ready or versions)]


def _served(entry: ModelEntry) -> ServedModel:
    if entry.replicas:
        return entry.replicas[0]
    if entry.state is ModelState.UNLOADED:
        raise NotFound(
            "MODEL_UNLOADED",
            f"model {entry.name!r} version {entry.version} was unloaded",
            model=entry.name,
            version=entry.version,
        )
    state = "still loads" if entry.state is ModelState.LOADING else f"failed to load: {entry.reason}"
    raise Unsupported(
        "MODEL_LOADING" if entry.state is ModelState.LOADING else "MODEL_FAILED",
        f"model {entry.name!r} version {entry.version} {state}",
        model=entry.name,
        version=entry.version,
        error_reason=entry.error_reason,
    )


def _failed(folder: ModelFolder, error: ExplainServeError) -> ModelEntry:
    reason = error.message.encode(errors="backslashreplace").decode()  # paths may hold what is no character
    logger.warning("model %s version %d is not served: %s", folder.name, folder.version, reason)
    return replace(_entry(folder, ModelState.FAILED), reason=reason, error_reason=error.reason)
