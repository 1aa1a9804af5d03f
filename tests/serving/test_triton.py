import shutil
import subprocess
import sys

import numpy as np
import pytest
from serving_parts import ROOT, Live, load_config, run_of

from tasks import run as runs
from tasks.errors import StepFailed
from tasks.serving import client, export_onnx, live_servers, repository, triton


@pytest.fixture
def checkout(tmp_path):
    """A copy of what serving needs of the source tree, for a test that copies files into it."""
    for name in ("tasks", "configs", "triton_model_repository"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("model.onnx*"))
    shutil.copy(ROOT / "start_triton_server.sh", tmp_path / "checkout")
    (tmp_path / "checkout" / ".venv").symlink_to(ROOT / ".venv")
    return tmp_path / "checkout"


def test_a_model_copied_by_hand_is_served(config, made, checkout):
    copied = checkout / "triton_model_repository" / "toxic_classificator" / "1"
    exported = made / "models" / "1" / "exported"
    server = Live(config, [str(checkout / "start_triton_server.sh")])
    try:
        shutil.copy(exported / "model.onnx", copied)
        server.start("/v2/models/toxic_classificator/ready")
        assert server.http("GET", "/v2/models/toxic_text").status_code == 404
        assert "only toxic_classificator is served" in server.log.read_text()
        server.stop()

        shutil.copy(exported / "tokenizer.json", copied)
        server.start("/v2/models/toxic_text/ready")
        answer = client.classify(["you are an idiot"], config.serving.url)[0]
        with pytest.raises(StepFailed, match="copied in by hand"), live_servers.connect(config):
            pass
    finally:
        server.stop()
    logits, _ = export_onnx.classify(config, exported / "model.onnx", made / "models/1/final", ["you are an idiot"])
    assert list(answer["scores"].values()) == pytest.approx((1 / (1 + np.exp(-logits[0]))).tolist(), abs=1e-4)


def test_why_a_server_does_not_start_is_said(config, tmp_path):
    models = tmp_path / "models"
    repository.create(config, models)
    repository.write(models, repository.text_config(config, 1))
    with pytest.raises(StepFailed, match="toxic_text.*has no loaded version.*triton.log"):
        with triton.running(config, models, tmp_path / "server"):
            pass


def test_where_there_is_no_server_the_way_out_is_named(workspace, tmp_path, monkeypatch):
    empty = load_config(workspace, f"serving.triton_env={tmp_path}")
    with pytest.raises(StepFailed, match="holds no Triton server: `make envs`"):
        triton.installation(empty, workspace)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StepFailed, match="no tritonserver on PATH"):
        triton.installation(load_config(workspace, "serving.triton_env=null"), workspace)


def test_a_run_whose_overrides_mean_nothing_any_more_does_not_keep_the_server_down(config, live, promote):
    promote(1)
    promote(2)
    run = run_of(config.workspace, "weekly")
    runs.record(run, config, ["serving.an_option_of_last_year=1", f"serving.http_port={config.serving.http_port + 1}"])
    assert runs.newest(config.workspace) == run
    live.kill()
    live.start("/v2/models/toxic_text/ready")
    assert client.classify(["you are an idiot"], config.serving.url)[0]["version"] == 2


def test_a_wrong_override_ends_the_server_command_with_2(workspace):
    command = [sys.executable, "-m", "tasks.serving.triton", "serving.nonsense=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "nonsense" in done.stderr.splitlines()[-1]
