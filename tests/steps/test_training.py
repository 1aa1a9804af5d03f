"""Training for real, on a model and a sample small enough for seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from tasks import config as configuration
from tasks import files
from tasks.errors import UsageError
from tasks.labels import LABELS
from tasks.training import base_model, checkpoint, data, model, module

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Prepared splits of 60 messages, and a model of two small layers."""
    workspace = tmp_path_factory.mktemp("workspace")
    folder = workspace / "data" / "processed"
    folder.mkdir(parents=True)
    for split, seed in (("train", 0), ("val", 1), ("test", 2)):
        rows(60, seed).write_parquet(folder / f"{split}.parquet")
    return configuration.load(overrides(workspace))


def overrides(workspace) -> list[str]:
    return [
        "profile=demo",
        f"workspace={workspace}",
        f"mlflow.tracking_uri=sqlite:///{workspace}/mlflow.db",
        "disk.min_free_gib=0",
        "model.architecture.hidden_size=32",
        "model.architecture.intermediate_size=32",
        "model.architecture.vocab_size=600",
        "training.per_device_train_batch_size=4",
        "training.num_train_epochs=2",
    ]


def rows(count: int, seed: int) -> pl.DataFrame:
    generator = np.random.default_rng(seed)
    made = []
    for k in range(count):
        toxic, russian = bool(generator.integers(2)), k % 3 == 0
        words = ["ты дурак", "вот отчёт"] if russian else ["you fool", "the report"]
        text = " ".join([words[not toxic], *map(str, generator.integers(100, size=generator.integers(1, 9)))])
        types = [None] * 5 if russian else [0, 0, 0, int(toxic), 0]
        made.append([f"{seed}-{k}", text, "ru" if russian else "en", "test", int(toxic), *types])
    schema = {"id": str, "text": str, "language": str, "source": str, **{name: pl.Int8 for name in LABELS}}
    return pl.DataFrame(made, schema=schema, orient="row")


@pytest.fixture(scope="module")
def base(config):
    return base_model.resolve(config.model, config.seed, config.workspace)


@pytest.fixture(scope="module")
def quantised(config, base):
    return model.add_adapter(config.training.lora, model.load_base(config.model, base, config.seed, quantised=True))


def test_the_tiny_base_is_the_same_for_the_same_seed(config, base, tmp_path):
    again = base_model.resolve(config.model, config.seed, tmp_path)
    other = base_model.resolve(config.model, config.seed + 1, tmp_path)
    assert base_model.content_hash(again) == base_model.content_hash(base) != base_model.content_hash(other)
    assert files.sha256(Path(again) / "tokenizer.json") == files.sha256(Path(base) / "tokenizer.json")


