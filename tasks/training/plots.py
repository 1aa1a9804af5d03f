"""The pictures of one evaluation: a PNG for people and, under the same name, the data behind it as JSON."""

from pathlib import Path

import numpy as np

from tasks import files, metrics
from tasks.labels import LABELS, TYPES

COLORS = {"challenger": "#2563eb", "champion": "#0f9d76", "baseline": "#737b8a"}
TYPE_COLORS = dict(zip(TYPES, ("#7c3aed", "#db2777", "#d97706", "#0891b2", "#65a30d")))
QUIET = "#cbd5e1"
POINTS = 300  # of a curve: more can't be seen, and the files stay small


def draw(folder: Path, truth: np.ndarray, scored: dict, result: dict) -> list[Path]:
    """Writes the pictures and their data into `folder` and returns all paths.

    Args:
        truth: of the test rows, [N, 6].
        scored: per model, an object with `probabilities` and `decisions`, [N, 6].
        result: evaluate's, with a summary per model.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"figure.dpi": 130, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    with files.new_folder(folder) as beside, plt.rc_context({**style, "axes.titlesize": 11, "legend.frameon": False}):
        for name, (data, picture) in {
            "f1": (f1_data(result), f1),
            "precision_recall": (precision_recall_data(truth, scored), precision_recall),
            "precision_recall_types": (precision_recall_types_data(truth, scored["challenger"]), precision_recall),
            "reliability": ({name: result[name]["calibration"] for name in scored}, reliability),
            "confusion": ({name: confusion_data(truth, of.decisions) for name, of in scored.items()}, confusion),
        }.items():
            figure = plt.figure(figsize=(6, 2.8 if name == "confusion" else 4.4), layout="constrained")
            picture(figure, data)
            figure.savefig(beside / f"{name}.png")
            plt.close(figure)
            files.write_json(beside / f"{name}.json", data)
    return sorted(folder.iterdir())


def f1_data(result: dict) -> dict:
    """Per model and F1: {"value", "interval", "support"}; the support of a type is its number of positives."""
    data = {}
    for name in COLORS:
        if not result[name]:
            continue
        of = result[name]
        rows = {
            "toxic": (of["f1_toxic"], "f1_toxic", None),
            "types, micro": (of["f1_types"], "f1_types", None),
            "types, macro": (of["f1_types_macro"], "f1_types_macro", None),
            **{type_: (of["types"][type_]["f1"], type_, of["types"][type_]["support"]) for type_ in TYPES},
        }
        data[name] = {
            row: {"value": value, "interval": of["intervals"][key], "support": support}
            for row, (value, key, support) in rows.items()
        }
    return data


def f1(figure, data: dict) -> None:
    axes = figure.subplots()
    rows = list(data["challenger"])
    spread = np.linspace(-0.22, 0.22, len(data)) if len(data) > 1 else [0]
    for offset, (name, of) in zip(spread, data.items()):
        values = np.array([of[row]["value"] for row in rows])
        low, high = np.array([of[row]["interval"] for row in rows]).T
        # With few positives the percentile interval may lie beside the value.
        reach = np.maximum([values - low, high - values], 0)
        places = np.arange(len(rows)) + offset
        axes.errorbar(values, places, xerr=reach, fmt="o", markersize=5, color=COLORS[name], label=name, elinewidth=1.5)
    support = {row: data["challenger"][row]["support"] for row in rows}
    names = [row if support[row] is None else f"{row} ({support[row]})" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.axhline(2.5, color=QUIET, linewidth=0.8)
    axes.grid(axis="x", color=QUIET, linewidth=0.5)
    axes.set(xlabel="F1 with 95 % interval (number of positives)", xlim=(0, 1.01))
    axes.invert_yaxis()
    figure.suptitle("F1 on the test messages", fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def precision_recall_data(truth: np.ndarray, scored: dict) -> dict:
    """Curves of `toxic` per model, and the point at which each decides."""
    return {
        "title": "Precision and recall of toxic",
        "curves": {
            name: _curve(truth[:, 0], of.probabilities[:, 0], of.decisions[:, 0]) for name, of in scored.items()
        },
    }


def precision_recall_types_data(truth: np.ndarray, challenger) -> dict:
    """Curves of the challenger's types, on the rows whose types are known; a type that never occurs has none."""
    known = metrics.types_known(truth)
    return {
        "title": "Precision and recall of the challenger's types",
        "curves": {
            name: _curve(truth[known, k], challenger.probabilities[known, k], challenger.decisions[known, k])
            for k, name in enumerate(LABELS)
            if k and truth[known, k].sum() > 0
        },
    }


