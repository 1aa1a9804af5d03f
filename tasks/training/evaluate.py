"""Measure the merged model, the champion and the baseline on the same test rows: the figures that the gate looks at."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from tasks import files, metrics
from tasks.config import Config
from tasks.data import splits
from tasks.labels import LABELS, answer
from tasks.promotion import in_service, registry
from tasks.run import Run
from tasks.training import baseline, behaviour, checkpoint, plots

log = logging.getLogger(__name__)

ERRORS = 50  # the most confident ones that are kept
SHOWN = ("id", "text", "original", "language")  # of each


@dataclass(frozen=True)
class Scored:
    """One model's answers to the test split.

    `probabilities` are float64 [N, 6], `thresholds` float64 [6], `checks` what behaviour.check found.
    """

    probabilities: np.ndarray
    thresholds: np.ndarray
    checks: dict

    @property
    def decisions(self) -> np.ndarray:
        return self.probabilities >= self.thresholds


def run(config: Config, run: Run) -> dict:
    """Chooses thresholds on validation and measures on test.

    Writes thresholds.json into the checkpoint; predictions.parquet, errors.json and behaviour.json into the run folder;
    plots and the data behind them into plots/<run_id>/. Logs figures and plots to MLflow.
    """
    folder, cases = checkpoint.of_run(config, run), behaviour.read()
    registry.require_experiment(config)  # now, not when all is measured
    train, val, test = (splits.read(config.workspace, split) for split in ("train", "val", "test"))
    scored = {"challenger": score(merged(folder), val, test, cases)}
    checkpoint.save_thresholds(folder, scored["challenger"].thresholds)
    champion, serving = what_serves(config)
    if champion:
        scored["champion"] = score(merged(champion), val, test, cases, checkpoint.thresholds(champion))
    scored["baseline"] = score(baseline.fit(train), val, test, cases)

    natural = run.result("prepare")["natural_toxic_share"]
    result = {
        "thresholds": dict(zip(LABELS, scored["challenger"].thresholds.tolist())),
        "champion_version": serving and serving["version"],
        "in_service": serving,
        "champion": None,
        **{name: summarise(config, test, of, natural) for name, of in scored.items()},
        "gain": gains(config, test, scored),
        "behaviour": {key: found for key, found in scored["challenger"].checks.items() if key != "failed"},
    }
    predictions(test, scored).write_parquet(run.folder / "predictions.parquet")
    files.write_json(run.folder / "errors.json", confident_errors(test, scored))
    files.write_json(run.folder / "behaviour.json", {name: of.checks for name, of in scored.items()})
    pictures = plots.draw(config.workspace / "plots" / run.id, metrics.truth_of(test), scored, result)
    registry.log_to_run(config, run.result("train")["mlflow_run"], figures(result), pictures, "plots")
    for name in scored:
        log.info("%s: F1 toxic %.3f, types %.3f", name, result[name]["f1_toxic"], result[name]["f1_types"])
    return result


def what_serves(config: Config) -> tuple[Path | None, dict | None]:
    """The checkpoint of what serves, and what is to be known of it: {"number", "engine", "version", "run_id": see
    in_service.Serving, "warning": what the registry has wrong or None, "not_compared": why its model is not to be found
    or None}. Both None where nothing serves; the checkpoint alone where it is nowhere any more."""
    serving, folder, why = in_service.warn(config), None, None
    if serving is None:
        return None, None
    try:
        folder = checkpoint.of_serving(config, serving)
    except checkpoint.Gone as error:
        why = f"{serving} serves, but can't be compared with: {error}"
        log.warning("%s", why)
    found = {name: getattr(serving, name) for name in ("number", "engine", "version", "run_id", "warning")}
    return folder, found | {"not_compared": why}


def merged(folder) -> Callable[[list[str]], np.ndarray]:
    """A function from messages to the probabilities of the merged model in a checkpoint folder, float64 [N, 6]."""
    from scipy.special import expit

    from tasks.training import model

    network, tokenizer = model.load_merged(folder)
    max_length = checkpoint.settings(folder)["max_length"]
    return lambda texts: expit(model.logits(network, tokenizer, texts, max_length).astype(np.float64))


def score(probabilities_of, val: pl.DataFrame, test: pl.DataFrame, cases: list, thresholds=None) -> Scored:
    """Asks a model for the test split and the behavioural checks; without thresholds they are chosen on `val`."""
    if thresholds is None:
        thresholds = metrics.choose_thresholds(metrics.truth_of(val), probabilities_of(val["text"].to_list()))
    return Scored(
        probabilities_of(test["text"].to_list()),
        thresholds,
        behaviour.check(cases, lambda texts: probabilities_of(texts)[:, 0], thresholds[0]),
    )


def summarise(config: Config, test: pl.DataFrame, scored: Scored, natural_toxic_share: dict[str, float]) -> dict:
    summary = metrics.summary(
        metrics.truth_of(test),
        scored.probabilities,
        scored.decisions,
        test["language"].to_numpy(),
        natural_toxic_share,
        config.gate.bootstrap,
        config.seed,
    )
    return {**summary, "behaviour": scored.checks["pass_rate"]}


def gains(config: Config, test: pl.DataFrame, scored: dict[str, Scored]) -> dict[str, dict]:
    """The challenger's gain over each other model, from a paired bootstrap; see metrics.gain."""
    truth, ours = metrics.truth_of(test), scored["challenger"].decisions
    return {
        name: metrics.gain(truth, ours, of.decisions, config.gate.bootstrap, config.seed)
        for name, of in scored.items()
        if name != "challenger"
    }


