"""The DAGs as Airflow reads them: their tasks, their order, their schedule, their parameters."""

import copy
import json
import subprocess
from datetime import datetime, timedelta, timezone
from itertools import pairwise

import pytest
from airflow.sdk.exceptions import ParamValidationError
from airflow.serialization.serialized_objects import DagSerialization
from airflow.timetables.base import DataInterval, TimeRestriction
from conftest import ROOT

from dags import configured

ORDER = (
    *("download", "validate_raw", "prepare", "validate_prepared", "train", "evaluate", "register", "gate", "report"),
    *("review", "decide", "export_onnx", "build_engine", "stage", "swap"),
)
GROUPS = {
    "data": {"download", "validate_raw", "prepare", "validate_prepared"},
    "training": {"train", "evaluate"},
    "promotion": {"register", "gate", "report", "review", "decide"},
    "serving": {"export_onnx", "build_engine", "stage", "swap"},
}


def test_every_file_is_read_without_an_error(dagbag):
    assert dagbag.import_errors == {}
    assert set(dagbag.dags) == {"toxicity_weekly", "toxicity_release"}


def test_the_tasks_come_in_the_order_of_the_story(weekly):
    assert set(weekly.task_dict) == set(ORDER)
    for earlier, later in pairwise(ORDER):
        assert earlier in weekly.get_task(later).get_flat_relative_ids(upstream=True)


def test_the_tasks_stand_in_four_groups(weekly):
    groups = weekly.task_group.children
    assert {name: set(group.children) for name, group in groups.items()} == GROUPS


def test_the_report_is_written_whether_the_gate_was_passed_or_not(weekly):
    report, review = weekly.get_task("report"), weekly.get_task("review")
    assert report.trigger_rule == "none_failed_min_one_success"
    assert report.upstream_task_ids == {"register", "gate"}
    assert review.trigger_rule == "all_success"
    assert review.upstream_task_ids == {"gate", "report"}
    others = set(weekly.task_dict) - {"report"}
    assert {weekly.get_task(name).trigger_rule for name in others} == {"all_success"}


def test_a_release_goes_the_same_way_from_the_decision_on(release):
    order = [task.task_id for task in release.topological_sort()]
    assert order == ["choose", "decide", "export_onnx", "build_engine", "stage", "swap", "settle"]


def test_a_release_starts_when_the_registry_says_approved_and_nothing_else_hears_of_it(weekly, release):
    assert release.schedule.name == "toxicity_approval"
    assert [watcher.trigger.serialize()[0] for watcher in release.schedule.watchers] == [
        "dags.approvals.ApprovalTrigger"
    ]
    assert release.is_paused_upon_creation is False
    assert not any(task.inlets or task.outlets for task in weekly.tasks)


def test_the_end_of_a_release_cannot_turn_it_green_and_comes_also_when_its_choice_failed(release):
    settle = release.get_task("settle")
    assert (settle.is_teardown, settle.on_failure_fail_dagrun) == (True, False)
    assert not any(task.is_setup for task in release.tasks)  # a teardown is left out where its setup failed


def test_one_retraining_and_one_release_at_a_time_without_catching_up(weekly, release):
    assert (weekly.max_active_runs, release.max_active_runs) == (1, 1)
    assert weekly.catchup is False


def test_every_task_has_its_limits_and_a_word_for_newcomers(dagbag):
    for dag in dagbag.dags.values():
        assert len(dag.doc_md) > 200
        for task in dag.tasks:
            assert task.doc_md
            if task.task_id != "review":  # promotion.review_hours
                assert timedelta(minutes=5) <= task.execution_timeout <= timedelta(hours=24)


NO_LIMITS = TimeRestriction(earliest=None, latest=None, catchup=False)


def next_run(dag, last=None):
    timetable = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(dag)).timetable
    info = timetable.next_dagrun_info(last_automated_data_interval=last, restriction=NO_LIMITS)
    return info.run_after


@pytest.mark.parametrize(
    "now",
    [
        datetime(2026, 11, 23, 3, 5, tzinfo=timezone.utc),  # just after a Monday's run would have been due
        datetime(2026, 11, 23, 15, 0, tzinfo=timezone.utc),
        datetime(2026, 11, 29, 23, 0, tzinfo=timezone.utc),
    ],
)
def test_unpausing_starts_nothing_for_the_past(weekly, monkeypatch, now):
    monkeypatch.setattr("airflow.timetables.trigger.utcnow", lambda: now)
    assert next_run(weekly) == datetime(2026, 11, 30, 3, 0, tzinfo=timezone.utc)


