"""The baseline every model must beat: TF-IDF of words and characters, and a logistic regression per label."""

import numpy as np
import polars as pl
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_union

from tasks import metrics
from tasks.labels import LABELS


def probabilities(train: pl.DataFrame, *others: pl.DataFrame) -> list[np.ndarray]:
    """Fits on `train` and returns the probabilities of each other frame's rows, float64 [N, 6].

    A label is fitted on the rows where it is known; one that has a single class there gets that class's share, 0 or 1.
    """
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=100_000),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=3, sublinear_tf=True, max_features=200_000),
    )
    matrix, truth = features.fit_transform(train["text"]), metrics.truth_of(train)
    others_matrix = [features.transform(frame["text"]) for frame in others]
    found = [np.zeros((len(frame), len(LABELS))) for frame in others]
    for k in range(len(LABELS)):
        known = truth[:, k] != metrics.UNKNOWN
        classes = np.unique(truth[known, k])
        if len(classes) < 2:
            for scores in found:
                scores[:, k] = classes[0] if len(classes) else 0.0
            continue
        model = LogisticRegression(C=5.0, solver="liblinear").fit(matrix[known], truth[known, k])
        for scores, rows in zip(found, others_matrix):
            scores[:, k] = model.predict_proba(rows)[:, 1]
    return found
