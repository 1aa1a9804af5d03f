"""Every check of the gate: passed, missed, and where it does not apply; and what it takes to change a limit."""

import copy
import shutil

import numpy as np
import pytest

from tasks import config as configuration
from tasks import metrics
from tasks.errors import UsageError
from tasks.labels import TYPES
from tasks.promotion import compare, gate

NAMES = [
    *("f1_toxic", "f1_types", "interval_f1_toxic", "interval_f1_types"),
    *("gain_f1_toxic", "gain_f1_types", "champion_f1_toxic", "champion_f1_types"),
    *(f"language_{name}{against}" for name in ("en", "ru") for against in ("", "_champion")),
    *(f"type_{name}{against}" for name in TYPES for against in ("", "_champion")),
    "calibration",
    *("behaviour", "behaviour_minimum", "behaviour_invariance", "behaviour_direction", "behaviour_obfuscation"),
]
WITH_CHAMPION = [name for name in NAMES if "champion" in name]


@pytest.fixture(scope="module")
def config():
    return configuration.load()


def model(toxic=0.90, types=0.80) -> dict:
    return {
        "f1_toxic": toxic,
        "f1_types": types,
        "intervals": {name: [f1 - 0.01, f1 + 0.01] for name, f1 in [("f1_toxic", toxic), ("f1_types", types)]}
        | {name: [types - 0.1, types + 0.1] for name in TYPES},
        "languages": {name: {"f1_toxic": toxic, "interval": [toxic - 0.02, toxic + 0.02]} for name in ("en", "ru")},
        "types": {name: {"f1": types, "support": 30} for name in TYPES},
        "calibration": {"ece": 0.02},
    }


def difference(gain: float, error=0.004) -> dict:
    """What metrics.gain says of a difference with this standard error."""
    ends = {"interval": [gain - 1.96 * error, gain + 1.96 * error]}
    return {"gain": gain, **ends, "lower": gain - 1.645 * error, "upper": gain + 1.645 * error}


def evaluated() -> dict:
    """Evaluate's result for a version that passes everything, against a champion of the same quality."""
    return {
        "challenger": model(),
        "champion": model(),
        "champion_version": 4,
        "baseline": model(0.8, 0.6),
        "gain": {
            "baseline": {"f1_toxic": difference(0.10), "f1_types": difference(0.20)},
            "champion": {"f1_toxic": difference(0.0), "f1_types": difference(0.0)},
        },
        "behaviour": {
            "pass_rate": 0.9,
            "kinds": {"minimum": 0.9, "invariance": 0.9, "direction": 0.9, "obfuscation": 0.9},
        },
    }


def set_at(found: dict, path: str, value) -> dict:
    found = copy.deepcopy(found)
    *parents, last = path.split("/")
    place = found
    for key in parents:
        place = place[key]
    place[last] = value
    return found


def judged(config, found) -> dict[str, dict]:
    return {check["name"]: check for check in gate.judge(config, found)}


def missed_in(checks: dict) -> set[str]:
    return {name for name, check in checks.items() if check["passed"] is False}


# Passed and missed ----------------------------------------------------------------------------------------------------


def test_every_check_has_its_name_its_limit_and_a_sentence_and_can_be_passed(config):
    checks = judged(config, evaluated())
    assert list(checks) == NAMES
    for check in checks.values():
        assert check["passed"] is True and gate.mark(check) == "passed"
        assert check["sentence"].startswith(check["title"]) and " meets " in check["sentence"]
        assert isinstance(check["limit"], float) and isinstance(check["binds"], bool)


