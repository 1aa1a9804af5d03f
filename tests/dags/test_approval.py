"""A reviewer sets the alias `approved` in a real registry, and a real Airflow does the rest."""

import json
import os
import time

import psutil
import pytest
from conftest import fake_steps, write_plan

POLL_S = 1.0


@pytest.fixture(scope="module")
def airflow(place, mlflow_server, tmp_path_factory):
    """Airflow as `make demo` runs it, with steps that end as they are told, and its REST API."""
    from local import demo, services

    folder = tmp_path_factory.mktemp("steps")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AIRFLOW")]:
            patch.delenv(name)  # the Airflow of the other tests
        patch.setenv("TOXIC_PYTHON", str(fake_steps(folder)))
        patch.setenv("TOXIC_APPROVAL_POLL_S", str(POLL_S))
        # A triggerer that was killed is followed by the next one after this, and not after 30 s.
        patch.setenv("AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD", "6")
        patch.setenv("AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC", "2")
        services.write_password(place)
        services.migrate_airflow(place)
        parts = [make(place) for name, make in services.SERVICES.items() if name.startswith("airflow-")]
        for part in parts:
            services.launch(place, part)
        services.wait_until_healthy(place, list(parts), say=lambda _: None)
        api = demo.Airflow(place)
        api.steps = folder
        until(lambda: api.http.get("/api/v2/dags/toxicity_release").status_code == 200)
        yield api
        for part in parts:  # it must not watch the registry of the tests that follow
            kill(place, part.name)


def kill(place, name):
    """SIGKILL for a service and its children."""
    from local import services

    service = psutil.Process(services.alive(place, name)["pid"])
    processes = [*service.children(recursive=True), service]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, 10)


def until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.3)
    return found


def releases(airflow) -> list[dict]:
    return airflow.get("/dags/toxicity_release/dagRuns", order_by="run_after")["dag_runs"]


def ended(airflow, number: int) -> dict:
    """The release of that number, counted from 1, once it has ended."""
    runs = releases(airflow)
    return runs[number - 1] if len(runs) >= number and runs[number - 1]["state"] in ("success", "failed") else None


def called(place, run: dict, step: str) -> dict:
    (file,) = place.workspace.glob(f"runs/release-*{run['dag_run_id'][-8:]}*/{step}.called")
    return json.loads(file.read_text().splitlines()[-1])["environment"]


def start_by_hand(airflow, version: int) -> None:
    body = {"logical_date": None, "conf": {"profile": "demo", "version": str(version)}}
    airflow.http.post("/api/v2/dags/toxicity_release/dagRuns", json=body).raise_for_status()


def state_of(airflow, number: int, task: str) -> str | None:
    run = releases(airflow)[number - 1]["dag_run_id"]
    return airflow.get(f"/dags/toxicity_release/dagRuns/{run}/taskInstances/{task}")["state"]


def test_the_alias_approved_starts_one_release_and_is_used_up_by_it(airflow, place, registry, mlflow_server):
    from local import services

    version = registry.register(approved_by="Ada", approved_why="fewer false alarms")
    (airflow.steps / "stage.wait").touch()
    registry.set_alias("approved", version)
    until(lambda: any(place.workspace.glob("runs/release-*/build_engine.json")))
    kill(place, "airflow-triggerer")
    triggerer = services.SERVICES["airflow-triggerer"](place)
    services.launch(place, triggerer)
    # The new one says "starting" when it begins to look again.
    until(lambda: "trigger ID" in place.log(triggerer.name).read_text())
    time.sleep(3 * POLL_S)
    assert (len(releases(airflow)), registry.aliases()) == (1, {"approved": version})
    (airflow.steps / "stage.wait").unlink()
    run = until(lambda: ended(airflow, 1))
    assert (run["state"], run["run_type"]) == ("success", "asset_triggered")
    assert run["note"] == "Version 7 is in service."  # as the step that stands for `swap` says
    assert json.loads(called(place, run, "decide")["TOXIC_REVIEW"]) == {
        "decision": "approve",
        "reviewer": "Ada",
        "reason": "fewer false alarms",
    }
    assert json.loads(called(place, run, "swap")["TOXIC_OVERRIDES"])[-1] == f"release.version={version}"
    assert (registry.aliases(), registry.tags(version)) == ({}, {"gate": "passed"})


def test_it_can_be_set_again_after_a_refusal_and_after_the_registry_was_away(airflow, place, registry, mlflow_server):
    from local import services

    number = len(releases(airflow))
    version = registry.register()
    write_plan(airflow.steps, exit={"decide": 2})
    registry.set_alias("approved", version)
    run = until(lambda: ended(airflow, number + 1))
    assert run["state"] == "failed"
    until(lambda: registry.aliases() == {})

    registry.set_alias("approved", version)  # at once: the refusal must not be taken for the new wish's answer
    assert until(lambda: ended(airflow, number + 2))["state"] == "failed"
    until(lambda: registry.aliases() == {})

    kill(place, "mlflow")
    log = place.log("airflow-triggerer")
    until(lambda: "the registry at" in log.read_text().rpartition("is approved")[2])
    services.wait_until_healthy(place, [mlflow_server()], say=lambda _: None)
    write_plan(airflow.steps)
    registry.set_alias("approved", version)
    run = until(lambda: ended(airflow, number + 3))
    assert run["state"] == "success"
    assert json.loads(called(place, run, "decide")["TOXIC_REVIEW"])["reviewer"] == "a reviewer in MLflow"
    assert len(releases(airflow)) == number + 3


def test_a_wish_outlives_a_failed_release_by_hand_and_a_registry_that_is_away_at_choose(
    airflow, place, registry, mlflow_server
):
    from local import services

    number = len(releases(airflow))
    version = registry.register(approved_by="Ada")
    write_plan(airflow.steps, exit={"decide": 2})
    (airflow.steps / "decide.wait").touch()
    start_by_hand(airflow, version)
    until(lambda: len(releases(airflow)) > number and state_of(airflow, number + 1, "decide") == "running")
    told = airflow.get("/assets/events")["total_entries"]
    registry.set_alias("approved", version)
    until(lambda: airflow.get("/assets/events")["total_entries"] > told)  # its release waits for the first
    kill(place, "mlflow")
    (airflow.steps / "decide.wait").unlink()
    assert until(lambda: ended(airflow, number + 1))["state"] == "failed"
    write_plan(airflow.steps)
    until(lambda: len(releases(airflow)) > number + 1)
    until(lambda: state_of(airflow, number + 2, "choose") == "up_for_retry")
    # Its other tries take 5 minutes: ended here as the last of them would end.
    path = f"/dags/toxicity_release/dagRuns/{releases(airflow)[number + 1]['dag_run_id']}/taskInstances/choose"
    airflow.http.patch(f"/api/v2{path}", json={"new_state": "failed"}).raise_for_status()
    assert until(lambda: ended(airflow, number + 2))["state"] == "failed"
    assert state_of(airflow, number + 2, "settle") == "success"

    services.wait_until_healthy(place, [mlflow_server()], say=lambda _: None)
    run = until(lambda: ended(airflow, number + 3))
    assert (run["state"], run["run_type"]) == ("success", "asset_triggered")
    assert json.loads(called(place, run, "decide")["TOXIC_REVIEW"])["reviewer"] == "Ada"
    assert registry.aliases() == {}
    assert len(releases(airflow)) == number + 3
