"""The gate, the decision and the registry, on a real MLflow store."""

import getpass
import json

import pytest
from signing import signed, tag

import commands
from tasks import config as configuration
from tasks.errors import Skip, StepFailed, UsageError
from tasks.labels import LANGUAGES, TYPES
from tasks.promotion import decide, gate, registry, signatures
from tasks.run import Run


@pytest.fixture
def config(workspace, monkeypatch):
    monkeypatch.delenv("TOXIC_REVIEW", raising=False)
    return configuration.load(["profile=demo"])


@pytest.fixture
def run(config):
    """A run whose model was evaluated and registered as version 1."""
    registry.ensure_model(config)
    mlflow = registry.client(config)
    name = config.mlflow.registered_model
    made = Run("first", config.workspace / "runs" / "first")
    version = mlflow.create_model_version(name, "file:///nowhere", tags={"run_id": made.id, "fingerprint": "abc"})
    made.save("register", {"version": signed(config, version.version)})
    made.save("evaluate", evaluated())
    return made


def evaluated(f1_toxic=0.90, f1_types=0.80, champion=None, champion_version=None, gain=(0.01, 0.05)):
    """Evaluate's result; `champion` and `gain` hold, for F1 toxic and types, the champion's own and the lower ends of
    the gain over the baseline."""

    def figures(toxic, types):
        return {
            "f1_toxic": toxic,
            "f1_types": types,
            "intervals": {
                "f1_toxic": [toxic - 0.01, toxic + 0.01],
                "f1_types": [types - 0.01, types + 0.01],
                **{name: [types - 0.1, types + 0.1] for name in TYPES},
            },
            "languages": {name: {"f1_toxic": toxic, "interval": [toxic - 0.02, toxic + 0.02]} for name in LANGUAGES},
            "types": {name: {"f1": types, "support": 40} for name in TYPES},
            "calibration": {"ece": 0.02},
        }

    gains = {"baseline": {name: gained(low + 0.02) for name, low in zip(("f1_toxic", "f1_types"), gain)}}
    if champion:
        gains["champion"] = {"f1_toxic": gained(f1_toxic - champion[0]), "f1_types": gained(f1_types - champion[1])}
    return {
        "challenger": figures(f1_toxic, f1_types),
        "champion": champion and figures(*champion),
        "champion_version": champion_version,
        "baseline": figures(0.88, 0.7),
        "gain": gains,
        "behaviour": {"pass_rate": 0.9, "kinds": {"minimum": 0.9, "invariance": 0.9, "direction": 0.9}},
    }


def gained(gain):
    return {"gain": gain, "interval": [gain - 0.02, gain + 0.02], "lower": gain - 0.017, "upper": gain + 0.017}


def test_a_good_first_version_becomes_challenger(config, run):
    verdict = gate.run(config, run)
    assert verdict["passed"]
    assert registry.alias(config, "challenger") == 1
    assert registry.tags(config, 1)["gate"] == "passed"
    assert set(signatures.KINDS["gate"]) & set(registry.tags(config, 1)) == {"gate", "gate_group", "gate_limits"}
    assert (verdict["missed"], verdict["warned"], verdict["overrides"], verdict["overridden_by"]) == ([], [], [], None)


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
    tags = registry.tags(config, 1)
    assert tags["gate"] == "failed"
    assert (
        set(figures) <= set(skip.value.result["missed"])
        and tags["gate_missed"].split(", ") == skip.value.result["missed"]
    )
    assert registry.verdict_of(config, "abc") == {"run_id": "first", "version": 1, "verdict": "gate_failed"}


def test_a_gain_over_the_baseline_that_is_not_certain_stops_the_real_model(config, run):
    default = config.model_copy(update={"gate": configuration.load().gate})
    run.save("evaluate", evaluated(gain=(-0.002, 0.01)))
    with pytest.raises(Skip, match="Gain in F1 toxic over the baseline, lower end at 95 % -0.002 is not above 0.000"):
        gate.run(default, run)


def test_what_only_warns_does_not_stop(config, run):
    poor = evaluated(f1_toxic=0.86, champion=(0.95, 0.9), champion_version=7, gain=(-0.06, 0.05))
    run.save("evaluate", poor)
    verdict = gate.run(config, run)
    assert verdict["passed"]
    assert set(verdict["warned"]) == {
        *("gain_f1_toxic", "champion_f1_toxic", "champion_f1_types", "language_en_champion", "language_ru_champion"),
        *(f"type_{name}_champion" for name in TYPES),
    }
    assert registry.tags(config, 1)["gate_warned"].split(", ") == verdict["warned"]


