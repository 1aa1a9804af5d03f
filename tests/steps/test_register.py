"""A trained model becomes a registered version on a real MLflow server, and answers when it is loaded from there."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from prepared_rows import rows
from safetensors import safe_open

from tasks import config as configuration
from tasks import files
from tasks.data import download, versions
from tasks.errors import StepFailed
from tasks.labels import LABELS, TYPES
from tasks.promotion import decide, gate, register, registry, report, signatures, verify
from tasks.run import find
from tasks.serving import predict
from tasks.training import checkpoint, evaluate, train

ROOT = Path(__file__).parents[2]
NOBODY = "http://127.0.0.1:9"
# Which database the registry has makes no difference to these, each of which loads the model once more.
on_sqlite = pytest.mark.parametrize("mlflow_server", ["sqlite"], indirect=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, empty_store):
    """(overrides, run) of a model of two small layers, trained and evaluated."""
    workspace = tmp_path_factory.mktemp("workspace")
    overrides = [
        "profile=demo",
        f"workspace={workspace}",
        "disk.min_free_gib=0",
        "model.architecture.hidden_size=32",
        "model.architecture.intermediate_size=32",
        "model.architecture.vocab_size=600",
        "training.num_train_epochs=1",
        "gate.bootstrap=100",
        "gate.toxic.min=0",  # it has learnt too little to pass
        "gate.types.min=0",
        "gate.override_reason=a test of what follows the gate",
    ]
    config = configuration.load([*overrides, f"mlflow.tracking_uri=sqlite:///{shutil.copy(empty_store, workspace)}"])
    run, data = find(workspace, "weekly-1"), workspace / "data" / "processed"
    data.mkdir(parents=True)
    for split, seed in (("train", 0), ("val", 1), ("test", 2)):
        rows(60, seed).write_parquet(data / f"{split}.parquet")
    version = versions.version(config, data)
    run.save("download", {"data_version": version, "fingerprint": download.fingerprint(config, {})})
    counts = {"train": {"en": {"rows": 40, "toxic": 20, **dict.fromkeys(TYPES, 5)}}}
    natural = {"en": 0.1, "ru": 0.3}
    run.save("prepare", {"data_version": version, "labels": counts, "natural_toxic_share": natural})
    run.save("train", train.run(config, run))
    run.save("evaluate", evaluate.run(config, run))
    return overrides, run


@pytest.fixture
def config(trained, mlflow_server, monkeypatch):
    """The same on a server, under a name that only this test knows."""
    overrides, run = trained
    name = f"toxic-{uuid.uuid4().hex[:8]}"
    config = configuration.load(
        [
            *overrides,
            f"mlflow.tracking_uri={mlflow_server.uri}",
            f"mlflow.registered_model={name}",
            f"mlflow.experiment={name}",
        ]
    )
    run.save("train", {**run.result("train"), "mlflow_run": registry.training_run(config, run)})
    monkeypatch.setenv("TOXIC_WORKSPACE", "/set/by/register")
    monkeypatch.setenv("TOXIC_DAG_RUN_URL", "http://airflow.example/dags/toxicity_weekly/runs/1")
    return config


def numbers(config) -> list[int]:
    found = registry.client(config).search_model_versions(f"name='{config.mlflow.registered_model}'")
    return sorted(int(version.version) for version in found)


def test_a_version_says_where_it_comes_from_and_answers_as_the_model_does(config, trained, tmp_path):
    from mlflow.pyfunc import get_model_dependencies

    _, run = trained
    result = register.run(config, run)
    assert result["version"] == 1 and result["model_uri"].endswith("/1")
    settings = checkpoint.settings(checkpoint.final(config))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    tags = registry.tags(config, 1)
    assert tags["git_commit"].removesuffix("-dirty") == head
    assert tags["data_version"] == run.result("prepare")["data_version"]
    assert tags["fingerprint"] == run.result("download")["fingerprint"]
    assert (tags["run_id"], tags["model_version"]) == ("weekly-1", result["model_version"])
    assert tags["dag_run_url"] == "http://airflow.example/dags/toxicity_weekly/runs/1"
    assert (tags["base_model"], tags["base_sha256"]) == ("tiny-qwen2", settings["base_sha256"])
    evaluated = run.result("evaluate")
    assert json.loads(tags["thresholds"]) == pytest.approx(evaluated["thresholds"], abs=1e-4)
    assert float(tags["f1_toxic"]) == pytest.approx(evaluated["challenger"]["f1_toxic"], abs=1e-4)
    assert float(tags["baseline_f1_types"]) == pytest.approx(evaluated["baseline"]["f1_types"], abs=1e-4)

    logged = registry.client(config).get_logged_model(registry.version(config, 1).source.removeprefix("models:/"))
    assert {metric.key for metric in logged.metrics} == set(evaluate.figures(evaluated))
    assert get_model_dependencies(result["model_uri"])  # what it needs, as a file

    # Another process, as of somebody who has the address and the workspace alone.
    registry.set_alias(config, "challenger", 1)
    asked = """
