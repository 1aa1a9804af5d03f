"""The model registry, which is the single truth of what serves: versions, their tags, and four aliases.

`challenger` passed the gate; `approved` is a reviewer's wish; `champion` is in service now and `previous` is what it
replaced. Only swap and rollback write the last two, under a lease.
"""

import json
import os
import socket
import time
import uuid
from contextlib import contextmanager

from tasks.config import Config
from tasks.errors import StepFailed, UsageError
from tasks.run import Run

LEASE_SECONDS = 1800


def client(config: Config):
    """An MLflow client for the configured server.

    Raises:
        StepFailed: the server doesn't answer; within seconds, not after MLflow's own minutes of retries.
    """
    import httpx
    from mlflow import MlflowClient, set_tracking_uri

    uri = config.mlflow.tracking_uri
    if uri.startswith("http"):
        try:
            httpx.get(f"{uri}/health", timeout=10).raise_for_status()
        except httpx.HTTPError as error:
            raise StepFailed(
                f"MLflow at {uri} does not answer ({type(error).__name__}): `make demo` starts one, or name another "
                "with mlflow.tracking_uri=…, or MLFLOW_TRACKING_URI"
            ) from None
    set_tracking_uri(uri)
    return MlflowClient(uri)


def training_run(config: Config, run: Run) -> str:
    """Id of the MLflow run that belongs to this run; the same one when a step is repeated."""
    mlflow, name = client(config), config.mlflow.experiment
    experiment = mlflow.get_experiment_by_name(name)
    # A server knows where it keeps artifacts; a plain database file would put them into the current folder.
    here = None if config.mlflow.tracking_uri.startswith("http") else str(config.workspace / "mlflow" / "artifacts")
    experiment_id = experiment.experiment_id if experiment else mlflow.create_experiment(name, artifact_location=here)
    known = mlflow.search_runs([experiment_id], f"tags.run_id = '{run.id}'", max_results=1)
    if known:
        return known[0].info.run_id
    created = mlflow.create_run(experiment_id, run_name=run.id, tags={"run_id": run.id})
    for section in ("model", "training", "data"):
        values = getattr(config, section).model_dump(mode="json", by_alias=True)
        for key, value in values.items():
            mlflow.log_param(created.info.run_id, f"{section}.{key}", str(value)[:500])
    return created.info.run_id


def log_to_run(config: Config, mlflow_run: str, figures: dict[str, float], files=(), folder: str | None = None) -> None:
    """Adds figures, and files in a folder of its artifacts, to the MLflow run of a training."""
    from mlflow.entities import Metric

    mlflow, now = client(config), int(time.time() * 1000)
    mlflow.log_batch(mlflow_run, metrics=[Metric(key, value, now, 0) for key, value in figures.items()])
    for file in files:
        mlflow.log_artifact(mlflow_run, str(file), folder)


def candidate(config: Config, run: Run) -> int:
    """The registry version that this run is about: the one it registered, or the one it was told to release."""
    return config.release.version or run.result("register")["version"]


def version(config: Config, number: int):
    """The registry's record of one version.

    Raises:
        UsageError: there is none of that number.
    """
    from mlflow.exceptions import MlflowException

    name = config.mlflow.registered_model
    try:
        return client(config).get_model_version(name, str(number))
    except MlflowException as error:
        raise UsageError(f"the registry has no version {number} of {name}: {error.message}") from None


