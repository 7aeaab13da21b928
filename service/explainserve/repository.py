"""The repository: holds the model versions that can be served. A bad one is kept with its reason, and never stops the
others."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from explainserve import placement
from explainserve.backends import LoadOptions
from explainserve.backends.trial import TrialLimits, Trials
from explainserve.backends.tried import Tried
from explainserve.errors import ExplainServeError, ModelRefused, NotFound, NotReady, Unsupported
from explainserve.model_folder import ModelFolder, discover
from explainserve.opening import DEFAULT_BATCH_ROWS, open_model
from explainserve.served_model import ServedModel

logger = logging.getLogger(__name__)


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
        since: time of `time.monotonic` at which this became known.
    """

    name: str
    version: int
    format: str
    state: ModelState
    reason: str = ""
    error_reason: str = ""
    replicas: tuple[ServedModel, ...] = ()
    since: float = field(default_factory=time.monotonic)


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
            NotReady: that version, or all of them, still load (MODEL_LOADING).
            Unsupported: that version, or all of them, failed to load (MODEL_FAILED).
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
    name, version = entry.name, entry.version
    subject = f"model {name!r} version {version}"
    if entry.state is ModelState.UNLOADED:
        raise NotFound("MODEL_UNLOADED", f"{subject} was unloaded", model=name, version=version)
    if entry.state is ModelState.LOADING:
        as_long_again = time.monotonic() - entry.since  # nothing tells how much of a load is left
        raise NotReady(
            "MODEL_LOADING", f"{subject} still loads; try again later", as_long_again, model=name, version=version
        )
    raise Unsupported(
        "MODEL_FAILED",
        f"{subject} failed to load: {entry.reason}",
        model=name,
        version=version,
        error_reason=entry.error_reason,
    )


def _failed(folder: ModelFolder, error: ExplainServeError) -> ModelEntry:
    reason = error.message.encode(errors="backslashreplace").decode()  # paths may hold what is no character
    logger.warning("model %s version %d is not served: %s", folder.name, folder.version, reason)
    return replace(_entry(folder, ModelState.FAILED), reason=reason, error_reason=error.reason)
