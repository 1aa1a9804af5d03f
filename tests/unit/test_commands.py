"""The command line as a person meets it: exit codes, one clear line, the result on stdout."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import commands

ROOT = Path(__file__).parents[2]


def call(tmp_path, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "commands.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "TOXIC_WORKSPACE": str(tmp_path), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "training.nope=1"], "training.nope"),
        (["train", "training.num_train_epochs=many"], "training.num_train_epochs='many'"),
        (["train", "--no-such-flag=1"], "train has no --no-such-flag"),
        (["train", "--config-path=nowhere"], "nowhere/config.yaml does not exist"),
        (["train", "profile=demo", "disk.min_free_gib=0"], "train.parquet does not exist: run `python commands.py"),
        (["train", "model=qwen", "disk.min_free_gib=0"], "train.parquet does not exist: run `python commands.py"),
        (
            "train --config-path configs --config-name config training.num_train_epochs=5 "
            "training.per_device_train_batch_size=2 disk.min_free_gib=0".split(),
            "train.parquet does not exist",
        ),
        (["gate"], "has no result of evaluate: run `python commands.py evaluate` first"),
        (["predict"], "--text"),
        (["predict", "--text=hello", "--checkpoint=nowhere"], "nowhere is not a checkpoint"),
        (["predict", "--input-file=nowhere.txt"], "nowhere.txt does not exist"),
        (["export_onnx", "--checkpoint=nowhere"], "go together"),
        (["validate", "--what=nothing"], "--what=nothing is not one of"),
        (["decide", "--decision=maybe", "release.version=1"], ""),
        (["hold", "--reason=why"], "--reason and --reviewer go with --clear"),
        (["hold", "--clear=maybe"], "--clear=maybe: it takes no value"),
    ],
)
def test_bad_input_is_exit_2_with_one_clear_line(tmp_path, empty_store, monkeypatch, capfd, arguments, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{empty_store}")
    code, said = commands.main(arguments), capfd.readouterr()
    assert code == 2, said.err
    assert words in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    assert said.out == ""


def test_no_mlflow_server_is_said_in_words(tmp_path):
    ended = call(tmp_path, "decide", "release.version=1", "mlflow.attempts=1", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert ended.returncode == 1
    assert "MLflow at http://127.0.0.1:9 does not answer, tried once" in ended.stderr.splitlines()[-1]


def test_an_mlflow_server_that_hangs_up_is_said_in_words(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            connection, _ = server.accept()
            connection.recv(1)  # and what else has come is lost: the connection is reset
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        ended = call(tmp_path, "hold", "mlflow.attempts=1", MLFLOW_TRACKING_URI=address)
        thread.join()
    assert ended.returncode == 1
    said = (
        f"MLflow at {address} does not answer, tried once (Connection reset by peer): start it (`make demo` does) and "
    )
    assert ended.stderr.splitlines()[-1].startswith(said)


def test_a_password_in_the_address_of_mlflow_is_not_said(tmp_path):
    ended = call(tmp_path, "hold", "mlflow.attempts=1", MLFLOW_TRACKING_URI="http://toxic:S3cret@127.0.0.1:9")
    assert ended.returncode == 1
    assert "MLflow at http://***@127.0.0.1:9 does not answer, tried once" in ended.stderr.splitlines()[-1]
    assert "S3cret" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("step", [step.__name__ for step in commands.STEPS])
def test_every_step_explains_itself(monkeypatch, capfd, step):
    monkeypatch.setenv("PAGER", "cat")
    with pytest.raises(SystemExit) as ended:
        commands.main([step, "--help"])
    said = "".join(capfd.readouterr())
    assert ended.value.code == 0 and f"commands.py {step}" in said and "DESCRIPTION" in said


def test_a_process_ends_with_the_code_and_the_line(tmp_path):
    ended = call(tmp_path, "train", "--help")
    assert ended.returncode == 0 and "DESCRIPTION" in ended.stdout + ended.stderr
    ended = call(tmp_path, "train", "training.nope=1")
    assert (ended.returncode, ended.stdout) == (2, "") and "training.nope" in ended.stderr.splitlines()[-1]


def test_an_unknown_step_is_exit_2(tmp_path):
    assert call(tmp_path, "fly").returncode == 2


def test_text_that_looks_like_python_stays_text(monkeypatch, capsys):
    seen = {}

    def fake(overrides, text, *rest):
        seen["text"] = text
        return []

    monkeypatch.setattr("tasks.serving.predict.run", fake)
    assert commands.main(["predict", "--text", "[1, 2]"]) == 0
    assert seen["text"] == "[1, 2]"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == []
