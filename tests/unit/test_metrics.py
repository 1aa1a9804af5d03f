import numpy as np
import pytest
from sklearn.metrics import f1_score

from tasks import metrics
from tasks.labels import answer

TRUTH = np.array(
    [[1, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, -1, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1]]
)


def decided(*rows):
    return np.array(rows, dtype=bool)


def test_f1_toxic_counts_every_row():
    decisions = decided([1, 0, 1, 0, 1, 0], [0] * 6, [0] * 6, [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0])
    assert metrics.f1_toxic(TRUTH, decisions) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_f1_types_leaves_out_rows_whose_types_are_unknown():
    decisions = decided([1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0], [0] * 6, [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1])
    assert metrics.f1_types(TRUTH, decisions) == pytest.approx(2 * 2 / (2 * 2 + 0 + 1))


def test_a_type_without_toxic_does_not_count_as_it_is_not_answered():
    decisions = decided([0, 0, 1, 0, 1, 0], [0] * 6, [0] * 6, [0] * 6, [0] * 6)
    assert metrics.f1_types(TRUTH, decisions) == 0
    assert answer(decisions[0]) == {"toxic": False, "labels": []}


def test_f1_types_without_known_rows_is_zero():
    assert metrics.f1_types(TRUTH[3:], decided([1] * 6, [0] * 6)) == 0.0


def test_thresholds_maximise_f1_on_the_rows_given():
    generator = np.random.default_rng(0)
    truth = np.repeat(generator.integers(0, 2, size=(400, 1)), 6, axis=1)
    scores = np.clip(truth * 0.3 + generator.random((400, 6)) * 0.6, 0.02, 0.98)
    chosen = metrics.choose_thresholds(truth, scores)
    best = max(f1_score(truth[:, 0], scores[:, 0] >= cut) for cut in np.linspace(0.02, 0.98, 500))
    assert f1_score(truth[:, 0], scores[:, 0] >= chosen[0]) >= best - 1e-9


def test_a_label_never_seen_keeps_one_half():
    truth = np.zeros((10, 6), dtype=int)
    assert (metrics.choose_thresholds(truth, np.random.default_rng(0).random((10, 6))) == 0.5).all()


def test_the_bootstrap_interval_holds_the_figure_and_narrows_with_rows():
    generator = np.random.default_rng(1)

    def interval(rows):
        truth = generator.integers(0, 2, size=(rows, 6))
        decisions = (truth == 1) ^ (generator.random((rows, 6)) < 0.1)
        low, high = metrics.bootstrap(truth, decisions, 300, seed=0)["f1_toxic"]
        assert low <= metrics.f1_toxic(truth, decisions) <= high
        return high - low

    assert interval(2000) < interval(100) / 2


def test_calibration_error_of_a_calibrated_and_an_overconfident_model():
    generator = np.random.default_rng(2)
    probability = generator.random(20000)
    truth = (generator.random(20000) < probability).astype(int)
    assert metrics.expected_calibration_error(truth, probability)["ece"] < 0.02
    coin = generator.integers(0, 2, size=20000)
    assert metrics.expected_calibration_error(coin, np.full(20000, 0.99))["ece"] == pytest.approx(0.49, abs=0.02)


def test_the_summary_answers_per_language_and_type():
    generator = np.random.default_rng(3)
    truth = generator.integers(0, 2, size=(60, 6))
    truth[30:, 1:] = metrics.UNKNOWN
    probabilities = np.clip(np.abs(truth) * 0.8, 0.1, 0.9)
    languages = np.array(["en"] * 30 + ["ru"] * 30)
    found = metrics.summary(truth, probabilities, probabilities >= 0.5, languages, 100, seed=0)
    assert found["languages"]["ru"] == {"f1_toxic": 1.0, "rows": 30}
    assert found["types"]["insult"]["support"] == int(truth[:30, 4].sum())
