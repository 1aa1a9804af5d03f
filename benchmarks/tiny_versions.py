"""Versions of the tiny model for benchmarks: the demo's sizes, random weights; exported, built and staged as any is."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from tasks import config as configuration
from tasks import files
from tasks.data import sample
from tasks.labels import LABELS
from tasks.promotion import registry
from tasks.run import Run, find
from tasks.serving import build_engine, export_onnx, stage
from tasks.text import clean
from tasks.training import base_model, checkpoint, model

ROOT = Path(__file__).resolve().parents[1]


def configure(workspace: Path, *overrides: str):
    """The demo's configuration in a workspace of its own; random weights are held against no limit of the gate."""
    os.chdir(ROOT)
    return configuration.load(
        [
            "profile=demo",
            f"workspace={workspace}",
            f"mlflow.tracking_uri=sqlite:///{workspace}/mlflow.db",
            *("gate.toxic.min=0", "gate.types.min=0", "gate.latency.max_ratio=1000"),
            "gate.override_reason=random weights",
            *overrides,
        ]
    )


def prepare(config) -> None:
    """A registry and the test split, before the first version."""
    registry.ensure_model(config)
    write_test_split(config)


def staged(config, version: int) -> Run:
    """A run whose version is exported, built and staged; no other checkpoint may be made meanwhile."""
    run = find(config.workspace, f"run-{version}")
    make_checkpoint(config, run, version)
    run.save("register", {"version": version})
    for step in (export_onnx, build_engine, stage):
        run.save(step.__name__.rpartition(".")[2], step.run(config, run))
    return run


def write_test_split(config) -> None:
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as raw:
        sample.write(Path(raw), 500, 500, label_noise=0.0, seed=0)
        raw_texts = pl.read_csv(Path(raw) / sample.JIGSAW_FILE)["comment_text"].head(200)
    texts = [clean(text) for text in raw_texts]  # as `prepare` leaves them: what is served is cleaned, too
    labels = {name: pl.Series(generator.integers(0, 2, len(texts)), dtype=pl.Int8) for name in LABELS}
    file = config.workspace / "data" / "processed" / "test.parquet"
    file.parent.mkdir(parents=True)
    pl.DataFrame({"id": [str(i) for i in range(len(texts))], "text": texts, **labels}).write_parquet(file)


def make_checkpoint(config, run, version: int) -> None:
    """A folder like models/finetuned/final, of a model of the demo's sizes with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    folder = checkpoint.final(config)
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = base_model.make_tokenizer(config.model.architecture.vocab_size, seed=version)
    tokenizer.save_pretrained(folder / "merged")
    torch.manual_seed(version)
    sizes = Qwen2Config(
        **config.model.architecture.model_dump(),
        num_labels=len(LABELS),
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # so that answers differ from message to message
    )
    Qwen2ForSequenceClassification(sizes).save_pretrained(folder / "merged")
    files.write_json(folder / "adapter" / "adapter_config.json", {"version": version})
    files.write_json(folder / "training.json", {"run_id": run.id, "max_length": config.model.max_length})
    texts = export_onnx.test_messages(config)
    logits = model.logits(*model.load_merged(folder), texts, config.model.max_length)
    thresholds = 1 / (1 + np.exp(-np.median(logits, axis=0)))
    files.write_json(folder / "thresholds.json", dict(zip(LABELS, thresholds.astype(float).tolist())))
    tags = {"run_id": run.id, "checkpoint_sha256": checkpoint.content_hash(folder)}
    name = config.mlflow.registered_model
    made = registry.client(config).create_model_version(name, f"file:{config.workspace}", tags=tags)
    registry.sign(config, int(made.version), "register")
