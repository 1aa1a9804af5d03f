"""Real MLflow servers for every suite that wants one: a process of its own, on SQLite or on PostgreSQL.

And for all: what a test leaves in the environment, such as the address that MLflow was told last, goes with it.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def environment_as_before():
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """The database file of a registry that knows nothing yet: MLflow takes seconds to make one, a copy takes none."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_registered_models()
    return file


class MLflowServer:
    """`mlflow server` with its artifacts under `folder`; it can be killed, and started again on the same port."""

    def __init__(self, folder: Path, store: str, *arguments: str, **environment: str):
        self.folder, self.store, self.process = folder, store, None
        self.arguments, self.environment = arguments, environment
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.kill()  # where a test has failed before it could
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"),
            *("--port", str(self.port), "--backend-store-uri", self.store),
            *("--serve-artifacts", "--artifacts-destination", str(self.folder / "artifacts")),
            *self.arguments,
        ]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **quiet, **self.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own: it is killed with its worker
            )
        deadline = time.monotonic() + 180
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    @property
    def log(self) -> Path:
        return self.folder / "mlflow.log"

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="session")
def own_mlflow_server():
    """For tests that want a server of their own: what makes one."""
    return MLflowServer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def mlflow_on_sqlite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    server = MLflowServer(folder, f"sqlite:///{folder}/mlflow.db")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def postgres():
    """The address of an empty database of a PostgreSQL that is made for these tests, on loopback alone."""
    missing = missing_for_postgres()
    if missing and os.environ.get("CI"):
        pytest.fail(f"{missing}; with CI set that is a failure: see .ci/run and `make envs`")
    if missing:
        pytest.skip(missing)
    # Not in pytest's own folder: that is its owner's alone, and the server may run as somebody else.
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    as_user = ordinary_user(folder)
    data, port = folder / "data", free_port()
    subprocess.run(
        [*as_user, postgres_binary("initdb"), "-D", data, "-U", "mlflow", "-A", "trust", "-E", "UTF8"],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c fsync=off"
    control = [*as_user, postgres_binary("pg_ctl"), "-D", data, "-w", "-l", folder / "log"]
    subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    stopped = subprocess.run([*control, "-m", "immediate", "stop"], capture_output=True, text=True, cwd=folder)
    log = (folder / "log").read_text()
    shutil.rmtree(folder)
    assert stopped.returncode == 0, stopped.stderr + log


def missing_for_postgres() -> str | None:
    if not postgres_binary("initdb"):
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    try:
        import psycopg2  # noqa: F401
    except ImportError:
        return "psycopg2 is not installed (extra `dev`)"
    return None


def postgres_binary(name: str) -> Path | None:
    """Debian keeps the server's binaries off PATH, one folder per version."""
    on_path = shutil.which(name)
    kept = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return Path(on_path) if on_path else kept[-1] if kept else None


def ordinary_user(folder: Path) -> list[str]:
    """What a command starts with to run as somebody whom initdb accepts: root, in a container say, becomes `nobody`."""
    if os.geteuid() != 0:
        return []
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    return ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]


@pytest.fixture(scope="session")
def mlflow_on_postgres(postgres, tmp_path_factory):
    server = MLflowServer(tmp_path_factory.mktemp("mlflow-postgres"), postgres)
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["sqlite", "postgres"])
def mlflow_server(request) -> MLflowServer:
    """A running server, once on each kind of database; tests share it and keep to a registered model of their own."""
    return request.getfixturevalue(f"mlflow_on_{request.param}")
