"""How fast training is on one GPU, and what it takes: in both memory modes, and the usual recipe beside them.

    python benchmarks/training.py [--figures=high,low,peer,whole,quality] [model.name=FOLDER key=value …]

Needs a prepared workspace (`download`, `prepare`), for `whole` and `quality` an MLflow store as well. `whole` is the
step `train`: the process from its start to its end, and the time from the first batch to the merged model on disk.
`quality` is what `evaluate` says of that model and of its gain over the baseline. The usual recipe, `peer`, is PEFT
with Hugging Face's Trainer: NF4, gradient checkpointing, batches of 4 padded to the longest length. Prints one JSON
line per figure.
"""

import argparse
import contextlib
import gc
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from pytorch_lightning import Callback  # noqa: E402

from benchmarks import json_line  # noqa: E402
from tasks import config as configuration  # noqa: E402
from tasks.config import Config  # noqa: E402
from tasks.training import base_model, memory, model, train  # noqa: E402

UNTIMED, TIMED = 10, 50  # steps of ours: the first compile
PEER_UNTIMED, PEER_TIMED = 5, 25  # steps of four messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", default="high,low,peer,whole,quality")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="the chip's dense bf16 rate; an H100's is 989")
    arguments, overrides = parser.parse_known_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    config = configuration.load(["profile=gpu", *overrides])
    base = base_model.resolve(config.model, config.seed, config.workspace)
    found = {}
    for name in arguments.figures.split(","):
        if name in ("whole", "quality"):
            whole(overrides) if name == "whole" else quality(overrides)
            continue
        found[name] = peer(config, base) if name == "peer" else ours(config, base, name)
        report(name, base, found[name], arguments.peak_tflops)
        gc.collect()
        torch.cuda.empty_cache()
    for name in {"high", "low"} & set(found) if "peer" in found else ():
        times = found[name]["messages"] / found[name]["seconds"] * found["peer"]["seconds"] / found["peer"]["messages"]
        json_line.of_gpu(f"training_{name}_against_usual_recipe", round(times, 1), "times")


class Measured(Exception):
    """Enough steps were timed."""


class Clock(Callback):
    def __init__(self):
        self.messages, self.ends = 0, []

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if index + 1 > UNTIMED:
            self.messages += sum(len(pack["truth"]) for pack in batch)
            self.ends += [pack["last"].max() for pack in batch]  # read at the end: that waits for the GPU
        if index + 1 == UNTIMED:
            torch.cuda.synchronize()
            self.started = time.monotonic()
        if index + 1 == UNTIMED + TIMED:
            torch.cuda.synchronize()
            self.seconds = time.monotonic() - self.started
            self.tokens = int((torch.stack(self.ends) + 1).sum())
            raise Measured


def ours(config: Config, base: str, mode: str) -> dict:
    training = config.training.model_copy(update={"memory": mode, "validations_per_epoch": 1})
    config = config.model_copy(update={"training": training})
    torch.cuda.reset_peak_memory_stats()
    classifier, batches = train.build(config, base)
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        try:
            train.fit(config, Path(place) / "run", classifier, batches, [clock])
        except Measured:
            pass
    return {"messages": clock.messages, "tokens": clock.tokens, "seconds": clock.seconds, **peaks()}