# Other limits than the shipped ones -----------------------------------------------------------------------------------


def with_gate(config, *overrides):
    return config.model_copy(update={"gate": configuration.load(["profile=demo", *overrides]).gate})


def test_a_changed_limit_is_in_verdict_registry_and_log_with_who_and_why(config, run, monkeypatch, caplog):
    monkeypatch.setenv("TOXIC_TRIGGERED_BY", "ada")
    run.save("evaluate", evaluated(f1_types=0.60))
    changed = with_gate(config, "gate.types.min=0.55", "gate.override_reason=few typed messages this week")
    verdict = gate.run(changed, run)
    assert verdict["passed"] and registry.alias(config, "challenger") == 1
    assert verdict["overrides"] == [{"key": "gate.types.min", "from": 0.7, "to": 0.55}]
    assert (verdict["overridden_by"], verdict["overridden_why"]) == ("ada", "few typed messages this week")
    tags = registry.tags(config, 1)
    assert json.loads(tags["gate_overrides"]) == verdict["overrides"]
    assert (tags["gate_overridden_by"], tags["gate_overridden_why"]) == ("ada", "few typed messages this week")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "ada (few typed messages this week): gate.types.min is 0.55, not 0.7" in warning


def test_by_hand_the_login_name_says_who(config, run, monkeypatch):
    monkeypatch.delenv("TOXIC_TRIGGERED_BY", raising=False)
    gate.run(with_gate(config, "gate.types.binds=false", "gate.override_reason=a trial"), run)
    assert registry.tags(config, 1)["gate_overridden_by"] == getpass.getuser()


def test_a_version_judged_again_has_only_the_last_verdict(config, run):
    run.save("evaluate", evaluated(f1_types=0.60))
    changed = with_gate(config, "gate.types.min=0.55", "gate.override_reason=a trial")
    with pytest.raises(Skip):
        gate.run(config, run)
    assert registry.verdict_of(config, "abc")["verdict"] == "gate_failed"
    gate.run(changed, run)
    assert registry.verdict_of(config, "abc") is None
    tags = registry.tags(config, 1)
    assert tags["gate"] == "passed" and "gate_missed" not in tags and "gate_overrides" in tags
    with pytest.raises(Skip):
        gate.run(config, run)
    tags = registry.tags(config, 1)
    assert tags["gate"] == "failed" and tags["gate_missed"] and "gate_overrides" not in tags
    assert registry.alias(config, "challenger") is None


def test_the_command_refuses_a_changed_limit_without_a_reason(config, run, monkeypatch, capsys):
    monkeypatch.chdir(configuration.SHIPPED.parent)
    assert commands.main(["gate", "profile=demo", "gate.toxic.binds=false"]) == 2
    assert "gate.toxic.binds is false, not true" in capsys.readouterr().err
    assert not run.has("gate") and "gate" not in registry.tags(config, 1)


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


def test_a_hold_that_was_set_after_the_review_task_answered_for_auto_counts(config, run, monkeypatch):
    passed(config, run)
    registry.set_hold(config, "version 0 was rolled back by ada: insults passed")
    answer = {"decision": "approve", "reviewer": "auto", "reason": "promotion.mode is auto", "by_mode": True}
    monkeypatch.setenv("TOXIC_REVIEW", json.dumps(answer))
    with pytest.raises(Skip, match="on hold"):
        decide.run(config, run)
    assert "decision" not in registry.tags(config, 1)


def test_a_review_that_times_out_does_not_speak_against_what_was_released_meanwhile(config, run, monkeypatch):
    passed(config, run)
    tag(config, 1, verdict="promoted")
    registry.set_alias(config, "champion", 1)
    monkeypatch.setenv("TOXIC_REVIEW", json.dumps({"decision": "reject", "reviewer": "nobody", "reason": "timed_out"}))
    with pytest.raises(Skip, match="in service: nothing is recorded; .* rollback"):
        decide.run(config, run)
    assert registry.tags(config, 1)["verdict"] == "promoted"


