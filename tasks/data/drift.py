"""How far data has moved from the champion's: shares of labels, mix of languages, lengths of messages.

A profile is small enough to be kept with every run, so the champion's data itself need not be there.
"""

import numpy as np

from tasks.labels import LABELS

# Lengths are counted in bins that are a quarter of a doubling wide: 1, 1.19, 1.41, 1.68, 2 … 65,536 characters.
BINS_PER_DOUBLING, BINS = 4, 64


def profile(frame) -> dict:
    """What later data is compared with.

    Args:
        frame: measures of a file or of the splits, as in `measures`.

    Returns:
        {"rows": n, "labels": {label: [positive, known]}, "mix": {language or script: n}, "lengths": [n in each bin]}
    """
    mix = "language" if "language" in frame.columns and frame["language"].notna().any() else "script"
    return {
        "rows": len(frame),
        "labels": {label: counts(frame[label]) for label in LABELS if label in frame.columns},
        "mix": {str(name): int(n) for name, n in frame[mix].value_counts().items()} if mix in frame.columns else {},
        "lengths": histogram(frame["text_chars"]) if "text_chars" in frame.columns else [],
    }


def counts(label) -> list[int]:
    return [int((label == 1).sum()), int(label.isin([0, 1]).sum())]


def histogram(chars) -> list[int]:
    logs = np.log2(chars[chars > 0].to_numpy(dtype="float64"))
    return np.bincount(np.minimum(logs * BINS_PER_DOUBLING, BINS - 1).astype(int), minlength=BINS).tolist()


def compared(file: str, now: dict, before: dict) -> list[dict]:
    """The distance of every figure that both profiles have.

    Each as {"subject", "file", "kind", "distance", "before", "now", "rows"}. `kind` is label or mix, with the
    Jensen-Shannon distance of the shares, base 2, from 0 to 1; or length, with the Wasserstein distance of the lengths'
    log2: 1 for messages twice as long. `before` and `now` are a share, a median length, or the mix in words; `rows` is
    the number of rows that the smaller side has.
    """
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import wasserstein_distance

    found = []

    def add(name, kind, distance, was, is_, rows):
        found.append(
            # Of two equal sides the square root may be that of -0.0…1, which is no number.
            {
                "subject": f"{file}: {name}",
                "file": file,
                "kind": kind,
                "distance": round(float(np.nan_to_num(distance)), 4),
            }
            | {"before": was, "now": is_, "rows": int(rows)}
        )

    for label in [label for label in now["labels"] if label in before["labels"]]:
        (yes, known), (yes_before, known_before) = now["labels"][label], before["labels"][label]
        if known and known_before:
            distance = jensenshannon([yes, known - yes], [yes_before, known_before - yes_before], base=2)
            add(label, "label", distance, yes_before / known_before, yes / known, min(known, known_before))
    names = sorted(now["mix"].keys() | before["mix"].keys())
    is_, was = ([side["mix"].get(name, 0) for name in names] for side in (now, before))
    if sum(is_) and sum(was):
        words = [", ".join(f"{name} {n / sum(side):.1%}" for name, n in zip(names, side)) for side in (was, is_)]
        add("languages", "mix", jensenshannon(is_, was, base=2), *words, min(sum(is_), sum(was)))
    is_, was = now["lengths"], before["lengths"]
    if sum(is_) and sum(was):
        doublings = np.arange(BINS) / BINS_PER_DOUBLING
        distance = wasserstein_distance(doublings, doublings, is_, was)
        add("length", "length", distance, median(was), median(is_), min(sum(is_), sum(was)))
    return found


def median(lengths: list[int]) -> int:
    middle = np.searchsorted(np.cumsum(lengths), sum(lengths) / 2)
    return round(2 ** ((middle + 0.5) / BINS_PER_DOUBLING))
