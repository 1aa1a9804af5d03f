"""The gate, the decision and the registry, on a real MLflow store."""

import pytest

from tasks import config as configuration
from tasks.errors import Skip, StepFailed, UsageError
from tasks.promotion import decide, gate, registry
from tasks.run import Run


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path))
    monkeypatch.delenv("TOXIC_REVIEW", raising=False)
    return configuration.load(["profile=demo", f"mlflow.tracking_uri=sqlite:///{tmp_path}/mlflow.db"])


@pytest.fixture
def run(config):
    """A run whose model was evaluated and registered as version 1."""
    registry.ensure_model(config)
    mlflow = registry.client(config)
    name = config.mlflow.registered_model
    made = Run("first", config.workspace / "runs" / "first")
    version = mlflow.create_model_version(name, "file:///nowhere", tags={"run_id": made.id, "fingerprint": "abc"})
    made.save("register", {"version": int(version.version)})
    made.save("evaluate", evaluated())
    return made


def evaluated(f1_toxic=0.90, f1_types=0.80, champion=None, champion_version=None, gain=(0.01, 0.05)):
    def figures(toxic, types):
        languages = {"en": {"f1_toxic": toxic, "rows": 10}, "ru": {"f1_toxic": toxic, "rows": 10}}
        return {"f1_toxic": toxic, "f1_types": types, "languages": languages, "calibration": {"ece": 0.02}}

    return {
        "challenger": figures(f1_toxic, f1_types),
        "champion": champion and figures(*champion),
        "champion_version": champion_version,
        "baseline": figures(0.88, 0.7),
        "gain": {
            "baseline": dict(zip(("f1_toxic", "f1_types"), (None if low is None else gained(low) for low in gain)))
        },
        "behaviour": {"pass_rate": 0.9},
    }


def gained(low):
    return {"gain": low + 0.02, "interval": [low, low + 0.04]}


def verdicts(config, **figures):
    return {check["name"]: gate.mark(check) for check in gate.judge(config, evaluated(**figures))}


def test_a_good_first_version_becomes_challenger(config, run):
    verdict = gate.run(config, run)
    assert verdict["passed"]
    assert registry.alias(config, "challenger") == 1
    assert registry.tags(config, 1)["gate"] == "passed"


@pytest.mark.parametrize(
    "figures, sentence",
    [
        ({"f1_toxic": 0.849}, "F1 toxic 0.849 is below 0.850"),
        ({"f1_types": 0.64}, "F1 types 0.640 is below 0.700"),
    ],
)
def test_a_missed_limit_skips_the_rest_and_names_value_limit_and_report(config, run, figures, sentence):
    run.save("evaluate", evaluated(**figures))
    with pytest.raises(Skip) as skip:
        gate.run(config, run)
    assert sentence in str(skip.value) and "report.html" in str(skip.value)
    assert skip.value.result["passed"] is False
    assert registry.alias(config, "challenger") is None
    assert registry.tags(config, 1)["gate"] == "failed"
    assert registry.verdict_of(config, "abc") == {"run_id": "first", "version": 1, "verdict": "gate_failed"}


def test_the_champion_is_compared_within_the_tolerance(config):
    default = config.model_copy(update={"gate": configuration.load().gate})
    assert verdicts(default)["champion_f1_toxic"] == "n/a"
    assert verdicts(default, champion=(0.904, 0.80))["champion_f1_toxic"] == "passed"
    assert verdicts(default, champion=(0.906, 0.80))["champion_f1_toxic"] == "failed"
    assert verdicts(default, champion=(0.90, 0.81))["champion_f1_types"] == "failed"


def test_a_gain_over_the_baseline_that_is_not_certain_stops_the_real_model(config, run):
    default = config.model_copy(update={"gate": configuration.load().gate})
    run.save("evaluate", evaluated(gain=(-0.002, 0.01)))
    with pytest.raises(Skip, match="Gain in F1 toxic over the baseline, lower end at 95 % -0.002 is not above 0.000"):
        gate.run(default, run)