def test_a_model_that_can_not_be_had_is_named(config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, words in (("nobody/no-such-model", "neither in the local cache nor"), ("./nowhere", "no such folder")):
        with pytest.raises(UsageError, match=f"model.name={name}.*{words}"):
            base_model.resolve(
                config.model.model_copy(update={"architecture": None, "name": name}), 0, config.workspace
            )


def test_the_base_is_four_bit_and_the_head_is_trained_in_full(quantised):
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in quantised.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 2 * 7
    assert all(layer.weight.quant_type == "nf4" for layer in layers)
    trained = {name for name, p in quantised.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trained) and any("lora_A" in name for name in trained)
    assert not any("lora" not in name and "score" not in name and "embed_tokens" not in name for name in trained)


def test_types_do_not_count_where_they_are_unknown():
    logits = torch.zeros(2, 6, requires_grad=True)
    truth = torch.tensor([[1.0, -1, -1, -1, -1, -1], [0.0, 0, 0, 1, 0, 0]])
    model.loss(logits, truth, type_weight=1.0).backward()
    assert (logits.grad[0, 1:] == 0).all() and logits.grad[0, 0] != 0 and (logits.grad[1, 1:] != 0).all()


def test_a_batch_without_known_types_has_a_finite_loss():
    truth = torch.tensor([[1.0, -1, -1, -1, -1, -1]])
    assert model.loss(torch.zeros(1, 6), truth, type_weight=1.0) == pytest.approx(np.log(2))


def test_batched_and_single_logits_agree(quantised, base):
    tokenizer = model.load_tokenizer(base)
    texts = [
        "you fool",
        "the report of last week is here, and it is long enough to need padding beside it",
        "",
        "ты дурак",
    ]
    quantised.eval()
    batched = model.logits(quantised, tokenizer, texts, max_length=32)
    single = np.concatenate([model.logits(quantised, tokenizer, [text], max_length=32) for text in texts])
    np.testing.assert_allclose(batched, single, atol=2e-5)


def test_every_message_is_in_one_batch_and_the_order_changes_with_the_epoch():
    buckets = data.LengthBuckets([k % 17 for k in range(103)], batch_size=8, seed=1)
    first = list(buckets)
    assert sorted(i for batch in first for i in batch) == list(range(103)) and len(first) == len(buckets)
    assert first == list(buckets)
    buckets.set_epoch(1)
    assert first != list(buckets)


def test_a_step_with_non_finite_gradients_is_skipped_and_counted(config, quantised):
    classifier = module.ToxicClassifier(quantised, config.training.model_copy(update={"max_bad_steps": 1}))
    trained = [p for p in quantised.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    before = trained[0].detach().clone()
    for expected in (1, 2):
        trained[0].grad = torch.full_like(trained[0], float("nan"))
        if expected == 2:
            with pytest.raises(Exception, match="2 steps had non-finite gradients, 1 are allowed"):
                classifier.on_before_optimizer_step(optimizer)
        else:
            classifier.on_before_optimizer_step(optimizer)
        optimizer.step()
        assert classifier.bad_steps == expected
    assert torch.equal(trained[0], before)


def command(config, step, *more, **environment):
    return [sys.executable, "commands.py", step, *overrides(config.workspace), *more], {
        "cwd": ROOT,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
    }


@pytest.fixture(scope="module")
def trained(config):
    """The result of `train`, killed once on its way and started again."""
    arguments, place = command(
        config, "train", "training.num_train_epochs=4", "training.checkpoint_every_minutes=0.002", TOXIC_RUN_ID="killed"
    )
    last = config.workspace / "models" / "finetuned" / "checkpoints" / "killed" / "last.ckpt"
    first = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **place)
    deadline = time.monotonic() + 120
    while not last.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not checkpoint.final(config).exists()
    second = subprocess.run(arguments, capture_output=True, text=True, **place)
    assert second.returncode == 0, second.stderr
    return json.loads(second.stdout.splitlines()[-1]), second.stderr


def test_a_killed_training_resumes_from_its_checkpoint(config, trained):
    result, log = trained
    assert "resuming from" in log
    assert result["steps"] == 4 * 15
    assert not (config.workspace / "models" / "finetuned" / "checkpoints" / "killed").exists()


def test_the_checkpoint_holds_safetensors_and_no_pickle(config, trained):
    names = {file.name for file in checkpoint.final(config).rglob("*") if file.is_file()}
    assert {"adapter_model.safetensors", "model.safetensors", "tokenizer.json", "training.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")) for name in names)


def test_the_merged_model_answers_like_base_and_adapter(config, trained, base):
    from peft import PeftModel

    folder = checkpoint.final(config)
    plain = PeftModel.from_pretrained(
        model.load_base(config.model, base, 0, quantised=False), folder / "adapter"
    ).eval()
    merged, tokenizer = model.load_merged(folder)
    texts = rows(8, seed=5)["text"].to_list()
    np.testing.assert_allclose(
        model.logits(merged, tokenizer, texts, 64), model.logits(plain, tokenizer, texts, 64), atol=1e-4
    )


def test_predict_answers_a_file_of_messages(config, trained, tmp_path):
    (tmp_path / "input.txt").write_text("you fool 1\nвот отчёт\n")
    folder = checkpoint.final(config)
    arguments, place = command(
        config,
        "predict",
        f"--input-file={tmp_path}/input.txt",
        f"--output-file={tmp_path}/predictions.json",
        f"--checkpoint={folder}",
    )
    subprocess.run(arguments, check=True, capture_output=True, **place)
    found = files.read_json(tmp_path / "predictions.json")
    assert [row["text"] for row in found] == ["you fool 1", "вот отчёт"]
    assert all(set(row) == {"text", "toxic", "labels"} and (row["toxic"] or not row["labels"]) for row in found)


def test_another_base_is_refused(config, trained, tmp_path):
    import shutil

    folder = Path(shutil.copytree(checkpoint.final(config), tmp_path / "final"))
    training = checkpoint.settings(folder)
    files.write_json(folder / "training.json", {**training, "base_sha256": "0" * 64})
    with pytest.raises(Exception, match="trained on a base with hash 000000000000"):
        checkpoint.add_merged(folder, config.workspace)
