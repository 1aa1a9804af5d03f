"""Training for real, on a model and a sample small enough for seconds."""

import copy
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from mlflow import MlflowClient
from prepared_rows import rows
from pytorch_lightning import Callback

from tasks import config as configuration
from tasks import files, metrics
from tasks.errors import StepFailed, UsageError
from tasks.training import (
    base_model,
    checkpoint,
    data,
    memory,
    merged,
    model,
    module,
    packed,
    progress,
    resume,
    train,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory, empty_store):
    """Prepared splits of 60 messages, and a model of two small layers."""
    workspace = tmp_path_factory.mktemp("workspace")
    shutil.copy(empty_store, workspace)
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
        "training.per_device_train_batch_size=1",
        "training.num_train_epochs=2",
    ]


@pytest.fixture(scope="module")
def base(config):
    return base_model.resolve(config.model, config.seed, config.workspace)


@pytest.fixture(scope="module")
def quantised(config, base):
    return model.add_adapter(config.training.lora, model.load_base(config.model, base, config.seed, weights="nf4"))


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


def test_unpacked_weights_are_those_of_four_bits(config, base, quantised):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    unpacked = dict(model.load_base(config.model, base, config.seed, weights="unpacked").named_modules())
    compared = 0
    for name, layer in quantised.get_base_model().named_modules():
        if isinstance(layer, Linear4bit):
            values = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(values, unpacked[name.removesuffix(".base_layer")].weight)
            compared += 1
    assert compared == 2 * 7


def test_a_pack_has_hardly_more_slots_than_messages():
    shape = packed.Shape.of([69] * 1000, tokens=8192, longest=512)
    assert 8192 // 69 < shape.messages < shape.slots < 1.5 * 8192 // 69
    pack = packed.pack([[7] * 69] * 100, 0, shape)
    assert pack["boundaries"].shape == (shape.slots + 1,) and packed.messages(pack) == [[7] * 69] * 100
    assert all(sum(69 for _ in rows) <= 8192 for rows in packed.split([69] * 300, shape))


def test_the_losses_of_packs_add_up_to_that_of_the_step():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 6, generator=generator)
    truth = torch.randint(0, 2, (6, 6), generator=generator).float()
    truth[4:, 1:] = -1
    parts = [model.loss(logits[k : k + 2], truth[k : k + 2], 3.0, truth) for k in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), model.loss(logits, truth, 3.0))


