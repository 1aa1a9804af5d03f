"""Whole runs of the weekly DAG by Airflow itself: real operators and trigger rules, steps that end as they are told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowFailException
from conftest import free_port, results, run_to_the_end

from dags import registry as registry_of_dags
from dags import review

AFTER_GATE = {"review", "decide", "export_onnx", "build_engine", "stage", "swap"}
PARAMS = {"profile": "demo", "promotion": "config", "data_folder": None, "epochs": None, "limits": None, "reason": None}


@pytest.fixture
def run(weekly, steps, workspace):
    """A function that runs the DAG to its end and returns (state of the run, {task: state}, calls by step).

    `meanwhile` is called again and again while the run waits for a person.
    """

    def to_the_end(meanwhile=lambda: None, **conf):
        dag_run = run_to_the_end(weekly, meanwhile, **{**PARAMS, **conf})
        states = {task.task_id: task.state for task in dag_run.get_task_instances()}
        calls = {
            file.stem: [json.loads(line) for line in file.read_text().splitlines()]
            for file in workspace.glob("runs/*/*.called")
        }
        return dag_run.state, states, calls

    return to_the_end


def test_a_good_version_goes_all_the_way(run):
    state, states, calls = run(data_folder="/it's, $(here)", epochs=3)
    assert state == "success"
    assert set(states.values()) == {"success"}
    train, decide = calls["train"][0], calls["decide"][0]
    assert train["argv"] == ["commands.py", "train"]
    assert calls["validate_raw"][0]["argv"] == ["commands.py", "validate", "--what=raw"]
    assert json.loads(train["environment"]["TOXIC_OVERRIDES"]) == [
        "profile=demo",
        "data=folder",
        "data.folder='/it\\'s, $(here)'",
        "training.num_train_epochs=3",
    ]
    assert train["environment"]["TOXIC_RUN_ID"].startswith("weekly-manual__")
    assert train["environment"]["TOXIC_DAG_RUN_URL"].startswith(
        "http://airflow.example:8088/dags/toxicity_weekly/runs/"
    )
    assert "TOXIC_REVIEW" not in train["environment"]
    assert json.loads(decide["environment"]["TOXIC_REVIEW"]) == {
        "decision": "approve",
        "reviewer": "auto",
        "reason": "promotion.mode is auto and the gate was passed",
        "by_mode": True,
    }


def test_a_missed_gate_still_gets_its_report_and_stays_green(run, steps):
    steps(exit={"gate": 99})
    state, states, calls = run()
    assert state == "success"
    assert states["report"] == "success"
    assert {name for name, state in states.items() if state == "skipped"} == {"gate", *AFTER_GATE}
    assert not AFTER_GATE & set(calls)


def test_whoever_triggers_may_change_limits_for_a_reason(run):
    state, _, calls = run(limits=["types.min=0.68"], reason="few typed messages, says {{ Ada }}")
    assert state == "success"
    changed = ["gate.types.min=0.68", "gate.override_reason='few typed messages, says {{ Ada }}'"]
    for (call,) in calls.values():
        assert json.loads(call["environment"]["TOXIC_OVERRIDES"]) == ["profile=demo", *changed]
        assert call["environment"]["TOXIC_TRIGGERED_BY"] == "dag_test"


def test_changed_limits_without_a_reason_are_refused_before_anything_starts(run, capfd):
    state, states, calls = run(limits=["types.min=0.68"])
    assert (state, states["download"], calls) == ("failed", "failed", {})
    assert "gate.types.min=0.68: limits other than the shipped ones need a reason" in capfd.readouterr().out


def test_nothing_new_skips_the_whole_run(run, steps):
    steps(exit={"download": 99})
    state, states, calls = run()
    assert (state, set(states.values()), set(calls)) == ("success", {"skipped"}, {"download"})


def test_bad_usage_fails_without_a_second_try(run, steps):
    steps(exit={"prepare": 2})
    state, states, calls = run()
    assert (state, states["prepare"], len(calls["prepare"])) == ("failed", "failed", 1)
    assert states["report"] == "upstream_failed"


def test_a_version_that_nobody_wants_ends_green(run, steps):
    steps(mode="never", exit={"decide": 99})
    state, states, calls = run()
    assert state == "success"
    assert (states["review"], states["decide"], states["swap"]) == ("success", "skipped", "skipped")
    review = json.loads(calls["decide"][0]["environment"]["TOXIC_REVIEW"])
    assert (review["decision"], review["reviewer"], review["by_mode"]) == ("reject", "auto", True)


def answer(chosen, reason, asked):
    """Answers a pending review as the UI does, through the route of Airflow's API."""
    from airflow.api_fastapi.core_api.datamodels.hitl import UpdateHITLDetailPayload
    from airflow.api_fastapi.core_api.routes.public.hitl import update_hitl_detail
    from airflow.models.hitl import HITLDetail
    from airflow.utils.session import create_session
    from sqlalchemy import select

    class User:
        get_id, get_name = staticmethod(lambda: "7"), staticmethod(lambda: "Ada")

    with create_session() as session:
        detail = session.scalar(select(HITLDetail).where(HITLDetail.responded_at.is_(None)))
        if detail is None:
            return
        task = detail.task_instance
        asked.append((detail.subject, detail.body, detail.defaults))
        payload = UpdateHITLDetailPayload(chosen_options=[chosen], params_input={"reason": reason})
        update_hitl_detail(task.dag_id, task.run_id, task.task_id, payload, User, session)


