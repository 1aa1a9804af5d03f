"""The baseline every model must beat: TF-IDF of words and characters, and a logistic regression per label."""

import logging
import time
from collections.abc import Callable

import numpy as np
import polars as pl

from tasks import metrics
from tasks.labels import LABELS

log = logging.getLogger(__name__)


def fit(train: pl.DataFrame) -> Callable[[list[str]], np.ndarray]:
    """Fits on prepared rows; returns a function from messages to probabilities, float64 [N, 6].

    A label is fitted on the rows where it is known; one that has a single class there gets that class's share, 0 or 1.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_union

    started = time.monotonic()
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=100_000, dtype=np.float32),
        TfidfVectorizer(
            analyzer="char_wb",
            ngram_range=(2, 5),
            min_df=3,
            sublinear_tf=True,
            max_features=200_000,
            dtype=np.float32,
        ),
    )
    matrix, truth = features.fit_transform(train["text"].to_list()), metrics.truth_of(train)
    models = []
    for k in range(len(LABELS)):
        known = truth[:, k] != metrics.UNKNOWN
        classes = np.unique(truth[known, k])
        if len(classes) < 2:
            models.append(float(classes[0]) if len(classes) else 0.0)
        else:
            models.append(LogisticRegression(C=5.0, solver="liblinear").fit(matrix[known], truth[known, k]))
    log.info("the baseline took %.1f s for %d messages", time.monotonic() - started, len(train))

    def probabilities(texts: list[str]) -> np.ndarray:
        rows = features.transform(texts)
        columns = [
            np.full(len(texts), model) if isinstance(model, float) else model.predict_proba(rows)[:, 1]
            for model in models
        ]
        return np.stack(columns, axis=1)

    return probabilities
