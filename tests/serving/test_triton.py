import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serving_parts import ROOT, Live, load_config, messages
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from tasks import labels
from tasks.errors import StepFailed
from tasks.serving import client, export_onnx, repository, swap, triton

HOSTILE = {
    "empty": b"",
    "only spaces": " \t\n\u3000".encode(),
    "NUL": b"you\x00are\x00an idiot",
    "emoji": "🤬🤬 you 👩‍👩‍👧‍👦 idiot 💩".encode(),
    "right to left": "أنت أحمق \u202edetresrever".encode(),
    "not UTF-8": b"\xff\xfe\xfa you are \xc3",
    "lone surrogate": "you \ud800 idiot".encode(errors="surrogatepass"),
    "markup": b"<b>you</b> &lt;are&gt; &#0; &#xD800; an idiot<",
    "special tokens": b"<|endoftext|><|endoftext|>",
    "1 MB without a space": b"a" * 2**20,
    "1 MB of words": b"you idiot " * (2**20 // 10),
}


def test_any_text_gets_an_answer_and_what_is_no_text_a_clear_refusal(config, live, promote):
    promote(1)
    with InferenceServerClient(config.serving.url) as server:

        def infer(model, name, values, kind="BYTES"):
            tensor = InferInput(name, list(values.shape), kind)
            tensor.set_data_from_numpy(values)
            return server.infer(model, [tensor])

        for name, text in HOSTILE.items():
            found = infer("toxic_text", "text", np.array([[text]], dtype=object)).as_numpy("answer")
            assert found.shape == (1, 1) and b'"version": 1' in found[0, 0], name
        together = infer("toxic_text", "text", np.array([[text] for text in HOSTILE.values()], dtype=object))
        assert together.as_numpy("answer").shape == (len(HOSTILE), 1)

        too_many = np.full((config.serving.max_batch_size + 1, 1), b"text", dtype=object)
        for values, kind, complaint in (
            (too_many, "BYTES", "batch-size must be <= 32"),
            (np.array([[b"two", b"texts"]], dtype=object), "BYTES", "shape"),
            (np.zeros((1, 1), dtype=np.int64), "INT64", "data-type"),
        ):
            with pytest.raises(InferenceServerException, match=complaint):
                infer("toxic_text", "text", values, kind)
        assert client.ask(server, ["still here"])[0]["version"] == 1

        def ids(values):
            tensors = [InferInput(name, list(values.shape), "INT64") for name in ("input_ids", "attention_mask")]
            tensors[0].set_data_from_numpy(values)
            tensors[1].set_data_from_numpy(np.ones_like(values))
            return server.infer("toxic_classificator", tensors)

        found = ids(np.array([[5, 6, 7]]))
        assert found.as_numpy("logits").shape == (1, 6) and found.as_numpy("logits").dtype == np.float32
        assert found.as_numpy("decisions").dtype == bool and found.as_numpy("model_version").tolist() == [[1]]
        with pytest.raises(InferenceServerException, match="out of data bounds|indices"):
            ids(np.array([[10**6]]))
        # Requests that share a batch with such a one are answered.
        with ThreadPoolExecutor(16) as pool:
            sent = [pool.submit(ids, np.array([[10**6 if i % 8 == 0 else 5]])) for i in range(64)]
        assert [i for i, one in enumerate(sent) if one.exception()] == list(range(0, 64, 8))

    answers = client.classify(messages(), config.serving.url, batch_size=7, threads=3)
    assert [a["scores"] for a in answers] == [client.classify([m], config.serving.url)[0]["scores"] for m in messages()]
    for answer in answers:
        assert set(answer) == {"toxic", "labels", "scores", "version"} and list(answer["scores"]) == list(labels.LABELS)
        assert answer["toxic"] or not answer["labels"]
    assert any(answer["labels"] for answer in answers) and not all(answer["toxic"] for answer in answers)


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
        with pytest.raises(StepFailed, match="copied in by hand"), swap.live_servers(config):
            pass
    finally:
        server.stop()
    logits, _ = export_onnx.classify(config, exported / "model.onnx", made / "models/1/final", ["you are an idiot"])
    assert list(answer["scores"].values()) == pytest.approx((1 / (1 + np.exp(-logits[0]))).tolist(), abs=1e-4)


def test_why_a_server_does_not_start_is_said(config, tmp_path):
    models = tmp_path / "models"
    repository.create(config, models)
    repository.write(models, repository.text_config(config, 1))
    with pytest.raises(StepFailed, match="toxic_classificator.*triton.log"):
        with triton.running(config, models, tmp_path / "server"):
            pass


def test_where_there_is_no_server_the_way_out_is_named(workspace, tmp_path, monkeypatch):
    empty = load_config(workspace, f"serving.triton_env={tmp_path}")
    with pytest.raises(StepFailed, match="holds no Triton server: `make envs`"):
        triton.installation(empty)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StepFailed, match="no tritonserver on PATH"):
        triton.installation(load_config(workspace, "serving.triton_env=null"))


def test_a_wrong_override_ends_the_server_command_with_2(workspace):
    command = [sys.executable, "-m", "tasks.serving.triton", "serving.nonsense=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "nonsense" in done.stderr.splitlines()[-1]
