"""What is slow is made once: three versions, exported, built and staged. Every test gets a workspace of its own."""

import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from serving_parts import (
    VERSIONS,
    Live,
    changed,
    choose_thresholds,
    load_config,
    make_checkpoint,
    put_in_service,
    run_of,
    torch_probabilities,
    write_data,
)
from signing import signed

from tasks import run as runs
from tasks.promotion import registry
from tasks.run import Run
from tasks.serving import build_engine, export_onnx, stage, triton
from tasks.training import checkpoint


@pytest.fixture(scope="session")
def made(tmp_path_factory, worker_id) -> Path:
    """A workspace in which versions 1 to 3 went through all steps up to stage, each kept in models/<version>.

    Whichever worker wants it first makes it for all. Tests only read it.
    """
    of_this_process = tmp_path_factory.getbasetemp()
    workspace = (of_this_process if worker_id == "master" else of_this_process.parent) / "made"
    with FileLock(f"{workspace}.lock"):
        done = workspace / "done"
        if not done.exists():
            shutil.rmtree(workspace, ignore_errors=True)  # of a worker that failed
            workspace.mkdir()
            make_versions(workspace)
            done.touch()
    return workspace


def make_versions(workspace: Path) -> Path:
    config = load_config(workspace)
    registry.ensure_model(config)
    for version in VERSIONS:
        run = run_of(workspace, version)
        folder = make_checkpoint(workspace / "models" / "finetuned" / "final", run.id, seed=version)
        write_data(workspace, run, torch_probabilities(folder) >= choose_thresholds(folder))
        tags = {"run_id": run.id, "checkpoint_sha256": checkpoint.content_hash(folder)}
        name = config.mlflow.registered_model
        created = registry.client(config).create_model_version(name, f"file:{workspace}", tags=tags)
        assert signed(config, created.version) == version
        run.save("register", {"version": version})
        run.save("export_onnx", export_onnx.run(config, run))
        run.save("build_engine", build_engine.run(config, run))
        run.save("stage", stage.run(config, run))
        kept = workspace / "models" / str(version)
        shutil.copytree(export_onnx.exported(config, run), kept / "exported")
        shutil.copytree(build_engine.folder_of(config, run), kept / "engine")
        shutil.move(folder, kept / "final")
        shutil.move(workspace / "data", kept / "data")
    return workspace


@pytest.fixture
def workspace(made, tmp_path, monkeypatch) -> Path:
    """A fresh workspace beside a copy of the registry and of both runs."""
    monkeypatch.delenv("TOXIC_RUN_ID", raising=False)
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path))
    for name in ("runs", "signing"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copy(made / "mlflow.db", tmp_path)
    return tmp_path


@pytest.fixture
def bring(made, workspace):
    """Makes a version the one that models/ and data/ hold, as its retraining has left them."""

    def version(number: int) -> Run:
        run, kept = run_of(workspace, number), made / "models" / str(number)
        runs.remove_builds(workspace, run.id)
        for kind in runs.BUILDS:
            shutil.copytree(kept / kind, workspace / "models" / kind / run.id)
        shutil.rmtree(workspace / "data", ignore_errors=True)
        shutil.copytree(kept / "data", workspace / "data")
        shutil.copytree(kept / "final", workspace / "models/finetuned/final", dirs_exist_ok=True)
        return run

    return version


@pytest.fixture
def config(workspace):
    """The demo's configuration, with a live server's ports that are free now."""
    http, grpc, metrics = triton.free_ports(3)
    return load_config(
        workspace,
        f"serving.urls=[127.0.0.1:{grpc}]",
        f"serving.http_port={http}",
        f"serving.grpc_port={grpc}",
        f"serving.metrics_port={metrics}",
        "serving.keep_previous_loaded=false",
    )


@pytest.fixture
def live(config):
    server = Live(config, [sys.executable, "-m", "tasks.serving.triton"])
    server.start()
    yield server
    server.stop()


@pytest.fixture
def promote(config, bring):
    """Puts a staged version into service, as toxicity_weekly or toxicity_release does after the decision."""

    def version(number: int, release: bool = False) -> dict:
        released = config.release.model_copy(update={"version": number if release else None})
        return put_in_service(config.model_copy(update={"release": released}), bring, number)

    return version


@pytest.fixture
def pair(config):
    """Two servers' configurations; each means its own server by `url`."""
    http, grpc, metrics = triton.free_ports(3)
    other = changed(config, urls=[f"127.0.0.1:{grpc}"], http_port=http, grpc_port=grpc, metrics_port=metrics)
    return [config, other]


@pytest.fixture
def two(pair):
    """Two live servers of one workspace."""
    servers = [Live(one, [sys.executable, "-m", "tasks.serving.triton"]) for one in pair]
    for server in servers:
        server.start()
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def config_of_both(pair):
    return changed(pair[0], urls=[one.serving.url for one in pair], keep_previous_loaded=True)
