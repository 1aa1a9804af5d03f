"""The demo as a newcomer runs it: three retrainings through Airflow, one of them under load, and a server that dies.

`make evidence` runs these in the order of the file, in a workspace and on ports of their own.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from asking import CLIENTS, Clients, ask

from tasks.data import sample
from tasks.serving.triton import free_ports

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A workspace and ports of their own; everything that was started is stopped at the end."""
    names = ("MLFLOW_PORT", "TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT", "AIRFLOW_PORT")
    workspace = tmp_path_factory.mktemp("workspace")
    own = dict(zip(names, map(str, free_ports(len(names))))) | {"TOXIC_WORKSPACE": str(workspace)}
    yield own
    make("down", own)


def make(target: str, own: dict, *variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", target, *variables], cwd=ROOT, env={**environment, **own}, capture_output=True, text=True
    )


def demo(own: dict, *variables: str) -> dict:
    done = make("demo", own, *variables)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def url(own: dict) -> str:
    return f"http://127.0.0.1:{own['TRITON_HTTP_PORT']}"


@pytest.fixture(scope="module")
def first(environment):
    return demo(environment)


def test_the_first_demo_serves_a_model_that_passed_the_gate(environment, first):
    assert (first["dag_run"], first["served_version"], first["gate"]) == ("success", 1, "passed")
    assert first["f1_toxic"] >= 0.85 and first["f1_types"] >= 0.70
    assert httpx.get(f"{url(environment)}/v2/models/toxic_classificator").status_code == 200


def test_text_in_json_out(environment, first):
    answer = ask(url(environment))
    assert set(answer) == {"toxic", "labels", "scores", "version"}
    assert answer["toxic"] is True and answer["version"] == 1
    assert ask(url(environment), "Thank you for your help, Harriet.")["toxic"] is False


def test_the_client_example_of_the_readme_works_as_printed(environment, first):
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(import httpx.*?)```", readme, re.DOTALL)
    example = example.replace("127.0.0.1:8000", f"127.0.0.1:{environment['TRITON_HTTP_PORT']}")
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["toxic"] for answer in answers] == [True, False]


def test_the_registered_version_answers_like_the_readme_says(environment, first):
    program = (
        "import mlflow\n"
        f"mlflow.set_tracking_uri('http://127.0.0.1:{environment['MLFLOW_PORT']}')\n"
        "model = mlflow.pyfunc.load_model('models:/toxic_classificator@challenger')\n"
        "print(model.predict(['You are an idiot.']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.stdout.startswith("[{'toxic': True, 'labels': ["), done.stdout + done.stderr


def test_a_second_demo_finds_nothing_new(environment, first):
    done = make("demo", environment)
    assert "nothing new since run" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["dag_run"], found["served_version"], found["gate"]) == ("success", 1, "skipped")


@pytest.fixture(scope="module")
def forced(environment, first):
    with Clients(url(environment)) as clients:
        found = demo(environment, "FORCE=1")
    return found, clients


def test_a_forced_retraining_swaps_under_load_without_a_failed_request(environment, forced):
    found, clients = forced
    assert (found["dag_run"], found["served_version"], found["gate"]) == ("success", 2, "passed")
    assert clients.failures == []
    assert len(clients.versions) > 1000 and set(clients.versions) == {1, 2}
    switch = clients.versions.index(2)
    assert 1 not in clients.versions[switch + CLIENTS :], "version 1 answered again after the swap"
    assert ask(url(environment), "Hello")["version"] == 2


def triton(own: dict) -> psutil.Process:
    port = f"--http-port={own['TRITON_HTTP_PORT']}"
    (found,) = [p for p in psutil.process_iter(["cmdline"]) if port in (p.info["cmdline"] or [])]
    return found


def test_a_killed_triton_comes_back_with_version_2(environment, forced):
    process = triton(environment)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    done = subprocess.run(
        [sys.executable, "-m", "local.services", "start"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ask(url(environment), "Hello")["version"] == 2


def test_kaggles_own_files_that_teach_nothing_leave_service_untouched(environment, forced, tmp_path):
    sample.write(tmp_path, 1200, 800, label_noise=0.45, seed=5)
    for file in (sample.JIGSAW_FILE, sample.RUSSIAN_FILE):
        subprocess.run(["gzip", tmp_path / file], check=True)
    found = demo(environment, f"DATA={tmp_path}", "FORCE=1")
    assert (found["dag_run"], found["served_version"], found["gate"]) == ("success", 2, "failed")
    assert 0 < found["f1_toxic"] < 0.85


def test_a_taken_port_is_named_and_nothing_is_started(environment, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = make("demo", {**environment, "TOXIC_WORKSPACE": str(tmp_path)}, f"MLFLOW_PORT={port}")
    assert done.returncode == 2
    assert port in done.stderr and "MLFLOW_PORT=" in done.stderr


def test_down_stops_everything(environment, forced):
    assert make("down", environment).returncode == 0
    left = [p for p in psutil.process_iter() if environment["TOXIC_WORKSPACE"] in " ".join(command(p))]
    assert left == []


def command(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline(), process.environ().get("TOXIC_WORKSPACE", "")] if process.pid != os.getpid() else []
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []
