"""Triton where paths are odd and proxies stand around: whoever starts it, it serves, or says at once why not."""

import os
import sys
import time

import psutil
import pytest
from serving_parts import Live, load_config

from tasks.errors import StepFailed
from tasks.serving import client, live_servers, repository, stage, triton

DEAD = "127.0.0.1:9"  # nobody listens there
PROXIES = {"http_proxy": f"http://{DEAD}", "https_proxy": f"http://{DEAD}", "ALL_PROXY": f"socks5://{DEAD}"}


@pytest.fixture
def odd(made, tmp_path, monkeypatch):
    """The configuration of a workspace, in the C locale and with proxies that nobody answers at; version 1 is there."""
    workspace = tmp_path / 'it\'s 50% "проект" (#1) & $b?'
    for name, value in {**PROXIES, "LC_ALL": "C", "no_proxy": "", "NO_PROXY": ""}.items():
        monkeypatch.setenv(name, value)
    http, grpc, metrics = triton.free_ports(3)
    ports = [f"serving.http_port={http}", f"serving.grpc_port={grpc}", f"serving.metrics_port={metrics}"]
    config = load_config(tmp_path, f"serving.urls=[127.0.0.1:{grpc}]", *ports)
    config = config.model_copy(update={"workspace": workspace})
    stage.install(config, made / "models" / "1" / "engine", repository.live(config), 1)
    return config


def test_the_live_server_serves_from_there(odd):
    server = Live(odd, [sys.executable, "-m", "tasks.serving.triton"])
    try:
        server.start("/v2/models/toxic_text/ready")
        assert client.classify(["you are an idiot"], odd.serving.url)[0]["version"] == 1
        with live_servers.connect(odd) as servers:
            assert all(live_servers.has_loaded(connection, 1) for connection in servers.values())
    finally:
        server.stop()
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if triton.serves_from(odd.workspace, p, p.info["cmdline"] or [])
    ]


def test_what_keeps_a_model_from_loading_is_said_in_its_own_words(odd):
    classifier = repository.folder(repository.live(odd), repository.CLASSIFIER, 1)
    (classifier / "engine.json").unlink()
    (classifier / "engine.json").write_text("{}")
    log = odd.workspace / "log" / "triton.log"
    with pytest.raises(StepFailed, match="KeyError: 'buckets'.*toxic_classificator/1/model.py.*initialize"):
        with triton.running(odd, repository.live(odd), log.parent, load=()) as server:
            triton.load(odd, server, repository.TEXT, log)


@pytest.mark.parametrize(
    "stub, said",
    [
        (
            "echo 'stub: error while loading shared libraries: libx.so: cannot open' >&2; exit 127",
            "libx.so: cannot open",
        ),
        ("echo 'Fatal Python error: init_fs_encoding: no module encodings' >&2; kill -9 $$", "no module encodings"),
    ],
)
def test_a_models_process_that_ends_at_once_is_told_at_once(odd, monkeypatch, stub, said):
    """Triton itself would wait for it for ever."""

    def backends(folder, server):
        target = real(folder, server)
        program = target / "python" / "triton_python_backend_stub"
        program.unlink()
        program.write_text(f"#!/bin/sh\n{stub}\n")
        program.chmod(0o755)
        return target

    def kill(pid):
        memory.extend(triton.shared_memory(psutil.Process(pid)))
        end(pid)

    memory, real, end = [], triton.backends, triton.kill
    monkeypatch.setattr(triton, "backends", backends)
    monkeypatch.setattr(triton, "kill", kill)
    log, started = odd.workspace / "log" / "triton.log", time.monotonic()
    with pytest.raises(triton.StubDied, match=said) as failed:
        with triton.running(odd, repository.live(odd), log.parent, load=()) as server:
            triton.load(odd, server, repository.TEXT, log)
    assert time.monotonic() - started < odd.serving.load_timeout_s / 2
    assert "CUDA" not in str(failed.value) and "Cuda" not in str(failed.value)
    assert not psutil.pid_exists(server.pid)
    assert memory and not any(map(os.path.exists, memory))


LOG = """\
W1129 19:24:08 7317 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory: CUDA driver version"
E1129 19:24:08 7317 server.cc:241] "CudaDriverHelper has not been initialized."
I1129 19:24:08 7317 server.cc:1] "Started"
Error: Failed to initialize NVML
"""


@pytest.mark.parametrize(
    "more, said",
    [
        ("bash: line 1: /tmp/with: No such file or directory\n", "bash: line 1: /tmp/with: No such file or directory"),
        ('E1129 19:24:09 7317 model.cc:1] "failed to load"\n', 'E1129 19:24:09 7317 model.cc:1] "failed to load"'),
        ("", 'I1129 19:24:08 7317 server.cc:1] "Started"'),
    ],
)
def test_the_lack_of_a_gpu_is_blamed_for_nothing(tmp_path, more, said):
    (tmp_path / "triton.log").write_text(LOG + more)
    assert triton.why(tmp_path / "triton.log") == said


def test_servers_of_an_older_checkout_are_found_by_their_whole_paths(tmp_path):
    """They were started with the repository's path, from anywhere."""
    here = psutil.Process()
    staging = tmp_path / "triton" / "staging"
    assert triton.serves_from(staging, here, ["tritonserver", f"--model-repository={staging}/run/candidate"])
    stub = ["stub", f"{staging}/run/candidate/toxic_labels/1/model.py", f"{triton.SHARED_MEMORY}1"]
    assert triton.serves_from(staging, here, stub)
    assert not triton.serves_from(staging, here, ["vim", f"{staging}/run/candidate/toxic_labels/1/model.py"])
    assert not triton.serves_from(staging, here, ["tritonserver", f"--model-repository={tmp_path}/triton/models"])