def test_a_person_reads_the_figures_and_approves(run, steps):
    steps(mode="review")
    asked = []
    state, states, calls = run(meanwhile=lambda: answer("Approve", "it's better", asked))
    assert (state, states["swap"]) == ("success", "success")
    assert json.loads(calls["decide"][0]["environment"]["TOXIC_REVIEW"]) == {
        "decision": "approve",
        "reviewer": "Ada",
        "reason": "it's better",
    }
    ((subject, body, defaults),) = asked
    assert "version 7" in subject
    assert defaults == ["Reject"]
    assert "| F1 toxic | 0.912 | >= 0.850 | passed |" in body
    assert "passed the gate, with a warning. Version **6** is in service now" in body
    assert "**Warnings**\n\n- Calibration error 0.13 should be <= 0.1" in body
    assert "| Calibration error | 0.130 | <= 0.100 | missed, only a warning |" in body
    assert "| F1 types against the champion's | 0.770 | – | does not apply |" in body
    assert "| F1 toxic | 0.912 | 0.901 | 0.880 |" in body
    assert "| F1 toxic, Russian | 0.902 | 0.891 | 0.870 |" in body
    assert "| F1 toxic | +0.011 (-0.004 to +0.025) | +0.032 (+0.020 to +0.045) |" in body
    assert "| F1 types | – | +0.032 (+0.020 to +0.045) |" in body
    assert "(http://127.0.0.1:8080/#/models/toxic_classificator/versions/7)" in body
    assert "[The report](http://127.0.0.1:8080/#/runs/0123abcd" in body
    assert "no answer within 72 hours" in body


