"""The Python client and what stands on it, against a real server."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from serving_parts import ROOT, Live, decided, messages
from tritonclient.utils import InferenceServerException

from tasks import files
from tasks.labels import LABELS
from tasks.serving import build_engine, client, swap
from tasks.serving.client import ModelNotLoaded, Refused, ServerUnavailable, TimedOut, TooLarge, ToxicClient
from tasks.text import LONGEST

HEAVY = {"torch", "transformers", "mlflow", "hydra", "omegaconf", "pydantic", "polars", "onnxruntime", "httpx"}


def test_the_client_asks_for_nothing_but_tritonclient_and_tenacity():
    program = "import sys, tasks.serving.client; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"tritonclient", "tenacity"} <= set(loaded.stdout.split()) and not HEAVY & set(loaded.stdout.split())


def test_without_a_server_the_address_and_the_way_out_are_named(config):
    with ToxicClient(config.serving.url, attempts=2) as toxic, pytest.raises(ServerUnavailable) as failed:
        toxic.classify(["text"])
    assert config.serving.url in str(failed.value) and "start_triton_server.sh" in str(failed.value)


def test_a_server_without_a_model_is_told_from_no_server(config, live):
    with ToxicClient(config.serving.url, attempts=2) as toxic:
        with pytest.raises(ModelNotLoaded, match="has not loaded toxic_text: `python commands.py swap`"):
            toxic.classify(["text"])


def test_answers_come_in_order_and_batches_from_many_threads(config, live, promote):
    promote(1)
    texts = [*messages(), "", "lone \ud800", "a" * LONGEST]
    one_by_one = client.classify(texts, config.serving.url, batch_size=1)
    with ToxicClient(config.serving.url, batch_size=7) as toxic:
        found = toxic.classify(texts)
        assert toxic.classify([]) == [] and toxic.classify(["text"]) == toxic.classify(iter(["text"]))
        with pytest.raises(TypeError, match="list of messages"):
            toxic.classify("text")
    assert [a["scores"] for a in found] == [pytest.approx(a["scores"], abs=1e-3) for a in one_by_one]
    for answer in found:
        assert set(answer) == set(client.Answer.__annotations__) and list(answer["scores"]) == list(LABELS)
        assert type(answer["toxic"]) is bool and answer["version"] == 1 and (answer["toxic"] or not answer["labels"])
    assert any(answer["labels"] for answer in found) and not all(answer["toxic"] for answer in found)

    with (
        ToxicClient(config.serving.url, batch_size=33) as toxic,
        pytest.raises(Refused, match="batch-size must be <= 32"),
    ):
        toxic.classify(["text"] * 33)
    with ToxicClient(config.serving.url) as toxic:
        with pytest.raises(TooLarge, match="a message has 1048577 bytes, servers take 1048576 at most"):
            toxic.classify(["text", "a" * (LONGEST + 1)])
        assert toxic.classify(["text"])[0]["version"] == 1
    assert issubclass(Refused, InferenceServerException)  # what swap catches


def test_requests_are_cut_by_number_and_by_bytes():
    megabyte = "ы" * 2**19
    texts = ["a"] * 5 + [megabyte] * 6 + ["c"]
    found = list(client.batches(texts, 4))
    assert [text for batch in found for text in batch] == texts
    assert [len(batch) for batch in found] == [4, 4, 4]
    assert all(sum(map(len, map(client.encode, batch))) <= client.REQUEST_BYTES for batch in found)


def test_a_server_that_hangs_is_not_waited_for(config, live, promote):
    promote(1)
    with ToxicClient(config.serving.url, timeout_s=1) as toxic:
        assert toxic.classify(["text"])[0]["version"] == 1
        with stopped(live.process.pid), pytest.raises(TimedOut, match="no answer within 1 s: raise timeout_s"):
            toxic.classify(["text"])
        toxic.timeout_s = 30
        assert toxic.classify(["text"])[0]["version"] == 1


@contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_no_answer_is_lost_while_the_server_starts_again(config, live, promote):
    promote(1)
    answers, failures, finished = [], [], threading.Event()

    def ask():
        with ToxicClient(config.serving.url, attempts=30) as toxic:
            while not finished.is_set():
                try:
                    answers.extend(toxic.classify(["text", "another"]))
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for_more(answers)
    live.kill()
    live.start("/v2/models/toxic_text/ready")
    wait_for_more(answers)
    finished.set()
    for thread in threads:
        thread.join()
    assert failures == [] and {answer["version"] for answer in answers} == {1}


def wait_for_more(answers):
    enough, deadline = len(answers) + 20, time.monotonic() + 60
    while len(answers) < enough:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_predict_asks_a_server(config, live, promote, tmp_path):
    done = predict("--text=you are an idiot", f"--url={config.serving.url}", "profile=demo")
    assert done.returncode == 1 and f"--url={config.serving.url}: the server has not loaded" in done.stderr
    promote(1)
    expected = client.classify(["you are an idiot", "thank\u2028you"], config.serving.url)  # no line ends there
    done = predict("--text=you are an idiot", f"--url={config.serving.url}", "profile=demo")
    assert json.loads(done.stdout.splitlines()[-1]) == [{"text": "you are an idiot", **expected[0]}]
    (tmp_path / "in.txt").write_text("you are an idiot\nthank\u2028you\n", encoding="utf-8")
    files_named = (f"--input-file={tmp_path}/in.txt", f"--output-file={tmp_path}/out.json")
    done = predict(*files_named, f"--url={config.serving.url}", "profile=demo")
    assert json.loads(done.stdout.splitlines()[-1])["messages"] == 2
    assert [answer["scores"] for answer in files.read_json(tmp_path / "out.json")] == [a["scores"] for a in expected]
    done = predict("--text=text", f"--url={config.serving.url}", "--checkpoint=x", "profile=demo")
    assert done.returncode == 2 and "one of the two" in done.stderr


def test_predict_sends_no_more_at_a_time_than_the_server_takes(live, bring, config, tmp_path):
    run = decided(config, bring, 1)
    engine = build_engine.folder_of(config, run) / "engine.json"
    files.write_json(engine, {**files.read_json(engine), "max_batch_size": 2})
    swap.run(config, run)
    with pytest.raises(Refused, match="batch-size must be <= 2"):
        client.classify(messages(3), config.serving.url)
    (tmp_path / "in.txt").write_text("\n".join(messages(5)), encoding="utf-8")
    done = predict(f"--input-file={tmp_path}/in.txt", f"--url={config.serving.url}", "profile=demo")
    assert [answer["text"] for answer in json.loads(done.stdout.splitlines()[-1])] == messages(5)


def predict(*arguments):
    command = [sys.executable, "commands.py", "predict", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_readmes_ways_to_ask_work_as_printed(config, live, promote):
    promote(1)
    section = (ROOT / "README.md").read_text().split("## Asking Triton\n")[1].split("\n## ")[0]
    section = section.replace("127.0.0.1:8001", config.serving.url)
    section = section.replace("localhost:8000", f"localhost:{config.serving.http_port}")
    section = section.replace("127.0.0.1:8000", f"127.0.0.1:{config.serving.http_port}")
    curl, program, predicting = (
        block
        for language, block in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
        if re.match("curl|from tasks|python commands.py predict", block)
    )
    found = subprocess.run(["bash", "-euc", curl], capture_output=True, text=True, check=True)
    assert json.loads(json.loads(found.stdout)["outputs"][0]["data"][0])["version"] == 1
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    found = subprocess.run([sys.executable, "-c", program], **run)
    assert len(found.stdout.splitlines()) == 2 and "1" in found.stdout
    found = subprocess.run(["bash", "-euc", predicting.replace("python", sys.executable, 1)], **run)
    assert json.loads(found.stdout.splitlines()[-1])[0]["version"] == 1


@pytest.fixture
def checkout(tmp_path):
    """The script beside programs that only say how they were called: no GPU and no Docker can be started here."""
    shutil.copy(ROOT / "start_triton_server.sh", tmp_path)
    (tmp_path / "bin").mkdir()

    def program(name, body):
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def start(*arguments):
        path = f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
        environment = {"PATH": path, "TOXIC_WORKSPACE": str(tmp_path / "ws")}
        command = [tmp_path / "start_triton_server.sh", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.stdout.splitlines() if done.returncode == 0 else done.stderr

    program("python", 'echo python "$@"')
    program("nvidia-smi", "exit 0")
    program("docker", 'case "$1" in info) exit 0 ;; *) echo docker "$@" ;; esac')
    start.program, start.folder = program, tmp_path
    return start


def test_with_docker_and_a_gpu_the_image_is_started(checkout):
    built, started = checkout("serving.http_port=9000")
    assert built == "docker build --quiet --tag toxic-triton --file docker/triton.Dockerfile ."
    assert started.startswith("docker run --rm --init --gpus all") and f"{checkout.folder}/ws:/workspace" in started
    serve = "toxic-triton python -m tasks.serving.triton --by-hand serving.triton_env=null"
    assert started.endswith(f"{serve} profile=gpu serving.http_port=9000")
    built, started = checkout("profile=demo")
    assert started.endswith(f"{serve} profile=demo")


def test_where_the_image_can_not_be_built_the_one_that_is_there_serves(checkout):
    programs = checkout.folder / "bin"
    checkout.program(
        "docker", 'case "$1" in info) ;; image) [ -e "$0.built" ] ;; build) exit 1 ;; *) echo "$@" ;; esac'
    )
    assert "toxic-triton could not be built" in checkout()
    (programs / "docker.built").touch()
    (started,) = checkout()
    assert started.startswith("run --rm --init --gpus all")


@pytest.mark.parametrize("missing", ["nvidia-smi", "docker"])
def test_without_docker_or_a_gpu_the_binary_is_started(checkout, missing):
    checkout.program(missing, "exit 1")
    assert checkout("serving.http_port=9000") == [
        "python -m tasks.serving.triton --by-hand serving=onnx serving.http_port=9000"
    ]
    assert checkout("profile=demo") == ["python -m tasks.serving.triton --by-hand profile=demo"]


def test_the_script_starts_the_real_server_where_there_is_no_gpu(config, promote, live):
    promote(1)
    live.stop()
    server = Live(config, [str(ROOT / "start_triton_server.sh")])
    try:
        server.start("/v2/models/toxic_text/ready")
        assert client.classify(["text"], config.serving.url)[0]["version"] == 1
    finally:
        server.stop()
