"""A trained model on disk: adapter/ (with the head), merged/, thresholds.json, training.json."""

import hashlib
import logging
import shutil
from pathlib import Path

import numpy as np

from tasks import files
from tasks.config import Config, Model
from tasks.errors import StepFailed, Unsuitable, UsageError
from tasks.labels import LABELS
from tasks.run import Run

log = logging.getLogger(__name__)

MAX_CHARS = 5000  # what a checkpoint was trained with that does not say, as those of before


def final(config: Config) -> Path:
    return config.workspace / "models" / "finetuned" / "final"


def require(folder: Path) -> Path:
    """The folder, if it is a checkpoint.

    Raises:
        UsageError: it is not; the message names what is missing.
    """
    for part in ("merged/config.json", "training.json"):
        if not (folder / part).is_file():
            raise UsageError(f"{folder} is not a checkpoint: it has no {part}; `python commands.py train` writes one")
    return folder


def thresholds(folder: Path) -> np.ndarray:
    """Probabilities per label, float64 [6]; 0.5 each for a model that was never evaluated."""
    file = folder / "thresholds.json"
    chosen = files.read_json(file) if file.exists() else {}
    return np.array([chosen.get(name, 0.5) for name in LABELS])


def settings(folder: Path) -> dict:
    """Who trained it on what: {run_id, base_model, base_sha256, max_length, max_chars, seed, model, merged_onto}."""
    return {"max_chars": MAX_CHARS} | files.read_json(folder / "training.json")


def save_thresholds(folder: Path, chosen: np.ndarray) -> None:
    files.write_json(folder / "thresholds.json", dict(zip(LABELS, chosen.tolist())))


def of_run(config: Config, run: Run) -> Path:
    """The checkpoint that this run trained.

    Raises:
        UsageError: models/finetuned/final is another run's.
    """
    folder = require(final(config))
    owner = settings(folder)["run_id"]
    if owner != run.id:
        raise UsageError(f"{folder} was trained by run {owner}, not {run.id}: run `python commands.py train` first")
    return folder


def of_candidate(config: Config, run: Run) -> Path:
    """The checkpoint of the version this run is about; one that is not at hand is rebuilt from the registry."""
    from tasks.promotion import registry

    return of_version(config, registry.candidate(config, run))


def of_version(config: Config, number: int, signed_as: tuple[str, ...] = ()) -> Path:
    """The checkpoint of a registry version: one that is at hand and has its content, else merged anew from its adapter.

    A folder's name, or its run, doesn't tell: a run may be trained again by hand, a registry be made anew. What MLflow
    has lost, or has in another form than it was registered, DVC may still have.

    Args:
        signed_as: names of the registered model that its signature may be for; by default the one that it has.

    Raises:
        Unsigned: no step has written where the version comes from.
        Gone: neither has it.
    """
    from tasks.promotion import registry
    from tasks.promotion.refusals import Refused

    version = registry.require_signed(config, number, names=signed_as)
    wanted = version.tags.get("checkpoint_sha256")
    rebuilt = config.workspace / "models" / "finetuned" / f"version-{number}"
    for folder in (final(config), rebuilt):
        if (folder / "merged").exists() and content_hash(folder) == wanted:
            return folder
    try:
        rebuild(config, version, rebuilt)
    except (Refused, OSError, registry.Changed) as error:  # its artifacts are gone, or a hand has changed them
        said = " ".join(str(error).split())
        lost = f"MLflow has lost the model of version {number} ({said[:200]})"
        problem = said if isinstance(error, registry.Changed) else lost
        log.warning("%s", problem)
        bring_back(config, version.tags.get("model_version"), rebuilt, problem)
    return rebuilt