def _curve(truth: np.ndarray, probability: np.ndarray, decisions: np.ndarray) -> dict:
    from sklearn.metrics import average_precision_score, precision_recall_curve, precision_recall_fscore_support

    precision, recall, _ = precision_recall_curve(truth, probability, drop_intermediate=True)
    kept = np.unique(np.linspace(0, len(recall) - 1, POINTS).round().astype(int))
    at = precision_recall_fscore_support(truth, decisions, average="binary", zero_division=0.0)
    return {
        "pr_auc": float(average_precision_score(truth, probability)),
        "recall": recall[kept].tolist(),
        "precision": precision[kept].tolist(),
        "decides_at": {"precision": float(at[0]), "recall": float(at[1])},
    }


def precision_recall(figure, data: dict) -> None:
    axes = figure.subplots()
    for name, curve in data["curves"].items():
        color = {**COLORS, **TYPE_COLORS}[name]
        label = f"{name}, area {curve['pr_auc']:.3f}"
        axes.step(curve["recall"], curve["precision"], where="post", color=color, linewidth=1.5, label=label)
        axes.plot(curve["decides_at"]["recall"], curve["decides_at"]["precision"], "o", color=color, markersize=6)
    axes.grid(color=QUIET, linewidth=0.5)
    axes.set(title=data["title"], xlabel="recall (dot: at the threshold)", ylabel="precision")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.03))
    axes.legend(fontsize=9, loc="lower left")


def reliability(figure, data: dict) -> None:
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color=QUIET, linestyle="--")
    for name, of in data.items():
        label = f"{name}, ECE {of['ece']:.3f}"
        axes.plot(of["confidence"], of["share"], marker="o", markersize=4, color=COLORS[name], label=label)
        below.plot(of["confidence"], of["count"], marker="o", markersize=3, color=COLORS[name])
    axes.set(title="Reliability of toxic", ylabel="share that is toxic", xlim=(0, 1), ylim=(-0.02, 1.02))
    axes.legend(fontsize=9, loc="upper left")
    below.set(xlabel="predicted probability", ylabel="messages", yscale="log")


def confusion_data(truth: np.ndarray, decisions: np.ndarray) -> list[list[int]]:
    """Numbers of messages by label (clean, toxic) and answer (clean, toxic)."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(truth[:, 0], decisions[:, 0], labels=[0, 1]).tolist()


def confusion(figure, data: dict) -> None:
    for axes, (name, table) in zip(np.atleast_1d(figure.subplots(1, len(data), sharey=True)), data.items()):
        table = np.array(table)
        share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(2, 2):
            text, color = f"{table[row, column]}\n{share[row, column]:.1%}", (
                "white" if share[row, column] > 0.5 else "black"
            )
            axes.text(column, row, text, ha="center", va="center", color=color)
        axes.set(title=name, xlabel="answered")
        axes.set_xticks([0, 1], ["clean", "toxic"])
        axes.set_yticks([0, 1], ["clean", "toxic"])
        axes.spines[:].set_visible(False)
    figure.axes[0].set_ylabel("label")
    figure.suptitle("Answers to the test messages by label", fontsize=11)