def test_a_run_follows_a_run_on_the_next_monday(weekly, monkeypatch):
    monday = datetime(2026, 11, 23, 3, 0, tzinfo=timezone.utc)
    monkeypatch.setattr("airflow.timetables.trigger.utcnow", lambda: monday + timedelta(hours=2))
    assert next_run(weekly, DataInterval.exact(monday)) == monday + timedelta(days=7)


@pytest.mark.parametrize(
    "conf",
    [
        {"force": "yes"},
        {"max_samples": 0},
        {"max_samples": 1000},
        {"max_samples": "many"},
        {"epochs": 1.5},
        {"promotion": "perhaps"},
        {"profile": "laptop"},
        {"data_folder": ""},
        {"limits": "types.min=0.68"},
        {"limits": ["types.min"]},
        {"limits": ["types.min=low"]},
        {"limits": ["types.min=0.68", "types.min=0.6 data.max_samples=1"]},
        {"limits": ["types.min=${x}"]},
        {"limits": ["types=demo"]},
    ],
)
def test_a_parameter_of_the_wrong_kind_is_refused(weekly, conf):
    with pytest.raises(ParamValidationError):
        copy.deepcopy(weekly.params).update(conf)


def test_limits_are_taken_as_people_write_them(weekly, release):
    for dag in (weekly, release):
        copy.deepcopy(dag.params).update({"limits": ["gate.types.min = .68", "", " champion.binds=false"]})


@pytest.mark.parametrize("version", [3, "", "0", "1.5", "-1", "two words", "a;b", "{{ x }}"])
def test_a_version_that_is_neither_number_nor_alias_is_refused(release, version):
    with pytest.raises(ParamValidationError):
        copy.deepcopy(release.params).update({"version": version})


@pytest.mark.parametrize("version", ["3", "challenger", "previous", "approved"])
def test_a_version_is_a_number_or_an_alias(release, version):
    copy.deepcopy(release.params).update({"version": version})


def test_the_form_of_a_release_names_no_version_by_itself(release):
    assert release.params["version"] is None


def test_the_forms_say_what_is_configured(weekly):
    said = {name: weekly.params.get_param(name) for name in weekly.params}
    assert said["max_samples"].description.endswith("Empty: as configured: 40,000.")
    assert "data.min_rows (1,000)" in said["max_samples"].description
    assert said["epochs"].description.endswith("as configured: 4 (demo), 2 (gpu).")
    assert said["promotion"].schema["values_display"]["config"] == "as configured: auto"
    assert "72 hours" in said["promotion"].schema["values_display"]["review"]
    assert "F1 toxic at least 0.85" in said["limits"].description


def test_what_is_rarely_needed_is_folded_and_every_field_has_a_name(weekly, release):
    shown = {"force", "promotion"}, {"version", "reason"}
    for dag, in_sight in zip((weekly, release), shown):
        fields = {name: dag.params.get_param(name).schema for name in dag.params}
        assert {name for name, schema in fields.items() if "section" not in schema} == in_sight
        assert all(schema["title"] for schema in fields.values())
        assert dag.dag_id in dag.dag_display_name != dag.dag_id
        assert {task.owner for task in dag.tasks} == {"toxicity"}


def test_the_form_reads_the_configuration_as_hydra_does():
    keys = ["data.max_samples", "data.min_rows", "training.num_train_epochs", "promotion.mode", "gate.toxic.binds"]
    keys += ["promotion.review_hours", "gate.champion.binds", "gate.types.min", "disk.min_free_gib", "training.lora.r"]
    read = (
        "import json, sys; from tasks import config\n"
        "found = {p: config.flat(config.load([f'profile={p}']).model_dump(mode='json')) for p in ('demo', 'gpu')}\n"
        "print(json.dumps(found))"
    )
    python = ROOT / ".venv/tasks/bin/python"
    done = subprocess.run([python, "-c", read], capture_output=True, text=True, check=True, cwd=ROOT)
    by_hydra = json.loads(done.stdout)
    for profile in configured.PROFILES:
        assert {key: configured.value(key, profile) for key in keys} == {key: by_hydra[profile][key] for key in keys}
    assert set(configured.limits()) == {
        key for key in by_hydra["gpu"] if key.startswith("gate.") and key not in ("gate.group", "gate.overrides")
    }
