"""How Triton serves the tiny model on CPUs, as ratios within one run: batching, the ensemble's extra, ONNX Runtime.

    python benchmarks/serving.py                # about 3 minutes

A version with the demo's sizes and random weights is installed as any is, and served twice: as it is configured, and
with every part's dynamic batching taken out of its configuration. The two are asked in turns, so that a change of the
machine meets both. Prints one JSON line per figure.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import json_line, tiny_versions  # noqa: E402
from tasks.data import splits  # noqa: E402
from tasks.serving import build_engine, client, repository, triton  # noqa: E402
from tasks.training import checkpoint, model  # noqa: E402

ROUNDS = 5  # in turns; what is told is the median
CONCURRENCY = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as place:
        config = tiny_versions.configure(Path(place))
        tiny_versions.prepare(config)
        run = tiny_versions.staged(config, 1)
        texts = splits.read(config.workspace, "test")["text"].to_list()
        _, engine = build_engine.of_run(config, run)
        with ExitStack() as stack:
            joined, single = (
                stack.enter_context(
                    triton.running(config, installed(config, engine, Path(place) / name, batching), Path(place) / name)
                )
                for name, batching in (("joined", True), ("single", False))
            )
            tokens = tokenized(joined, texts)
            as_text = [request(repository.TEXT, text=as_bytes(text)) for text in texts]
            as_ids = [request(repository.CLASSIFIER, **of) for of in tokens]
            shortest = min(as_ids, key=lambda one: one.inputs[0].shape[1])
            batching(joined, single, as_text, "text", seconds)
            batching(joined, single, as_ids, "token ids", seconds)
            batching(joined, single, [shortest], f"{shortest.inputs[0].shape[1]} token ids", seconds)
            ensemble(joined, as_text, as_ids, seconds)
        onnxruntime_and_torch(checkpoint.final(config), engine / "model.onnx", tokens)


def installed(config, engine: Path, folder: Path, batching: bool) -> Path:
    """A model repository that serves the engine as version 1."""
    models = folder / "models"
    repository.create(config, models)
    repository.install(engine, models, 1)
    for part in repository.PARTS:
        parsed = repository.part_config(config, part, [1])
        if not batching:
            parsed.ClearField("dynamic_batching")
        repository.write(models, parsed)
    repository.write(models, repository.text_config(config, 1))
    return models


# The server's ---------------------------------------------------------------------------------------------------------


def batching(joined, single, requests, asked_for: str, seconds: float) -> None:
    """Messages per second that CONCURRENCY clients get from each."""
    rates = {"joined": [], "single": []}
    for _ in range(ROUNDS):
        for name, server in (("joined", joined), ("single", single)):
            rates[name].append(len(asked(server.url, requests, CONCURRENCY, seconds)) / seconds)
    found = {name: statistics.median(of) for name, of in rates.items()}
    more = {"of": asked_for, "concurrency": CONCURRENCY}
    for name, of in rates.items():
        json_line.of_host(f"serving_{name}", round(found[name]), "messages/s", **more, rounds=spread(of))
    json_line.of_host("serving_batching_gain", round(found["joined"] / found["single"], 2), "times", **more)


def ensemble(server, as_text, as_ids, seconds: float) -> None:
    """Median time of one message after another: as text through the ensemble, as token ids to the classifier."""
    took = {"text": [], "ids": []}
    for _ in range(ROUNDS):
        for name, requests in (("text", as_text), ("ids", as_ids)):
            took[name].append(1000 * statistics.median(asked(server.url, requests, 1, seconds)))
    found = {name: statistics.median(of) for name, of in took.items()}
    json_line.of_host("serving_text_p50", round(found["text"], 2), "ms", concurrency=1, rounds=spread(took["text"]))
    json_line.of_host("serving_logits_p50", round(found["ids"], 2), "ms", concurrency=1, rounds=spread(took["ids"]))
    json_line.of_host("serving_ensemble_extra_p50", round(found["text"] - found["ids"], 2), "ms", concurrency=1)


def spread(values: list[float]) -> list[float]:
    return [round(of, 2) for of in (min(values), max(values))]


def as_bytes(text: str) -> np.ndarray:
    return np.array([[text.encode()]], dtype=object)


def request(model: str, **tensors: np.ndarray):
    """A request as it goes over the wire, made once: the time that a client's Python takes is not the server's."""
    from tritonclient.grpc.service_pb2 import ModelInferRequest
    from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

    made = ModelInferRequest(model_name=model)
    for name, value in tensors.items():
        made.inputs.add(name=name, datatype=np_to_triton_dtype(value.dtype), shape=value.shape)
        content = serialize_byte_tensor(value).item() if value.dtype == object else value.tobytes()
        made.raw_input_contents.append(content)
    return made


def tokenized(server, texts: list[str]) -> list[dict[str, np.ndarray]]:
    """What the server's tokenizer makes of each text: input_ids and attention_mask, [1, bucket]."""
    from tritonclient.grpc import InferInput

    found = []
    with client.connect(server.url) as connection:
        for text in texts:
            tensor = InferInput("text", [1, 1], "BYTES")
            tensor.set_data_from_numpy(as_bytes(text))
            answer = connection.infer(repository.TOKENIZER, [tensor])
            found.append({name: answer.as_numpy(name) for name in ("input_ids", "attention_mask")})
    return found


