"""What `make demo` leaves running: MLflow, Triton and Airflow, on loopback, each process in a session of its own.

    python -m local.services start | status | down

A pid file beside each process's start time says what runs, so that a reused pid is never taken for a service. Every
process and all its descendants carry TOXIC_SERVICE and the workspace in their environment: `down` finds by these what
a crash, or a service's own session, would hide from it.
"""

import argparse
import fcntl
import functools
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tasks import files, paths, proxies
from tasks.errors import StepFailed, UsageError

ROOT = Path(__file__).resolve().parents[1]
AIRFLOW = [str(ROOT / ".venv/airflow/bin/python"), "-m", "airflow"]
HOST = "127.0.0.1"
PORTS = {  # the variables of the Makefile, and what needs them
    "MLFLOW_PORT": (8080, "MLflow"),
    "TRITON_HTTP_PORT": (8000, "Triton (HTTP)"),
    "TRITON_GRPC_PORT": (8001, "Triton (gRPC)"),
    "TRITON_METRICS_PORT": (8002, "Triton (metrics)"),
    "AIRFLOW_PORT": (8088, "Airflow"),
}
START_TIMEOUT_S = 240
STOP_GRACE_S = 20  # then SIGKILL; Triton alone may take over 4 s


@dataclass(frozen=True)
class Service:
    """One long-running process, which is all or a part of a `product`."""

    name: str
    product: str
    command: list[str]
    healthy: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT  # where it runs


@dataclass(frozen=True)
class Place:
    """Where a workspace's services are: its folder and their ports, by the names of the Makefile's variables."""

    workspace: Path
    ports: dict[str, int]

    def url(self, port: str) -> str:
        return f"http://{HOST}:{self.ports[port]}"

    @property
    def airflow_home(self) -> Path:
        return self.workspace / "airflow"

    @property
    def password(self) -> str:
        return files.read_json(self.password_file)["admin"]

    @property
    def password_file(self) -> Path:
        return self.airflow_home / "simple_auth_manager_passwords.json.generated"

    def log(self, name: str) -> Path:
        return self.workspace / "logs" / "services" / f"{name}.log"

    def pid_file(self, name: str) -> Path:
        return self.workspace / "services" / f"{name}.json"


def place() -> Place:
    """The workspace and the ports that the environment names."""
    ports = {}
    for name, (default, _) in PORTS.items():
        text = os.environ.get(name) or str(default)
        if not text.isdigit() or not 1024 <= int(text) <= 65535:
            raise UsageError(f"{name}={text} is not a port: choose one from 1024 to 65535")
        ports[name] = int(text)
    workspace = Path(os.environ.get("TOXIC_WORKSPACE") or ROOT / "workspace").expanduser().absolute()
    return Place(workspace, ports)


def start(at: Place, say: Callable[[str], None] = print) -> None:
    """Starts what isn't running yet and waits until all of it answers; `say` hears of each product that does.

    Raises:
        UsageError: a path or a proxy that can't be used, a port is taken, or a service already runs on other ports;
            nothing has been started.
        StepFailed: a service ended or did not answer in time; the message names its log.
    """
    paths.require_usable(ROOT, at.workspace)
    proxies.in_order(os.environ)
    with lock(at):
        running = {name: record for name in SERVICES if (record := alive(at, name))}
        refuse_other_ports(at, running)
        missing = [service for name, make in SERVICES.items() if name not in running for service in [make(at)]]
        if missing:
            if not running:
                end(at, marked(at))  # what a crash left behind
            refuse_taken_ports(at, running)
            write_password(at)
            for service in missing:
                if service.name == FIRST_OF_AIRFLOW:
                    migrate_airflow(at)  # while MLflow and Triton come up
                launch(at, service)
        wait_until_healthy(at, [make(at) for make in SERVICES.values()], say)


def down(at: Place, say: Callable[[str], None] = print) -> None:
    """Stops everything that runs from this workspace, the scheduler first so that it starts nothing meanwhile."""
    with lock(at):
        found = marked(at)
        scheduler = alive(at, "airflow-scheduler")
        if scheduler:
            main = psutil.Process(scheduler["pid"])
            main.terminate()
            wait_until_gone([main], 3)  # it waits for its running task, which is ended next
        end(at, marked(at))
        for name in SERVICES:
            at.pid_file(name).unlink(missing_ok=True)
        say("stopped MLflow, Triton and Airflow" if found else "nothing was running")


def status(at: Place) -> list[tuple[str, str]]:
    """Each service's name and, in words, how it is."""
    return [(name, describe(at, make(at))) for name, make in SERVICES.items()]


def describe(at: Place, service: Service) -> str:
    record = alive(at, service.name)
    if record is None:
        return "stopped"
    if record["ports"] != at.ports:
        return f"running (pid {record['pid']}) on other ports: {as_arguments(record['ports'], at.ports)}"
    return f"running (pid {record['pid']})" if service.healthy() else f"not answering: see {at.log(service.name)}"


