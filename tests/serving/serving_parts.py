"""The small real parts of the serving tests: a random Qwen2 of two layers, its data, and a live server."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import polars as pl
from tritonclient.grpc import InferenceServerClient

from tasks import config as configuration
from tasks import files, integrity
from tasks.labels import LABELS
from tasks.promotion import decide, registry
from tasks.run import Run, find
from tasks.serving import client, repository, swap, triton

ROOT = Path(__file__).parents[2]
WORDS = "good morning you are an idiot thank article please fool hate this page дурак спасибо привет какой ты".split()
MAX_LENGTH = 24
VERSIONS = (1, 2, 3)


def messages(count: int = 80) -> list[str]:
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 30))) for _ in range(count)]


def make_checkpoint(folder: Path, run_id: str, seed: int) -> Path:
    """A folder like models/finetuned/final; every seed has weights and a tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

    from tasks.training.model import load_tokenizer

    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    random.Random(seed).shuffle(alphabet)  # the ids of one version mean other letters to another
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", *alphabet], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(messages(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    wrapped.save_pretrained(folder / "merged")
    shape = Qwen2Config(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=len(LABELS),
        pad_token_id=wrapped.pad_token_id,
        initializer_range=0.2,
    )
    Qwen2ForSequenceClassification(shape).save_pretrained(folder / "merged")
    # Transformers reads any tokenizer of a Qwen2 as its own kind; what it has read is what training saves.
    load_tokenizer(str(folder / "merged")).save_pretrained(folder / "merged")
    files.write_json(folder / "adapter" / "adapter_config.json", {"seed": seed})  # stands for the weights it would hold
    files.write_json(folder / "training.json", {"run_id": run_id, "max_length": MAX_LENGTH})
    return folder


def torch_probabilities(folder: Path) -> np.ndarray:
    from tasks.training import model

    logits = model.logits(*model.load_merged(folder), messages(), MAX_LENGTH).astype(np.float64)
    return 1 / (1 + np.exp(-logits))


def choose_thresholds(folder: Path) -> np.ndarray:
    """Thresholds in the widest gap of each label's middle scores: every label is both given and withheld."""
    ordered = np.sort(torch_probabilities(folder), axis=0)[20:60]
    widest = np.diff(ordered, axis=0).argmax(axis=0)
    columns = np.arange(len(LABELS))
    chosen = (ordered[widest, columns] + ordered[widest + 1, columns]) / 2
    files.write_json(folder / "thresholds.json", dict(zip(LABELS, chosen.tolist())))
    return chosen


def write_data(workspace: Path, run: Run, decisions: np.ndarray) -> None:
    """The test split, whose truth is what torch decides, and evaluate's predictions for it."""
    ids = {"id": [str(i) for i in range(len(decisions))], "text": messages()}
    truth = {name: decisions[:, k] & decisions[:, 0] for k, name in enumerate(LABELS)}
    test = pl.DataFrame({**ids, **{name: pl.Series(values, dtype=pl.Int8) for name, values in truth.items()}})
    (workspace / "data" / "processed").mkdir(parents=True, exist_ok=True)
    test.write_parquet(workspace / "data" / "processed" / "test.parquet")
    run.folder.mkdir(parents=True, exist_ok=True)
    predictions = {f"decision_{name}": decisions[:, k] for k, name in enumerate(LABELS)}
    pl.DataFrame({**ids, **predictions}).write_parquet(run.folder / "predictions.parquet")


def load_config(workspace: Path, *overrides: str):
    return configuration.load(
        [
            "profile=demo",
            f"workspace={workspace}",
            f"mlflow.tracking_uri=sqlite:///{workspace}/mlflow.db",
            f"serving.triton_env={ROOT}/.venv/triton",
            *overrides,
        ]
    )


def run_of(workspace: Path, version: int) -> Run:
    return find(workspace, f"run-{version}")