def test_merged_weights_answer_and_learn_like_the_adapter_beside_them(config, base, quantised):
    unpacked = model.load_base(config.model, base, config.seed, weights="unpacked")
    beside = model.add_adapter(config.training.lora, unpacked)
    with torch.no_grad():  # an adapter that has learnt something: a fresh one adds nothing
        for name, parameter in beside.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    within = copy.deepcopy(beside)
    merged.use_merged_weights(within)
    assert sum(isinstance(layer, merged.MergedLinear) for layer in within.modules()) == 2 * 7

    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for network in (beside, within):
        logits = network(input_ids=ids).logits
        logits.square().sum().backward()
        found.append((logits, {name: p.grad for name, p in network.named_parameters() if p.requires_grad}))
    (logits, gradients), (others, other_gradients) = found
    torch.testing.assert_close(others, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_single_batched_and_packed_logits_agree(quantised, base):
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
    ids = [row or [tokenizer.pad_token_id] for row in tokenizer(texts, truncation=True, max_length=32)["input_ids"]]
    with packed.attention(quantised), torch.inference_mode():
        together = packed.logits(quantised, packed.pack(ids, tokenizer.pad_token_id, packed.Shape(128, 32, 6)), 32)
    np.testing.assert_allclose(batched, single, atol=2e-5)
    np.testing.assert_allclose(together.numpy(), single, atol=2e-5)
    np.testing.assert_array_equal(model.logits(quantised, tokenizer, texts, max_length=32), batched)


def test_every_message_is_seen_once_an_epoch_in_as_many_steps():
    lengths = [k % 17 + 1 for k in range(103)]
    shape = packed.Shape(64, 17, 9)
    steps = data.Steps(lengths, shape, epochs=3, parts=4, seed=1)
    assert steps.per_epoch % 4 == 0 and len(steps) == 3 * steps.per_epoch
    epochs = [list(steps)[k * steps.per_epoch : (k + 1) * steps.per_epoch] for k in range(3)]
    for epoch in epochs:
        assert sorted(i for step in epoch for i in step) == list(range(103)) and all(epoch)
    assert epochs[0] != epochs[1] != epochs[2]
    assert (
        list(data.Steps(lengths, shape, 3, 4, seed=1)) == list(steps) != list(data.Steps(lengths, shape, 3, 4, seed=2))
    )
    steps.start = 5
    assert list(steps) == steps.steps[5:]


class Losses(Callback):
    """The loss of every step, by number; stops a training dead after one of them."""

    def __init__(self, dies_after=None):
        self.of, self.dies_after = {}, dies_after

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.of[index + 1] = float(outputs["loss"])
        if index + 1 == self.dies_after:
            raise KeyError("killed")


@pytest.fixture
def learn(config, base, tmp_path):
    """Trains in this process: learn(name=value, …) → (losses by step, the classifier)."""

    def go(folder=tmp_path / "going-on", dies_after=None, dropout=0.0, **changes):
        lora = config.training.lora.model_copy(update={"dropout": dropout})
        changed = config.model_copy(update={"training": config.training.model_copy(update={**changes, "lora": lora})})
        classifier, batches = train.build(changed, base)
        losses = Losses(dies_after)
        train.fit(changed, folder, classifier, batches, [losses])
        return losses.of, classifier

    return go


def test_a_step_with_non_finite_gradients_is_skipped_and_counted(learn, monkeypatch):
    clean, calls = model.loss, []

    def spoilt(*arguments):
        calls.append(1)
        return clean(*arguments) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(model, "loss", spoilt)
    losses, classifier = learn()
    assert classifier.bad_steps == 1 and [step for step, loss in losses.items() if not np.isfinite(loss)] == [2]
    assert all(torch.isfinite(p).all() for p in classifier.trained.values())


def test_too_many_such_steps_stop_the_training(learn, monkeypatch):
    monkeypatch.setattr(model, "loss", lambda logits, *_: logits.sum() * float("nan"))
    with pytest.raises(StepFailed, match="3 steps had non-finite gradients, 2 are allowed"):
        learn(max_bad_steps=2)


def test_low_memory_learns_the_same(learn):
    (high, _), (low, _) = learn(memory="high"), learn(memory="low")
    np.testing.assert_allclose(list(low.values()), list(high.values()), atol=2e-4)
    assert list(high.values())[-1] < list(high.values())[0]


def test_out_of_memory_halves_the_packs_and_changes_nothing_else(learn, monkeypatch):
    undisturbed, _ = learn(per_device_train_batch_size=4)
    enough = packed.logits

    def scarce(network, pack, longest):
        if pack["input_ids"].shape[1] > 128 and network.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return enough(network, pack, longest)

    monkeypatch.setattr(packed, "logits", scarce)
    losses, classifier = learn(per_device_train_batch_size=4)
    assert classifier.shape.tokens == 128
    np.testing.assert_allclose(list(losses.values()), list(undisturbed.values()), atol=1e-4)


def test_out_of_memory_with_one_message_says_what_to_do(learn, monkeypatch):
    def none_left(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(packed, "logits", none_left)
    with pytest.raises(StepFailed, match="pack of \\d+ tokens, which is one message: use training.memory=low"):
        learn()


def test_a_resumed_training_ends_with_the_same_losses_and_weights(learn, tmp_path):
    whole, undisturbed = learn(folder=tmp_path / "whole", dropout=0.1)
    every_step = {"checkpoint_every_minutes": 1e-9, "dropout": 0.1}
    for dies_after in (3, 5):
        with pytest.raises(KeyError, match="killed"):
            learn(folder=tmp_path / "parts", dies_after=dies_after, **every_step)
    newest, before = resume.found(tmp_path / "parts")
    newest.write_bytes(newest.read_bytes()[:1000])  # the machine lost power, say
    rest, resumed = learn(folder=tmp_path / "parts", dropout=0.1)
    assert set(rest) == set(range(int(before.stem.split("-")[1]) + 1, len(whole) + 1))
    assert rest == {step: whole[step] for step in rest}
    assert all(torch.equal(p, undisturbed.trained[name]) for name, p in resumed.trained.items())


def test_training_stops_when_validation_gets_no_better(learn):
    losses, classifier = learn(num_train_epochs=9, patience=2, learning_rate=1e-12)
    assert len(losses) == 3 * 10 and classifier.best["step"] == 10


def test_the_average_of_the_weights_is_what_is_validated_and_kept(learn):
    _, plain = learn()
    _, averaged = learn(ema_decay=0.9)
    averaged.take_best()
    for name, weight in plain.trained.items():
        assert torch.equal(averaged.best["weights"][name], averaged.trained[name])
    moved = [name for name, p in plain.trained.items() if not torch.equal(p, averaged.trained[name])]
    assert moved == list(plain.trained)


def test_sigterm_is_the_steps_own_again_after_training(learn):
    before = signal.getsignal(signal.SIGTERM)
    learn(num_train_epochs=1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_full_disk_leaves_the_last_checkpoint_intact(learn, tmp_path):
    folder = tmp_path / "full"
    with pytest.raises(KeyError, match="killed"):
        learn(folder=folder, dies_after=3, checkpoint_every_minutes=1e-9)
    newest, size = resume.found(folder)[0], resume.found(folder)[0].stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))  # no file can grow beyond
    try:
        with pytest.raises(StepFailed, match=f"no checkpoint could be written to {folder}: .* free some disk"):
            learn(folder=folder, checkpoint_every_minutes=1e-9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert resume.newest(folder) == newest and {file.suffix for file in folder.iterdir()} == {".ckpt"}


def test_memory_decides_how_training_is_computed_and_not_what_a_step_sees():
    training = configuration.load(["profile=gpu", "training.per_device_train_batch_size=32"]).training
    real = configuration.load(["profile=gpu"]).model
    sizes = memory.Sizes(vocabulary=151936, hidden=1536, intermediate=8960, layers=28, key_values=256)

    def plan(gib, **changes):
        return memory.choose(training.model_copy(update=changes), real, sizes, gib * 2**30)

    plans = [plan(gib) for gib in (76, 30, 16, 12, 8, 5, 1)]
    assert {p.step_tokens for p in plans} == {16384}
    assert [p.mode for p in plans] == ["high"] * 4 + ["low"] * 3
    assert all(p.pack_tokens >= q.pack_tokens for p, q in zip(plans[:4], plans[1:4]))
    assert plans[0].pack_tokens == 16384 and plans[-1].pack_tokens == 512
    assert plan(76, memory="low").mode == "low" and plan(5, memory="high").mode == "high"
    assert sizes.need("low", plan(76, memory="low").pack_tokens, training.lora, real) <= 7.5 * 2**30


def test_silence_is_broken(caplog):
    with caplog.at_level("INFO"), progress.Heartbeat(silence=0.05) as heartbeat:
        heartbeat.now("merging", "onto plain weights")
        time.sleep(0.2)
        heartbeat.now("recording", "figures")
    assert any(record.message.startswith("still merging onto plain weights, for ") for record in caplog.records)
    assert list(heartbeat.phases) == ["merging"] and heartbeat.phases["merging"] >= 0.2


def command(config, step, *more, **environment):
    return [sys.executable, "commands.py", step, *overrides(config.workspace), *more], {
        "cwd": ROOT,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
    }


@pytest.fixture(scope="module")
def trained(config):
    """The result of `train`, ended by SIGKILL and by SIGTERM on its way and started again, and the three logs."""
    arguments, place = command(
        config,
        "train",
        "training.num_train_epochs=8",
        "training.patience=100",
        "training.checkpoint_every_minutes=1e-9",
        TOXIC_RUN_ID="killed",
    )
    folder = config.workspace / "models" / "finetuned" / "checkpoints" / "killed"
    logs = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        known = set(resume.found(folder))
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **place)
        deadline = time.monotonic() + 120
        while len(set(resume.found(folder)) - known) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        logs.append(process.communicate()[1])
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number], logs[-1]
    assert not checkpoint.final(config).exists()
    last = subprocess.run(arguments, capture_output=True, text=True, **place)
    assert last.returncode == 0, last.stderr
    return json.loads(last.stdout.splitlines()[-1]), [*logs, last.stderr]


