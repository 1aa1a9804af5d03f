"""Fine-tune the base model with QLoRA, then merge: models/finetuned/final holds what everything after looks at."""

import logging
import os
import shutil
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tasks import files
from tasks.config import Config
from tasks.data import splits
from tasks.promotion import registry
from tasks.run import Run
from tasks.training import base_model, checkpoint

log = logging.getLogger(__name__)


def run(config: Config, run: Run) -> dict:
    """Trains on data/processed/train.parquet.

    Returns the MLflow run, the base and its hash, how training went, what was merged, and the seconds that each phase
    took. A repeated call resumes from the last readable checkpoint of this run, or goes on to merge where training was
    over.
    """
    registry.require_experiment(config)  # first of all: Lightning and PyTorch take seconds to import
    from tasks.training import behaviour, progress

    files.require_free_disk(config.workspace, config.disk.min_free_gib)
    splits.require(config.workspace)
    behaviour.read()  # a typo there is named now, not when the training is paid for
    # Compiled graphs outlive the process: the next training of the same model starts at once.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(config.workspace / "models" / "cache" / "compiled"))
    base = base_model.resolve(config.model, config.seed, config.workspace)
    mlflow_run = registry.training_run(config, run)
    going_on = checkpoints(config, run)
    with progress.Heartbeat() as heartbeat, ThreadPoolExecutor(1) as beside:
        base_sha256 = beside.submit(base_model.content_hash, base)  # reads gigabytes: not while somebody waits
        if not (going_on / "trained").exists():
            learn(config, base, going_on, mlflow_run, heartbeat)
        result = files.read_json(going_on / "trained" / "result.json")
        settings, merged = merge(config, run, base, going_on / "trained" / "adapter", heartbeat, base_sha256)
        heartbeat.now("recording", "figures in MLflow")
        metrics = {f"merged_{onto}_{name}": value for onto, found in merged.items() for name, value in found.items()}
        registry.log_to_run(config, mlflow_run, metrics)
    shutil.rmtree(going_on, ignore_errors=True)
    return {
        "mlflow_run": mlflow_run,
        "base_model": config.model.name,
        "base_sha256": settings["base_sha256"],
        **result,
        "merged_onto": settings["merged_onto"],
        "merged": merged,
        "phases": heartbeat.phases,
    }


def learn(config: Config, base: str, folder: Path, mlflow_run: str, heartbeat) -> None:
    """Writes folder/trained: the adapter of the best validation, and result.json; resumes where it was interrupted."""
    from pytorch_lightning.loggers import MLFlowLogger

    from tasks.training import progress, resume

    heartbeat.now("loading", config.model.name)
    classifier, batches = build(config, base)
    lines = progress.StepLines(heartbeat)
    heartbeat.now("training", f"{config.model.name} on {len(batches.train)} messages")
    logger = MLFlowLogger(config.mlflow.experiment, tracking_uri=config.mlflow.tracking_uri, run_id=mlflow_run)
    with registry.answering(config):  # Lightning's logger asks MLflow by itself
        fit(config, folder, classifier, batches, [lines, *progress.bar()], logger)
    classifier.take_best()
    with files.new_folder(folder / "trained") as trained:
        classifier.network.save_pretrained(trained / "adapter")
        result = {
            "messages": len(batches.train),
            "steps": classifier.done,
            "bad_steps": classifier.bad_steps,
            "best_step": classifier.best["step"],
            "validation": classifier.best["figures"],
            "memory": batches.plan.mode,
            "step_tokens": batches.plan.step_tokens,
            "pack_tokens": classifier.shape.tokens,
            "messages_per_second": lines.messages_per_second,
            "peak_gib": progress.peak_gib(),
        }
        files.write_json(trained / "result.json", result)
    for file in resume.found(folder):
        file.unlink()