# The services ---------------------------------------------------------------------------------------------------------


def mlflow(at: Place) -> Service:
    return Service(
        "mlflow",
        "MLflow",
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", HOST, "--port", str(at.ports["MLFLOW_PORT"])),
            *("--backend-store-uri", "sqlite:///mlflow.db"),
            *("--serve-artifacts", "--artifacts-destination", "./artifacts"),
        ],
        healthy=lambda: answers(at.url("MLFLOW_PORT") + "/health"),
        # Without the job runner it is 2 processes and 0.5 GB instead of 15 and 1.5 GB.
        environment={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        # It reads both as addresses, each in its own way: relative ones have nothing in them to misread.
        folder=at.workspace / "mlflow",
    )


def triton(at: Place) -> Service:
    return Service(
        "triton",
        "Triton",
        [sys.executable, "-m", "tasks.serving.triton", *serving_overrides(at)],
        healthy=lambda: answers(at.url("TRITON_HTTP_PORT") + "/v2/health/live"),
        environment={"TOXIC_TRITON_ENV": str(ROOT / ".venv/triton")},
    )


def serving_overrides(at: Place) -> list[str]:
    return [
        "profile=demo",
        f"serving.http_port={at.ports['TRITON_HTTP_PORT']}",
        f"serving.grpc_port={at.ports['TRITON_GRPC_PORT']}",
        f"serving.metrics_port={at.ports['TRITON_METRICS_PORT']}",
    ]


def airflow(component: str, *arguments: str) -> Callable[[Place], Service]:
    def service(at: Place) -> Service:
        return Service(
            f"airflow-{component}",
            "Airflow",
            [*AIRFLOW, component, *arguments],
            healthy=lambda: airflow_answers(at, component.replace("-", "_")),
            environment=airflow_environment(at),
        )

    return service


