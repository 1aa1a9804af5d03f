"""What is better and what is worse: slices of the test split, messages whose answer changes, rows trained on."""

import numpy as np
import polars as pl

from tasks import metrics
from tasks import run as runs
from tasks.config import Config
from tasks.labels import LABELS, TYPES, answer
from tasks.promotion import registry
from tasks.promotion.gate import FIGURES, LANGUAGE_NAMES
from tasks.run import Run

MODELS = ("challenger", "champion", "baseline")
LENGTHS = (50, 200, 500)  # upper ends of the slices by length, in characters; the last one is open


def figures(evaluated: dict) -> list[dict]:
    """The figures of the whole test split, each as {"title", "note", "models": {model: {"value", "interval" or None}}};
    where one could not be measured it is left out."""
    names = {**FIGURES, "f1_types_macro": "F1 types, macro", "pr_auc": "PR-AUC toxic", "roc_auc": "ROC-AUC toxic"}
    names |= {"precision_toxic": "precision toxic", "recall_toxic": "recall toxic"}
    models = {name: evaluated[name] for name in MODELS if evaluated[name]}
    found = [
        {
            "title": title,
            "note": "",
            "models": {name: {"value": of[key], "interval": of["intervals"].get(key)} for name, of in models.items()},
        }
        for key, title in names.items()
        if evaluated["challenger"][key] is not None
    ]
    for language, ours in evaluated["challenger"]["languages"].items():
        if ours["natural"]:
            natural = {name: of["languages"][language]["natural"] for name, of in models.items()}
            found.append(
                {
                    "title": f"F1 toxic, {LANGUAGE_NAMES[language]} at its natural rate",
                    "note": "{:.1f} % toxic, here {:.1f} %".format(
                        100 * ours["natural"]["toxic_share"], 100 * ours["toxic_share"]
                    ),
                    "models": {
                        name: {"value": of["f1_toxic"], "interval": of["interval"]} for name, of in natural.items()
                    },
                }
            )
    return found


# Slices ---------------------------------------------------------------------------------------------------------------


def slices(config: Config, predictions: pl.DataFrame, evaluated: dict) -> list[dict]:
    """F1 of each model on the parts of the test split that hold a positive: by language, type and length of the text.

    Each as {"group", "key", "title", "note", "words": the figure in full, "rows", "positives",
    "models": {model: {"value", "interval"}}, "gain": {other model: {"gain", "interval"}}}; intervals are of 95 %, that
    of a gain from a paired bootstrap.

    Args:
        predictions: as `evaluate.predictions` made them.
    """
    truth = metrics.truth_of(predictions)
    models = [name for name in MODELS if evaluated[name]]
    tallies = {name: metrics.tallies(truth, decisions(predictions, name)) for name in models}
    found = []
    for part, figure, rows in parts(predictions, truth):
        if part["positives"]:
            of_part = np.stack([tallies[name][figure][rows] for name in models], axis=1)
            part |= compared(of_part, models, config.gate.bootstrap, config.seed)
            for name in models:
                # The interval that the gate knows, where it has one: mine comes from other resamples.
                part["models"][name]["interval"] = (
                    evaluated[name]["languages"][part["key"]]["interval"]
                    if part["group"] == "language"
                    else evaluated[name]["intervals"].get(part["key"], part["models"][name]["interval"])
                )
            found.append(part)
    return found


def parts(predictions: pl.DataFrame, truth: np.ndarray):
    """Yields (part, which of `metrics.tallies` measures it, its rows as bool [N])."""
    chars, known = predictions["text"].str.len_chars().to_numpy(), metrics.types_known(truth)

    def part(group, key, title, words, rows, label=0):
        positives = int((truth[rows, label] == 1).sum())
        note = f"{positives:,} positive" if label else f"{positives:,} toxic of {rows.sum():,}"
        named = {"group": group, "key": key, "title": title, "note": note, "words": words}
        return named | {"rows": int(rows.sum()), "positives": positives}

    for language, name in LANGUAGE_NAMES.items():
        rows = (predictions["language"] == language).to_numpy()
        yield part("language", language, name, f"F1 toxic in {name}", rows), "f1_toxic", rows
    for k, type_ in enumerate(TYPES, start=1):
        yield part("type", type_, type_, f"F1 {type_}", known, k), type_, known
    for low, high in zip((0, *LENGTHS), (*LENGTHS, None)):
        rows = (chars > low) & (chars <= (high or np.inf))
        title = f"{low + 1} to {high} characters" if high else f"over {low} characters"
        yield part("length", title, title, f"F1 toxic of {title}", rows), "f1_toxic", rows


