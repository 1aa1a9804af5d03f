import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error

from tasks import metrics
from tasks.labels import TYPES, answer

TRUTH = np.array(
    [[1, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, -1, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1]]
)


def decided(*rows):
    return np.array(rows, dtype=bool)


def made(rows: int, wrong: float, seed: int, unknown: float = 0.4):
    """Truth with types on some rows, and decisions of which a share is wrong."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 2, size=(rows, 6))
    decisions = (truth == 1) ^ (generator.random((rows, 6)) < wrong)
    truth[: int(rows * unknown), 1:] = metrics.UNKNOWN
    return truth, decisions


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


# Calibration ----------------------------------------------------------------------------------------------------------


def test_calibration_error_of_a_calibrated_and_an_overconfident_model():
    generator = np.random.default_rng(2)
    probability = generator.random(20000)
    truth = (generator.random(20000) < probability).astype(int)
    assert metrics.calibration(truth, probability)["ece"] < 0.02
    coin = generator.integers(0, 2, size=20000)
    assert metrics.calibration(coin, np.full(20000, 0.99))["ece"] == pytest.approx(0.49, abs=0.02)


def test_calibration_error_is_that_of_torchmetrics_and_its_bins_hold_every_row():
    generator = np.random.default_rng(3)
    probability = np.concatenate([generator.random(500) ** 3, np.zeros(20), np.ones(20)])
    truth = (generator.random(540) < probability).astype(int)
    found = metrics.calibration(truth, probability)
    assert sum(found["count"]) == 540
    assert len(found["count"]) == len(found["share"]) == len(found["confidence"])
    theirs = binary_calibration_error(torch.tensor(probability), torch.tensor(truth), n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(theirs), abs=1e-6)


# The natural share ----------------------------------------------------------------------------------------------------


def test_the_weighted_f1_by_hand():
    # 4 of 8 messages are toxic; naturally 1 of 5 is. Weights: toxic 0.2/0.5, others 0.8/0.5.
    toxic = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    found = np.array([1, 1, 1, 0, 1, 0, 0, 0])
    truth, decisions = np.repeat(toxic[:, None], 6, axis=1), np.repeat(found[:, None], 6, axis=1).astype(bool)
    natural = metrics.of_language(truth, found[:, None], decisions, 0.2, resamples=100, seed=0)["natural"]
    hits, missed, alarms = 3 * 0.4, 1 * 0.4, 1 * 1.6
    assert natural["f1_toxic"] == pytest.approx(2 * hits / (2 * hits + missed + alarms))
    assert natural["precision_toxic"] == pytest.approx(hits / (hits + alarms))
    assert natural["recall_toxic"] == pytest.approx(3 / 4)


def test_the_natural_figure_at_the_share_of_the_rows_is_the_plain_one():
    truth, decisions = made(500, 0.2, seed=4, unknown=0)
    found = metrics.of_language(truth, decisions * 1.0, decisions, truth[:, 0].mean(), resamples=200, seed=0)
    assert found["natural"]["f1_toxic"] == pytest.approx(found["f1_toxic"])
    assert found["natural"]["interval"] == pytest.approx(found["interval"])


def test_without_a_natural_share_or_with_one_class_there_is_no_natural_figure():
    truth, decisions = made(50, 0.2, seed=5, unknown=0)
    assert metrics.of_language(truth, decisions * 1.0, decisions, None, 100, 0)["natural"] is None
    clean = np.zeros_like(truth)
    assert metrics.of_language(clean, decisions * 1.0, decisions, 0.1, 100, 0)["natural"] is None


# Intervals ------------------------------------------------------------------------------------------------------------


def test_the_bootstrap_interval_holds_the_figure_and_narrows_with_rows():
    def width(rows):
        truth, decisions = made(rows, 0.1, seed=rows)
        low, high = metrics.bootstrap(truth, decisions, 300, seed=0)["f1_toxic"]
        assert low <= metrics.f1_toxic(truth, decisions) <= high
        return high - low

    assert width(2000) < width(100) / 2


def test_the_intervals_are_those_of_scipy():
    truth, decisions = made(400, 0.15, seed=6)
    ours = metrics.bootstrap(truth, decisions, 20_000, seed=0)
    known, answers = metrics.types_known(truth), metrics.answered(decisions)

    def interval(truth, decisions, figure):
        index = (np.arange(len(truth)),)
        found = stats.bootstrap(
            index, lambda rows: figure(truth[rows], decisions[rows]), vectorized=False, n_resamples=1000,
            method="percentile", rng=np.random.default_rng(1),
        )  # fmt: skip
        return [found.confidence_interval.low, found.confidence_interval.high]

    assert ours["f1_toxic"] == pytest.approx(interval(truth[:, 0], decisions[:, 0], f1_score), abs=0.008)
    insult = interval(truth[known, 4], answers[known, 4], f1_score)
    assert ours["insult"] == pytest.approx(insult, abs=0.012)
    micro = interval(truth[known, 1:], answers[known, 1:], lambda t, d: f1_score(t, d, average="micro"))
    assert ours["f1_types"] == pytest.approx(micro, abs=0.008)


def test_the_intervals_of_the_areas_are_those_of_resampled_scikit_learn():
    generator = np.random.default_rng(14)
    truth = generator.integers(0, 2, size=300)
    probability = np.clip(truth * 0.3 + generator.random(300) * 0.7, 0, 1).round(2)  # rounded: equal scores occur
    ours, draws = metrics.bootstrap_areas(truth, probability, 400, seed=5), np.random.default_rng(5)
    rows = [draws.integers(300, size=300) for _ in range(400)]
    order = np.argsort(-probability, kind="stable")
    for name, figure in (("pr_auc", average_precision_score), ("roc_auc", roc_auc_score)):
        theirs = [figure(truth[order][chosen], probability[order][chosen]) for chosen in rows]
        assert ours[name] == pytest.approx(metrics.interval(np.array(theirs)))


def test_a_model_gains_nothing_over_itself():
    truth, decisions = made(500, 0.1, seed=7)
    found = metrics.gain(truth, decisions, decisions, 500, seed=0)
    nothing = {"gain": 0.0, "interval": [0.0, 0.0], "lower": 0.0, "upper": 0.0}
    assert found["f1_toxic"] == nothing == found["f1_types"]


def test_a_clearly_better_model_gains_for_certain_and_a_worse_one_loses():
    truth, better = made(600, 0.05, seed=8)
    _, worse = made(600, 0.25, seed=8)
    up, down = (metrics.gain(truth, *pair, 500, seed=0) for pair in ((better, worse), (worse, better)))
    for name, figure in (("f1_toxic", metrics.f1_toxic), ("f1_types", metrics.f1_types)):
        assert up[name]["gain"] == pytest.approx(figure(truth, better) - figure(truth, worse))
        assert 0 < up[name]["interval"][0] < up[name]["gain"] < up[name]["interval"][1]
        assert down[name]["interval"][1] < 0


def test_pairing_sees_a_small_gain_that_separate_intervals_hide():
    truth, worse = made(2000, 0.2, seed=9)
    better = worse.copy()
    corrected = np.flatnonzero(better[:, 0] != truth[:, 0])[:15]
    better[corrected, 0] = truth[corrected, 0] == 1
    apart = [metrics.bootstrap(truth, decisions, 1000, seed=0)["f1_toxic"] for decisions in (better, worse)]
    assert apart[0][0] < apart[1][1]
    assert metrics.gain(truth, better, worse, 1000, seed=0)["f1_toxic"]["interval"][0] > 0


def test_a_gain_in_types_needs_rows_with_types():
    truth, decisions = made(50, 0.1, seed=10, unknown=1.0)
    assert metrics.gain(truth, decisions, decisions, 100, seed=0)["f1_types"] is None


def test_the_paired_intervals_and_bounds_are_those_of_scipy():
    truth, ours = made(3000, 0.08, seed=11)
    theirs = (truth == 1) ^ (np.random.default_rng(12).random(truth.shape) < 0.1)
    resamples = 2000
    found = metrics.gain(truth, ours, theirs, resamples, seed=0)

    def f1_difference(hits, misses, their_hits, their_misses, axis):
        f1 = [
            2 * h.sum(axis) / (2 * h.sum(axis) + m.sum(axis)) for h, m in ((hits, misses), (their_hits, their_misses))
        ]
        return f1[0] - f1[1]

    known = metrics.types_known(truth)
    for name, rows, columns in (("f1_toxic", slice(None), [0]), ("f1_types", known, [1, 2, 3, 4, 5])):
        samples = []
        for decisions in (ours, theirs):
            right, answers = truth[rows][:, columns] == 1, metrics.answered(decisions)[rows][:, columns]
            samples += [(right & answers).sum(axis=1), (right != answers).sum(axis=1)]
        intervals = {}
        for level in (0.95, 0.90):  # each end of the second is a one-sided 95 % bound
            theirs_at = stats.bootstrap(
                samples, f1_difference, paired=True, n_resamples=resamples, method="percentile", batch=200,
                confidence_level=level, rng=np.random.default_rng(1),
            )  # fmt: skip
            intervals[level] = theirs_at.confidence_interval
        # Both draw at random. With B resamples a quantile of order q of a normal distribution has a standard error of
        # sqrt(q (1 - q) / B) / density(q) standard deviations, 0.06 for q = 0.025; two of them differ by 0.085, and by
        # more than four times that, about a third of a standard deviation, in one case of 10,000.
        tolerance = 0.34 * theirs_at.standard_error
        assert found[name]["interval"] == pytest.approx(list(intervals[0.95]), abs=tolerance)
        bounds = [found[name]["lower"], found[name]["upper"]]
        assert bounds == pytest.approx(list(intervals[0.90]), abs=tolerance)
        assert found[name]["gain"] == pytest.approx(f1_difference(*samples, axis=0))


# The summary ----------------------------------------------------------------------------------------------------------


def test_the_summary_answers_per_language_and_type():
    generator = np.random.default_rng(13)
    truth = generator.integers(0, 2, size=(60, 6))
    truth[30:, 1:] = metrics.UNKNOWN
    truth[:30, 2] = 0
    truth[3, 2] = 1
    probabilities = np.clip(np.abs(truth) * 0.8, 0.1, 0.9)
    languages = np.array(["en"] * 30 + ["ru"] * 30)
    found = metrics.summary(truth, probabilities, probabilities >= 0.5, languages, {"en": 0.1}, 100, seed=0)
    assert (found["languages"]["ru"]["f1_toxic"], found["languages"]["ru"]["rows"]) == (1.0, 30)
    assert found["languages"]["ru"]["natural"] is None and found["languages"]["en"]["natural"]["toxic_share"] == 0.1
    assert found["types"]["insult"]["support"] == int(truth[:30, 4].sum())
    insult = average_precision_score(truth[:30, 4], probabilities[:30, 4])
    assert found["types"]["insult"]["pr_auc"] == pytest.approx(insult)
    assert found["types"]["obscene"] == {
        "f1": pytest.approx(truth[3, 0]),
        "support": 1,
        "pr_auc": None,
        "roc_auc": None,
    }
    assert found["f1_types_macro"] == pytest.approx(np.mean([found["types"][name]["f1"] for name in TYPES]))
