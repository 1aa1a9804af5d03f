"""The whole stack on a real Docker Engine, once for all tests: its own name, ports, secrets and data.

`make stack` runs these. The workspace lies on a small file system of its own, so that a test can fill it.
"""

import json
import os
import secrets
import shutil
import subprocess
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx
import pytest
from asking import TEXT, ask

from benchmarks import json_line
from tasks.serving.triton import free_ports

ROOT = Path(__file__).parents[2]
MLFLOW_URL = "https://mlflow.example.org"  # as a reverse proxy before the stack would have it
WEEKLY = "/api/v2/dags/toxicity_weekly"
PORTS = ("AIRFLOW_PORT", "MLFLOW_PORT", "TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT")
# A run of minutes that ends at the gate: for what concerns how a run goes, not what it teaches.
SHORT = {"profile": "demo", "force": True, "max_samples": 2000, "epochs": 1, "promotion": "never"}


class Stack:
    """A stack of its own: what Compose is told, and what its people may ask."""

    def __init__(self, folder: Path):
        self.folder, self.secrets, self.workspace = folder, folder / "secrets", folder / "workspace"
        self.name = f"toxic-test-{os.getpid()}"
        self.images = [f"{self.name}-{image}" for image in ("airflow", "trainer", "triton")]
        self.ports = dict(zip(PORTS, free_ports(len(PORTS))))
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")},
            "MAKEFLAGS": "e",  # what stands here comes before an .env of this checkout
            **{name: str(port) for name, port in self.ports.items()},
            "COMPOSE_FILE": f"{ROOT / 'docker-compose.yaml'}:{Path(__file__).with_name('overrides.yaml')}",
            "COMPOSE_PROFILES": "cpu",
            "TOXIC_PROFILE": "demo",
            "TOXIC_STACK": self.name,
            "TOXIC_SECRETS": str(self.secrets),
            "TOXIC_MLFLOW_URL": f"{MLFLOW_URL}/",
            "TOXIC_MLFLOW_HOSTS": MLFLOW_URL.removeprefix("https://"),
            "TOXIC_STEP_MEMORY": "4g",
            "TOXIC_HEARTBEAT_TIMEOUT": "30",
            # No test is to meet a scheduled run.
            "TOXIC_SCHEDULE": f"0 3 * * {(datetime.now(timezone.utc) + timedelta(days=3)).isoweekday() % 7}",
            "TOXIC_TEST_WORKSPACE": str(self.workspace),
            "TOXIC_TEST_DAG": shutil.copy(Path(__file__).with_name("impatient.py"), folder),
        }
        self.tokens: dict[tuple[str, str], tuple[float, str]] = {}  # since when

    def run(self, *command: str, check=True, **more) -> subprocess.CompletedProcess:
        environment = {**self.environment, **more}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def compose(self, *arguments: str, check=True, **more) -> subprocess.CompletedProcess:
        return self.run("docker", "compose", *arguments, check=check, **more)

    def command(self, *words: str, check=True) -> subprocess.CompletedProcess:
        """One of the project's commands, by hand."""
        run = ("run", "--rm", "-T", "commands", "python", "commands.py")
        return self.compose(*run, *words, "profile=demo", check=check)

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text()

    def url(self, port: str, path: str = "") -> str:
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    def container(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service).stdout.strip()

    def steps(self, running: bool = False) -> dict[str, str]:
        """The step of each container of a step that there is, running or not, by its id."""
        listed = self.run(
            *("docker", "ps", "--no-trunc", "--filter", f"label=toxic.workspace={self.name}-workspace"),
            *("--format", '{{.ID}} {{.Label "toxic.step"}}', *(() if running else ("--all",))),
        )
        return dict(line.split() for line in listed.stdout.splitlines())

    def wait_healthy(self) -> None:
        """Until every service is healthy; none is started here."""
        wait_for(lambda: set(self.health().values()) == {"healthy"}, 240, lambda: str(self.health()))

    def health(self) -> dict[str, str]:
        lines = self.compose("ps", "--all", "--format", "json").stdout.splitlines()
        services = [json.loads(line) for line in lines]
        return {s["Service"]: s["Health"] or s["State"] for s in services if s["Service"] != "init"}

    def airflow(self, user: str) -> httpx.Client:
        """Airflow's REST API as one of its users."""
        password = self.secret(f"AIRFLOW_{user.upper()}_PASSWORD")
        if self.tokens.get((user, password), (0, ""))[0] < time.monotonic() - 1800:  # they live an hour
            login = {"username": user, "password": password}
            answer = httpx.post(self.url("AIRFLOW_PORT", "/auth/token"), json=login, timeout=60).raise_for_status()
            self.tokens[user, password] = time.monotonic(), answer.json()["access_token"]
        bearer = {"Authorization": f"Bearer {self.tokens[user, password][1]}"}
        return httpx.Client(base_url=self.url("AIRFLOW_PORT"), timeout=60, headers=bearer)

    def trigger(self, run_id: str, conf: dict) -> None:
        with self.airflow("operator") as airflow:
            wait_for(lambda: airflow.get(WEEKLY).status_code == 200, 60)
            airflow.patch(WEEKLY, json={"is_paused": False}).raise_for_status()
            body = {"dag_run_id": run_id, "logical_date": None, "conf": conf}
            airflow.post(f"{WEEKLY}/dagRuns", json=body).raise_for_status()

    def state(self, run_id: str) -> str:
        with self.airflow("viewer") as airflow:
            return airflow.get(f"{WEEKLY}/dagRuns/{run_id}").raise_for_status().json()["state"]

    def tasks(self, run_id: str) -> dict[str, dict]:
        with self.airflow("viewer") as airflow:
            found = airflow.get(f"{WEEKLY}/dagRuns/{run_id}/taskInstances").raise_for_status().json()
        return {task["task_id"]: task for task in found["task_instances"]}

    def log(self, run_id: str, task: str, attempt: int = 1, dag: str = WEEKLY) -> str:
        path = f"{dag}/dagRuns/{run_id}/taskInstances/{task}/logs/{attempt}"
        with self.airflow("viewer") as airflow:
            return airflow.get(path, params={"full_content": True}).raise_for_status().text

    def errors(self, run_id: str, task: str, attempt: int = 1, dag: str = WEEKLY) -> list[str]:
        """What a task's log says as an error, in order: the exception's type where there is one, else the message."""
        lines = json.loads(self.log(run_id, task, attempt, dag))["content"]
        errors = [line for line in lines if line.get("level") in ("error", "critical")]
        return [line["error_detail"][0]["exc_type"] if line.get("error_detail") else line["event"] for line in errors]

    def finish(self, run_id: str, timeout: float = 900, watch=lambda: None) -> str:
        """Waits for the end of a run and returns its state; `watch` is called meanwhile."""

        def over() -> bool:
            watch()
            try:
                return self.state(run_id) in ("success", "failed")
            except httpx.HTTPError:
                return False  # some tests kill what it takes to answer

        def story() -> str:
            return str({name: task["state"] for name, task in self.tasks(run_id).items()})

        wait_for(over, timeout, story)
        return self.state(run_id)

    def wait_for_step(self, step: str, timeout: float = 300) -> str:
        """The container of a step, once it runs."""

        def container() -> str | None:
            return {name: container for container, name in self.steps(running=True).items()}.get(step)

        return wait_for(container, timeout, lambda: str(self.steps()))

    def ask(self, text: str = TEXT) -> dict:
        return ask(self.url("TRITON_HTTP_PORT"), text)


