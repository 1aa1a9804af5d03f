"""Brings back the data that a registered version was trained on, and clears away versions that nobody needs."""

import logging
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tasks import config as configuration
from tasks import files
from tasks import run as runs
from tasks.config import Config
from tasks.data import versions
from tasks.errors import StepFailed, UsageError
from tasks.promotion import in_service, registry

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
        with ExitStack() as all_copied:  # before the first takes its place: a disk may be full after one
            for name in missing:
                new = all_copied.enter_context(files.new_folder(folder / name))
                shutil.copytree(place / name, new, dirs_exist_ok=True)
        for name, md5 in missing.items():
            if not output_path:
                files.write_text(versions.pointer_file(folder / name), versions.pointer(name, md5))
            log.info("%s is version %s now", folder / name, md5)
    return {"version": version, "folder": str(folder), "data": wanted, "replaced": others}


def data_of(config: Config, number: int) -> dict[str, str]:
    """The MD5s of the data that a registered version was trained on, {"raw": …, "processed": …}.

    Raises:
        UsageError: there is no version of that number, or it was registered without its .dvc files.
        Unsigned: no step has written what the registry says of it.
    """
    version = registry.require_signed(config, number)
    pointers = pointers_of(config, version)
    if not pointers.keys() >= set(FOLDERS):
        raise UsageError(f"version {number} was registered without its .dvc files: what it was trained on is not known")
    signed = {"raw": version.tags.get("raw_version"), "processed": version.tags.get("data_version")}
    for name in FOLDERS:
        if signed[name] and signed[name] != pointers[name]:
            log.warning("dvc/%s.dvc of version %d names other data than is signed, which is taken", name, number)
    return {name: signed[name] or pointers[name] for name in FOLDERS}


def pointers_of(config: Config, version) -> dict[str, str]:
    """The .dvc files that `register` has logged for a version, {name: MD5}; empty where it has none.

    One that is damaged or gone is logged anew where the version's tags or its run folder say the same.

    Raises:
        StepFailed: nothing does.
    """
    from mlflow.artifacts import download_artifacts

    client = registry.client(config)
    if not client.list_artifacts(version.run_id, "dvc"):
        return {}
    known = recorded(config, version)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(download_artifacts(run_id=version.run_id, artifact_path="dvc", dst_path=place))
        found = {file.stem: versions.pointed_to(file) for file in folder.glob("*.dvc")}
        for name in sorted({*FOLDERS, *found}):
            if found.get(name):
                continue
            if not known.get(name):
                raise StepFailed(
                    f"dvc/{name}.dvc of MLflow run {version.run_id} is damaged or gone, so that it is not known what "
                    f"version {version.version} was trained on: put it back from a backup, or delete the version"
                )
            found[name] = known[name]
            files.write_text(folder / f"{name}.dvc", versions.pointer(name, found[name]))
            client.log_artifact(version.run_id, str(folder / f"{name}.dvc"), "dvc")
            log.warning("dvc/%s.dvc of MLflow run %s was damaged or gone: logged anew", name, version.run_id)
    return found


def recorded(config: Config, version) -> dict[str, str | None]:
    """What else says which data and model a version is of: {name: MD5 or None}."""
    run = runs.find(config.workspace, version.tags.get("run_id", "none"))
    return {
        "raw": run.result("download").get("data_version") if run.has("download") else None,
        "processed": version.tags.get("data_version"),
        "final": version.tags.get("model_version"),
    }


def named_by_registry(config: Config) -> dict[str, str]:
    """The MD5s of the data and the models of every version in the registry, and what they are of."""
    name = config.mlflow.registered_model
    found = registry.client(config).search_model_versions(f"name='{name}'")
    named = {}
    for version in found:
        tagged = {key: version.tags[key] for key in ("data_version", "model_version") if key in version.tags}
        for key, md5 in (tagged | pointers_of(config, version)).items():
            named[md5] = f"{key} of version {version.version}"
    return named


def prune(overrides, config_path: str, config_name: str) -> dict:
    """Removes the versions of data and models that neither the registry, a run folder nor an installed version names;
    see `versions.prune`.

    Returns {"kept": number of versions, "freed_mib": in the workspace}.
    """
    config = configuration.load(overrides, config_path, config_name)
    kept = named_by_runs(config) | named_by_registry(config) | in_service.named_by_service(config)
    freed = versions.prune(config, kept)
    return {"kept": len(kept), "freed_mib": round(freed / 2**20, 1)}


def named_by_runs(config: Config) -> dict[str, str]:
    """The MD5s in the results of the run folders that are still there, and what they are of."""
    named = {}
    steps = [f"{step}.json" for step in runs.STEPS]  # other files there are lists and curves
    for file in [file for file in config.workspace.glob("runs/*/*.json") if file.name in steps]:
        result = files.read_json(file)
        for key in ("data_version", "model_version"):
            if result.get(key):
                named[result[key]] = f"{key} of {file.parent.name}'s {file.stem}"
    return named