MISSES = {
    "f1_toxic": ("challenger/f1_toxic", 0.8499, "F1 toxic 0.8499 is below 0.8500"),
    "f1_types": ("challenger/f1_types", 0.64, "F1 types 0.640 is below 0.700"),
    "interval_f1_toxic": (
        "challenger/intervals/f1_toxic",
        [0.82, 0.9],
        "F1 toxic, lower end at 95 % 0.820 is below 0.830",
    ),
    "interval_f1_types": (
        "challenger/intervals/f1_types",
        [0.67, 0.9],
        "F1 types, lower end at 95 % 0.670 is below 0.680",
    ),
    "gain_f1_toxic": ("gain/baseline/f1_toxic/interval", [0.0, 0.1], "lower end at 95 % 0.000 is not above 0.000"),
    "gain_f1_types": ("gain/baseline/f1_types/interval", [-0.002, 0.1], "lower end at 95 % -0.002 is not above 0.000"),
    "champion_f1_toxic": (
        "gain/champion/f1_toxic",
        difference(-0.012),
        "F1 toxic less the champion's -0.012 is below -0.007 (with 95 % confidence it is -0.005 at most)",
    ),
    "champion_f1_types": ("gain/champion/f1_types", difference(-0.02), "F1 types less the champion's -0.020 is below"),
    "language_en": ("challenger/languages/en/f1_toxic", 0.74, "F1 toxic in English 0.740 is below 0.750"),
    "language_ru": ("challenger/languages/ru/f1_toxic", 0.74, "F1 toxic in Russian 0.740 is below 0.750"),
    "language_en_champion": ("champion/languages/en/f1_toxic", 0.931, "English less the champion's -0.031 is below"),
    "language_ru_champion": ("champion/languages/ru/f1_toxic", 0.931, "Russian less the champion's -0.031 is below"),
    **{f"type_{name}": (f"challenger/types/{name}/f1", 0.2, f"F1 {name} 0.200 is below") for name in TYPES},
    **{
        f"type_{name}_champion": (
            f"champion/types/{name}/f1",
            0.831,
            f"F1 {name} less the champion's -0.031 is below -0.030",
        )
        for name in TYPES
    },
    "calibration": ("challenger/calibration/ece", 0.11, "Calibration error 0.110 is above 0.100"),
    "behaviour": ("behaviour/pass_rate", 0.79, "Share of behavioural checks passed 0.790 is below 0.800"),
    "behaviour_obfuscation": ("behaviour/kinds/obfuscation", 0.4, "checks passed, obfuscation 0.400 is below 0.500"),
    **{
        f"behaviour_{kind}": (f"behaviour/kinds/{kind}", 0.7, f"checks passed, {kind} 0.700 is below 0.800")
        for kind in ("minimum", "invariance", "direction")
    },
}


