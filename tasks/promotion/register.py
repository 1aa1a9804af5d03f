"""Make the trained model a new version in the registry: everything but the base, which goes by name and hash."""

import json
import logging
import os
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

from tasks import files
from tasks import run as runs
from tasks.config import Config
from tasks.data import versions
from tasks.promotion import in_service, registry, signatures
from tasks.run import Run
from tasks.serving import repository
from tasks.training import checkpoint, evaluate

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]

# What a version takes to answer elsewhere, beside its own code.
REQUIREMENTS = (
    *("mlflow", "bitsandbytes", "cryptography", "numpy", "peft", "polars", "psutil", "pydantic", "torch"),
    "transformers",
)

LOGGED = "logged.json"  # in the run's folder: what a version is about to be made of


def run(config: Config, run: Run) -> dict:
    """Logs the checkpoint to the training's MLflow run and registers it with its lineage as tags, which it signs.

    Returns {"version", "model_uri", "model_version"}; a repeated call finds the version that it made before.
    """
    folder = checkpoint.of_run(config, run)
    tags = lineage(config, run, versions.version(config, folder), checkpoint.content_hash(folder))
    registry.require_experiment(config)
    registry.ensure_model(config)
    log_pointers(config, run, tags["model_version"])
    number = registered(config, tags) or log_version(config, run, folder, tags)
    log.info("version %d of %s", number, config.mlflow.registered_model)
    uri = f"models:/{config.mlflow.registered_model}/{number}"
    return {"version": number, "model_uri": uri, "model_version": tags["model_version"]}


def is_there(config: Config, run: Run) -> bool:
    """Whether the version that the run has registered is still in the registry."""
    return registry.exists(config, run.result("register")["version"])


def registered(config: Config, tags: dict[str, str]) -> int | None:
    """The version that an earlier, killed try of this step has made of the same model; not one under whose number the
    live repository has another, since it could not be put into service, nor one that somebody else has made."""
    name, wanted = config.mlflow.registered_model, f"tag.run_id='{tags['run_id']}'"
    found = registry.versions(config, f"name='{name}' and {wanted}")
    same = [v for v in found if v.tags.get("model_version") == tags["model_version"]]
    fit = [v for v in same if not in_service.is_another_model(config, int(v.version), v.tags)]
    return max((int(v.version) for v in fit if is_own(config, v)), default=None)


def is_own(config: Config, version) -> bool:
    """Whether a version is signed. One that this step has made, but was killed before it signed it, is signed now: the
    run's folder says of which logged model it is, and with which tags."""
    wrong = signatures.problem_of(config.workspace, version, "register")
    if wrong is None:
        return True
    logged = files.read_note(runs.find(config.workspace, version.tags["run_id"]).folder / LOGGED)
    if logged == {"source": version.source, "tags": dict(version.tags)}:
        sign(config, int(version.version), logged)
        return True
    log.warning("version %s is not taken for this run's, which gets another: %s", version.version, wrong)
    return False


def sign(config: Config, number: int, logged: dict) -> None:
    """Signs a version as this step has registered it, whatever a hand may have made of it since."""
    values = {name: logged["tags"][name] for name in signatures.KINDS["register"] if name in logged["tags"]}
    values["source"] = logged["source"]
    registry.tag(config, number, **registry.signature_tag(config, number, "register", values))


def log_version(config: Config, run: Run, folder: Path, tags: dict[str, str]) -> int:
    """Logs adapter, head, thresholds and tokenizer with their figures, and registers that, its tags with it."""
    import mlflow

    mlflow_run = run.result("train")["mlflow_run"]
    registry.pass_over_numbers(config, max(repository.installed(repository.live(config)), default=0))
    os.environ["TOXIC_WORKSPACE"] = str(config.workspace)  # MLflow loads the model and has the example answered
    registry.client(config)
    with tempfile.TemporaryDirectory() as place, registry.answering(config), mlflow.start_run(run_id=mlflow_run):
        without_base = shutil.copytree(folder, f"{place}/checkpoint", ignore=shutil.ignore_patterns("merged"))
        checkpoint.copy_tokenizer(folder, Path(without_base))
        signatures.sign_folder(config.workspace, Path(without_base), config.mlflow.registered_model)
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(ROOT / "tasks" / "promotion" / "pyfunc.py"),
            artifacts={"checkpoint": Path(without_base).as_uri()},  # MLflow reads a path as an address too
            signature=signature(),
            input_example=["Good morning!", "You are an idiot."],
            code_paths=[str(ROOT / "tasks")],
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )
        mlflow.log_metrics(evaluate.figures(run.result("evaluate")), model_id=logged.model_id)
        with registry.fetched(config, logged.model_uri) as model:  # MLflow adds files of its own, its code among them
            made_of = {"source": logged.model_uri, "tags": {**tags, "model_sha256": registry.files_sha256(model)}}
        files.write_json(run.folder / LOGGED, made_of)
        made = mlflow.register_model(logged.model_uri, config.mlflow.registered_model, tags=made_of["tags"])
    sign(config, int(made.version), made_of)
    return int(made.version)


def signature():
    """A message in, `{"toxic": bool, "labels": [str]}` out.

    Not left to MLflow: to find it out, it would load the model once more than to have the example answered.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Object, Property

    answer = Object([Property("toxic", DataType.boolean), Property("labels", Array(DataType.string))])
    return ModelSignature(inputs=Schema([ColSpec(DataType.string)]), outputs=Schema([ColSpec(answer)]))


def lineage(config: Config, run: Run, model_version: str, checkpoint_sha256: str) -> dict[str, str]:
    """Where a version comes from and how good it is, as tags that the registry's pages show."""
    evaluated, trained = run.result("evaluate"), run.result("train")
    thresholds = {label: round(value, 4) for label, value in evaluated["thresholds"].items()}
    figures = {
        f"{prefix}{name}": evaluated[model][name]
        for model, prefix in (("challenger", ""), ("baseline", "baseline_"))
        for name in ("f1_toxic", "f1_types")
    }
    return {
        "run_id": run.id,
        "profile": config.profile or "none",
        "data_version": run.result("prepare")["data_version"],
        "raw_version": run.result("download")["data_version"],
        "model_version": model_version,
        "checkpoint_sha256": checkpoint_sha256,
        "fingerprint": run.result("download")["fingerprint"],
        "git_commit": git_commit(),
        "dag_run_url": os.environ.get("TOXIC_DAG_RUN_URL", "by hand"),
        "base_model": trained["base_model"],
        "base_sha256": trained["base_sha256"],
        "thresholds": json.dumps(thresholds),
        **{name: f"{figure:.4f}" for name, figure in figures.items()},
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
    """The commit that this code is, `-dirty` where files have changed since; an image has it in TOXIC_GIT_COMMIT."""
    if os.environ.get("TOXIC_GIT_COMMIT"):
        return os.environ["TOXIC_GIT_COMMIT"]
    ask = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git here
        found = ""
    return found or "unknown"
