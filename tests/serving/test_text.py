"""Whatever a client sends, over HTTP or gRPC, gets an answer or a refusal that says why, and the server goes on."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from serving_parts import answer, load_config, messages, ready
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from tasks import files, integrity, labels
from tasks.errors import StepFailed
from tasks.serving import client, repository, triton
from tasks.text import LONGEST, clean, clean_start

MEGABYTE = 2**20
TEXTS = {
    "empty": b"",
    "only spaces": " \t\n\u3000".encode(),
    "NUL": b"you\x00are\x00an idiot",
    "only NUL": b"\x00",
    "emoji": "🤬🤬 you 👩‍👩‍👧‍👦 idiot 💩".encode(),
    "right to left": "أنت أحمق \u202edetresrever".encode(),
    "not UTF-8": b"\xff\xfe\xfa you are \xc3",
    "lone surrogate": "you \ud800 idiot".encode(errors="surrogatepass"),
    "markup": b"<b>you</b> &lt;are&gt; &#0; &#xD800; an idiot<",
    "special tokens": b"<|endoftext|><|endoftext|>",
    "1 MB without a space": b"a" * MEGABYTE,
    "1 MB of words": b"you idiot " * (MEGABYTE // 10),
    "1 MB of accents": ("a" + "\u0301\u0323" * (MEGABYTE // 4 - 1)).encode(),
    "1 MB of entities": b"&" + b"amp;" * (MEGABYTE // 4 - 1),
}
IDS, MASK, TEXT = "input_ids", "attention_mask", "text"


def ids(*rows):
    return np.array(rows, dtype=np.int64)


def ones(*shape):
    return np.ones(shape, dtype=np.int64)


def texts(*shape):
    return np.full(shape, b"text", dtype=object)


# (model, inputs, what the refusal says): the demo's model reads up to 128 tokens, and has 600 ids
REFUSED = {
    "batch 0": ("toxic_text", {TEXT: texts(0, 1)}, "got 0"),
    "wrong dtype": ("toxic_text", {TEXT: ones(1, 1)}, "data-type"),
    "two texts in a row": ("toxic_text", {TEXT: texts(1, 2)}, "shape"),
    "no batch dimension": ("toxic_text", {TEXT: texts(1)}, "shape"),
    "more than a message may have": (
        "toxic_text",
        {TEXT: np.array([[b"a" * (LONGEST + 1)]], dtype=object)},
        "1048577 bytes",
    ),
    "batch over the maximum": ("toxic_text", {TEXT: texts(33, 1)}, "batch-size must be <= 32"),
    "missing text": ("toxic_text", {}, "1 inputs|at least one input"),
    "extra text input": ("toxic_text", {TEXT: texts(1, 1), "more": texts(1, 1)}, "more|but got 2"),
    "unknown model": ("toxic_texts", {TEXT: texts(1, 1)}, "unknown model"),
    "id outside the vocabulary": ("toxic_classificator", {IDS: ids([5, 600]), MASK: ones(1, 2)}, "idx=600"),
    "huge id": ("toxic_classificator", {IDS: ids([2**62]), MASK: ones(1, 1)}, "idx=4611686018427387904"),
    "negative id": ("toxic_classificator", {IDS: ids([5, -1]), MASK: ones(1, 2)}, "has -1: ids start at 0"),
    "too long": (
        "toxic_classificator",
        {IDS: ones(1, 129), MASK: ones(1, 129)},
        "129 tokens, the model reads 1 to 128",
    ),
    "no tokens": ("toxic_classificator", {IDS: ones(1, 0), MASK: ones(1, 0)}, "0 tokens|size"),
    "ids of batch 0": ("toxic_classificator", {IDS: ones(0, 4), MASK: ones(0, 4)}, "batch|size"),
    "ids of another dtype": (
        "toxic_classificator",
        {IDS: ones(1, 4).astype(np.int32), MASK: ones(1, 4)},
        "data-type",
    ),
    "ids without a batch": ("toxic_classificator", {IDS: ones(4), MASK: ones(4)}, "shape"),
    "mask of another length": ("toxic_classificator", {IDS: ones(1, 4), MASK: ones(1, 3)}, "one mask per id"),
    "mask of another batch": ("toxic_classificator", {IDS: ones(2, 4), MASK: ones(1, 4)}, "batch|shape"),
    "missing mask": ("toxic_classificator", {IDS: ones(1, 4)}, "2 inputs but got 1"),
    "extra ids input": ("toxic_classificator", {IDS: ones(1, 4), MASK: ones(1, 4), "more": ones(1, 4)}, "got 3|more"),
    "ids over the maximum": ("toxic_classificator", {IDS: ones(33, 4), MASK: ones(33, 4)}, "batch-size must be <= 32"),
}


@pytest.fixture(scope="module")
def served(made, tmp_path_factory):
    """A server with version 1."""
    folder = tmp_path_factory.mktemp("served")
    config = load_config(folder)
    repository.create(config, folder / "models")
    repository.install(made / "models" / "1" / "engine", folder / "models", 1)
    for part in repository.PARTS:
        repository.write(folder / "models", repository.part_config(config, part, [1]))
    repository.write(folder / "models", repository.text_config(config, 1))
    with triton.running(config, folder / "models", folder) as server:
        yield server


@pytest.fixture(params=["http", "grpc"])
def infer(request, served):
    """infer(model, {name: array}) → the outputs, over one protocol. Raises InferenceServerException."""
    library = {"http": http, "grpc": grpc}[request.param]
    url = served.http_url.removeprefix("http://") if request.param == "http" else served.url
    kinds = {"object": "BYTES", "int64": "INT64", "int32": "INT32"}
    with library.InferenceServerClient(url) as server:

        def send(model, inputs):
            tensors = []
            for name, values in inputs.items():
                tensors.append(library.InferInput(name, list(values.shape), kinds[str(values.dtype)]))
                tensors[-1].set_data_from_numpy(values)
            return server.infer(model, tensors)

        yield send
        found = send("toxic_text", {TEXT: np.array([[b"still here"]], dtype=object)}).as_numpy("answer")
        assert json.loads(found[0, 0])["version"] == 1


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_any_text_gets_an_answer(infer, text):
    found = infer("toxic_text", {TEXT: np.array([[text]], dtype=object)}).as_numpy("answer")
    assert found.shape == (1, 1)
    check(json.loads(found[0, 0]))


def check(found):
    assert set(found) == {"toxic", "labels", "scores", "version"} and list(found["scores"]) == list(labels.LABELS)
    assert found["version"] == 1 and (found["toxic"] or not found["labels"])


def test_all_of_them_in_one_batch_get_the_answers_they_get_alone(infer):
    together = infer("toxic_text", {TEXT: np.array([[text] for text in TEXTS.values()], dtype=object)})
    for text, found in zip(TEXTS.values(), together.as_numpy("answer").ravel()):
        alone = infer("toxic_text", {TEXT: np.array([[text]], dtype=object)}).as_numpy("answer")[0, 0]
        assert json.loads(found)["scores"] == pytest.approx(json.loads(alone)["scores"], abs=1e-3)


@pytest.mark.parametrize("model, inputs, complaint", REFUSED.values(), ids=REFUSED)
def test_what_is_no_text_is_refused_and_why_is_said(infer, model, inputs, complaint):
    with pytest.raises(InferenceServerException, match=complaint) as refused:
        infer(model, inputs)
    assert refused.value.status() in ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")


# What only a JSON body can hold. Triton's own reader of JSON says what it does not like,
# in this release with status 500.
BODY = '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": %s, "data": %s}]}'
ANSWERED = {
    "escaped emoji": BODY % ("[1, 1]", r'["\ud83e\udd2c you"]'),
    "escaped NUL": BODY % ("[1, 1]", r'["you\u0000are"]'),
    "not UTF-8": (BODY % ("[1, 1]", '["you X"]')).encode().replace(b"X", b"\xff\xfe"),
    "nested": BODY % ("[1, 1]", '[["you"]]'),
}
NOT_READ = {
    "lone surrogate": (BODY % ("[1, 1]", r'["\ud800"]'), "surrogate pair in string is invalid"),
    "cut off": ((BODY % ("[1, 1]", '["you"]'))[:-20], "failed to parse"),
    "no JSON": ("you idiot", "failed to parse"),
    "no inputs": ("[]", "inputs"),
    "a hundred thousand brackets": ("[" * 100_000, "failed to parse"),
    "a number": (BODY % ("[1, 1]", "[5]"), "non-string"),
    "null": (BODY % ("[1, 1]", "[null]"), "non-string"),
    "fewer than the shape says": (BODY % ("[2, 1]", '["you"]'), "expected 2 string elements"),
    "more than the shape says": (BODY % ("[1, 1]", '["you", "are"]'), "unexpected number of string elements 2"),
    "negative batch": (BODY % ("[-1, 1]", '["you"]'), "Unable to parse 'shape'"),
    "a shape beyond all numbers": (BODY % ("[9223372036854775807, 9223372036854775807]", '["you"]'), "shape"),
}
# The rest is refused by Triton's parser of JSON, which calls it an error of its own.
REFUSED = ("expected 2 string elements", "unexpected number of string elements 2", "shape")


@pytest.mark.parametrize("body", ANSWERED.values(), ids=ANSWERED)
def test_any_json_string_gets_an_answer(served, body):
    check(json.loads(post(served, body).raise_for_status().json()["outputs"][0]["data"][0]))


@pytest.mark.parametrize("body, complaint", NOT_READ.values(), ids=NOT_READ)
def test_a_body_that_is_no_request_is_refused(served, body, complaint):
    found = post(served, body)
    assert found.status_code == (400 if complaint in REFUSED else 500) and complaint in found.json()["error"]
    check(json.loads(post(served, ANSWERED["nested"]).raise_for_status().json()["outputs"][0]["data"][0]))


def post(served, body):
    return httpx.post(f"{served.http_url}/v2/models/toxic_text/infer", content=body, timeout=60)


def test_requests_that_share_a_batch_with_a_wrong_one_are_answered(served):
    def send(i):
        length = 1 + i % 3
        tensors = [grpc.InferInput(name, [1, length], "INT64") for name in (IDS, MASK)]
        tensors[0].set_data_from_numpy(ids([{0: 600, 1: -1}.get(i % 8, 5)] * length))
        tensors[1].set_data_from_numpy(ones(1, length))
        return server.infer("toxic_classificator", tensors).as_numpy("logits")

    with grpc.InferenceServerClient(served.url) as server, ThreadPoolExecutor(16) as pool:
        sent = [pool.submit(send, i) for i in range(128)]
        expected = [send(i) for i in (3, 4, 2)]
    assert [i for i, one in enumerate(sent) if one.exception()] == [i for i in range(128) if i % 8 < 2]
    for i, one in enumerate(sent):
        if i % 8 > 1:
            assert one.result() == pytest.approx(expected[i % 3], abs=1e-4)


def test_requests_of_all_lengths_are_joined_in_every_part(served):
    with grpc.InferenceServerClient(served.url) as server:

        def counts():
            found = [server.get_inference_statistics(part).model_stats[0] for part in repository.PARTS]
            return np.array([(one.inference_count, one.execution_count) for one in found])

        before = counts()
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda text: client.ask(server, [text]), messages() * 10))
        inferences, executions = (counts() - before).T
        assert (inferences == 800).all() and (executions < 600).all(), executions


def test_the_server_has_the_configuration_that_the_parts_need(served):
    with grpc.InferenceServerClient(served.url) as server:
        found = {model: server.get_model_config(model).config for model in (*repository.PARTS, repository.TEXT)}
    assert all(found[part].HasField("dynamic_batching") for part in repository.PARTS)
    assert [found[part].instance_group[0].count for part in repository.PARTS] == [2, 1, 1]
    assert not any(one.response_cache.enable for one in found.values())
    assert not any(one.model_warmup for one in found.values())  # one that fails may end the server


@pytest.mark.parametrize(
    "text",
    [
        "short &amp; plain",
        "x" * 30,
        " " * 1000 + "you idiot",
        "\u200b" * 1000 + "you idiot",
        "&nbsp;" * 1000 + "you idiot",
        "you \x00 " * 1000,
        "e\u0301" * 1000,
        "&eacute; " * 1000,
    ],
)
def test_a_long_text_is_cut_to_what_cleaning_the_whole_would_begin_with(text):
    assert clean_start(text, 20) == clean(text)[:20].rstrip(" ")


@pytest.mark.parametrize(
    "part, name",
    [("toxic_tokenizer", "tokenizer.json"), ("toxic_tokenizer", "settings.json"), ("toxic_labels", "labels.py")],
)
def test_a_changed_file_does_not_load_and_the_old_version_goes_on(config, live, promote, monkeypatch, part, name):
    promote(1)
    before = answer(config)
    verify, said = repository.verify, []

    def verify_and_change(models, version):
        verify(models, version)
        file = repository.folder(models, part, version) / name
        change(file)
        installed = files.read_json(file.with_name("hashes.json"))[name]
        said.append(f"{name} has SHA-256 {integrity.sha256(file)[:12]}, installed was {installed[:12]}: trigger")
        with pytest.raises(StepFailed, match=f"{name} has SHA-256"):
            verify(models, version)

    with monkeypatch.context() as patched, pytest.raises(StepFailed) as failed:
        patched.setattr(repository, "verify", verify_and_change)
        promote(2)
    assert said[0] in str(failed.value) and "1 serves as before" in str(failed.value)
    assert answer(config) == before and ready(config) == [1]
    assert promote(2)["served_version"] == 2  # the same version, unharmed
    (repository.folder(repository.live(config), part, 2) / "hashes.json").unlink()
    with pytest.raises(StepFailed, match="hashes.json is missing"):
        verify(repository.live(config), 2)


def change(file):
    content = file.read_text(encoding="utf-8")
    file.unlink()  # it is a link to the engine's own
    file.write_text(content.replace("insult", "threat") + "\n", encoding="utf-8")
