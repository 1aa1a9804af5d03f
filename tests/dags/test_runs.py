"""Whole runs of the weekly DAG by Airflow itself: real operators and trigger rules, steps that end as they are told."""

import json
import time
from datetime import timedelta

import pytest

AFTER_GATE = {"review", "decide", "export_onnx", "build_engine", "stage", "swap"}
PARAMS = {"profile": "demo", "promotion": "config"}


@pytest.fixture
def run(weekly, steps, workspace, monkeypatch):
    """A function that runs the DAG to its end and returns (state of the run, {task: state}, calls by step).

    `meanwhile` is called again and again while the run waits for a person.
    """
    sleep = time.sleep

    def to_the_end(meanwhile=lambda: None, **conf):
        def sleep_less(seconds):  # dag.test() would sleep a second for each task that is skipped or waits
            sleep(min(seconds, 0.05))
            meanwhile()

        monkeypatch.setattr("time.sleep", sleep_less)
        dag_run = weekly.test(run_conf={**PARAMS, **conf}, logical_date=None)
        monkeypatch.setattr("time.sleep", sleep)
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
    }


def test_a_missed_gate_still_gets_its_report_and_stays_green(run, steps):
    steps(exit={"gate": 99})
    state, states, calls = run()
    assert state == "success"
    assert states["report"] == "success"
    assert {name for name, state in states.items() if state == "skipped"} == {"gate", *AFTER_GATE}
    assert not AFTER_GATE & set(calls)


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
    assert json.loads(calls["decide"][0]["environment"]["TOXIC_REVIEW"])["decision"] == "reject"


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
    assert "| Calibration error | 0.130 | <= 0.100 | missed, only a warning |" in body
    assert "| F1 types against the champion's | 0.770 | – | nothing to compare with |" in body
    assert "| F1 toxic | 0.912 | 0.901 | 0.880 |" in body
    assert "| F1 toxic, Russian | 0.902 | 0.891 | 0.870 |" in body
    assert "| F1 toxic | +0.011 (-0.004 to +0.025) | +0.032 (+0.020 to +0.045) |" in body
    assert "| F1 types | – | +0.032 (+0.020 to +0.045) |" in body
    assert "http://mlflow.example/#/models/toxic_classificator/versions/7" in body
    assert "report.html" in body


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


def test_no_answer_in_time_is_a_no(run, weekly, steps, monkeypatch):
    from airflow.jobs.job import Job
    from airflow.jobs.scheduler_job_runner import SchedulerJobRunner
    from airflow.utils.session import create_session

    def sweep():
        """What the scheduler does every few seconds."""
        with create_session() as session:
            SchedulerJobRunner(Job()).check_awaiting_input_timeouts(session=session)

    steps(mode="review", exit={"decide": 99})
    monkeypatch.setattr(weekly.get_task("review"), "response_timeout", timedelta(seconds=0.1))
    state, states, calls = run(meanwhile=sweep)
    assert (state, states["decide"]) == ("success", "skipped")
    assert json.loads(calls["decide"][0]["environment"]["TOXIC_REVIEW"]) == {
        "decision": "reject",
        "reviewer": "nobody",
        "reason": "timed out",
    }


def test_a_release_is_decided_by_whoever_triggers_it(release, steps, workspace):
    dag_run = release.test(run_conf={"profile": "demo", "version": 3, "reason": None}, logical_date=None)
    assert dag_run.state == "success"
    (file,) = workspace.glob("runs/release-*/decide.called")
    environment = json.loads(file.read_text())["environment"]
    assert json.loads(environment["TOXIC_OVERRIDES"]) == ["profile=demo", "release.version=3"]
    assert json.loads(environment["TOXIC_REVIEW"]) == {
        "decision": "approve",
        "reviewer": "dag_test",
        "reason": "released by hand",
    }