def of_serving(config: Config, serving) -> Path:
    """The checkpoint of what serves (an in_service.Serving), by whatever still leads to it: the registry's version, the
    same model under another number or name there, or DVC, by what its engine or the run that made it says.

    Of a version that is not signed nothing is taken from MLflow: what serves is then known by its engine alone.

    Raises:
        Gone: nothing does.
    """
    from tasks.promotion import in_service

    if serving.version is not None and not serving.unsigned:
        return of_version(config, serving.version)
    if serving.elsewhere:
        name, number = serving.elsewhere
        mlflow = config.mlflow.model_copy(update={"registered_model": name})
        return of_version(config.model_copy(update={"mlflow": mlflow}), number, (name, config.mlflow.registered_model))
    if not serving.on_disk:
        raise Gone(serving.unsigned)
    target = final(config).with_name(f"serving-{serving.engine[:12]}")
    made_of = in_service.made_of(config, serving)
    for folder in (final(config), target):
        if made_of is not None and (folder / "merged").exists() and content_hash(folder) == made_of:
            return folder
    if not target.exists():
        problem = serving.unsigned or f"the registry has no version with the model of {serving}"
        bring_back(config, in_service.model_version(config, serving), target, problem)
    return target


class Gone(StepFailed):
    """A checkpoint is nowhere any more."""


def bring_back(config: Config, md5: str | None, target: Path, problem: str) -> None:
    """Puts the version `md5` of a checkpoint, as `register` has given it to DVC, into `target`.

    Raises:
        Gone: DVC does not have it, or nobody knows its MD5; the message begins with `problem`.
    """
    from tasks.data import versions

    if md5 is None:
        raise Gone(f"{problem}, and no run folder in {config.workspace / 'runs'} says which one DVC would have")
    try:
        with versions.fetched(config, {"final": md5}) as place, files.new_folder(target) as folder:
            shutil.copytree(place / "final", folder, dirs_exist_ok=True)
    except StepFailed as error:
        raise Gone(f"{problem}, and {error}") from None
    log.info("the checkpoint is back from DVC, version %s", md5)


def content_hash(folder: Path) -> str | None:
    """SHA-256 over what a training and its evaluation made: adapter, head and thresholds; None while there are none."""
    if not ((folder / "adapter").exists() and (folder / "thresholds.json").exists()):
        return None
    parts = files.sha256(folder / "adapter") + files.sha256(folder / "thresholds.json")
    return hashlib.sha256(parts.encode()).hexdigest()


def rebuild(config: Config, version, target: Path) -> None:
    """Merges the adapter of a registry version, whose record is signed, onto its base again; such folders of versions
    without an alias go first."""
    from tasks.promotion import registry

    kept = {f"version-{other}" for other in {int(version.version), *registry.aliased(config)}}
    for folder in [*target.parent.glob("version-*"), *target.parent.glob("serving-*")]:  # each as large as the base
        if folder.name not in kept:
            shutil.rmtree(folder)
    log.info("rebuilding version %s from the registry", version.version)
    with files.new_folder(target) as folder:
        registry.fetch(config, version, folder)
        add_merged(folder, config.workspace)


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Puts a checkpoint's tokenizer into target/tokenizer: where merged/ stays behind, `add_merged` needs it."""
    from tasks.training import model

    model.load_tokenizer(folder / "merged").save_pretrained(target / "tokenizer")


def add_merged(folder: Path, workspace: Path) -> None:
    """Writes merged/ from adapter/, tokenizer/ and the base.

    Raises:
        StepFailed: the base model at hand is not the one that the adapter was trained on.
    """
    from tasks.training import base_model, model

    training = settings(folder)
    config = Model.model_validate(training["model"])
    base = base_model.resolve(config, training["seed"], workspace)
    found = base_model.content_hash(base)
    if found != training["base_sha256"]:
        raise Unsuitable(
            f"this adapter was trained on a base with hash {training['base_sha256'][:12]}, but {base} has "
            f"{found[:12]}: bring that base back, or retrain"
        )
    onto = training.get("merged_onto", "plain")
    model.merge(config, base, folder / "adapter", onto).save_pretrained(folder / "merged")
    model.load_tokenizer(folder / "tokenizer").save_pretrained(folder / "merged")