def asked(url: str, requests, concurrency: int, seconds: float) -> list[float]:
    """Seconds that each answer took to come, from clients in a process of their own that ask without a pause."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(ask_for, (url, [one.SerializeToString() for one in requests], concurrency, seconds))


def ask_for(url: str, requests: list[bytes], concurrency: int, seconds: float) -> list[float]:
    return asyncio.run(ask_concurrently(url, requests, concurrency, seconds))


async def ask_concurrently(url: str, requests: list[bytes], concurrency: int, seconds: float) -> list[float]:
    import grpc

    took = []
    async with grpc.aio.insecure_channel(url) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        async def client(number: int, until: float, keep: list[float]) -> None:
            while (at := time.perf_counter()) < until:
                await infer(requests[number % len(requests)])
                keep.append(time.perf_counter() - at)
                number += concurrency

        for length, keep in ((1, []), (seconds, took)):  # first a second that does not count
            until = time.perf_counter() + length
            await asyncio.gather(*(client(number, until, keep) for number in range(concurrency)))
    return took


# Without a server -----------------------------------------------------------------------------------------------------


def onnxruntime_and_torch(trained: Path, exported: Path, tokens: list[dict]) -> None:
    """Median time of one message after another in this process, with one thread each."""
    import onnxruntime
    import torch

    torch.set_num_threads(1)
    network, _ = model.load_merged(trained)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(exported), options, providers=["CPUExecutionProvider"])

    def in_torch(message):
        with torch.inference_mode():
            return network(**{name: torch.tensor(value) for name, value in message.items()}).logits.numpy()

    def in_onnxruntime(message):
        return session.run(["logits"], message)[0]

    took = {in_torch: [], in_onnxruntime: []}
    for _ in range(ROUNDS):
        for compute, of in took.items():
            for message in tokens:
                of.append(timed(compute, message))
    difference = max(float(np.abs(in_torch(message) - in_onnxruntime(message)).max()) for message in tokens)
    found = {compute: statistics.median(of) for compute, of in took.items()}
    json_line.of_host("serving_torch_eager_p50", round(found[in_torch], 3), "ms")
    json_line.of_host(
        "serving_onnxruntime_p50", round(found[in_onnxruntime], 3), "ms", logits_off_by=round(difference, 6)
    )
    json_line.of_host("serving_onnxruntime_gain", round(found[in_torch] / found[in_onnxruntime], 2), "times")
    for size in (1, CONCURRENCY):  # what there is to gain by batching, before any server
        batch = dict.fromkeys(tokens[0], np.ones((size, 16), dtype=np.int64))
        per_message = statistics.median(timed(in_onnxruntime, batch) for _ in range(200)) / size
        json_line.of_host("serving_onnxruntime_message", round(per_message, 3), "ms", tokens=16, batch=size)


def timed(compute, message) -> float:
    at = time.perf_counter()
    compute(message)
    return 1000 * (time.perf_counter() - at)


if __name__ == "__main__":
    main()