import json, mlflow, sys
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(f"models:/{sys.argv[2]}@challenger")
signature = model.metadata.signature.to_dict()
print(json.dumps([model.predict(sys.argv[3:]), model.predict(model.input_example), signature]))
"""
    texts = ["you fool 1", "вот отчёт 7", "the report 3"]
    answered = subprocess.run(
        [sys.executable, "-c", asked, config.mlflow.tracking_uri, config.mlflow.registered_model, *texts],
        cwd=ROOT,
        env={**os.environ, "TOXIC_WORKSPACE": str(config.workspace)},
        capture_output=True,
        text=True,
    )
    assert answered.returncode == 0, answered.stderr
    answers, examples, signature = json.loads(answered.stdout.splitlines()[-1])
    assert answers == predict.answers_of(checkpoint.final(config), texts)
    for answer in (*answers, *examples):
        assert set(answer) == {"toxic", "labels"} and isinstance(answer["toxic"], bool)
        assert set(answer["labels"]) <= set(TYPES) and (answer["toxic"] or not answer["labels"])
    assert len(examples) == 2
    assert json.loads(signature["inputs"]) == [{"type": "string", "required": True}]
    assert {"toxic", "labels"} == set(json.loads(signature["outputs"])[0]["properties"])


@on_sqlite
def test_a_version_brings_all_but_the_base(config, trained, mlflow_server, tmp_path, monkeypatch):
    from mlflow.artifacts import download_artifacts
    from mlflow.pyfunc import load_model

    _, run = trained
    merges, merge = [], checkpoint.add_merged
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "add_merged", lambda *of: merges.append(merge(*of)))
        uri = register.run(config, run)["model_uri"]
    assert len(merges) == 1  # to have the example answered: a model of gigabytes is loaded no more often than that
    folder = Path(download_artifacts(artifact_uri=uri, dst_path=str(tmp_path))) / "artifacts" / "checkpoint"
    assert {path.name for path in folder.iterdir()} == {
        "adapter",
        "tokenizer",
        "thresholds.json",
        "training.json",
        "signature.json",
    }
    head = "base_model.model.score.weight"
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "np") as weights:
        names = set(weights.keys())
        assert weights.get_tensor(head).shape == (len(LABELS), 32)
    # The tiny base is not pretrained, so its embeddings are trained and come along; no other weight of the base does.
    assert all("lora_" in name or "score" in name or "embed_tokens" in name for name in names)

    registry.set_alias(config, "previous", 1)
    for number in (1, 7):
        files.write_text(tmp_path / f"version-{number}" / "merged" / "model.safetensors", "of an earlier rebuild")
    again = tmp_path / "version-3"
    checkpoint.rebuild(config, registry.require_signed(config, 1), again)
    assert {path.name for path in tmp_path.glob("version-*")} == {"version-1", "version-3"}  # 7 carries no alias
    merged = checkpoint.final(config) / "merged"
    assert files.sha256(again / "merged" / "model.safetensors") == files.sha256(merged / "model.safetensors")
    assert files.sha256(again / "merged" / "tokenizer.json") == files.sha256(merged / "tokenizer.json")

    # What it brings is signed, its code too: whoever changes a file of it changes a version that nobody loads.
    command = [f"mlflow.{key}={getattr(config.mlflow, key)}" for key in ("tracking_uri", "registered_model")]
    command = [f"workspace={config.workspace}", *command]
    found = verify.run(command, 1, "configs", "config")
    assert (found["model_uri"], found["signed"], found["signed_by"]) == (uri, ["register"], None)
    assert found["checkpoint"] == checkpoint.content_hash(checkpoint.final(config))
    model_id = registry.version(config, 1).source.removeprefix("models:/")
    (stored,) = mlflow_server.folder.glob(f"**/{model_id}/artifacts/MLmodel")
    for name in ("code/tasks/promotion/pyfunc.py", "artifacts/checkpoint/training.json"):
        file = stored.parent / name
        file.write_text(file.read_text().replace("tiny", "tinier") + "\n")
        with pytest.raises(registry.Changed, match="in MLflow are not those that were registered"):
            verify.run(command, 1, "configs", "config")
        with pytest.raises(registry.Changed, match="in MLflow are not those that were registered"):
            checkpoint.rebuild(config, registry.require_signed(config, 1), again)
    monkeypatch.setenv("TOXIC_WORKSPACE", str(config.workspace))
    with pytest.raises(signatures.Unsigned, match="its files are not those that were signed"):
        load_model(uri)
    # DVC has it as it was.
    shutil.move(checkpoint.final(config), tmp_path / "final")
    try:
        back = checkpoint.of_version(config, 1)
        assert checkpoint.content_hash(back) == found["checkpoint"] and back != checkpoint.final(config)
    finally:
        shutil.move(tmp_path / "final", checkpoint.final(config))


class Killed(BaseException):
    pass


@on_sqlite
def test_registering_again_makes_no_second_version_of_the_same_model(config, trained, monkeypatch):
    _, run = trained
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("mlflow.register_model", killed)
        register.run(config, run)
    assert numbers(config) == []
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(register, "sign", killed)  # the version is there, its signature is not
        register.run(config, run)
    assert numbers(config) == [1] and "signature_register" not in registry.tags(config, 1)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(register.log, "info", killed)  # both are there, the result is not
        register.run(config, run)
    assert register.run(config, run)["version"] == 1
    assert numbers(config) == [1] and registry.require_signed(config, 1)
    # A version of somebody else who says that it is this run's is not taken for it, with or without a signature.
    name, tags = config.mlflow.registered_model, registry.tags(config, 1)
    for forged in (tags, {key: value for key, value in tags.items() if key != "signature_register"}):
        registry.client(config).create_model_version(name, "test:///forged", tags=forged)
        assert register.run(config, run)["version"] == 1
    # Another model of the same run is another version.
    thresholds = checkpoint.final(config) / "thresholds.json"
    before = thresholds.read_text()
    try:
        files.write_json(thresholds, {**files.read_json(thresholds), "toxic": 0.123})
        assert register.run(config, run)["version"] == 4
    finally:
        thresholds.write_text(before)


def killed(*arguments, **named):
    raise Killed


@on_sqlite
def test_a_server_that_goes_away_before_any_step_leaves_nothing_half_done(config, trained, mlflow_server):
    _, run = trained
    hasty = {"attempts": 2, "backoff_s": 0}
    killed, away = (
        config.model_copy(update={"mlflow": config.mlflow.model_copy(update={**hasty, "tracking_uri": address})})
        for address in (mlflow_server.uri, NOBODY)  # the same to a step; to start a server takes seconds
    )
    mlflow_server.kill()
    try:
        with pytest.raises(StepFailed, match=f"MLflow at {mlflow_server.uri} does not answer, tried 2 times"):
            register.run(killed, run)
    finally:
        mlflow_server.start()
    for step in ("validate_raw", "validate_prepared"):
        run.save(step, {"step": step, "expectations": [], "warnings": 0, "drift": [], "champion_run": None})
    seen = []
    for step in (register, gate, report, decide):
        with pytest.raises(StepFailed, match=f"MLflow at {NOBODY} does not answer, tried 2 times"):
            step.run(away, run)
        state = known(config)
        assert state == (seen[-1] if seen else {})  # as it was after the step before
        run.save(step.__name__.rpartition(".")[2], step.run(config, run))
        seen.append(known(config))
    first, judged, _, decided = seen
    assert first["tags"]["base_sha256"] and "gate" not in first["tags"] and first["challenger"] is None
    assert judged["tags"]["gate"] == "passed" and judged["challenger"] == 1
    assert decided["tags"]["decision"] == "approve" and decided["challenger"] == 1


def known(config) -> dict:
    """What the registry knows about the run's version, where there is one."""
    if not numbers(config):
        return {}
    return {"tags": registry.tags(config, 1), "challenger": registry.alias(config, "challenger")}
