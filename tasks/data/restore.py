"""Brings back the data that a registered version was trained on, and clears away versions that nobody needs."""

import logging
import shutil
import tempfile
from pathlib import Path

from tasks import config as configuration
from tasks import files
from tasks.config import Config
from tasks.data import versions
from tasks.errors import UsageError
from tasks.promotion import registry

log = logging.getLogger(__name__)

FOLDERS = ("raw", "processed")  # of workspace/data


def run(overrides, version: int, output_path: str | None, replace: bool, config_path: str, config_name: str) -> dict:
    """Puts data/raw and data/processed as version `version` of the registry had them into `output_path`, or into the
    workspace.

    Returns {"version", "folder", "data": {name: MD5}, "replaced": {name: MD5 of what lay there before}}.

    Raises:
        UsageError: the registry has no such version, or other data is there and `replace` is off.
        StepFailed: the remote does not have it any more, or what it has is damaged.
    """
    config = configuration.load(overrides, config_path, config_name)
    wanted = data_of(config, version)
    folder = Path(output_path).expanduser().absolute() if output_path else config.workspace / "data"
    present = {name: versions.current(config, folder / name) for name in FOLDERS if (folder / name).exists()}
    others = {name: md5 for name, md5 in present.items() if md5 != wanted[name]}
    if others and not replace:
        raise UsageError(
            f"{folder} holds other data than version {version} was trained on ({', '.join(others)}): --replace puts "
            "that in its place, --output-path=FOLDER leaves it alone"
        )
    if others and not output_path:
        for name in others:
            versions.version(config, folder / name)  # so that it can be brought back in its turn
    missing = {name: wanted[name] for name in FOLDERS if present.get(name) != wanted[name]}
    with versions.fetched(config, missing) as place:
        for name, md5 in missing.items():
            with files.new_folder(folder / name) as new:
                shutil.copytree(place / name, new, dirs_exist_ok=True)
            if not output_path:
                files.write_text(folder / f"{name}.dvc", versions.pointer(name, md5))
            log.info("%s is version %s now", folder / name, md5)
    return {"version": version, "folder": str(folder), "data": wanted, "replaced": others}


def data_of(config: Config, number: int) -> dict[str, str]:
    """The MD5s of the data that a registered version was trained on, {"raw": …, "processed": …}.

    Raises:
        UsageError: there is no version of that number, or it was registered without its .dvc files.
    """
    pointers = pointers_of(config, registry.version(config, number))
    if not pointers.keys() >= set(FOLDERS):
        raise UsageError(f"version {number} was registered without its .dvc files: what it was trained on is not known")
    return {name: pointers[name] for name in FOLDERS}


def pointers_of(config: Config, version) -> dict[str, str]:
    """The .dvc files that `register` has logged for a version, {name: MD5}; empty where it has none."""
    from mlflow.artifacts import download_artifacts

    if not registry.client(config).list_artifacts(version.run_id, "dvc"):
        return {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(download_artifacts(run_id=version.run_id, artifact_path="dvc", dst_path=place))
        return {file.stem: versions.pointed_to(file) for file in folder.glob("*.dvc")}


def named_by_registry(config: Config) -> set[str]:
    """The MD5s of the data and the models of every version in the registry."""
    name = config.mlflow.registered_model
    found = registry.client(config).search_model_versions(f"name='{name}'")
    tagged = {
        version.tags[key] for version in found for key in ("data_version", "model_version") if key in version.tags
    }
    return tagged.union(*(pointers_of(config, version).values() for version in found))


def prune(overrides, config_path: str, config_name: str) -> dict:
    """Removes the versions of data and models that neither the registry nor a run folder names; see `versions.prune`.

    Returns {"kept": number of versions, "freed_mib": in the workspace}.
    """
    config = configuration.load(overrides, config_path, config_name)
    kept = named_by_registry(config) | named_by_runs(config)
    freed = versions.prune(config, kept)
    return {"kept": len(kept), "freed_mib": round(freed / 2**20, 1)}


def named_by_runs(config: Config) -> set[str]:
    """The MD5s in the results of the run folders that are still there."""
    results = [files.read_json(file) for file in config.workspace.glob("runs/*/*.json")]
    return {result[key] for result in results for key in ("data_version", "model_version") if result.get(key)}
