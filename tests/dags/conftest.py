"""A real Airflow of the tests' own: its home, its SQLite database and a workspace under a temporary folder."""

import json
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = tempfile.TemporaryDirectory(prefix="toxic-airflow-")

# Airflow reads these when it is imported.
os.environ.update(
    AIRFLOW_HOME=HOME.name,
    AIRFLOW__CORE__DAGS_FOLDER=str(ROOT / "dags"),
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{HOME.name}/airflow.db",
    AIRFLOW__LOGGING__LOGGING_LEVEL="WARNING",
    AIRFLOW__API__BASE_URL="http://airflow.example:8088",
)
for name in ("TOXIC_RUNNER", "TOXIC_PROFILE", "TOXIC_PYTHON", "TOXIC_WORKSPACE"):
    os.environ.pop(name, None)
sys.path.insert(0, str(ROOT))

# Stands for a tasks' environment: takes `commands.py STEP`, notes how it was called, answers and ends as it is told.
STEP = """#!{python}
import json, os, pathlib, sys
name = {{"raw": "validate_raw", "prepared": "validate_prepared"}}.get(sys.argv[-1].split("=")[-1], sys.argv[2])
plan = json.loads(pathlib.Path(__file__).with_name("plan.json").read_text())
folder = pathlib.Path(os.environ["TOXIC_WORKSPACE"], "runs", os.environ["TOXIC_RUN_ID"])
folder.mkdir(parents=True, exist_ok=True)
noted = {{key: value for key, value in os.environ.items() if key.startswith("TOXIC_")}}
note = json.dumps({{"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": noted}})
with (folder / f"{{name}}.called").open("a") as calls:
    calls.write(note + "\\n")
for file, text in plan.get("files", {{}}).items():
    (folder / file).write_text(text)
code = plan.get("exit", {{}}).get(name, 0)
print("a line of log", file=sys.stderr, flush=True)
print(json.dumps({{"step": name}}), flush=True)
if code:
    print(f"{{name}} says why", file=sys.stderr)
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
    python = tmp_path / "python"
    python.write_text(STEP.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("TOXIC_PYTHON", str(python))

    def plan(exit=None, mode="auto", hold=None):
        (tmp_path / "plan.json").write_text(json.dumps({"exit": exit or {}, "files": results(mode, hold)}))

    plan()
    return plan


def figures(toxic: float, types: float) -> dict:
    languages = {"en": {"f1_toxic": toxic + 0.01}, "ru": {"f1_toxic": toxic - 0.01}}
    return {
        "f1_toxic": toxic,
        "f1_types": types,
        "f1_types_macro": types - 0.1,
        "languages": languages,
        "behaviour": 0.8,
    }


def results(mode="auto", hold=None) -> dict[str, str]:
    """The files that the review reads in a run folder."""
    checks = [
        {"title": "F1 toxic", "value": 0.9123, "limit": 0.85, "comparison": ">=", "passed": True},
        {"title": "Calibration error", "value": 0.13, "limit": 0.1, "comparison": "<=", "passed": False},
        {"title": "F1 types against the champion's", "value": 0.77, "limit": None, "comparison": ">=", "passed": None},
    ]
    mlflow = "mlflow: {tracking_uri: 'http://mlflow.example', registered_model: toxic_classificator}\n"
    evaluate = {
        "challenger": figures(0.9123, 0.77),
        "champion": figures(0.9011, 0.75),
        "baseline": figures(0.88, 0.734),
        "gain": {
            "champion": {"f1_toxic": {"gain": 0.0112, "interval": [-0.004, 0.025]}, "f1_types": None},
            "baseline": {name: {"gain": 0.0323, "interval": [0.02, 0.045]} for name in ("f1_toxic", "f1_types")},
        },
    }
    gate = {"passed": True, "hold": hold, "version": 7, "champion": 6, "checks": checks}
    return {
        "config.yaml": f"promotion: {{mode: {mode}}}\n{mlflow}",
        "gate.json": json.dumps(gate),
        "evaluate.json": json.dumps(evaluate),
    }