def confident_errors(test: pl.DataFrame, scored: dict[str, Scored]) -> list[dict]:
    """The test messages on which the challenger is most sure of a wrong `toxic`, the surest first: at most ERRORS.

    Where the baseline makes the same error with confidence, look at the label first.
    """
    probability, decided = scored["challenger"].probabilities[:, 0], scored["challenger"].decisions
    truth = metrics.truth_of(test)
    wrong = np.flatnonzero(decided[:, 0] != truth[:, 0])
    surest = wrong[np.argsort(-np.abs(probability[wrong] - truth[wrong, 0]), kind="stable")][:ERRORS]
    return [
        {
            **{name: value for name, value in test.row(int(k), named=True).items() if name in SHOWN},
            "truth": answer(truth[k] == 1),
            "answer": answer(decided[k]),
            "score": float(probability[k]),
            "baseline_score": float(scored["baseline"].probabilities[k, 0]),
        }
        for k in surest
    ]


def predictions(test: pl.DataFrame, scored: dict[str, Scored]) -> pl.DataFrame:
    """Every test row with each model's `probability_<label>` and `decision_<label>`, the challenger's unprefixed."""
    columns = {}
    for name, of in scored.items():
        prefix = "" if name == "challenger" else f"{name}_"
        for k, label in enumerate(LABELS):
            columns[f"{prefix}probability_{label}"] = of.probabilities[:, k]
            columns[f"{prefix}decision_{label}"] = of.decisions[:, k]
    return test.with_columns(**{name: pl.Series(values) for name, values in columns.items()})


def figures(result: dict) -> dict[str, float]:
    """What MLflow plots over time; a figure that could not be measured is left out."""
    found = {}
    for name in ("challenger", "champion", "baseline"):
        if not result[name]:
            continue
        of = result[name]
        for figure in ("f1_toxic", "f1_types", "f1_types_macro", "pr_auc", "roc_auc", "behaviour"):
            found[f"{name}_{figure}"] = of[figure]
        found[f"{name}_ece"] = of["calibration"]["ece"]
        for type_, of_type in of["types"].items():
            found[f"{name}_f1_{type_}"] = of_type["f1"]
        for language, of_language in of["languages"].items():
            found[f"{name}_{language}_f1_toxic"] = of_language["f1_toxic"]
            if of_language["natural"]:
                found[f"{name}_{language}_f1_toxic_natural"] = of_language["natural"]["f1_toxic"]
    for other, of in result["gain"].items():
        for figure, gain in of.items():
            if gain:
                found[f"gain_over_{other}_{figure}"] = gain["gain"]
                found[f"gain_over_{other}_{figure}_low"] = gain["interval"][0]
    return {key: value for key, value in found.items() if value is not None}