def test_every_check_is_tried():
    assert set(MISSES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_check_is_missed_for_its_own_reason_alone(config, name):
    path, value, sentence = MISSES[name]
    checks = judged(config, set_at(evaluated(), path, value))
    # A type that falls under its floor has lost against the champion as well.
    assert missed_in(checks) - {f"{name}_champion"} == {name}
    assert sentence in checks[name]["sentence"]
    assert gate.mark(checks[name]) == ("failed" if checks[name]["binds"] else "warning")


def test_a_figure_that_is_no_number_is_missed(config):
    assert judged(config, set_at(evaluated(), "challenger/f1_toxic", float("nan")))["f1_toxic"]["passed"] is False


def test_binding_is_a_matter_of_configuration(config):
    with_reason = ["gate.override_reason=a trial"]
    binds = configuration.load(["gate.calibration.binds=true", "gate.per_type.threat.loss.binds=true", *with_reason])
    found = set_at(evaluated(), "challenger/calibration/ece", 0.2)
    assert gate.mark(judged(config, found)["calibration"]) == "warning"
    assert gate.mark(judged(binds, found)["calibration"]) == "failed"
    found = set_at(evaluated(), "champion/types/threat/f1", 0.9)
    assert gate.mark(judged(config, found)["type_threat_champion"]) == "warning"
    assert gate.mark(judged(binds, found)["type_threat_champion"]) == "failed"


# Where a check does not apply -----------------------------------------------------------------------------------------


def test_for_a_first_version_nothing_is_compared_with_a_champion(config):
    first = evaluated() | {"champion": None, "champion_version": None}
    del first["gain"]["champion"]
    checks = judged(config, first)
    assert {name for name, check in checks.items() if check["passed"] is None} == set(WITH_CHAMPION)
    assert gate.mark(checks["champion_f1_toxic"]) == "n/a"
    assert (
        checks["champion_f1_toxic"]["sentence"]
        == "F1 toxic less the champion's: does not apply, nothing is in service yet"
    )
    assert not missed_in(checks)


def test_a_type_with_few_positives_is_not_judged(config):
    poor = set_at(evaluated(), "challenger/types/threat", {"f1": 0.0, "support": 29})
    checks = judged(config, poor)
    assert checks["type_threat"]["passed"] is None is checks["type_threat_champion"]["passed"]
    assert "29 positives in the test split, 30 are asked for" in checks["type_threat"]["sentence"]
    enough = set_at(poor, "challenger/types/threat/support", 30)
    assert missed_in(judged(config, enough)) == {"type_threat", "type_threat_champion"}


def test_what_the_test_split_does_not_hold_is_not_judged(config):
    found = evaluated()
    del found["challenger"]["languages"]["ru"], found["behaviour"]["kinds"]["direction"]
    found["gain"]["baseline"]["f1_types"] = found["gain"]["champion"]["f1_types"] = None
    checks = judged(config, found)
    assert {name for name, check in checks.items() if check["passed"] is None} == {
        *("language_ru", "language_ru_champion", "behaviour_direction", "gain_f1_types", "champion_f1_types")
    }
    assert "no message in Russian" in checks["language_ru"]["sentence"]


# Not worse than the champion ------------------------------------------------------------------------------------------


def share_stopped(config, rows: int, loss: float, trials=200) -> float:
    """How many of simulated challengers are stopped that are worse than the champion by `loss` on average.

    Half the messages are toxic. Both models err on the same 6 % and each on 4.5 % of its own, so that both have F1
    0.895; the challenger on `loss` more, which costs about as much F1.
    """
    generator, stopped = np.random.default_rng(1), 0
    for trial in range(trials):
        truth = np.full((rows, 6), metrics.UNKNOWN)
        truth[:, 0] = generator.integers(0, 2, size=rows)
        position = generator.random(rows)
        ours, theirs = truth == 1, truth == 1
        ours[:, 0] ^= position < 0.105 + loss
        theirs[:, 0] ^= (position < 0.06) | (position > 0.955)
        gain = metrics.gain(truth, ours, theirs, 500, seed=trial)
        found = evaluated()
        found["gain"]["champion"] = gain
        stopped += judged(config, found)["champion_f1_toxic"]["passed"] is False
    return stopped / trials


def test_a_model_as_good_as_the_champion_is_seldom_stopped_by_chance(config):
    # 0.05 is meant; 200 trials of that lie below 0.10 in all but 3 of 1,000 cases, and the seed is fixed.
    assert 0 < share_stopped(config, rows=4000, loss=0) <= 0.10


def test_a_model_that_is_clearly_worse_is_stopped(config):
    assert share_stopped(config, rows=4000, loss=0.02) >= 0.95
    assert share_stopped(config, rows=4000, loss=0.015) >= 0.85


def test_a_loss_within_the_tolerance_never_stops_however_sure_it_is(config):
    assert share_stopped(config, rows=200_000, loss=0.003, trials=10) == 0
    assert share_stopped(config, rows=200_000, loss=0.008, trials=10) == 1


def test_the_same_model_again_is_not_worse(config):
    found = evaluated()
    same = {"gain": 0.0, "interval": [0.0, 0.0], "lower": 0.0, "upper": 0.0}
    found["gain"]["champion"] = {"f1_toxic": same, "f1_types": same}
    checks = judged(config, found)
    assert checks["champion_f1_toxic"]["limit"] == -config.gate.champion.tolerance
    assert not missed_in(checks)


def test_what_the_gate_calls_a_loss_is_worse_on_the_report_too(config):
    found = evaluated()
    doubtful = {"gain": -0.027, "interval": [-0.054, 0.001], "lower": -0.05, "upper": -0.003}
    found["gain"]["champion"] = {"f1_toxic": {**doubtful, "upper": 0.001}, "f1_types": doubtful}
    checks = judged(config, found)
    assert (checks["champion_f1_toxic"]["passed"], checks["champion_f1_types"]["passed"]) == (True, False)
    differences = compare.differences(found, [], "champion")
    named = {kind: [row["words"] for row in rows] for kind, rows in differences.items()}
    assert named == {"better": [], "worse": ["F1 types"], "unclear": ["F1 toxic"]}


# Changing a limit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["gate.toxic.min=0.5"], "gate.toxic.min is 0.5, not 0.85"),
        (["gate.champion.binds=false"], "gate.champion.binds is false, not true"),
        (["gate.per_type.threat.floor.min=0"], "gate.per_type.threat.floor.min is 0.0, not 0.3"),
        (["profile=gpu", "gate=demo"], "gate.champion.binds is false, not true"),
        (["profile=demo", "++gate.types.min=0.1"], "gate.types.min is 0.1, not 0.7"),
        (["gate.toxic.min=0.5", "+gate.overrides=[]"], "gate.toxic.min is 0.5, not 0.85"),
        (["gate.toxic.min=0.5", "gate.override_reason="], "gate.toxic.min is 0.5, not 0.85"),
        (["gate.toxic.min=0.5", "gate.override_reason=  "], "gate.toxic.min is 0.5, not 0.85"),
    ],
)
def test_a_changed_limit_without_a_reason_is_refused_with_the_way_out(overrides, words):
    with pytest.raises(UsageError) as error:
        configuration.load(overrides)
    assert words in str(error.value) and "gate.override_reason" in str(error.value)