def test_a_killed_training_resumes_from_its_checkpoint(config, trained):
    result, logs = trained
    assert "stopped by SIGTERM before step" in logs[1]
    assert "resuming from" in logs[1] and "resuming from" in logs[2]
    assert result["steps"] == 8 * 10 and result["bad_steps"] == 0
    assert not (config.workspace / "models" / "finetuned" / "checkpoints" / "killed").exists()


def test_what_was_computed_twice_was_the_same(config, trained):
    history = MlflowClient(config.mlflow.tracking_uri).get_metric_history(trained[0]["mlflow_run"], "train_loss")
    losses = {}
    for metric in history:
        assert losses.setdefault(metric.step, metric.value) == metric.value
    assert set(losses) == set(range(1, 8 * 10 + 1))


def test_the_better_of_both_merged_models_is_kept(config, trained):
    result, _ = trained
    best = max(result["merged"].values(), key=module.score)
    assert result["merged"][result["merged_onto"]] == best
    assert checkpoint.settings(checkpoint.final(config))["merged_onto"] == result["merged_onto"]
    network, tokenizer = model.load_merged(checkpoint.final(config))
    val = pl.read_parquet(config.workspace / "data" / "processed" / "val.parquet")
    logits = model.logits(network, tokenizer, val["text"].to_list(), config.model.max_length)
    assert module.figures(logits, metrics.truth_of(val)) == best


def test_the_checkpoint_holds_safetensors_and_no_pickle(config, trained):
    names = {file.name for file in checkpoint.final(config).rglob("*") if file.is_file()}
    assert {"adapter_model.safetensors", "model.safetensors", "tokenizer.json", "training.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")) for name in names)


def test_the_merged_model_answers_like_base_and_adapter(config, trained, base):
    from peft import PeftModel

    folder = checkpoint.final(config)
    plain = PeftModel.from_pretrained(
        model.load_base(config.model, base, 0, checkpoint.settings(folder)["merged_onto"]), folder / "adapter"
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