def airflow_environment(at: Place) -> dict[str, str]:
    """Airflow's configuration, and what the steps find in their environment."""
    return {
        "AIRFLOW_HOME": str(at.airflow_home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "dags" / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",  # a worker rests up to 5 s after a task; the next one finds another
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": at.url("AIRFLOW_PORT") + "/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": files.sqlite_url(at.airflow_home / "airflow.db"),
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(at.ports["AIRFLOW_PORT"]),
        "AIRFLOW__API__BASE_URL": at.url("AIRFLOW_PORT"),
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.3",  # what a task waits for at most
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "120",  # a task that died is tried again after this
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "30",
        # Its default is a pattern with the home in it, which is left as it is where the home holds a % itself.
        "AIRFLOW__LOGGING__DAG_PROCESSOR_CHILD_PROCESS_LOG_DIRECTORY": str(at.airflow_home / "logs" / "dag_processor"),
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(at.workspace / "logs" / "airflow"),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "PYTHONPATH": str(ROOT),
        "TOXIC_RUNNER": "process",
        "TOXIC_PROFILE": "demo",
        "TOXIC_PYTHON": os.environ.get("TOXIC_PYTHON") or sys.executable,
        "TOXIC_TRITON_ENV": str(ROOT / ".venv/triton"),
        "MLFLOW_TRACKING_URI": at.url("MLFLOW_PORT"),
        "TRITON_URL": f"{HOST}:{at.ports['TRITON_GRPC_PORT']}",
    }


FIRST_OF_AIRFLOW = "airflow-api-server"
SERVICES: dict[str, Callable[[Place], Service]] = {
    "mlflow": mlflow,
    "triton": triton,
    FIRST_OF_AIRFLOW: airflow("api-server"),
    "airflow-scheduler": airflow("scheduler", "--skip-serve-logs"),  # serve-logs would listen on every address
    "airflow-dag-processor": airflow("dag-processor"),
    "airflow-triggerer": airflow("triggerer", "--skip-serve-logs"),
}


@functools.cache
def client() -> httpx.Client:
    """One for all questions: each new one reads its certificates, 41 ms of a core."""
    return httpx.Client(timeout=5, trust_env=False)


def answers(url: str) -> bool:
    try:
        return client().get(url).status_code == 200
    except httpx.HTTPError:
        return False


def airflow_answers(at: Place, component: str) -> bool:
    try:
        health = client().get(at.url("AIRFLOW_PORT") + "/api/v2/monitor/health").json()
    except (httpx.HTTPError, ValueError):
        return False
    return component == "api_server" or health[component]["status"] == "healthy"


# Starting -------------------------------------------------------------------------------------------------------------


@contextmanager
def lock(at: Place):
    """One start or stop at a time in a workspace."""
    folder = at.workspace / "services"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def refuse_other_ports(at: Place, running: dict[str, dict]) -> None:
    for name, record in running.items():
        if record["ports"] != at.ports:
            raise UsageError(
                f"{name} already runs from {at.workspace} on other ports: `make down` first, or "
                f"`make demo {as_arguments(record['ports'], at.ports)}`"
            )


def as_arguments(ports: dict[str, int], usual: dict[str, int]) -> str:
    return " ".join(f"{name}={port}" for name, port in ports.items() if port != usual[name])


def refuse_taken_ports(at: Place, running: dict[str, dict]) -> None:
    in_use = {name for name in PORTS if any(name.startswith(service.split("-")[0].upper()) for service in running)}
    seen: dict[int, str] = {}
    for name, port in at.ports.items():
        what = PORTS[name][1]
        if port in seen:
            raise UsageError(f"port {port} is meant for both {seen[port]} and {what}: choose another {name}=")
        seen[port] = what
        if name not in in_use and taken(port):
            free = next(other for other in range(port + 1000, 65535) if not taken(other))
            raise UsageError(
                f"port {port}, which {what} needs, is taken by another program: `make demo {name}={free}` takes "
                "another one; nothing was started"
            )


def taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
        return False


def write_password(at: Place) -> None:
    """Airflow would choose one too, and print it into its log."""
    if not at.password_file.exists():
        at.airflow_home.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(at.password_file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            json.dump({"admin": secrets.token_urlsafe(9)}, file)


def migrate_airflow(at: Place) -> None:
    log = at.log("airflow-db")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.run(
            [*AIRFLOW, "db", "migrate"],
            env={**surroundings(), **airflow_environment(at)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        raise StepFailed(f"airflow db migrate failed: {last_line(log)}; see {log}")


def launch(at: Place, service: Service) -> None:
    log = at.log(service.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    service.folder.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            service.command,
            cwd=service.folder,
            env={**surroundings(), **service.environment, **marks(at, service.name)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it outlives make and the terminal
        )
    created = psutil.Process(process.pid).create_time()
    files.write_json(at.pid_file(service.name), {"pid": process.pid, "created": created, "ports": at.ports})


def marks(at: Place, name: str) -> dict[str, str]:
    # SPT_NOENV: processes that set their title would write over the environment that `marked` reads.
    return {"TOXIC_SERVICE": name, "TOXIC_WORKSPACE": str(at.workspace), "SPT_NOENV": "1"}


def surroundings() -> dict[str, str]:
    """What every service finds in its environment: ours, with proxies that lead to the outside alone."""
    # UTF-8 wherever Python reads or writes, whatever the locale: paths and messages are in any script.
    return {**os.environ, **proxies.in_order(os.environ), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


def wait_until_healthy(at: Place, waiting: list[Service], say: Callable[[str], None]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while waiting:
        for service in list(waiting):
            log = at.log(service.name)
            record = alive(at, service.name)
            if record is None:
                raise StepFailed(f"{service.name} has ended: {last_line(log)}; see {log}")
            if service.name == "triton":
                from tasks.serving.triton import require_stubs

                require_stubs(record["pid"], log)  # without them it waits for ever
            if service.healthy():
                waiting.remove(service)
                if service.product not in {other.product for other in waiting}:
                    say(service.product)
        if waiting and time.monotonic() > deadline:
            names = ", ".join(service.name for service in waiting)
            raise StepFailed(f"{names} did not answer within {START_TIMEOUT_S} s: see {log.parent}")
        time.sleep(0.5 if waiting else 0)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


# Finding and ending ---------------------------------------------------------------------------------------------------


def alive(at: Place, name: str) -> dict | None:
    """The service's pid file, if the very process that it names still runs."""
    try:
        record = files.read_json(at.pid_file(name))
        process = psutil.Process(record["pid"])
        if process.create_time() == record["created"] and lives(process):
            return record
    except (FileNotFoundError, psutil.NoSuchProcess):
        pass
    return None


def marked(at: Place) -> list[psutil.Process]:
    """Every process that a service of this workspace started, whatever has become of its parents."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):  # another user's, or gone
            continue
        if "TOXIC_SERVICE" in environment and environment.get("TOXIC_WORKSPACE") == str(at.workspace):
            found.append(process)
    return found


def end(at: Place, processes: list[psutil.Process]) -> None:
    """SIGTERM, a while to clean up, SIGKILL; and once more for what was started meanwhile."""
    for process in processes:
        with_mercy(process.terminate)
    wait_until_gone(processes, STOP_GRACE_S)
    left = marked(at)
    for process in left:
        with_mercy(process.kill)
    wait_until_gone(left, 5)


def wait_until_gone(processes: list[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(lives(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def lives(process: psutil.Process) -> bool:
    # A zombie has ended; the `make demo` that started it may be watching still.
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def with_mercy(signal: Callable[[], None]) -> None:
    try:
        signal()
    except psutil.NoSuchProcess:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local.services", description="MLflow, Triton and Airflow")
    parser.add_argument("action", choices=["start", "status", "down"])
    action = parser.parse_args().action
    try:
        at = place()
        if action == "start":
            start(at, say=lambda product: print(f"{product} answers"))
        elif action == "down":
            down(at)
        else:
            for name, state in status(at):
                print(f"{name:24}{state}")
    except (UsageError, StepFailed) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