def test_what_was_decided_stays_the_final_verdict_when_the_gate_is_asked_again(config, run):
    for verdict in ("rejected", "promoted"):
        tag(config, 1, verdict=verdict)
        strict = with_gate(config, "gate.toxic.min=0.99", "gate.override_reason=a stricter week")
        with pytest.raises(Skip):
            gate.run(strict, run)
        assert registry.tags(config, 1)["verdict"] == verdict
        gate.run(config, run)
        assert (registry.tags(config, 1)["gate"], registry.tags(config, 1)["verdict"]) == ("passed", verdict)


def test_a_version_that_was_rolled_back_is_not_approved_by_an_earlier_review(config, run):
    passed(config, run)
    late = {"served_at": "2026-01-01T10:00:00", "rolled_back_at": "2026-01-01T12:00:00", "rolled_back_by": "ada"}
    tag(config, 1, **late, rolled_back_because="calls greetings toxic")
    with pytest.raises(StepFailed, match="rolled back by ada at .*calls greetings toxic.*toxicity_release"):
        decide.run(config, run, decision="approve", reviewer="bo")


def test_auto_leaves_a_change_of_the_base_model_to_a_person(config, run):
    passed(config, run)
    mlflow, name = registry.client(config), config.mlflow.registered_model
    mlflow.create_model_version(name, "file:///nowhere", tags={"base_sha256": "another"})
    registry.set_alias(config, "champion", signed(config, 2))
    run.save("gate", {**run.result("gate"), "champion": 2})
    with pytest.raises(Skip, match="a person decides, since version 2, which serves, has another base model"):
        decide.run(config, run)


# Against a champion that was judged by more ---------------------------------------------------------------------------


REAL = ["profile=gpu"]


def after(config, run, overrides, champion=REAL, **tags):
    """The configuration of a run with these overrides, whose version 2 meets version 1, judged by `champion`'s limits,
    in service."""
    configs = [configuration.load(chosen) for chosen in (champion, overrides)]
    tag(config, 1, profile=configs[0].profile, base_sha256="base")
    gate.run(configs[0], run)
    registry.set_alias(config, "champion", 1)
    tags = {"run_id": run.id, "profile": configs[1].profile, "base_sha256": "base"}
    registry.client(config).create_model_version(config.mlflow.registered_model, "file:///nowhere", tags=tags)
    run.save("register", {"version": signed(config, 2)})
    run.save("evaluate", evaluated(champion=(0.90, 0.80), champion_version=1))
    return configs[1]


def test_the_registry_knows_by_which_limits_a_version_was_judged(config, run):
    gate.run(config, run)
    tags = registry.tags(config, 1)
    limits = json.loads(tags["gate_limits"])
    assert tags["gate_group"] == "demo"
    assert (limits["toxic.min"], limits["types.min"]) == (0.85, 0.70) and "champion.tolerance" not in limits
    with pytest.raises(Skip):
        gate.run(with_gate(config, "gate=default", "gate.toxic.min=0.95", "gate.override_reason=a trial"), run)
    tags = registry.tags(config, 1)
    limits = json.loads(tags["gate_limits"])
    assert (tags["gate_group"], limits["toxic.min"], limits["champion.tolerance"]) == ("default", 0.95, 0.005)


def test_a_demo_is_never_put_in_the_place_of_a_real_model_by_a_mode(config, run):
    demo = after(config, run, ["profile=demo"])
    assert demo.promotion.mode == "auto"
    verdict = gate.run(demo, run)
    run.save("gate", verdict)
    profile, limits = verdict["person"]
    assert verdict["passed"] and profile == "version 1, which serves, is of profile gpu, this one of demo"
    assert "version 1, which serves, was judged by harder limits (default, this one by demo)" in limits
    assert "champion.tolerance does not bind" in limits
    with pytest.raises(Skip, match="version 2 waits: a person decides, since .*gpu.*harder limits") as skip:
        decide.run(demo, run)
    assert skip.value.result["decision"] is None and skip.value.result["person"] == verdict["person"]
    assert "decision" not in registry.tags(config, 2) and registry.verdict_of(config, "abc") is None
    found = decide.run(demo, run, decision="approve", reviewer="ada", reason="to show it")
    assert (found["decision"], found["person"]) == ("approve", verdict["person"])
    assert registry.tags(config, 2)["decided_by"] == "ada"


