"""Brings the raw data into the workspace, gives it a version and asks the registry whether any of it is new."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from tasks import files
from tasks import run as runs
from tasks.config import Config, Source
from tasks.data import kaggle, schemas, sources, versions
from tasks.errors import Skip, StepFailed, UsageError
from tasks.promotion import in_service, registry

log = logging.getLogger(__name__)

SOURCE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Copy:
    """What a file of data/raw is a copy of; kept in data/raw.json, beside the folder, as DVC versions what is in it."""

    origin: dict  # kind, name, file: where it comes from
    state: dict | None  # what Kaggle said that it has, when it was downloaded
    how: Literal["fetched", "unchanged", "unreachable"]  # new, or kept: Kaggle has the same, or did not answer
    sha256: str
    rows: int
    set_aside: int


@dataclass(frozen=True)
class Wanted:
    """A source, what Kaggle has of it, and the copy in data/raw: to be kept, or to fall back on."""

    source: Source
    state: dict | None = None
    last: Copy | None = None
    keep: bool = False


def run(config: Config, run: runs.Run) -> dict:
    """Returns {"rows": {file: number}, "files": {file: sha256}, "set_aside": {file: rows that are wrong, of feedback},
    "sources": {file: see `Copy`}, "data_version": DVC's MD5, "fingerprint": sha256}.

    Raises:
        Skip: this fingerprint already has a final verdict, and `force` is off.
        Refused: the experiment that the training would be logged to is deleted.
        UsageError, StepFailed: a source is not there or cannot be read.
    """
    files.require_free_disk(config.workspace, config.disk.min_free_gib)
    registry.require_experiment(config)
    in_service.warn(config)
    runs.prune(config.workspace, config.disk.keep_runs, in_service.protected_runs(config) | {run.id})
    copies = fetch(config)
    hashes = {name: copy.sha256 for name, copy in copies.items()}
    found = {
        "rows": {name: copy.rows for name, copy in copies.items()},
        "files": hashes,
        "set_aside": {name: copy.set_aside for name, copy in copies.items() if copy.origin["kind"] == "feedback"},
        "sources": {name: {**copy.origin, "state": copy.state, "how": copy.how} for name, copy in copies.items()},
        "data_version": versions.version(config, config.workspace / "data" / "raw"),
        "fingerprint": fingerprint(config, hashes),
    }
    verdict = None if config.force else registry.verdict_of(config, found["fingerprint"])
    if verdict:
        raise Skip(
            f"nothing new since run {verdict['run_id']}: version {verdict['version']} was {verdict['verdict']}", **found
        )
    return found


def fetch(config: Config) -> dict[str, Copy]:
    """Brings the file of every source into data/raw, and says of each what it is a copy of.

    Kaggle is asked first what it has: a file that is in data/raw already is kept. The last good copy of data/raw stays
    where it is until every source is there; what has come of them until then lies in data/incoming.
    """
    names = [source.file for source in config.data.sources]
    if len(set(names)) < len(names):
        raise UsageError(f"data.sources brings {', '.join(names)}: each file needs a name of its own in data/raw")
    folder, incoming = config.workspace / "data" / "raw", config.workspace / "data" / "incoming"
    wanted = preflight(config, folder)
    with files.new_folder(folder) as new:
        copies = {want.source.file: brought(want, config, folder, new, incoming) for want in wanted}
    files.write_json(beside(folder), {name: asdict(copy) for name, copy in copies.items()})
    shutil.rmtree(incoming, ignore_errors=True)
    return copies


def preflight(config: Config, folder: Path) -> list[Wanted]:
    """Asks for all that the sources need before anything is downloaded: account, network, rights, files, disk.

    Raises:
        UsageError, StepFailed: something is missing; the message says what, and how to come by it.
    """
    for source in config.data.sources:
        if source.kind == "folder":
            sources.find(Path(source.name).expanduser(), source.file, config.unpack)
    kaggle.require_account(config.data.sources)
    wanted = [look(source, config, folder) for source in config.data.sources]
    coming = {want.source.file: want.state["bytes"] or 0 for want in wanted if want.state and not want.keep}
    needed = 2 * sum(coming.values()) / 2**30  # as it comes, and unpacked beside it
    free = shutil.disk_usage(config.workspace).free / 2**30
    if free < needed + config.disk.min_free_gib:
        raise StepFailed(
            f"{config.workspace} has {free:.1f} GiB free: {', '.join(coming)} from Kaggle take up to {needed:.1f} GiB, "
            f"and disk.min_free_gib={config.disk.min_free_gib:g} stay free. Free some, or lower it"
        )
    return wanted


def look(source: Source, config: Config, folder: Path) -> Wanted:
    """Asks Kaggle whether it has something newer than the copy in data/raw; other sources are always fetched."""
    if source.kind not in kaggle.KINDS:
        return Wanted(source)
    last = last_copy(source, folder)
    try:
        state = kaggle.state(source, config.kaggle)
    except kaggle.Unreachable as error:
        return Wanted(source, last=fall_back(last, config, error), keep=True)
    keep = last is not None and last.state == state
    log.info("%s of %s: %s, %s", source.file, source.name, state, "unchanged, kept" if keep else "to be downloaded")
    return Wanted(source, state, replace(last, how="unchanged") if keep else last, keep)


def last_copy(source: Source, folder: Path) -> Copy | None:
    """The copy of this very source in data/raw, if it is there and still what was written."""
    path, record = folder / source.file, beside(folder)
    known = files.read_note(record)
    if not path.is_file() or source.file not in known:
        return None
    last = Copy(**known[source.file])
    return last if last.origin == origin(source) and last.sha256 == files.sha256(path) else None


def fall_back(last: Copy | None, config: Config, error: kaggle.Unreachable) -> Copy:
    """The last good copy, where the configuration wants that; else raises what kept Kaggle from answering."""
    if config.kaggle.when_unreachable == "fail" or last is None:
        raise error
    log.warning("%s. Going on with the copy of %s, as kaggle.when_unreachable says", error, last.state)
    return replace(last, how="unreachable")


def brought(want: Wanted, config: Config, folder: Path, new: Path, incoming: Path) -> Copy:
    """Puts a source's file into the folder `new`, from `folder` if it is kept, and says what it is."""
    source, path = want.source, new / want.source.file
    if not want.keep:
        log.info("fetching %s from %s %s", source.file, source.kind, source.name)
        try:
            wrong = sources.fetch(source, config, new, incoming, want.state)
        except kaggle.Unreachable as error:
            want = replace(want, last=fall_back(want.last, config, error), keep=True)
    if want.keep:
        os.link(folder / source.file, path)
        return want.last
    rows = schemas.tidied(path, source)
    return Copy(origin(source), want.state, "fetched", files.sha256(path), rows, len(wrong))


def beside(folder: Path) -> Path:
    return folder.with_suffix(".json")


def origin(source: Source) -> dict:
    return {"kind": source.kind, "name": source.name, "file": source.file}


def fingerprint(config: Config, hashes: dict[str, str]) -> str:
    """SHA-256 of all that a retraining depends on: the raw files, the configuration, the code, the expectations."""
    sections = {name: getattr(config, name).model_dump(mode="json") for name in ("data", "model", "training")}
    # Why a limit was changed decides nothing; that it was changed does.
    sections["gate"] = config.gate.model_dump(mode="json", exclude={"override_reason"})
    written = [*(SOURCE_ROOT / "tasks").rglob("*.py"), *(SOURCE_ROOT / "expectations").glob("*.*")]
    code = {path.relative_to(SOURCE_ROOT).as_posix(): files.sha256(path) for path in written}
    everything = json.dumps([hashes, sections, config.seed, code], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()
