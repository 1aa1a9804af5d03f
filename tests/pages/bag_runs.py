"""Runs up to the report with a bag of words for a model: pages need real figures, and no network for them."""

from pathlib import Path

import pytest
from signing import signed

from tasks import files, step
from tasks.data import download, prepare, splits, validate
from tasks.errors import Skip
from tasks.promotion import gate, registry, report
from tasks.run import find
from tasks.training import baseline, checkpoint, evaluate

SMALL = [
    "profile=demo",
    "data.sample.english_rows=3000",
    "data.sample.russian_rows=1500",
    "data.min_rows=500",
    "disk.min_free_gib=0",
]
SHOWN = 20  # changed messages of each kind on the second version's page: it has more
CHANGED_LIMITS = {
    "overrides": [{"key": "gate.toxic.min", "from": 0.85, "to": 0.8}],
    "overridden_by": "ada",
    "overridden_why": "the new source is <harder>",
}


def retrained(overrides: list[str], share: float) -> dict:
    """One run up to the report; its model is a bag of words that has seen `share` of the training rows."""
    step.execute("download", download.run, [*overrides, "force=true"])
    step.execute("validate_raw", validate.run, stage="raw")
    step.execute("prepare", prepare.run)
    step.execute("validate_prepared", validate.run, stage="prepared")
    step.execute("train", trained, share=share)
    return judged()


def trained(config, run, share: float) -> dict:
    files.write_json(bag_of(config, run) / "bag.json", {"share": share})
    return {"mlflow_run": registry.training_run(config, run)}


def judged() -> dict:
    """From evaluation to the report. No network is trained for the pages' sake: the bags of words stand for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "of_run", bag_of)
        patch.setattr(checkpoint, "of_version", lambda config, number: bag_of(config, run_of(config, number)))
        patch.setattr(evaluate, "merged", probabilities_of)
        step.execute("evaluate", evaluate.run)
    step.execute("register", registered)
    try:
        step.execute("gate", gate.run)
    except Skip:
        pass
    return step.execute("report", report.run)


def bag_of(config, run) -> Path:
    return config.workspace / "bags" / run.id


def run_of(config, number: int):
    return find(config.workspace, registry.tags(config, number)["run_id"])


def probabilities_of(bag: Path):
    rows = splits.read(bag.parents[1], "train")
    return baseline.fit(rows.sample(fraction=files.read_json(bag / "bag.json")["share"], seed=1))


def registered(config, run) -> dict:
    registry.ensure_model(config)
    name, url = config.mlflow.registered_model, "http://airflow.example/runs/1"
    tags = {"run_id": run.id, "dag_run_url": url, "profile": config.profile}
    known = registry.client(config).search_model_versions(f"name='{name}' and tag.run_id='{run.id}'")
    made = known[0] if known else registry.client(config).create_model_version(name, "file:///nowhere", tags=tags)
    return {"version": signed(config, made.version)}