def build(config: Config, base: str):
    """(ToxicClassifier, ToxicData), as memory allows: see memory.plan."""
    from tasks.training import data, memory, merged, model, module, packed

    plan = memory.plan(config.training, config.model, base)
    memory.keep_within(plan)
    batches = data.ToxicData(config, model.load_tokenizer(base), plan)
    weights = {"high": "unpacked", "low": "nf4"}[plan.mode] if config.model.load_in_4bit else "plain"
    network = model.add_adapter(config.training.lora, model.load_base(config.model, base, config.seed, weights))
    if plan.mode == "high" and not config.training.lora.dropout:
        merged.use_merged_weights(network)
    packed.use_packed_attention(network)
    packed.prepare_layers(network, compiled=config.training.compile, checkpointed=plan.mode == "low")
    return module.ToxicClassifier(network, config, batches.shape, batches.pad_token_id), batches


def fit(config: Config, folder: Path, classifier, batches, callbacks: list, logger=None) -> None:
    """Runs Lightning's loop over all steps, from the newest checkpoint in `folder` on if there is one."""
    import torch
    from pytorch_lightning import Trainer
    from pytorch_lightning.utilities.warnings import PossibleUserWarning

    from tasks.training import resume

    for other in set(folder.parent.glob("*")) - {folder}:  # left by runs that were killed and never started again
        shutil.rmtree(other)
    trainer = Trainer(
        max_epochs=1,  # as Lightning sees it: see data.Steps
        val_check_interval=batches.steps.per_epoch // config.training.validations_per_epoch,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        logger=logger or False,
        log_every_n_steps=1,  # progress.StepLines logs
        callbacks=[resume.Saves(folder, config.training.checkpoint_every_minutes), *callbacks],
        plugins=[resume.WholeFiles()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        num_sanity_val_steps=0,
    )
    last = resume.newest(folder)
    if last:
        log.info("resuming from %s", last)
    # Lightning would have the loader remember where it was: data.Steps does.
    with warnings.catch_warnings(action="ignore", category=PossibleUserWarning):
        trainer.fit(classifier, batches, ckpt_path=last and str(last), weights_only=True)


def merge(config: Config, run: Run, base: str, adapter: Path, heartbeat, base_sha256: Future) -> tuple[dict, dict]:
    """Merges the adapter onto the base's own weights and onto what NF4 made of them; keeps the better on validation.

    Writes models/finetuned/final: adapter, merged model, tokenizer and training.json, as safetensors and JSON; the
    folder appears whole.

    Returns:
        What training.json says, and the validation figures of each merged model.
    """
    from tasks import metrics
    from tasks.training import model, module

    tokenizer = model.load_tokenizer(base)
    val = splits.read(config.workspace, "val")
    found, onto = {}, None
    with files.new_folder(checkpoint.final(config)) as folder:
        shutil.copytree(adapter, folder / "adapter")
        # First what it was trained on, most likely the better one: writing takes longer than merging.
        for weights in ("unpacked", "plain") if config.model.load_in_4bit else ("plain",):
            heartbeat.now("merging", f"onto {weights} weights")
            network = model.merge(config.model, base, adapter, weights)
            logits = model.logits(network, tokenizer, val["text"].to_list(), config.model.max_length)
            found[weights] = module.figures(logits, metrics.truth_of(val))
            log.info("merged onto %s weights: %s", weights, found[weights])
            if onto is None or module.score(found[weights]) > module.score(found[onto]):
                onto = weights
                network.save_pretrained(folder / "merged")
            del network
        tokenizer.save_pretrained(folder / "merged")
        settings = {
            "run_id": run.id,
            "base_model": config.model.name,
            "base_sha256": base_sha256.result(),
            "max_length": config.model.max_length,
            "max_chars": config.data.max_chars,
            "seed": config.seed,
            "model": config.model.model_dump(),
            "merged_onto": onto,
        }
        files.write_json(folder / "training.json", settings)
    return settings, found


def checkpoints(config: Config, run: Run) -> Path:
    return config.workspace / "models" / "finetuned" / "checkpoints" / run.id