def test_with_a_reason_it_is_kept_what_was_changed():
    found = configuration.load(["gate.toxic.min=0.5", "gate.types.binds=false", "gate.override_reason=agreed with Ada"])
    assert found.gate.overrides == [
        {"key": "gate.toxic.min", "from": 0.85, "to": 0.5},
        {"key": "gate.types.binds", "from": True, "to": False},
    ]


@pytest.mark.parametrize("words", ["few rows, says Ada: it's ${HOME}", "5", "[a list]", "ends in a \\", "is = and ?"])
def test_the_reason_is_taken_as_it_was_written(words):
    assert configuration.load(["gate.toxic.min=0.5", f"gate.override_reason={words}"]).gate.override_reason == words


@pytest.mark.parametrize("overrides", [[], ["profile=demo"], ["profile=gpu"], ["gate.toxic.min=0.85"]])
def test_the_shipped_limits_need_no_reason(overrides):
    assert configuration.load(overrides).gate.overrides == []


def test_a_configuration_kept_elsewhere_is_held_against_the_shipped_limits(tmp_path):
    folder = shutil.copytree(configuration.SHIPPED, tmp_path / "configs")
    file = folder / "gate" / "default.yaml"
    file.write_text(file.read_text().replace("toxic: { min: 0.85", "toxic: { min: 0.10"))
    with pytest.raises(UsageError, match="gate.toxic.min is 0.1, not 0.85"):
        configuration.load(config_path=folder)
    file.rename(folder / "gate" / "ours.yaml")
    root = folder / "config.yaml"
    root.write_text(root.read_text().replace("gate: default", "gate: ours"))
    with pytest.raises(UsageError, match="gate.toxic.min is 0.1, not 0.85"):
        configuration.load(config_path=folder)


def test_a_limit_can_not_be_left_out():
    with pytest.raises(UsageError, match="gate.per_type.threat.*Field required"):
        configuration.load(["~gate.per_type.threat", "gate.override_reason=a trial"])
