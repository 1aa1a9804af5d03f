"""What `make demo` starts and `make down` ends: ports, pid files, processes."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from local import services
from tasks.errors import UsageError


def free_port():
    with socket.socket() as probe:
        probe.bind((services.HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture
def at(tmp_path):
    return services.Place(tmp_path, {name: free_port() for name in services.PORTS})


def test_a_taken_port_is_named_with_a_way_out_and_nothing_is_started(at):
    with socket.socket() as other:
        other.bind((services.HOST, at.ports["MLFLOW_PORT"]))
        other.listen()
        with pytest.raises(UsageError, match=f"port {at.ports['MLFLOW_PORT']}, which MLflow needs.*MLFLOW_PORT="):
            services.start(at)
    assert services.marked(at) == []
    assert list((at.workspace / "services").glob("*.json")) == []


def test_one_port_cannot_serve_two(at):
    at.ports["AIRFLOW_PORT"] = at.ports["MLFLOW_PORT"]
    with pytest.raises(UsageError, match="meant for both MLflow and Airflow"):
        services.refuse_taken_ports(at, {})


@pytest.mark.parametrize("port", ["abc", "80", "70000"])
def test_what_is_not_a_port_is_refused(monkeypatch, port):
    monkeypatch.setenv("TRITON_HTTP_PORT", port)
    with pytest.raises(UsageError, match=f"TRITON_HTTP_PORT={port} is not a port"):
        services.place()


def test_services_on_other_ports_are_not_started_twice(at):
    ports = {**at.ports, "MLFLOW_PORT": 9999}
    with pytest.raises(UsageError, match="make demo MLFLOW_PORT=9999"):
        services.refuse_other_ports(at, {"mlflow": {"ports": ports}})


def test_a_reused_pid_is_not_taken_for_a_service(at):
    record = {"pid": os.getpid(), "created": psutil.Process().create_time(), "ports": at.ports}
    at.pid_file("mlflow").parent.mkdir()
    at.pid_file("mlflow").write_text(json.dumps(record))
    assert services.alive(at, "mlflow") == record
    at.pid_file("mlflow").write_text(json.dumps({**record, "created": record["created"] - 1}))
    assert services.alive(at, "mlflow") is None


# A parent that ends at once, and its child in a session of its own that does not listen to SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
if sys.argv[1:]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
"""


def test_down_finds_orphans_and_ends_those_that_do_not_listen(at, tmp_path, monkeypatch):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    services.launch(at, services.Service("mlflow", "MLflow", [sys.executable, str(script)], healthy=lambda: True))
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        wait_for(lambda: services.alive(at, "mlflow") is None)
        (orphan,) = services.marked(at)
        monkeypatch.setattr(services, "STOP_GRACE_S", 0.5)
        services.down(at, say=lambda words: None)
        assert not services.lives(orphan)
        assert stranger.poll() is None
        assert not at.pid_file("mlflow").exists()
    finally:
        stranger.kill()
        stranger.wait()


def wait_for(condition):
    for _ in range(100):
        if condition():
            return
        services.time.sleep(0.1)
    raise AssertionError("it did not happen within 10 s")
