"""Fine-tune the base model with QLoRA, then merge: models/finetuned/final holds what everything after looks at."""

import logging
import shutil
import sys
from datetime import timedelta
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

    Returns the MLflow run, the base and its hash, and how training went. A repeated call resumes from the last
    Lightning checkpoint of this run.
    """
    from tasks.training import data, model, module

    files.require_free_disk(config.workspace, config.disk.min_free_gib)
    splits.require(config.workspace)
    base = base_model.resolve(config.model, config.seed, config.workspace)
    tokenizer = model.load_tokenizer(base)
    batches = data.ToxicData(
        config.workspace, tokenizer, config.model.max_length, config.training.per_device_train_batch_size, config.seed
    )
    batches.setup("fit")
    network = model.add_adapter(
        config.training.lora, model.load_base(config.model, base, config.seed, config.model.load_in_4bit)
    )
    classifier = module.ToxicClassifier(network, config.training)
    mlflow_run = registry.training_run(config, run)
    log.info("training %s on %d messages", config.model.name, len(batches.train))
    trainer = fit(config, run, classifier, batches, mlflow_run)
    folder = save(config, run, base, network)
    shutil.rmtree(checkpoints(config, run), ignore_errors=True)
    return {
        "mlflow_run": mlflow_run,
        "base_model": config.model.name,
        "base_sha256": files.read_json(folder / "training.json")["base_sha256"],
        "messages": len(batches.train),
        "steps": trainer.global_step,
        "bad_steps": classifier.bad_steps,
        "validation": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")},
    }


def fit(config: Config, run: Run, classifier, batches, mlflow_run: str):
    """Runs Lightning's loop from the last checkpoint of this run, if there is one; returns the trainer."""
    import torch
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import MLFlowLogger

    from tasks.training import module

    folder = checkpoints(config, run)
    for other in set(folder.parent.glob("*")) - {folder}:  # left by runs that were killed and never started again
        shutil.rmtree(other)
    interval = timedelta(minutes=config.training.checkpoint_every_minutes)
    trainer = Trainer(
        max_epochs=config.training.num_train_epochs,
        accumulate_grad_batches=config.training.gradient_accumulation_steps,
        gradient_clip_val=config.training.max_grad_norm,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        logger=MLFlowLogger(config.mlflow.experiment, tracking_uri=config.mlflow.tracking_uri, run_id=mlflow_run),
        callbacks=[
            ModelCheckpoint(folder, save_last=True, train_time_interval=interval),
            *module.progress(),
        ],
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
    )
    last = folder / "last.ckpt"
    if last.exists():
        log.info("resuming from %s", last)
    # Our own file, written by this run: see the contract on pickles in docs/architecture.md.
    trainer.fit(classifier, batches, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    trainer.save_checkpoint(last)  # killed while merging, the next start has nothing left to train
    return trainer


def save(config: Config, run: Run, base: str, network) -> Path:
    """Writes adapter, merged model and training.json as safetensors and JSON; the folder appears whole."""
    target = checkpoint.final(config)
    with files.new_folder(target) as folder:
        network.save_pretrained(folder / "adapter")
        files.write_json(
            folder / "training.json",
            {
                "run_id": run.id,
                "base_model": config.model.name,
                "base_sha256": base_model.content_hash(base),
                "max_length": config.model.max_length,
                "seed": config.seed,
                "model": config.model.model_dump(),
            },
        )
        checkpoint.add_merged(folder, config.workspace)
    return target


def checkpoints(config: Config, run: Run) -> Path:
    return config.workspace / "models" / "finetuned" / "checkpoints" / run.id