def test_what_people_typed_cannot_forge_a_line_or_a_link_of_the_review(run, steps, tmp_path):
    steps(mode="review", hold="[fine](http://x)\n\n**Checked** by <b>Ada</b>")
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["results"]["gate"] |= {"overrides": ["x"], "overridden_by": "`Bob`", "overridden_why": "too\n\n| strict |\\"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    asked = []
    run(meanwhile=lambda: answer("Approve", None, asked))
    lines = asked[0][1].splitlines()
    assert r"**Limits were changed** by \`Bob\`: too \| strict \|\\" in lines
    held = r"**Held**: \[fine\](http://x) \*\*Checked\*\* by \<b\>Ada\</b\>. Automatic promotion waits for a person."
    assert held in lines


def test_a_hold_makes_auto_ask_and_a_rejection_is_passed_on(run, steps):
    steps(mode="auto", hold="rolled back: insults passed", exit={"decide": 99})
    asked = []
    state, states, calls = run(meanwhile=lambda: answer("Reject", None, asked))
    assert (state, states["decide"], states["swap"]) == ("success", "skipped", "skipped")
    assert json.loads(calls["decide"][0]["environment"]["TOXIC_REVIEW"]) == {
        "decision": "reject",
        "reviewer": "Ada",
        "reason": "",
    }
    assert "rolled back: insults passed" in asked[0][1]


def test_softer_limits_than_the_champions_make_auto_ask(run, steps):
    steps(mode="auto", person=["version 6, which serves, is of profile gpu, this one of demo"])
    asked = []
    state, states, calls = run(meanwhile=lambda: answer("Approve", "a trial", asked))
    assert (state, states["swap"]) == ("success", "success")
    review = json.loads(calls["decide"][0]["environment"]["TOXIC_REVIEW"])
    assert review == {"decision": "approve", "reviewer": "Ada", "reason": "a trial"}
    assert "**A person decides**: version 6, which serves, is of profile gpu, this one of demo." in asked[0][1]


def test_no_answer_in_time_is_a_no(run, steps):
    from airflow.jobs.job import Job
    from airflow.jobs.scheduler_job_runner import SchedulerJobRunner
    from airflow.utils.session import create_session

    def sweep():
        """What the scheduler does every few seconds."""
        with create_session() as session:
            SchedulerJobRunner(Job()).check_awaiting_input_timeouts(session=session)

    steps(mode="review", review_hours=0.1 / 3600, exit={"decide": 99})
    state, states, calls = run(meanwhile=sweep)
    assert (state, states["decide"]) == ("success", "skipped")
    assert json.loads(calls["decide"][0]["environment"]["TOXIC_REVIEW"]) == {
        "decision": "reject",
        "reviewer": "nobody",
        "reason": "timed_out",
    }


# Releases -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def released(release, steps, registry, workspace):
    """A function that runs the release to its end: (state of the run, {task: state}, {step: its environment})."""

    def to_the_end(**conf):
        empty = {"profile": "demo", "limits": None, "reason": None}
        dag_run = run_to_the_end(release, **{**empty, **conf})
        states = {task.task_id: task.state for task in dag_run.get_task_instances()}
        calls = {
            file.stem: json.loads(file.read_text().splitlines()[-1])["environment"]
            for file in workspace.glob("runs/release-*/*.called")
        }
        return dag_run.state, states, calls

    return to_the_end


def test_a_release_by_number_is_decided_by_whoever_triggers_it(released, registry):
    version = registry.register()
    state, states, calls = released(version=str(version), reason="it's {{ better }}", limits=["parity.min_equal=0.99"])
    assert (state, set(states.values())) == ("success", {"success"})
    changed = ["gate.parity.min_equal=0.99", "gate.override_reason='it\\'s {{ better }}'"]
    for environment in calls.values():
        assert json.loads(environment["TOXIC_OVERRIDES"]) == ["profile=demo", f"release.version={version}", *changed]
    assert json.loads(calls["decide"]["TOXIC_REVIEW"]) == {
        "decision": "approve",
        "reviewer": "dag_test",
        "reason": "it's {{ better }}",
    }
    assert calls["stage"]["TOXIC_TRIGGERED_BY"] == "dag_test"


@pytest.mark.parametrize("alias", ["challenger", "previous"])
def test_a_release_by_alias_means_one_version_from_beginning_to_end(released, registry, alias):
    version = registry.register()
    registry.set_alias(alias, version)
    registry.set_alias("approved", version)  # fulfilled by this release as well
    state, states, calls = released(version=alias)
    assert (state, json.loads(calls["swap"]["TOXIC_OVERRIDES"])[-1]) == ("success", f"release.version={version}")
    assert json.loads(calls["decide"]["TOXIC_REVIEW"])["reason"] == "none given"
    assert registry.aliases() == {alias: version}


@pytest.mark.parametrize("version", ["9", "nobody", "approved", "champion", None])
def test_what_the_registry_does_not_know_ends_before_anything_starts(released, registry, version, capfd):
    registry.set_alias("previous", registry.register())
    state, states, calls = released(version=version)
    assert (state, states["choose"], calls) == ("failed", "failed", {})
    assert (states["decide"], states["settle"]) == ("upstream_failed", "success")
    why = {
        "9": "toxic_classificator has no version 9",
        "nobody": "no version carries the alias nobody: the aliases are previous",
        "approved": "no version carries the alias approved",
        None: "no version carries the alias approved: the aliases are previous; trigger again and name a version",
        "champion": "the aliases are previous, and `python commands.py swap --repair` sets champion and previous again",
    }
    assert why[version] in capfd.readouterr().out


def test_a_review_says_what_the_registry_has_wrong_about_what_serves(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    found, warning = results(), "version 5 (engine 0ld) serves, but has lost the alias champion"
    found["gate"] |= {"champion": None, "in_service": {"number": 5, "warning": warning}}
    for step, result in found.items():
        (tmp_path / f"{step}.json").write_text(json.dumps(result))
    (tmp_path / "config.yaml").write_text("promotion: {review_hours: 72}\n")
    body = review.body(tmp_path)
    assert "Version **5** is in service now." in body and "leaves version 5 as it is" in body
    assert f"**The registry is wrong about what serves**: {warning}." in body


@pytest.mark.parametrize("status", [401, 403])
def test_a_registry_that_does_not_allow_it_is_not_asked_again(release, monkeypatch, status):
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        context = {"params": {"version": "1"}, "dag_run": SimpleNamespace(run_type="manual")}
        with pytest.raises(AirflowFailException, match=f"refuses it to a request without a login .{status}.: correct"):
            release.get_task("choose").python_callable(**context)
        server.shutdown()


def test_a_release_by_hand_that_is_refused_is_red_and_leaves_a_wish_alone(released, registry, steps):
    version, newer = registry.register(approved_by="Ada"), registry.register()
    registry.set_alias("approved", version)
    steps(exit={"decide": 2})
    state, states, _ = released(version=str(version))
    assert (state, states["decide"], states["swap"], states["settle"]) == (
        *("failed", "failed", "upstream_failed"),
        "success",
    )
    assert (registry.aliases(), registry.tags(version)["approved_by"]) == ({"approved": version}, "Ada")
    registry.set_alias("approved", newer)  # a newer wish than the release that ends now
    steps()
    assert released(version=str(version))[0] == "success"
    assert registry.aliases() == {"approved": newer}


def test_a_wish_is_told_of_again_when_the_registry_stays_away_to_the_end(release, monkeypatch):
    server = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    settle = release.get_task("settle")

    def at_try(number) -> dict:
        """What the trigger remembers after that try."""
        memory = {"told": 7}
        ti = SimpleNamespace(try_number=number, max_tries=settle.retries, xcom_pull=lambda **_: {"version": 7})
        store = {settle.inlets[0]: SimpleNamespace(delete=memory.pop)}
        dag_run = SimpleNamespace(run_type="asset_triggered")
        with pytest.raises(
            registry_of_dags.NoAnswer, match=f"^the registry at {server} does not .*ConnectError.*: start"
        ):
            settle.python_callable(ti=ti, asset_state_store=store, dag_run=dag_run)
        return memory

    assert at_try(settle.retries) == {"told": 7}
    assert at_try(settle.retries + 1) == {}