def peer(config: Config, base: str) -> dict:
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from tasks import metrics
    from tasks.data import splits

    torch.cuda.reset_peak_memory_stats()
    frame = splits.read(config.workspace, "train").head(4 * (PEER_UNTIMED + PEER_TIMED))
    texts, longest = frame["text"].to_list(), config.model.max_length
    tokens = model.load_tokenizer(base)(texts, truncation=True, max_length=longest, padding="max_length")
    truth = metrics.truth_of(frame).clip(0).astype("float32")
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels}
        for ids, mask, labels in zip(tokens["input_ids"], tokens["attention_mask"], truth)
    ]
    network = prepare_model_for_kbit_training(
        model.load_base(config.model, base, config.seed, weights="nf4"),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    lora = config.training.lora
    network = get_peft_model(
        network,
        LoraConfig(task_type=TaskType.SEQ_CLS, r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules),
    )

    class StepClock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in (PEER_UNTIMED, PEER_UNTIMED + PEER_TIMED):
                torch.cuda.synchronize()
                self.started, self.seconds = time.monotonic(), time.monotonic() - getattr(self, "started", 0)

    clock = StepClock()
    with tempfile.TemporaryDirectory() as place:
        settings = TrainingArguments(
            place,
            per_device_train_batch_size=4,
            max_steps=PEER_UNTIMED + PEER_TIMED,
            learning_rate=config.training.learning_rate,
            bf16=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no",
            report_to="none",
        )
        with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its own figures
            Trainer(network, settings, train_dataset=rows, callbacks=[clock]).train()
    length = sum(sum(row["attention_mask"]) for row in rows) / len(rows)
    messages = 4 * PEER_TIMED
    return {"messages": messages, "tokens": round(messages * length), "seconds": clock.seconds, **peaks()}


def peaks() -> dict:
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def whole(overrides: list[str]) -> None:
    started = time.monotonic()
    result = step("train", overrides)
    seconds, phases = round(time.monotonic() - started, 1), result["phases"]
    json_line.of_gpu("train_step", seconds, "s", messages=result["messages"], steps=result["steps"], phases=phases)
    json_line.of_gpu("training_start_to_merged_model", round(phases["training"] + phases["merging"], 1), "s")


def quality(overrides: list[str]) -> None:
    evaluated = step("evaluate", overrides)
    found, rows = evaluated["challenger"], evaluated["challenger"]["rows"]
    for name in ("f1_toxic", "f1_types", "f1_types_macro", "pr_auc"):
        json_line.of_gpu(
            f"test_{name}", round(found[name], 4), "", interval=rounded(found["intervals"][name]), messages=rows
        )
    for language, slice_ in found["languages"].items():
        interval = rounded(slice_["interval"])
        json_line.of_gpu(
            f"test_f1_toxic_{language}", round(slice_["f1_toxic"], 4), "", interval=interval, messages=slice_["rows"]
        )
    for name in ("f1_toxic", "f1_types"):
        json_line.of_gpu(f"baseline_test_{name}", round(evaluated["baseline"][name], 4), "", messages=rows)
        gain = evaluated["gain"]["baseline"][name]
        json_line.of_gpu(f"gain_{name}", round(gain["gain"], 4), "", interval=rounded(gain["interval"]), messages=rows)


def rounded(interval: list[float]) -> list[float]:
    return [round(end, 4) for end in interval]


def step(name: str, overrides: list[str]) -> dict:
    command = [sys.executable, "commands.py", name, "profile=gpu", *overrides]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(name: str, base: str, found: dict, peak_tflops: float) -> None:
    """
    A frozen weight costs two operations forward and two backward, for the activations' gradient; a padded or a repeated
    operation doesn't count.
    """
    flops = 4 * memory.Sizes.of(base).linear * found["tokens"] / found["seconds"]
    tokens = round(found["tokens"] / found["messages"], 1)
    json_line.of_gpu(
        f"training_{name}", round(found["messages"] / found["seconds"], 1), "messages/s", tokens_per_message=tokens
    )
    json_line.of_gpu(
        f"training_{name}_share_of_peak", round(flops / (peak_tflops * 1e12), 3), f"of {peak_tflops:.0f} TFLOP/s bf16"
    )
    json_line.of_gpu(f"training_{name}_peak_memory", round(found["allocated"] / 2**30, 2), "GiB")
    json_line.of_gpu(f"training_{name}_peak_memory_reserved", round(found["reserved"] / 2**30, 2), "GiB")


if __name__ == "__main__":
    main()
