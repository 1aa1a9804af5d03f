"""Measure the merged model, the champion and the baseline on the same test rows: the figures that the gate looks at."""

import logging

import numpy as np
import polars as pl

from tasks import metrics
from tasks.config import Config
from tasks.data import splits
from tasks.labels import LABELS
from tasks.promotion import registry
from tasks.run import Run
from tasks.training import behaviour, checkpoint, plots

log = logging.getLogger(__name__)


def run(config: Config, run: Run) -> dict:
    """Chooses thresholds on validation and measures on test.

    Writes thresholds.json into the checkpoint, predictions.parquet (see `predictions`) into the run folder and plots
    into plots/<run_id>/; logs figures and plots to MLflow.
    """
    from tasks.training import baseline, model

    folder = checkpoint.of_run(config, run)
    train, val, test = (splits.read(config.workspace, split) for split in ("train", "val", "test"))
    network, tokenizer = model.load_merged(folder)

    def probabilities(texts: list[str]) -> np.ndarray:
        return sigmoid(model.logits(network, tokenizer, texts, config.model.max_length))

    thresholds = metrics.choose_thresholds(metrics.truth_of(val), probabilities(val["text"].to_list()))
    checkpoint.save_thresholds(folder, thresholds)
    challenger = probabilities(test["text"].to_list())
    of_val, of_test = baseline.probabilities(train, val, test)
    scored = {
        "challenger": (challenger, thresholds),
        "baseline": (of_test, metrics.choose_thresholds(metrics.truth_of(val), of_val)),
    }
    champion_version = registry.alias(config, "champion")
    if champion_version:
        scored["champion"] = champion_on(config, champion_version, test["text"].to_list())

    result = {
        "thresholds": dict(zip(LABELS, thresholds.tolist())),
        "champion_version": champion_version,
        "champion": None,
        **{name: summarise(config, test, *scores) for name, scores in scored.items()},
        "behaviour": behaviour.check(lambda texts: probabilities(texts)[:, 0], thresholds[0]),
    }
    predictions(test, scored).write_parquet(run.folder / "predictions.parquet")
    pictures = plots.draw(config.workspace / "plots" / run.id, metrics.truth_of(test), challenger, result)
    registry.log_to_run(config, run.result("train")["mlflow_run"], figures(result), pictures)
    for name in scored:
        log.info("%s: F1 toxic %.3f, types %.3f", name, result[name]["f1_toxic"], result[name]["f1_types"])
    return result


def champion_on(config: Config, version: int, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The champion's probabilities on these messages, and its own thresholds."""
    from tasks.training import model

    folder = checkpoint.of_version(config, version)
    network, tokenizer = model.load_merged(folder)
    max_length = checkpoint.settings(folder)["max_length"]
    return sigmoid(model.logits(network, tokenizer, texts, max_length)), checkpoint.thresholds(folder)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def summarise(config: Config, test: pl.DataFrame, probabilities: np.ndarray, thresholds: np.ndarray) -> dict:
    return metrics.summary(
        metrics.truth_of(test),
        probabilities,
        probabilities >= thresholds,
        test["language"].to_numpy(),
        config.gate.bootstrap,
        config.seed,
    )


def predictions(test: pl.DataFrame, scored: dict) -> pl.DataFrame:
    """Every test row with each model's `probability_<label>` and `decision_<label>`, the challenger's unprefixed."""
    columns = {}
    for name, (probabilities, thresholds) in scored.items():
        prefix = "" if name == "challenger" else f"{name}_"
        for k, label in enumerate(LABELS):
            columns[f"{prefix}probability_{label}"] = probabilities[:, k]
            columns[f"{prefix}decision_{label}"] = probabilities[:, k] >= thresholds[k]
    return test.with_columns(**{name: pl.Series(values) for name, values in columns.items()})


def figures(result: dict) -> dict[str, float]:
    """What MLflow plots over time."""
    return {
        f"{name}_{figure}": result[name][figure]
        for name in ("challenger", "champion", "baseline")
        for figure in ("f1_toxic", "f1_types", "f1_types_macro", "pr_auc", "roc_auc")
        if result[name]
    } | {
        f"{language}_f1_toxic": of_language["f1_toxic"]
        for language, of_language in result["challenger"]["languages"].items()
    }
