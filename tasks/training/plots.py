"""The pictures of one evaluation: PNG for people, the data behind them is in evaluate.json."""

from pathlib import Path

import numpy as np

from tasks import files, metrics
from tasks.labels import LABELS, TYPES

INK, ACCENT, QUIET = "#334155", "#2563eb", "#cbd5e1"


def draw(folder: Path, truth: np.ndarray, probabilities: np.ndarray, result: dict) -> list[Path]:
    """Writes precision_recall, reliability, f1 and confusion into `folder` and returns their paths.

    Args:
        truth, probabilities: of the challenger on the test rows, [N, 6].
        result: evaluate's.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    with files.new_folder(folder) as beside:
        for name, picture in {
            "precision_recall": lambda axes: precision_recall(axes, truth, probabilities),
            "reliability": lambda axes: reliability(axes, result["challenger"]["calibration"]),
            "f1": lambda axes: f1_by_model(axes, result),
            "confusion": lambda axes: confusion(axes, truth[:, 0], probabilities[:, 0], result["thresholds"]["toxic"]),
        }.items():
            figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
            picture(axes)
            figure.savefig(beside / f"{name}.png")
            plt.close(figure)
    return sorted(folder.glob("*.png"))


def precision_recall(axes, truth, probabilities) -> None:
    from sklearn.metrics import PrecisionRecallDisplay

    for k, name in enumerate(LABELS):
        known = truth[:, k] != metrics.UNKNOWN
        if truth[known, k].sum() > 0:
            PrecisionRecallDisplay.from_predictions(truth[known, k], probabilities[known, k], name=name, ax=axes)
    axes.set(title="Precision and recall on the test split", xlim=(0, 1.02), ylim=(0, 1.05))
    axes.legend(fontsize=7, loc="lower left")


def reliability(axes, calibration: dict) -> None:
    filled = [k for k, count in enumerate(calibration["count"]) if count]
    axes.plot([0, 1], [0, 1], color=QUIET, linestyle="--", label="perfect")
    axes.plot(
        [calibration["confidence"][k] for k in filled],
        [calibration["share"][k] for k in filled],
        marker="o",
        color=ACCENT,
        label=f"challenger, ECE {calibration['ece']:.3f}",
    )
    axes.set(title="Reliability of `toxic`", xlabel="predicted probability", ylabel="share that is toxic")
    axes.legend()


def f1_by_model(axes, result: dict) -> None:
    models = [name for name in ("challenger", "champion", "baseline") if result[name]]
    columns = ["toxic", "types", *TYPES]
    width = 0.8 / len(models)
    for position, (name, color) in enumerate(zip(models, (ACCENT, INK, QUIET))):
        of_model = result[name]
        values = [of_model["f1_toxic"], of_model["f1_types"], *(of_model["types"][t]["f1"] for t in TYPES)]
        axes.bar(np.arange(len(columns)) + position * width, values, width, label=name, color=color)
    axes.set(title="F1 on the test split", ylim=(0, 1))
    axes.set_xticks(np.arange(len(columns)) + 0.4 - width / 2, columns, rotation=30, ha="right")
    axes.legend(loc="lower right")


def confusion(axes, truth, probability, threshold: float) -> None:
    from sklearn.metrics import ConfusionMatrixDisplay

    ConfusionMatrixDisplay.from_predictions(
        truth, probability >= threshold, display_labels=["clean", "toxic"], cmap="Blues", colorbar=False, ax=axes
    )
    axes.set(title="`toxic`, test messages")