@pytest.mark.parametrize(
    "changed, words",
    [
        ("gate.types.min=0.68", "types.min is 0.68, not 0.7"),
        ("gate.champion.tolerance=0.01", "champion.tolerance is 0.01, not 0.005"),
        ("gate.per_type.threat.floor.binds=false", "per_type.threat.floor.min does not bind"),
        ("gate.min_positives=50", "min_positives is 50, not 30"),
        ("gate.parity.min_equal=0.9", "parity.min_equal is 0.9, not 0.999"),
    ],
)
def test_a_limit_softened_for_one_run_waits_for_a_person_too(config, run, changed, words):
    softened = after(config, run, [*REAL, changed, "gate.override_reason=a trial"])
    verdict = gate.run(softened, run)
    run.save("gate", verdict)
    assert verdict["person"] == [
        f"version 1, which serves, was judged by harder limits (default, this one by default): {words}"
    ]
    with pytest.raises(Skip, match="a person decides"):
        decide.run(softened, run)


@pytest.mark.parametrize(
    "changed",
    ["gate.types.min=0.71", "gate.champion.tolerance=0.001", "gate.latency.binds=true", "gate.latency.max_ratio=9"],
)
def test_the_same_or_harder_limits_are_no_reason_to_wait(config, run, changed):
    same = after(config, run, [*REAL, changed, "gate.override_reason=a trial"])
    run.save("gate", gate.run(same, run))
    assert decide.run(same, run)["reviewer"] == "auto"


def test_a_demo_follows_a_demo_by_itself(config, run):
    demo = after(config, run, ["profile=demo"], champion=["profile=demo"])
    run.save("gate", gate.run(demo, run))
    found = decide.run(demo, run)
    assert (found["reviewer"], found["person"]) == ("auto", [])


def test_a_champion_that_was_never_judged_leaves_its_successor_to_a_person(config, run):
    demo = after(config, run, ["profile=demo"], champion=["profile=demo"])
    registry.untag(config, 1, "gate_limits")
    signed(config, 1)
    run.save("gate", gate.run(demo, run))
    with pytest.raises(Skip, match="nobody knows by which limits version 1, which serves, was judged"):
        decide.run(demo, run)


def test_never_rejects_also_what_a_person_would_have_to_approve(config, run):
    demo = after(config, run, ["profile=demo", "promotion.mode=never"])
    run.save("gate", gate.run(demo, run))
    with pytest.raises(Skip, match="promotion.mode=never"):
        decide.run(demo, run)
    assert registry.tags(config, 2)["verdict"] == "rejected"


def test_a_release_says_that_its_own_limits_ask_for_less(config, run, caplog):
    gate.run(configuration.load(REAL), run)
    registry.set_alias(config, "champion", 1)
    release = config.model_copy(update={"release": config.release.model_copy(update={"version": 1})})
    found = decide.run(release, run, decision="approve", reviewer="ada", reason="once more")
    (difference,) = found["person"]
    assert "harder limits (default, this one by demo)" in difference and difference in caplog.text


def test_limits_of_a_later_step_are_the_last_ones(config, run):
    changed = with_gate(config, "gate.parity.min_equal=0.9", "gate.override_reason=a trial")
    for step in ("export", "stage"):
        gate.record_overrides(changed, 1, step)
    assert registry.tags(config, 1)["stage_overridden_why"] == "a trial"
    gate.record_overrides(config, 1, "stage")
    assert {key for key in registry.tags(config, 1) if "overrid" in key} == {
        *("export_overrides", "export_overridden_by", "export_overridden_why")
    }


def test_a_version_that_missed_the_gate_can_not_be_approved(config, run):
    with pytest.raises(UsageError, match="has not passed the gate"):
        decide.run(config, run, decision="approve")


@pytest.mark.parametrize(
    "tags, missed", [({"gate": "failed", "gate_missed": "type_threat"}, "type_threat"), ({}, "never judged")]
)
def test_what_missed_the_gate_is_released_for_a_reason_alone_and_the_registry_keeps_it(config, run, tags, missed):
    tag(config, 1, **tags)
    release = config.model_copy(update={"release": config.release.model_copy(update={"version": 1})})
    with pytest.raises(UsageError, match=f"not passed the gate .*{missed}.*with a reason"):
        decide.run(release, run, decision="approve", reviewer="ada")
    decide.run(release, run, decision="approve", reviewer="ada", reason="threats are handled elsewhere")
    found = registry.tags(config, 1)
    assert missed in found["released_despite"] and found["released_why"] == "threats are handled elsewhere"


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
