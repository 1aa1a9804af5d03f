"""The command line as a person meets it: exit codes, one clear line, the result on stdout."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tritonclient.grpc import InferenceServerClient

import commands
from tasks.errors import StepFailed, Unsuitable
from tasks.serving import live_servers
from tasks.serving.client import Refused, ToxicClient

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
        (["trian"], "trian is no step; train?"),
        (["predict", "--text=x", "--chekpoint=y"], "predict has no --chekpoint; --checkpoint?"),
        (["predict", "-t", "x"], "predict has no -t"),
        (["download", "--force"], "download has no --force; force=…, without dashes?"),
        (["predict", "--text", "--url", "x:1"], "--text needs a value"),
        (["predict", "--text"], "--text needs a value"),
        (["predict", "--text", "You", "are"], "'are' is neither a flag nor key=value"),
        (["predict", "--text=x", "--input-file="], "--input-file is empty"),
        (["download", "profile=demo", "data.max_samples=1000"], "data.max_samples must exceed data.min_rows (1000)"),
        (["predict", "--text=x", "--url=http://127.0.0.1:8000"], "without http://; 127.0.0.1:8001"),
        (["predict", "--text=x", "--url=127.0.0.1"], "a port is missing"),
        (["predict", "--text=x", "--url=::1:8001"], "an IPv6 address in brackets, [::1]:8001"),
        (["predict", "--text=x", "--url=h:99999"], "99999 is no port"),
        (["predict", "--text=x", "--url=h:8001/v2"], "no path"),
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


TEXTS = ["[1, 2]", "1,2", "None", "True", "-5", "1e3", "", "-abc", "--", "-", "--no, really", "a=b", "~", "two\nlines"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("apart", [True, False])
def test_a_flag_is_what_was_typed(monkeypatch, capsys, text, apart):
    seen = {}
    monkeypatch.setattr("tasks.serving.predict.run", lambda overrides, text, *rest: seen.update(text=text) or [])
    assert commands.main(["predict", *(["--text", text] if apart else [f"--text={text}"])]) == 0
    assert seen == {"text": text}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == []


def test_every_flag_is_text_but_those_that_count_or_switch(monkeypatch, capsys):
    seen = []
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr("tasks.promotion.hold.run", lambda *given: seen.append(given) or {})
    monkeypatch.setattr("tasks.data.restore.run", lambda *given: seen.append(given) or {})
    monkeypatch.setattr("tasks.serving.export_onnx.export_by_hand", lambda *given: seen.append(given) or {})
    assert commands.main(["hold", "--clear", "mlflow.experiment=[x]", "--reason", "[x]", "--reviewer=1e3"]) == 0
    assert commands.main(["data", "--version", "3", "--replace", "--output_path=~/1,2"]) == 0
    assert commands.main(["export_onnx", "--checkpoint=None", "--output-path", "~/a b", "--config-path=7"]) == 0
    assert seen == [
        (("mlflow.experiment=[x]",), True, "1e3", "[x]", "configs", "config"),
        ((), 3, "/home/ada/1,2", True, "configs", "config"),
        ((), "None", "/home/ada/a b", "7", "config"),
    ]


def test_what_another_try_would_not_change_ends_like_bad_usage(monkeypatch, capfd):
    def too_few(*given, **more):
        raise Unsuitable("995 messages are left")

    monkeypatch.setattr("tasks.step.open_run", too_few)
    assert commands.main(["prepare"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "995 messages are left"


def test_an_http_port_is_told_at_once(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"127.0.0.1:{server.server_port}"
        with ToxicClient(address, attempts=50) as client, pytest.raises(Refused, match="is an HTTP port: .* gRPC"):
            client.classify(["x"])
        with InferenceServerClient(address) as server_of_clients:
            with pytest.raises(StepFailed, match="is an HTTP port.*serving.urls or TRITON_URL"):
                live_servers.require_answer(address, server_of_clients)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ValueError, match="without grpc://; h:1"):
        ToxicClient("grpc://h:1")
