"""Make the trained model a new version in the registry: everything but the base, which goes by name and hash."""

import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tasks import files
from tasks.config import Config
from tasks.data import versions
from tasks.promotion import registry
from tasks.run import Run
from tasks.training import checkpoint

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]


def run(config: Config, run: Run) -> dict:
    """Logs the checkpoint to the training's MLflow run and registers it with its lineage as tags.

    Returns {"version", "model_uri", "model_version"}; a repeated call finds the version that it made before.
    """
    folder = checkpoint.of_run(config, run)
    model_version = versions.version(config, folder)
    registry.ensure_model(config)
    number = version_of_run(config, run) or log_version(config, run, folder)
    registry.tag(config, number, **lineage(config, run, model_version))
    log_pointers(config, run, model_version)
    log.info("version %d of %s", number, config.mlflow.registered_model)
    uri = f"models:/{config.mlflow.registered_model}/{number}"
    return {"version": number, "model_uri": uri, "model_version": model_version}


def version_of_run(config: Config, run: Run) -> int | None:
    """The version that an earlier, killed try of this step has made."""
    mlflow_run = run.result("train")["mlflow_run"]
    name = config.mlflow.registered_model
    found = registry.client(config).search_model_versions(f"name='{name}' and run_id='{mlflow_run}'")
    return max((int(v.version) for v in found), default=None)


def log_version(config: Config, run: Run, folder: Path) -> int:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Array, DataType, Object, Property

    answer = Object([Property("toxic", DataType.boolean), Property("labels", Array(DataType.string))])
    signature = ModelSignature(Schema([ColSpec("string")]), Schema([ColSpec(answer)]))
    registry.client(config)
    with tempfile.TemporaryDirectory() as place, mlflow.start_run(run_id=run.result("train")["mlflow_run"]):
        without_merged = shutil.copytree(folder, f"{place}/checkpoint", ignore=shutil.ignore_patterns("merged"))
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(ROOT / "tasks" / "promotion" / "pyfunc.py"),
            artifacts={"checkpoint": str(without_merged)},
            signature=signature,
            input_example=["Good morning!", "You are an idiot."],
            pip_requirements=str(ROOT / "constraints.txt"),
            registered_model_name=config.mlflow.registered_model,
        )
    return int(logged.registered_model_version)


def lineage(config: Config, run: Run, model_version: str) -> dict[str, str]:
    """Where a version comes from and how good it is, as tags that the registry's pages show."""
    evaluated, trained = run.result("evaluate"), run.result("train")
    return {
        "run_id": run.id,
        "data_version": run.result("prepare")["data_version"],
        "model_version": model_version,
        "fingerprint": run.result("download")["fingerprint"],
        "git_commit": git_commit(),
        "dag_run_url": os.environ.get("TOXIC_DAG_RUN_URL", "by hand"),
        "base_model": trained["base_model"],
        "base_sha256": trained["base_sha256"],
        "f1_toxic": f"{evaluated['challenger']['f1_toxic']:.4f}",
        "f1_types": f"{evaluated['challenger']['f1_types']:.4f}",
        "baseline_f1_toxic": f"{evaluated['baseline']['f1_toxic']:.4f}",
        "baseline_f1_types": f"{evaluated['baseline']['f1_types']:.4f}",
    }


def log_pointers(config: Config, run: Run, model_version: str) -> None:
    """Logs the .dvc files of raw data, splits and model to the training's run: `commands.py data` brings them back."""
    md5s = {
        "raw": run.result("download")["data_version"],
        "processed": run.result("prepare")["data_version"],
        "final": model_version,
    }
    with tempfile.TemporaryDirectory() as place:
        for name, md5 in md5s.items():
            files.write_text(Path(place) / f"{name}.dvc", versions.pointer(name, md5))
        registry.client(config).log_artifacts(run.result("train")["mlflow_run"], place, "dvc")


def git_commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
