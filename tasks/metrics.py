"""The project's figures. Truth is int8 [N, 6] in the order of LABELS, -1 where a label is unknown; decisions are bool
[N, 6]; probabilities float [N, 6]."""

import numpy as np
import polars as pl
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
)

from tasks.labels import LABELS, LANGUAGES, TYPES

UNKNOWN = -1

# Below this many positives a curve's area says more about the few messages than about the model.
MIN_POSITIVES = 10


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


def agreement(expected: np.ndarray, found: np.ndarray, near: np.ndarray) -> dict:
    """How far two sets of decisions agree.

    Args:
        expected, found: bool [N, 6].
        near: bool [N, 6], where a decision is so near its threshold that it may go either way; these are only counted.

    Returns:
        {"equal", "near_threshold", "different"}: the share of the other decisions that are the same, and two counts.
    """
    different = (expected != found) & ~near
    return {
        "equal": float(1 - different.sum() / max((~near).sum(), 1)),
        "near_threshold": int(near.sum()),
        "different": int(different.sum()),
    }


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


def calibration(truth: np.ndarray, probability: np.ndarray, bins: int = 15) -> dict:
    """Expected calibration error of one binary label, and the reliability curve behind it.

    Args:
        truth: 0/1 [N].
        probability: float [N].

    Returns {"ece", "confidence": mean probability, "share": of positives, "count": rows}, the last three a list with
    one value per bin that has rows.
    """
    share, confidence = calibration_curve(truth, probability, n_bins=bins, pos_label=1)
    # The bins as scikit-learn's curve has them: a probability on an edge belongs to the lower one.
    count = np.bincount(np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probability))
    count = count[count > 0]
    ece = float((count * np.abs(confidence - share)).sum() / count.sum())
    return {"ece": ece, "confidence": confidence.tolist(), "share": share.tolist(), "count": count.tolist()}


def natural_weights(toxic: np.ndarray, share: float) -> np.ndarray:
    """Weights of rows, float64 [N] of mean 1, under which `share` of them are toxic; `toxic` is 0/1 [N], both present.

    Training data holds more toxic messages than arrive in service, and that flatters precision.
    """
    sampled = toxic.mean()
    return np.where(toxic == 1, share / sampled, (1 - share) / (1 - sampled))


# Intervals ------------------------------------------------------------------------------------------------------------
#
# F1 is 2·TP / (2·TP + FP + FN), so a resample needs only sums of what each row adds to the two: its tally.


def tallies(truth: np.ndarray, decisions: np.ndarray) -> dict[str, np.ndarray]:
    """Per F1, what each row adds to true positives, and to false positives and negatives together: int [N, 2]."""
    decided, positive = answered(decisions), truth == 1
    hits = positive & decided
    misses = positive != decided
    hits[~types_known(truth), 1:] = misses[~types_known(truth), 1:] = False
    columns = {"f1_toxic": [0], "f1_types": range(1, 6), **{name: [k] for k, name in enumerate(TYPES, start=1)}}
    return {
        name: np.stack([hits[:, list(k)].sum(axis=1), misses[:, list(k)].sum(axis=1)], axis=1)
        for name, k in columns.items()
    }


