"""Distances between profiles, on shifts made by hand."""

import numpy as np
import pandas as pd
import pytest

from tasks.data import drift

RNG = np.random.default_rng(0)


def profile(toxic=0.1, chars=120, russian=0.3, rows=4000):
    index = np.arange(rows)
    return drift.profile(
        pd.DataFrame(
            {
                "toxic": (index < toxic * rows).astype("int8"),
                "threat": np.full(rows, np.nan),
                "text_chars": np.full(rows, chars) if np.isscalar(chars) else chars,
                "language": np.where(index < russian * rows, "ru", "en"),
            }
        )
    )


def distances(now, before):
    return {row["subject"]: row for row in drift.compared("file", now, before)}


def test_the_same_data_is_at_no_distance_and_unknown_labels_are_not_compared():
    lengths = RNG.lognormal(5, 1, 4000).round()
    found = distances(profile(chars=lengths), profile(chars=lengths))
    assert set(found) == {"file: toxic", "file: languages", "file: length"}
    assert all(row["distance"] == 0 for row in found.values())


def test_messages_twice_as_long_are_at_distance_one():
    lengths = RNG.lognormal(5, 1, 4000).round().clip(1)
    row = distances(profile(chars=2 * lengths), profile(chars=lengths))["file: length"]
    assert row["distance"] == pytest.approx(1, abs=0.02)
    assert row["now"] == pytest.approx(2 * row["before"], rel=0.01)


def test_labels_move_only_their_own_distance():
    found = distances(profile(toxic=0.39), profile(toxic=0.096))
    assert found["file: toxic"]["distance"] == pytest.approx(0.3, abs=0.005)
    assert (found["file: toxic"]["before"], found["file: toxic"]["now"]) == (0.096, 0.39)
    assert found["file: languages"]["distance"] == found["file: length"]["distance"] == 0


def test_a_mix_that_loses_a_language_is_told_in_words():
    row = distances(profile(russian=0), profile(russian=0.3))["file: languages"]
    assert row["distance"] > 0.3 and (row["before"], row["now"]) == ("en 70.0%, ru 30.0%", "en 100.0%, ru 0.0%")


def test_another_size_of_the_same_data_is_no_drift():
    found = distances(profile(rows=400), profile(rows=4000))
    assert all(row["distance"] == 0 and row["rows"] == 400 for row in found.values())


def test_no_messages_at_all_make_a_profile_that_nothing_is_compared_with():
    assert distances(profile(rows=0, chars=np.array([])), profile()) == {}
