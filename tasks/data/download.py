"""Brings the raw data into the workspace, gives it a version and asks the registry whether any of it is new."""

import hashlib
import json
import logging
from pathlib import Path

from tasks import files
from tasks import run as runs
from tasks.config import Config
from tasks.data import sources, versions
from tasks.errors import Skip, UsageError
from tasks.promotion import registry

log = logging.getLogger(__name__)

SOURCE_ROOT = Path(__file__).resolve().parents[2]


def run(config: Config, run: runs.Run) -> dict:
    """Returns {"rows": {file: number}, "files": {file: sha256}, "data_version": DVC's MD5, "fingerprint": sha256}.

    The last good copy of data/raw stays where it is until every source has been fetched.

    Raises:
        Skip: this fingerprint already has a final verdict, and `force` is off.
        UsageError, StepFailed: a source is not there or cannot be read.
    """
    files.require_free_disk(config.workspace, config.disk.min_free_gib)
    runs.prune(config.workspace, config.disk.keep_runs, registry.protected_runs(config) | {run.id})
    names = [source.file for source in config.data.sources]
    if len(set(names)) < len(names):
        raise UsageError(f"data.sources brings {', '.join(names)}: each file needs a name of its own in data/raw")

    folder, rows = config.workspace / "data" / "raw", {}
    with files.new_folder(folder) as new:
        for source in config.data.sources:
            log.info("fetching %s from %s %s", source.file, source.kind, source.name)
            rows[source.file] = sources.read(sources.fetch(source, config, new)).height

    hashes = {name: files.sha256(folder / name) for name in names}
    found = {
        "rows": rows,
        "files": hashes,
        "data_version": versions.version(config, folder),
        "fingerprint": fingerprint(config, hashes),
    }
    verdict = None if config.force else registry.verdict_of(config, found["fingerprint"])
    if verdict:
        raise Skip(
            f"nothing new since run {verdict['run_id']}: version {verdict['version']} was {verdict['verdict']}", **found
        )
    return found


def fingerprint(config: Config, hashes: dict[str, str]) -> str:
    """SHA-256 of all that a retraining depends on: the raw files, the configuration, the code, the expectations."""
    sections = {name: getattr(config, name).model_dump(mode="json") for name in ("data", "model", "training", "gate")}
    sources = [*(SOURCE_ROOT / "tasks").rglob("*.py"), *(SOURCE_ROOT / "expectations").glob("*.json")]
    code = {path.relative_to(SOURCE_ROOT).as_posix(): files.sha256(path) for path in sources}
    everything = json.dumps([hashes, sections, config.seed, code], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()
