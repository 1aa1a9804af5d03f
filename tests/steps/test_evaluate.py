"""Evaluation for real, of a model of random weights: what it can't do, the figures must say."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from mlflow import MlflowClient
from prepared_rows import rows
from signing import signed

from tasks import config as configuration
from tasks import files, metrics
from tasks.labels import LABELS
from tasks.promotion import gate, registry, report
from tasks.run import find
from tasks.training import base_model, baseline, checkpoint, evaluate, model


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, empty_store):
    """(config, run, result) of an evaluation whose champion is the model itself."""
    workspace = tmp_path_factory.mktemp("workspace")
    shutil.copy(empty_store, workspace)
    config = configuration.load(
        [
            "profile=demo",
            f"workspace={workspace}",
            f"mlflow.tracking_uri=sqlite:///{workspace}/mlflow.db",
            "model.architecture.hidden_size=32",
            "model.architecture.intermediate_size=32",
            "model.architecture.vocab_size=600",
        ]
    )
    (workspace / "data" / "processed").mkdir(parents=True)
    for split, seed in (("train", 0), ("val", 1), ("test", 2)):
        rows(120, seed).write_parquet(workspace / "data" / "processed" / f"{split}.parquet")
    run = find(workspace, "a-run")
    folder = checkpoint.final(config)
    base = base_model.resolve(config.model, config.seed, workspace)
    model.load_base(config.model, base, config.seed, weights="plain").save_pretrained(folder / "merged")
    model.load_tokenizer(base).save_pretrained(folder / "merged")
    files.write_json(folder / "training.json", {"run_id": run.id, "max_length": config.model.max_length})
    run.save("prepare", {"natural_toxic_share": {"en": 0.1, "ru": 0.3}})
    run.save("train", {"mlflow_run": registry.training_run(config, run)})
    registry.ensure_model(config)
    name = config.mlflow.registered_model
    registry.client(config).create_model_version(name, "file:///nowhere", tags={"run_id": run.id})
    registry.set_alias(config, "champion", signed(config, 1))
    return config, run, evaluate.run(config, run)


def test_the_three_models_answer_the_same_rows(evaluated):
    config, run, result = evaluated
    predictions = pl.read_parquet(run.folder / "predictions.parquet")
    truth = metrics.truth_of(predictions)
    for name, prefix in (("challenger", ""), ("champion", "champion_"), ("baseline", "baseline_")):
        decisions = predictions.select([f"{prefix}decision_{label}" for label in LABELS]).to_numpy()
        assert result[name]["rows"] == 120
        assert result[name]["f1_toxic"] == metrics.f1_toxic(truth, decisions)
        assert result[name]["f1_types"] == metrics.f1_types(truth, decisions)
        low, high = result[name]["intervals"]["f1_toxic"]
        assert low <= result[name]["f1_toxic"] <= high


def test_what_the_words_tell_only_the_baseline_has_learned(evaluated):
    _, _, result = evaluated
    assert result["baseline"]["f1_toxic"] > 0.95 > result["challenger"]["f1_toxic"]
    assert result["gain"]["baseline"]["f1_toxic"]["interval"][1] < 0
    assert result["gain"]["champion"]["f1_types"] == {"gain": 0.0, "interval": [0.0, 0.0], "lower": 0.0, "upper": 0.0}
    assert result["champion"]["f1_toxic"] == result["challenger"]["f1_toxic"]


def test_english_stands_at_its_natural_rate_too(evaluated):
    _, _, result = evaluated
    english = result["challenger"]["languages"]["en"]
    assert english["natural"]["toxic_share"] == 0.1 < english["toxic_share"]
    assert english["natural"]["f1_toxic"] < english["f1_toxic"]


def test_the_thresholds_go_with_the_model(evaluated):
    config, _, result = evaluated
    assert dict(zip(LABELS, checkpoint.thresholds(checkpoint.final(config)))) == result["thresholds"]


def test_the_most_confident_errors_are_kept_surest_first(evaluated):
    _, run, result = evaluated
    errors = files.read_json(run.folder / "errors.json")
    assert 0 < len(errors) <= evaluate.ERRORS
    assert all(row["answer"]["toxic"] != row["truth"]["toxic"] for row in errors)
    sure = [abs(row["score"] - row["truth"]["toxic"]) for row in errors]
    assert sure == sorted(sure, reverse=True)
    assert all(0 <= row["baseline_score"] <= 1 and row["id"] and row["text"] for row in errors)


def test_every_model_has_its_behaviour_and_the_failures_are_kept_with_scores(evaluated):
    _, run, result = evaluated
    kept = files.read_json(run.folder / "behaviour.json")
    assert {name: kept[name]["pass_rate"] for name in kept} == {
        name: result[name]["behaviour"] for name in ("challenger", "champion", "baseline")
    }
    assert kept["baseline"]["failed"] and all(len(case["scores"]) >= 1 for case in kept["baseline"]["failed"])
    assert result["behaviour"]["cases"] == sum(row["cases"] for row in result["behaviour"]["capabilities"])


def test_plots_and_their_data_are_in_the_workspace_and_in_mlflow(evaluated):
    config, run, result = evaluated
    names = {"confusion", "f1", "precision_recall", "precision_recall_types", "reliability"}
    expected = {f"{name}.{ending}" for name in names for ending in ("png", "json")}
    folder = config.workspace / "plots" / run.id
    assert {file.name for file in folder.iterdir()} == expected
    confusion = files.read_json(folder / "confusion.json")
    assert all(np.sum(table) == 120 for table in confusion.values())
    mlflow, mlflow_run = MlflowClient(config.mlflow.tracking_uri), run.result("train")["mlflow_run"]
    assert {artifact.path for artifact in mlflow.list_artifacts(mlflow_run, "plots")} == {
        f"plots/{n}" for n in expected
    }
    logged = mlflow.get_run(mlflow_run).data.metrics
    assert logged["baseline_f1_toxic"] == pytest.approx(result["baseline"]["f1_toxic"])
    assert logged["gain_over_baseline_f1_toxic_low"] == pytest.approx(
        result["gain"]["baseline"]["f1_toxic"]["interval"][0]
    )


def test_the_report_shows_all_of_it_and_loads_nothing(evaluated):
    config, run, result = evaluated
    counts = {"train": {"en": {"rows": 80, **dict.fromkeys(LABELS, 40)}}}
    natural = {"en": 0.1, "ru": 0.3}
    run.save("prepare", {"labels": counts, "natural_toxic_share": natural, "data_version": "abc.dir"})
    for step in ("validate_raw", "validate_prepared"):
        run.save(step, {"step": step, "expectations": [], "warnings": 0, "drift": []})
    checks = gate.judge(config, result)
    assert all(check["passed"] for check in checks if check["group"] == "champion")  # it is the champion
    run.save("gate", {"version": 1, "champion": 1, "passed": True, "hold": None, "person": [], "checks": checks})
    run.save("evaluate", result)
    found = report.run(config, run)
    page = Path(found["report"]).read_text(encoding="utf-8")
    assert "Against the baseline" in page and "Against the champion, version 1" in page
    assert "The registry calls version 1 champion, but nothing serves, and it never did" in page
    assert "10.0 % toxic, here" in page and "PR-AUC toxic" in page
    assert "The same data as the champion’s" in page and found["changed"] == 0 and "None: both give the same" in page
    (errors,) = re.findall(r'aria-label="Most confident errors">(.*?)</table>', page, re.DOTALL)
    assert errors.count('class="blurred"') == len(files.read_json(run.folder / "errors.json"))
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)


def test_the_result_is_plain_json(evaluated):
    _, _, result = evaluated
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_baseline_learns_and_survives_a_label_never_seen():
    probabilities, test = baseline.fit(rows(200, seed=3)), rows(60, seed=4)
    scores = probabilities(test["text"].to_list())
    assert metrics.f1_toxic(metrics.truth_of(test), scores >= 0.5) > 0.95
    assert (scores[:, 1] == 0).all()