def wait_for(condition, timeout: float, story=lambda: ""):
    """Waits until a condition holds, and returns what it came to."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {story()}"
        time.sleep(1)
    return found


def answers(stack) -> int | None:
    try:
        return stack.ask()["version"]
    except httpx.HTTPError:
        return None


def kill_main_process(stack, service: str, name: bytes) -> None:
    """As the kernel would, out of memory: Docker takes `docker kill` for a wish and would not start it again."""
    container = stack.container(service)
    top = stack.run("docker", "top", container, "-eo", "pid,args").stdout.splitlines()[1:]
    pids = [line.split(maxsplit=1)[0] for line in top if name.decode() in line.split(maxsplit=1)[1]]
    subprocess.run(["kill", "-KILL", *pids], check=True)


def figure(name: str, value: float, unit: str = "s") -> None:
    """A measured figure, as the benchmarks print theirs (benchmarks/results)."""
    print()
    json_line.of_host(name, round(value), unit)


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """The stack, up and healthy; gone with all its data at the end."""
    if os.getuid():
        pytest.exit("make stack mounts a file system and kills processes in containers: run it as root", returncode=2)
    stack = Stack(tmp_path_factory.mktemp("stack"))
    stack.workspace.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3g,uid=10001,gid=10001", "tmpfs", stack.workspace], check=True)
    try:
        stack.run("make", "secrets")
        for name in ("KAGGLE_API_TOKEN", "HF_TOKEN"):  # made empty; the demo profile asks neither site
            (stack.secrets / name).write_text(f"no-token-{secrets.token_urlsafe(24)}")
        started = time.monotonic()
        stack.compose("build")
        built = time.monotonic()
        stack.run("make", "up")
        figure("stack_build", built - started)
        figure("stack_up", time.monotonic() - built)
        yield stack
    finally:
        (stack.folder / "stack.log").write_text(stack.compose("logs", check=False).stdout)
        for container in stack.steps():
            stack.run("docker", "rm", "--force", container)
        stack.compose("down", "--volumes", "--timeout=20", check=False)
        stack.run("docker", "rmi", *stack.images, check=False)
        subprocess.run(["umount", "--lazy", stack.workspace], check=True)


@pytest.fixture(scope="session")
def served(stack):
    """A stack that serves version 1, and the run that has brought it: which containers it had, its log as it ran."""
    seen: dict[str, str] = {}
    inspected: dict[str, dict] = {}
    live = []

    def watch():
        for container, step in stack.steps().items():
            if container not in seen:
                found = stack.run("docker", "inspect", container, check=False)
                if found.returncode == 0:
                    seen[container], inspected[step] = step, json.loads(found.stdout)[0]
            if step == "train" and "INFO step" in stack.log("first", "train"):
                live.append(step)

    started = time.monotonic()
    stack.trigger("first", {"profile": "demo"})
    state = stack.finish("first", watch=watch)
    figure("stack_first_run", time.monotonic() - started)
    tasks = {name: (task["state"], task["try_number"]) for name, task in stack.tasks("first").items()}
    return {"state": state, "tasks": tasks, "containers": seen, "inspected": inspected, "live": live}