def changed(config, **values):
    """The configuration with other values of `serving`."""
    return config.model_copy(update={"serving": config.serving.model_copy(update=values)})


def decided(config, bring, version: int) -> Run:
    """The version's run as a reviewer's approval has left it, ready for `swap`."""
    run, champion = bring(version), registry.alias(config, "champion")
    approval = {"decision": "approve", "reviewer": "ann", "reason": "as agreed"}
    result = {"version": version, "champion": champion, "at": registry.now(), "person": [], **approval}
    decide.record(config, result, config.release.version is not None, None, {})
    run.save("decide", result)
    return run


def put_in_service(config, bring, version: int) -> dict:
    """As toxicity_weekly or toxicity_release does; returns what `swap` does."""
    return swap.run(config, decided(config, bring, version))


class Live:
    """The live server, started as a person or a service manager starts it."""

    def __init__(self, config, command):
        self.config, self.command, self.process = config, command, None
        self.log = config.workspace / "live.log"
        # One for all requests, since each new one reads its certificates; it keeps no connection to a server that dies.
        self.client = httpx.Client(trust_env=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))

    def start(self, ready="/v2/health/ready"):
        ports = [f"serving.{name}={getattr(self.config.serving, name)}" for name in ("http_port", "grpc_port")]
        ports.append(f"serving.metrics_port={self.config.serving.metrics_port}")
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [*self.command, "profile=demo", *ports],
                cwd=ROOT,
                env={**os.environ, "TOXIC_WORKSPACE": str(self.config.workspace), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        while not self.answers(ready):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def answers(self, path) -> bool:
        try:
            return self.http("GET", path).status_code == 200
        except httpx.TransportError:
            return False

    def http(self, method, path, **arguments):
        url = f"http://127.0.0.1:{self.config.serving.http_port}{path}"
        return self.client.request(method, url, **arguments)

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """With all that it has started, at once: to end in order takes it seconds."""
        triton.end_servers(self.config.workspace / "triton")
        self.process.wait()


def answer(config, text="you are an idiot") -> dict:
    """What the live server says."""
    return client.classify([text], config.serving.url)[0]


def each(config) -> list:
    """The configuration of every live server by itself."""
    return [changed(config, urls=[url]) for url in config.serving.urls]


def ready(config, part=repository.CLASSIFIER) -> list[int]:
    """The versions that the live server has loaded."""
    with InferenceServerClient(config.serving.url) as server:
        return [version for version in VERSIONS if server.is_model_ready(part, str(version))]


def remove(config, version: int) -> None:
    """Takes a version's folders out of the live repository."""
    for part in repository.PARTS:
        shutil.rmtree(repository.folder(repository.live(config), part, version))


def own_files(config, version):
    """The classifier's folder of an installed version, whose files are links to the engine's no more."""
    folder = repository.folder(repository.live(config), repository.CLASSIFIER, version)
    for file in list(folder.iterdir()):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    return folder


def damage_model(folder):
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:50_000])


def empty_engine(folder):
    (folder / "engine.json").write_text("")


def add_fault(file, code):
    """A fault of the code, recorded as installed: else it would not load at all."""
    file.write_text(f"{file.read_text()}\n\n{code}")
    record = file.with_name(integrity.RECORD)
    files.write_json(record, {**files.read_json(record), file.name: integrity.sha256(file)})


def overrides(config) -> list[str]:
    """What a command needs to mean the same servers and the same registered model."""
    serving = config.serving
    settings = {
        "serving.urls": f"[{','.join(serving.urls)}]",
        "serving.metrics_port": serving.metrics_port,
        "serving.keep_previous_loaded": serving.keep_previous_loaded,
        "serving.tokenizer_instances": serving.tokenizer_instances,
    }
    settings |= {f"mlflow.{name}": value for name, value in config.mlflow.model_dump().items()}
    return ["profile=demo", *(f"{name}={value}" for name, value in settings.items())]