def alias(config: Config, name: str) -> int | None:
    """The version that carries the alias `name`, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return int(client(config).get_model_version_by_alias(config.mlflow.registered_model, name).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def set_alias(config: Config, name: str, number: int) -> None:
    client(config).set_registered_model_alias(config.mlflow.registered_model, name, str(number))


def delete_alias(config: Config, name: str) -> None:
    client(config).delete_registered_model_alias(config.mlflow.registered_model, name)


def tags(config: Config, number: int) -> dict[str, str]:
    return dict(version(config, number).tags)


def tag(config: Config, number: int, **values) -> None:
    mlflow = client(config)
    for key, value in values.items():
        mlflow.set_model_version_tag(config.mlflow.registered_model, str(number), key, str(value))


def ensure_model(config: Config) -> None:
    """Creates the registered model where there is none yet; leases and holds are kept as its tags."""
    from mlflow.exceptions import MlflowException

    try:
        client(config).create_registered_model(config.mlflow.registered_model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def hold(config: Config) -> str | None:
    """Why automatic promotion is on hold since a rollback, or None."""
    return _model_tags(config).get("hold") or None


def set_hold(config: Config, reason: str) -> None:
    """Until a person deletes the tag `hold` of the registered model, `auto` waits for a review."""
    client(config).set_registered_model_tag(config.mlflow.registered_model, "hold", reason)


def fetch(config: Config, number: int, folder) -> None:
    """Copies a version's checkpoint (adapter/, thresholds.json, training.json) into `folder`."""
    import shutil
    import tempfile

    from mlflow.artifacts import download_artifacts

    client(config)
    with tempfile.TemporaryDirectory() as place:
        uri = f"models:/{config.mlflow.registered_model}/{number}"
        fetched = download_artifacts(artifact_uri=uri, dst_path=place)
        shutil.copytree(f"{fetched}/artifacts/checkpoint", folder, dirs_exist_ok=True)


def verdict_of(config: Config, fingerprint: str) -> dict | None:
    """The final verdict that this fingerprint of data, config and code already has, as {run_id, version, verdict}."""
    found = client(config).search_model_versions(
        f"name='{config.mlflow.registered_model}' and tag.fingerprint='{fingerprint}'"
    )
    judged = [v for v in found if v.tags.get("verdict")]
    if not judged:
        return None
    last = max(judged, key=lambda v: int(v.version))
    return {"run_id": last.tags["run_id"], "version": int(last.version), "verdict": last.tags["verdict"]}


def protected_runs(config: Config) -> set[str]:
    """Ids of the runs whose version carries an alias: their folders are kept."""
    numbers = {alias(config, name) for name in ("challenger", "approved", "champion", "previous")} - {None}
    return {tags(config, number).get("run_id", "") for number in numbers}


@contextmanager
def lease(config: Config, holder: str):
    """Only one process at a time may change what serves: both DAGs and the command line take this lease first.

    It is a tag of the registered model. A holder that was killed is followed by its own next try, or by anybody once
    the lease ends.

    Raises:
        StepFailed: somebody else holds it; the message says who, and until when.
    """
    ensure_model(config)
    mlflow, name = client(config), config.mlflow.registered_model
    held = json.loads(_model_tags(config).get("lease", "null"))
    if held and held["holder"] != holder and held["expires"] > time.time() and not _died_here(held):
        until = time.strftime("%H:%M:%S", time.localtime(held["expires"]))
        raise StepFailed(f"{held['holder']} is changing what serves, until {until} at the latest: try again after it")
    mine = {
        "holder": holder,
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "expires": time.time() + LEASE_SECONDS,
    }
    mlflow.set_registered_model_tag(name, "lease", json.dumps(mine))
    # The registry has no compare-and-set: of two that wrote at once, the one whose token stayed goes on.
    time.sleep(0.2)
    now = json.loads(_model_tags(config).get("lease", "null"))
    if not now or now["token"] != mine["token"]:
        raise StepFailed(f"{now and now['holder']} took the lease at the same moment: try again after it")
    try:
        yield
    finally:
        now = json.loads(_model_tags(config).get("lease", "null"))
        if now and now["token"] == mine["token"]:
            mlflow.delete_registered_model_tag(name, "lease")


def _died_here(held: dict) -> bool:
    """Whether the lease's holder was a process of this machine that is gone."""
    if held["host"] != socket.gethostname():
        return False
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _model_tags(config: Config) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return dict(client(config).get_registered_model(config.mlflow.registered_model).tags)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