def test_both_gains_over_the_baseline_count_where_they_can_be_measured(config):
    default = config.model_copy(update={"gate": configuration.load().gate})
    assert verdicts(default, gain=(0.001, 0.0))["gain_f1_types"] == "failed"
    assert verdicts(default, gain=(0.001, -0.1))["gain_f1_toxic"] == "passed"
    assert verdicts(default, gain=(0.001, None))["gain_f1_types"] == "n/a"
    demanding = default.gate.min_gain_over_baseline.model_copy(update={"min": 0.03})
    asks_more = default.gate.model_copy(update={"min_gain_over_baseline": demanding})
    assert verdicts(config.model_copy(update={"gate": asks_more}))["gain_f1_toxic"] == "failed"


def test_what_only_warns_does_not_stop(config, run):
    poor = evaluated(f1_toxic=0.86, champion=(0.95, 0.9), champion_version=7, gain=(-0.06, 0.05))
    run.save("evaluate", poor)
    verdict = gate.run(config, run)
    assert verdict["passed"]
    assert {check["name"] for check in verdict["checks"] if gate.mark(check) == "warning"} == {
        "gain_f1_toxic",
        "champion_f1_toxic",
        "champion_f1_types",
    }


def passed(config, run, **promotion):
    run.save("gate", gate.run(config, run))
    return config.model_copy(update={"promotion": config.promotion.model_copy(update=promotion)})


def test_auto_approves_and_the_registry_says_so(config, run):
    found = decide.run(passed(config, run), run)
    assert (found["decision"], found["champion"]) == ("approve", None)
    tags = registry.tags(config, 1)
    assert (tags["decision"], tags["decided_by"]) == ("approve", "auto")


def test_never_rejects_and_the_fingerprint_has_its_verdict(config, run):
    with pytest.raises(Skip, match="promotion.mode=never"):
        decide.run(passed(config, run, mode="never"), run)
    assert registry.verdict_of(config, "abc")["verdict"] == "rejected"


def test_review_waits_for_a_person_without_a_verdict(config, run):
    with pytest.raises(Skip, match="waits"):
        decide.run(passed(config, run, mode="review"), run)
    assert registry.verdict_of(config, "abc") is None
    found = decide.run(
        passed(config, run, mode="review"), run, decision="approve", reviewer="ada", reason="fewer misses"
    )
    assert (found["decision"], found["reviewer"]) == ("approve", "ada")
    assert registry.tags(config, 1)["decided_why"] == "fewer misses"


def test_a_hold_turns_auto_into_review(config, run):
    registry.set_hold(config, "version 1 called every greeting toxic")
    with pytest.raises(Skip, match="called every greeting toxic"):
        decide.run(passed(config, run), run)


def test_the_answer_of_the_review_task_counts(config, run, monkeypatch):
    monkeypatch.setenv("TOXIC_REVIEW", '{"decision": "reject", "reviewer": "bo", "reason": "timed_out"}')
    with pytest.raises(Skip, match="rejected by bo: timed_out"):
        decide.run(passed(config, run), run)


def test_a_version_that_missed_the_gate_can_not_be_approved(config, run):
    with pytest.raises(UsageError, match="has not passed the gate"):
        decide.run(config, run, decision="approve")


def test_an_unknown_version_is_named(config, run):
    release = config.model_copy(update={"release": config.release.model_copy(update={"version": 99})})
    with pytest.raises(UsageError, match="no version 99"):
        decide.run(release, run)


def test_two_can_not_hold_the_lease(config):
    with registry.lease(config, "swap of run a"):
        with pytest.raises(StepFailed, match="swap of run a is changing what serves"):
            with registry.lease(config, "rollback by bo"):
                pass
    with registry.lease(config, "rollback by bo"):
        pass


def test_a_lease_ends_with_its_time(config, monkeypatch):
    monkeypatch.setattr(registry, "LEASE_SECONDS", -1)
    with registry.lease(config, "killed"):
        with registry.lease(config, "next"):
            pass
