"""Whatever a client sends, over HTTP or gRPC, gets an answer or a refusal that says why, and the server goes on."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serving_parts import Live, answer, messages, ready
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from tasks import integrity, labels
from tasks.serving import client, repository, triton
from tasks.text import clean, clean_start

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
    "1 MB of accents": ("a" + "\u0301\u0323" * (MEGABYTE // 4)).encode(),
    "1 MB of entities": b"&" + b"amp;" * (MEGABYTE // 4),
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
    "batch 0": ("toxic_text", {TEXT: texts(0, 1)}, "batch|shape|size"),
    "wrong dtype": ("toxic_text", {TEXT: ones(1, 1)}, "data-type"),
    "two texts in a row": ("toxic_text", {TEXT: texts(1, 2)}, "shape"),
    "no batch dimension": ("toxic_text", {TEXT: texts(1)}, "shape"),
    "batch over the maximum": ("toxic_text", {TEXT: texts(33, 1)}, "batch-size must be <= 32"),
    "missing text": ("toxic_text", {}, "1 inputs|at least one input"),
    "extra text input": ("toxic_text", {TEXT: texts(1, 1), "more": texts(1, 1)}, "more|but got 2"),
    "unknown model": ("toxic_texts", {TEXT: texts(1, 1)}, "unknown model"),
    "id outside the vocabulary": ("toxic_classificator", {IDS: ids([5, 600]), MASK: ones(1, 2)}, "idx=600"),
    "huge id": ("toxic_classificator", {IDS: ids([2**62]), MASK: ones(1, 1)}, "idx=4611686018427387904"),
    "negative id": ("toxic_classificator", {IDS: ids([5, -1]), MASK: ones(1, 2)}, "has -1: ids start at 0"),
    "too long": ("toxic_classificator", {IDS: ones(1, 129), MASK: ones(1, 129)}, "129 tokens, the model reads 1 to 128"),
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
    from serving_parts import load_config

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