def decisions(predictions: pl.DataFrame, model: str) -> np.ndarray:
    """What a model decided, bool [N, 6]."""
    prefix = "" if model == "challenger" else f"{model}_"
    return predictions.select([f"{prefix}decision_{label}" for label in LABELS]).to_numpy()


def compared(tallies: np.ndarray, models: list[str], resamples: int, seed: int) -> dict:
    """F1 of each model on the same rows, and what the first one gains over each other; see `metrics.resampled_f1`.

    Args:
        tallies: [N, models, 2].
    """
    f1, drawn = metrics.f1_of(tallies.sum(axis=0)), metrics.resampled_f1(tallies, resamples, seed)
    return {
        "models": {
            name: {"value": float(f1[k]), "interval": metrics.interval(drawn[:, k])} for k, name in enumerate(models)
        },
        "gain": {
            name: {"gain": float(f1[0] - f1[k]), "interval": metrics.interval(drawn[:, 0] - drawn[:, k])}
            for k, name in enumerate(models)
            if k
        },
    }


def differences(evaluated: dict, parts: list[dict], other: str) -> dict[str, list[dict]]:
    """Every gain over `other` as {"words", "gain", "interval"}, by what can be said of it at 95 %: better, worse or
    unclear. Whether one of the two F1 is worse the gate tells by its one-sided bound, and so does this."""
    gains = [(words, evaluated["gain"][other][name]) for name, words in FIGURES.items()]
    gains += [(part["words"], part["gain"][other]) for part in parts]
    found = {"better": [], "worse": [], "unclear": []}
    for words, gain in gains:
        if gain:
            low, high = gain["interval"]
            kind = "better" if low > 0 else "worse" if gain.get("upper", high) < 0 else "unclear"
            found[kind].append({"words": words, "gain": gain["gain"], "interval": [low, high]})
    return found


# Messages -------------------------------------------------------------------------------------------------------------


def changed(predictions: pl.DataFrame, against: str) -> list[dict]:
    """Messages that the challenger answers otherwise than the other model, those whose score moved most first.

    Each as {"id", "text", "original", "language", "truth", "before", "after", "score_before", "score", "change"}: the
    text as the model read it and, where cleaning changed letters, as it was written; answers as the service gives them,
    scores of toxic, and `change` is `fixed` or `broken` where `toxic` changes, else `types`.
    """
    before, after = decisions(predictions, against), decisions(predictions, "challenger")
    rows = []
    for k, row in enumerate(predictions.iter_rows(named=True)):
        was, now = answer(before[k]), answer(after[k])
        if was == now:
            continue
        right = "fixed" if now["toxic"] == bool(row["toxic"]) else "broken"
        rows.append(
            {name: row.get(name) for name in ("id", "text", "original", "language")}
            | {"truth": answer([row[label] or 0 for label in LABELS]), "before": was, "after": now}
            | {"score_before": row[f"{against}_probability_toxic"], "score": row["probability_toxic"]}
            | {"change": "types" if was["toxic"] == now["toxic"] else right}
        )
    return sorted(rows, key=lambda row: -abs(row["score"] - row["score_before"]))


# Data -----------------------------------------------------------------------------------------------------------------


def data(config: Config, run: Run, evaluated: dict) -> dict:
    """The messages that this version and what serves were made from.

    {"version": of the data, "before": that of the champion's or None, "why" there is nothing to compare with,
    "rows": [{"split", "language", "now": {"rows", label: n}, "before": the same or None, "types_known": bool}]}
    """
    now, before, why = run.result("prepare"), {}, "nothing is in service yet"
    if made_by := champions_run(config, evaluated):
        theirs = runs.find(config.workspace, made_by)
        why = f"the folder of the champion's run, {theirs.id}, is not in this workspace"
        before = theirs.result("prepare") if theirs.has("prepare") else {}
    found = {"version": now["data_version"], "before": before.get("data_version"), "why": why, "rows": []}
    for split, languages in now["labels"].items():
        for language, counts in languages.items():
            was = before.get("labels", {}).get(split, {}).get(language)
            known = any(side[type_] for side in (counts, was or {}) for type_ in TYPES if side)
            row = {"split": split, "language": language, "now": counts, "before": was, "types_known": known}
            found["rows"].append(row)
    return found


def champions_run(config: Config, evaluated: dict) -> str | None:
    """Id of the run that made what served when this was evaluated, `-` where nobody knows it; None: nothing served."""
    if serves := evaluated.get("in_service"):
        return serves["run_id"] or "-"
    if version := evaluated["champion_version"]:  # evaluated before that was looked for
        return registry.tags(config, version).get("run_id", "-")
    return None
