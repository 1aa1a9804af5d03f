"""A run is a folder: `workspace/runs/<run_id>/` holds the configuration and one `<step>.json` per finished step.

Steps find what earlier steps did here and nowhere else. The DAG names its run in the environment (TOXIC_RUN_ID); by
hand, `download` opens a new run and every other step means the newest one.
"""

import logging
import re
import shutil
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import yaml

from tasks import files
from tasks.config import Config
from tasks.errors import UsageError, without_credentials

log = logging.getLogger(__name__)

# In the order of the DAG. Running a step takes back the results of those after it: they no longer hold.
STEPS = (
    "download",
    "validate_raw",
    "prepare",
    "validate_prepared",
    "train",
    "evaluate",
    "register",
    "gate",
    "report",
    "decide",
    "export_onnx",
    "build_engine",
    "stage",
    "swap",
)

# Folders in models/ that hold one folder per run: what it exports and builds on its way into service, gigabytes each.
BUILDS = ("exported", "engine")

# The command that writes a step's result, where it is not called like the step.
_COMMANDS = {"validate_raw": "validate --what=raw", "validate_prepared": "validate --what=prepared"}


@dataclass(frozen=True)
class Run:
    """One retraining, or one release: its id and its folder."""

    id: str
    folder: Path

    def has(self, step: str) -> bool:
        return self._file(step).exists()

    def result(self, step: str) -> dict:
        """What `step` found in this run.

        Raises:
            UsageError: it has not finished here; the message names the command that does it.
        """
        if not self.has(step):
            raise UsageError(
                f"run {self.id} has no result of {step}: run `python commands.py {_COMMANDS.get(step, step)}` first"
            )
        return files.read_json(self._file(step))

    def save(self, step: str, result: dict) -> None:
        files.write_json(self._file(step), result)

    def forget_from(self, step: str) -> None:
        """Removes the results of `step` and of every step after it."""
        for later in STEPS[STEPS.index(step) :]:
            self._file(later).unlink(missing_ok=True)

    def _file(self, step: str) -> Path:
        return self.folder / f"{step}.json"


def new_id() -> str:
    return datetime.now(timezone.utc).strftime("manual-%Y-%m-%dT%H-%M-%S-%f")


def newest(workspace: Path) -> Run | None:
    """The run that was opened last, or None in a fresh workspace."""
    return next(iter(opened(workspace)), None)


def opened(workspace: Path) -> list[Run]:
    """All runs that are kept, the newest first."""
    found = [(files.read_json(file)["created_at"], file.parent) for file in workspace.glob("runs/*/run.json")]
    return [Run(folder.name, folder) for _, folder in sorted(found, reverse=True)]


def find(workspace: Path, run_id: str) -> Run:
    return Run(run_id, workspace / "runs" / run_id)


def overrides(run: Run) -> list[str]:
    """The Hydra overrides that the run was started with; a step by hand adds its own."""
    file = run.folder / "run.json"
    return files.read_json(file)["overrides"] if file.exists() else []


def record(run: Run, config: Config, overrides: list[str]) -> None:
    """Writes who the run is (`run.json`) and the configuration it resolved to (`config.yaml`), for people to read.

    Raises:
        UsageError: an override holds a password: later steps need it as it is, and a run folder is no place for it.
    """
    for override in overrides:
        if re.search(r"://[^/@\s]*:[^@\s]*@", override):
            raise UsageError(
                f"{without_credentials(override)} holds a password, which would be kept in {run.folder}: give it in "
                "the environment instead (MLFLOW_TRACKING_URI, TOXIC_DVC_REMOTE; see configs/config.yaml)"
            )
    file = run.folder / "run.json"
    now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    created_at = files.read_json(file)["created_at"] if file.exists() else now
    resolved = yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
    files.write_text(run.folder / "config.yaml", without_credentials(resolved))
    files.write_json(file, {"run_id": run.id, "created_at": created_at, "overrides": overrides})


def prune(workspace: Path, keep: int, protected: set[str]) -> list[str]:
    """Removes the oldest run folders but for the last `keep` and the `protected` ids; returns what it removed."""
    removed = [run.folder for run in reversed(opened(workspace)[keep:]) if run.id not in protected]
    for folder in removed:
        shutil.rmtree(folder)
        remove_builds(workspace, folder.name)
        (workspace / "logs" / f"{folder.name}.log").unlink(missing_ok=True)
        log.info("removed the old run %s", folder.name)
    return [folder.name for folder in removed]


def remove_builds(workspace: Path, run_id: str) -> None:
    """Removes what a run has exported and built: of no use once its version is in service, or the run is gone."""
    for kind in BUILDS:
        for name in (run_id, f".{run_id}.new", f".{run_id}.old"):  # see files.new_folder
            shutil.rmtree(workspace / "models" / kind / name, ignore_errors=True)


def prune_builds(workspace: Path) -> None:
    """Removes what runs have exported and built whose folder is gone. Another run's that is under way stays."""
    for place in [found for kind in BUILDS for found in workspace.glob(f"models/{kind}/*")]:
        half_done = place.name.removeprefix(".").removesuffix(".new").removesuffix(".old")
        if any((workspace / "runs" / owner).exists() for owner in (place.name, half_done)):
            continue
        log.info("removing %s: its run is gone", place)
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:  # runs once shared these folders, and may go when no workspace is that old any more
            place.unlink(missing_ok=True)