def resampled_f1(tally: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """F1s on bootstrap resamples of the rows, float64 [resamples, F]; all F on the same resamples.

    Rows with equal tallies are interchangeable: how often each kind is drawn is multinomial, so a resample costs as
    much as there are kinds of rows, a few hundred, and not as there are rows.

    Args:
        tally: [N, F, 2].
    """
    kinds, count = np.unique(tally, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(tally), count / len(tally), size=resamples)
    return f1_of(np.tensordot(drawn, kinds, axes=1))


def f1_of(sums: np.ndarray) -> np.ndarray:
    """F1, float64 [...], of sums of tallies [..., 2]; 0 where there is neither a hit nor a miss."""
    hits, misses = np.moveaxis(sums, -1, 0)
    return 2 * hits / np.maximum(2 * hits + misses, 1e-12)


def interval(values: np.ndarray) -> list[float]:
    """The middle 95 % of resampled values [resamples]."""
    return [float(q) for q in np.quantile(values, [0.025, 0.975])]


def bootstrap(truth: np.ndarray, decisions: np.ndarray, resamples: int, seed: int) -> dict[str, list[float]]:
    """95 % percentile intervals over resampled rows: {"f1_toxic": [low, high], "f1_types", "f1_types_macro" and each
    type}."""
    tally = tallies(truth, decisions)
    f1 = dict(zip(tally, resampled_f1(np.stack(list(tally.values()), axis=1), resamples, seed).T))
    f1["f1_types_macro"] = np.mean([f1[name] for name in TYPES], axis=0)
    return {name: interval(values) for name, values in f1.items()}


def bootstrap_areas(truth: np.ndarray, probability: np.ndarray, resamples: int, seed: int) -> dict[str, list[float]]:
    """95 % percentile intervals of both areas of one binary label: {"pr_auc": [low, high], "roc_auc"}; see `areas`.

    The rows are sorted once; a resample only changes how often each of them counts.

    Args:
        truth: 0/1 [N], both present.
        probability: float [N].
    """
    order = np.argsort(-probability, kind="stable")
    positive, ends = truth[order], np.flatnonzero(np.diff(probability[order], append=-1.0))  # equal scores count as one
    generator, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        times = np.bincount(generator.integers(len(truth), size=len(truth)), minlength=len(truth))
        hits, taken = np.cumsum(times * positive)[ends], np.cumsum(times)[ends]
        if not 0 < hits[-1] < taken[-1]:
            continue  # only one class was drawn: no curve
        pr_auc = (np.diff(hits, prepend=0) * hits / np.maximum(taken, 1)).sum() / hits[-1]
        alarms = taken - hits
        roc_auc = np.trapezoid(np.append(0, hits), np.append(0, alarms)) / (hits[-1] * alarms[-1])
        found.append((pr_auc, roc_auc))
    pr_auc, roc_auc = np.transpose(found)
    return {"pr_auc": interval(pr_auc), "roc_auc": interval(roc_auc)}


def gain(truth: np.ndarray, ours: np.ndarray, theirs: np.ndarray, resamples: int, seed: int) -> dict[str, dict]:
    """How much better our decisions are than theirs: {figure: {"gain", "interval", "lower", "upper"}}, of f1_toxic and
    f1_types.

    The bootstrap is paired: both are measured on the same resampled rows, so that what is hard for both cancels out.
    `interval` holds the middle 95 %; `lower` and `upper` are each a one-sided 95 % bound. `f1_types` is None where no
    row's types are known.
    """
    found, a, b = {}, tallies(truth, ours), tallies(truth, theirs)
    for name in ("f1_toxic", "f1_types"):
        if name == "f1_types" and not types_known(truth).any():
            found[name] = None
            continue
        pair = np.stack([a[name], b[name]], axis=1)
        ours_less_theirs = np.subtract(*resampled_f1(pair, resamples, seed).T)
        lower, upper = np.quantile(ours_less_theirs, [0.05, 0.95])
        found[name] = {
            "gain": float(np.subtract(*f1_of(pair.sum(axis=0)))),
            "interval": interval(ours_less_theirs),
            "lower": float(lower),
            "upper": float(upper),
        }
    return found


# One model on one set of rows -----------------------------------------------------------------------------------------


def summary(
    truth: np.ndarray,
    probabilities: np.ndarray,
    decisions: np.ndarray,
    languages: np.ndarray,
    natural_toxic_share: dict[str, float],
    resamples: int,
    seed: int,
) -> dict:
    """Everything that is said about one model on one set of rows.

    Args:
        languages: str [N], one of LANGUAGES.
        natural_toxic_share: per language, the share of toxic messages before training data was sampled.
        resamples, seed: of the bootstrap.
    """
    intervals = bootstrap(truth, decisions, resamples, seed)
    of_toxic = areas(truth[:, 0], probabilities[:, 0])
    if of_toxic["pr_auc"] is not None:
        intervals |= bootstrap_areas(truth[:, 0], probabilities[:, 0], resamples, seed)
    per_type = of_types(truth, probabilities, decisions)
    precision, recall, _, _ = precision_recall_fscore_support(
        truth[:, 0], decisions[:, 0], average="binary", zero_division=0.0
    )
    per_language = {}
    for name in LANGUAGES:
        rows = languages == name
        if rows.any():
            share = natural_toxic_share.get(name)
            per_language[name] = of_language(truth[rows], probabilities[rows], decisions[rows], share, resamples, seed)
    return {
        "rows": len(truth),
        "f1_toxic": f1_toxic(truth, decisions),
        "precision_toxic": float(precision),
        "recall_toxic": float(recall),
        "f1_types": f1_types(truth, decisions),
        "f1_types_macro": float(np.mean([found["f1"] for found in per_type.values()])),
        "intervals": intervals,
        "types": per_type,
        "languages": per_language,
        **of_toxic,
        "calibration": calibration(truth[:, 0], probabilities[:, 0]),
    }


def of_types(truth: np.ndarray, probabilities: np.ndarray, decisions: np.ndarray) -> dict[str, dict]:
    """F1, number of positives and areas of each type, on the rows whose types are known."""
    known, decided = types_known(truth), answered(decisions)
    return {
        name: {
            "f1": float(f1_score(truth[known, k], decided[known, k], zero_division=0.0)),
            "support": int(truth[known, k].sum()),
            **areas(truth[known, k], probabilities[known, k]),
        }
        for k, name in enumerate(TYPES, start=1)
    }


def of_language(truth, probabilities, decisions, natural_share: float | None, resamples: int, seed: int) -> dict:
    """Figures of `toxic` in one language, and under "natural" those at the language's natural share of toxic messages;
    that is None where the share is unknown, or the rows hold only one class."""
    toxic, decided, tally = truth[:, 0], decisions[:, 0], tallies(truth, decisions)["f1_toxic"][:, None, :]
    natural = None
    if natural_share is not None and 0 < toxic.mean() < 1:
        weights = natural_weights(toxic, natural_share)
        precision, recall, f1, _ = precision_recall_fscore_support(
            toxic, decided, average="binary", sample_weight=weights, zero_division=0.0
        )
        natural = {
            "toxic_share": natural_share,
            "f1_toxic": float(f1),
            "precision_toxic": float(precision),
            "recall_toxic": float(recall),
            "interval": interval(resampled_f1(tally * weights[:, None, None], resamples, seed)),
        }
    return {
        "rows": len(truth),
        "toxic_share": float(toxic.mean()),
        "f1_toxic": f1_toxic(truth, decisions),
        "interval": interval(resampled_f1(tally, resamples, seed)),
        **areas(toxic, probabilities[:, 0]),
        "natural": natural,
    }


def areas(truth: np.ndarray, probability: np.ndarray) -> dict[str, float | None]:
    """Areas under the precision-recall and the ROC curve of one binary label; None with fewer than MIN_POSITIVES
    positives, or no negative."""
    if truth.sum() < MIN_POSITIVES or truth.all():
        return {"pr_auc": None, "roc_auc": None}
    return {
        "pr_auc": float(average_precision_score(truth, probability)),
        "roc_auc": float(roc_auc_score(truth, probability)),
    }
