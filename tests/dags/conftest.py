"""A real Airflow of the tests' own: its home, its SQLite database and a workspace under a temporary folder."""

import copy
import json
import os
import socket
import stat
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
TASKS_PYTHON = ROOT / ".venv/tasks/bin/python"
HOME = tempfile.TemporaryDirectory(prefix="toxic-airflow-")

# Airflow reads these when it is imported.
os.environ.update(
    AIRFLOW_HOME=HOME.name,
    AIRFLOW__CORE__DAGS_FOLDER=str(ROOT / "dags"),
    AIRFLOW__CORE__PLUGINS_FOLDER=str(ROOT / "dags" / "plugins"),
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{HOME.name}/airflow.db",
    AIRFLOW__LOGGING__LOGGING_LEVEL="WARNING",
    AIRFLOW__API__BASE_URL="http://airflow.example:8088",
)
for name in list(os.environ):
    if name.startswith(("TOXIC_", "MLFLOW_", "AIRFLOW_CONN_")):
        del os.environ[name]
sys.path.insert(0, str(ROOT))

# Stands for a tasks' environment: takes `commands.py STEP`, notes how it was called, answers and ends as it is told.
STEP = """#!{python}
import json, os, pathlib, sys, time
name = {{"raw": "validate_raw", "prepared": "validate_prepared"}}.get(sys.argv[-1].split("=")[-1], sys.argv[2])
plan = json.loads(pathlib.Path(__file__).with_name("plan.json").read_text())
folder = pathlib.Path(os.environ["TOXIC_WORKSPACE"], "runs", os.environ["TOXIC_RUN_ID"])
folder.mkdir(parents=True, exist_ok=True)
while pathlib.Path(__file__).with_name(f"{{name}}.wait").exists():
    time.sleep(0.1)
noted = {{key: value for key, value in os.environ.items() if key.startswith("TOXIC_")}}
note = json.dumps({{"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": noted}})
with (folder / f"{{name}}.called").open("a") as calls:
    calls.write(note + "\\n")
(folder / "config.yaml").write_text(plan["config"])
code, result = plan["exit"].get(name, 0), plan["results"].get(name, {{}})
why = result.get("reason", f"{{name}} says why")
if code in (0, 99):
    result = {{**result, "step": name, "status": "skipped" if code else "done", "reason": why}}
    (folder / f"{{name}}.json").write_text(json.dumps(result))
print("a line of log", file=sys.stderr, flush=True)
print(json.dumps({{"step": name}}), flush=True)
if code:
    print(why, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="session")
def database():
    from airflow.utils.db import initdb

    initdb()


@pytest.fixture(scope="session")
def dagbag(database):
    from airflow.dag_processing.dagbag import DagBag

    return DagBag(str(ROOT / "dags"), safe_mode=False)  # safe mode passes over a broken file


@pytest.fixture
def weekly(dagbag):
    return dagbag.dags["toxicity_weekly"]


@pytest.fixture
def release(dagbag):
    return dagbag.dags["toxicity_release"]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path / "workspace"))
    return tmp_path / "workspace"


@pytest.fixture
def steps(tmp_path, workspace, monkeypatch):
    """A function that says how the steps will end, `steps(exit={"gate": 99}, mode="auto")`."""
    python = fake_steps(tmp_path)
    monkeypatch.setenv("TOXIC_PYTHON", str(python))
    return lambda **plan: write_plan(tmp_path, **plan)


def fake_steps(folder: Path) -> Path:
    """The program that stands for a tasks' environment; `write_plan` says how its steps end."""
    python = folder / "python"
    python.write_text(STEP.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    write_plan(folder)
    return python


def write_plan(folder: Path, exit=None, mode="auto", hold=None, person=(), review_hours=72) -> None:
    plan = {
        "exit": exit or {},
        "config": f"promotion: {{mode: {mode}, review_hours: {review_hours}}}\n",
        "results": results(hold, list(person), passed=not (exit or {}).get("gate")),
    }
    (folder / "plan.json").write_text(json.dumps(plan))


def run_to_the_end(dag, meanwhile=lambda: None, **conf):
    """A run of a DAG by Airflow itself, in this process. While it waits, `meanwhile` is called again and again."""
    sleep, parameters = time.sleep, copy.deepcopy(dag.params)

    def sleep_less(seconds):  # `test()` would sleep a second for each task that is skipped or waits
        sleep(min(seconds, 0.05))
        meanwhile()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", sleep_less)
        try:
            return dag.test(run_conf=conf, logical_date=None)
        finally:
            dag.params = parameters  # or the next run would find this one's


@pytest.fixture(scope="session")
def place():
    """A workspace with ports of its own, for services that live as long as the tests."""
    from local import services

    with tempfile.TemporaryDirectory(prefix="toxic-services-") as folder:
        at = services.Place(Path(folder), {name: free_port() for name in services.PORTS})
        yield at
        services.down(at, say=lambda _: None)


@pytest.fixture(scope="session")
def mlflow_server(place):
    """A real MLflow server, as `make demo` starts it; a function that starts it again."""
    from local import services

    def start():
        service = services.mlflow(place)
        service = replace(service, command=[str(TASKS_PYTHON), *service.command[1:]])
        services.launch(place, service)
        return service

    services.wait_until_healthy(place, [start()], say=lambda _: None)
    return start


@pytest.fixture
def registry(mlflow_server, place, monkeypatch):
    """The registry without any version, and what a reviewer does there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.url("MLFLOW_PORT"))
    with Registry(place.url("MLFLOW_PORT")) as registry:
        registry.request("DELETE", "registered-models/delete", json={"name": registry.name})
        registry.call("registered-models/create", name=registry.name)
        yield registry


class Registry(httpx.Client):
    """MLflow's REST API as a reviewer's browser uses it."""

    name = "toxic_classificator"

    def __init__(self, server: str):
        super().__init__(base_url=f"{server}/api/2.0/mlflow/", trust_env=False, timeout=30)

    def call(self, path, **values):
        return self.post(path, json=values).raise_for_status().json()

    def register(self, **tags) -> int:
        tags = [{"key": key, "value": value} for key, value in {"gate": "passed", **tags}.items()]
        made = self.call("model-versions/create", name=self.name, source="s3://bucket/model", tags=tags)
        return int(made["model_version"]["version"])

    def set_alias(self, alias: str, version: int) -> None:
        self.call("registered-models/alias", name=self.name, alias=alias, version=str(version))

    def set_tag(self, version: int, key: str, value: str) -> None:
        self.call("model-versions/set-tag", name=self.name, version=str(version), key=key, value=value)

    def model(self) -> dict:
        return self.get("registered-models/get", params={"name": self.name}).json()["registered_model"]

    def aliases(self) -> dict[str, int]:
        return {alias["alias"]: int(alias["version"]) for alias in self.model().get("aliases", [])}

    def tags(self, version: int) -> dict[str, str]:
        found = self.get("model-versions/get", params={"name": self.name, "version": str(version)}).json()
        return {tag["key"]: tag["value"] for tag in found["model_version"].get("tags", [])}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def figures(toxic: float, types: float) -> dict:
    languages = {"en": {"f1_toxic": toxic + 0.01}, "ru": {"f1_toxic": toxic - 0.01}}
    return {
        "f1_toxic": toxic,
        "f1_types": types,
        "f1_types_macro": types - 0.1,
        "languages": languages,
        "behaviour": 0.8,
    }


def results(hold=None, person=(), passed=True) -> dict[str, dict]:
    """What the steps find, as far as the review and the notices read it."""
    types = check("F1 types", 0.77 if passed else 0.64, ">=", 0.7, passed, binds=True)
    checks = [
        check("F1 toxic", 0.9123, ">=", 0.85, True, binds=True),
        types,
        check("Calibration error", 0.13, "<=", 0.1, False, binds=False),
        check("F1 types against the champion's", 0.77, ">=", None, None, binds=True),
    ]
    evaluate = {
        "challenger": figures(0.9123, 0.77),
        "champion": figures(0.9011, 0.75),
        "baseline": figures(0.88, 0.734),
        "gain": {
            "champion": {"f1_toxic": {"gain": 0.0112, "interval": [-0.004, 0.025]}, "f1_types": None},
            "baseline": {name: {"gain": 0.0323, "interval": [0.02, 0.045]} for name in ("f1_toxic", "f1_types")},
        },
    }
    found = {"passed": passed, "hold": hold, "person": person}
    why = {} if passed else {"reason": f"version 7: {types['sentence']}"}
    return {
        "train": {"mlflow_run": "0123abcd"},
        "evaluate": evaluate,
        "gate": {**found, "version": 7, "champion": 6, "checks": checks, **why},
        "swap": {"served_version": 7, "previous_version": 6},
    }


def check(title, value, comparison, limit, passed, binds) -> dict:
    sentence = f"{title} {value} should be {comparison} {limit}"
    return {
        **{"title": title, "value": value, "limit": limit, "comparison": comparison},
        **{"passed": passed, "binds": binds, "sentence": sentence},
    }
