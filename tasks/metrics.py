"""The project's figures. Truth is int8 [N, 6] in the order of LABELS, -1 where a label is unknown; decisions are bool
[N, 6]; probabilities float [N, 6]."""

import numpy as np
import polars as pl
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from tasks.labels import LABELS, LANGUAGES, TYPES

UNKNOWN = -1


def truth_of(frame: pl.DataFrame) -> np.ndarray:
    """Labels of prepared rows, int8 [N, 6]; a null becomes UNKNOWN."""
    return frame.select(pl.col(LABELS).fill_null(UNKNOWN).cast(pl.Int8)).to_numpy()


def types_known(truth: np.ndarray) -> np.ndarray:
    return (truth[:, 1:] != UNKNOWN).all(axis=1)


def f1_toxic(truth: np.ndarray, decisions: np.ndarray) -> float:
    """Binary F1 of `toxic` over all rows."""
    return float(f1_score(truth[:, 0], decisions[:, 0], zero_division=0.0))


def f1_types(truth: np.ndarray, decisions: np.ndarray) -> float:
    """Micro-F1 over the five types, on the rows whose types are known. Without such a row it is 0."""
    known = types_known(truth)
    if not known.any():
        return 0.0
    return float(f1_score(truth[known, 1:], answered(decisions)[known, 1:], average="micro", zero_division=0.0))


def answered(decisions: np.ndarray) -> np.ndarray:
    """Decisions as the service answers them: no type without `toxic`."""
    return decisions & np.concatenate([np.ones_like(decisions[:, :1]), np.repeat(decisions[:, :1], 5, axis=1)], axis=1)


def choose_thresholds(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The probability per label, float64 [6], above which F1 is best on these rows; 0.5 for a label never seen."""
    chosen = np.full(len(LABELS), 0.5)
    for k in range(len(LABELS)):
        known = truth[:, k] != UNKNOWN
        if truth[known, k].sum() == 0:
            continue
        precision, recall, cuts = precision_recall_curve(truth[known, k], probabilities[known, k])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(np.argmax(f1[:-1]))
        # Halfway to the next lower score, so that a rounding error in another engine does not turn the decision.
        below = cuts[best - 1] if best else 0.0
        chosen[k] = np.clip((cuts[best] + below) / 2, 0.01, 0.99)
    return chosen


def expected_calibration_error(truth: np.ndarray, probability: np.ndarray, bins: int = 15) -> dict:
    """ECE of one binary label, and the reliability curve behind it.

    Args:
        truth: 0/1 [N].
        probability: float [N].
    """
    index = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    confidence = np.bincount(index, probability, bins) / np.maximum(count, 1)
    share = np.bincount(index, truth, bins) / np.maximum(count, 1)
    ece = float((count * np.abs(confidence - share)).sum() / max(count.sum(), 1))
    return {"ece": ece, "confidence": confidence.tolist(), "share": share.tolist(), "count": count.tolist()}


def bootstrap(truth: np.ndarray, decisions: np.ndarray, resamples: int, seed: int) -> dict[str, list[float]]:
    """95 % percentile intervals of F1 toxic and F1 types over resampled rows, as {"f1_toxic": [low, high], …}.

    F1 is 2·TP / (2·TP + FP + FN), so each resample needs only sums of per-row counts.
    """
    decisions = answered(decisions)
    known = types_known(truth)
    counts = {
        "f1_toxic": _counts(truth[:, :1], decisions[:, :1]),
        "f1_types": _counts(truth[known, 1:], decisions[known, 1:]),
    }
    generator = np.random.default_rng(seed)
    intervals = {}
    for name, rows in counts.items():
        if not len(rows):
            intervals[name] = [0.0, 0.0]
            continue
        drawn = np.array([rows[generator.integers(len(rows), size=len(rows))].sum(axis=0) for _ in range(resamples)])
        f1 = 2 * drawn[:, 0] / np.maximum(2 * drawn[:, 0] + drawn[:, 1], 1)
        intervals[name] = [float(q) for q in np.quantile(f1, [0.025, 0.975])]
    return intervals


def _counts(truth: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """Per row: true positives; false positives and negatives together. int [N, 2]."""
    positive = truth == 1
    return np.stack([(positive & decisions).sum(axis=1), (positive != decisions).sum(axis=1)], axis=1)


def summary(
    truth: np.ndarray,
    probabilities: np.ndarray,
    decisions: np.ndarray,
    languages: np.ndarray,
    resamples: int,
    seed: int,
) -> dict:
    """Everything that is said about one model on one set of rows.

    Args:
        languages: str [N], one of LANGUAGES.
        resamples, seed: of the bootstrap.
    """
    known = types_known(truth)
    decided = answered(decisions)
    per_type = {
        name: {
            "f1": float(f1_score(truth[known, k], decided[known, k], zero_division=0.0)),
            "support": int(truth[known, k].sum()),
        }
        for k, name in enumerate(TYPES, start=1)
    }
    return {
        "rows": len(truth),
        "f1_toxic": f1_toxic(truth, decisions),
        "f1_types": f1_types(truth, decisions),
        "intervals": bootstrap(truth, decisions, resamples, seed),
        "f1_types_macro": float(np.mean([t["f1"] for t in per_type.values()])),
        "types": per_type,
        "languages": {
            language: {
                "f1_toxic": f1_toxic(truth[languages == language], decisions[languages == language]),
                "rows": int((languages == language).sum()),
            }
            for language in LANGUAGES
            if (languages == language).any()
        },
        "pr_auc": float(average_precision_score(truth[:, 0], probabilities[:, 0])),
        "roc_auc": float(roc_auc_score(truth[:, 0], probabilities[:, 0])),
        "calibration": expected_calibration_error(truth[:, 0], probabilities[:, 0]),
    }
