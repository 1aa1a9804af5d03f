"""The Lightning module: what is learnt from a batch, what is measured on validation, what a checkpoint holds."""

import logging
import sys
import time

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule

from tasks import metrics
from tasks.config import Training
from tasks.errors import StepFailed
from tasks.training import model

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10


class ToxicClassifier(LightningModule):
    """A PEFT model with six logits: AdamW, linear warm-up and decay; a step with non-finite gradients is skipped."""

    # A checkpoint holds only what is trained: the frozen base is loaded from where it came.
    strict_loading = False

    def __init__(self, network, training: Training):
        super().__init__()
        self.network, self.training_config = network, training
        self.bad_steps = 0
        self.validated: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        truth = batch.pop("truth")
        loss = model.loss(self.network(**batch).logits, truth, self.training_config.type_loss_weight)
        self.log("train_loss", loss, batch_size=len(truth))
        return loss

    def on_before_optimizer_step(self, optimizer) -> None:
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        if not gradients or torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            return
        optimizer.zero_grad(set_to_none=True)
        self.bad_steps += 1
        log.warning("step %d had non-finite gradients and is skipped (%d so far)", self.global_step, self.bad_steps)
        if self.bad_steps > self.training_config.max_bad_steps:
            raise StepFailed(
                f"{self.bad_steps} steps had non-finite gradients, {self.training_config.max_bad_steps} are allowed: "
                "lower training.learning_rate, or raise training.max_bad_steps"
            )

    def validation_step(self, batch: dict, index: int) -> None:
        truth = batch.pop("truth")
        self.validated.append((self.network(**batch).logits.float().cpu(), truth.cpu()))

    def on_validation_epoch_end(self) -> None:
        logits, truth = (torch.cat(part) for part in zip(*self.validated))
        self.validated.clear()
        loss = model.loss(logits, truth, self.training_config.type_loss_weight)
        truth, decisions = truth.numpy().astype(np.int8), (logits >= 0).numpy()
        figures = {
            "val_f1_toxic": metrics.f1_toxic(truth, decisions),
            "val_f1_types": metrics.f1_types(truth, decisions),
        }
        self.log_dict({"val_loss": loss, **figures})
        if not self.trainer.sanity_checking:
            log.info("epoch %d: F1 toxic %.3f, types %.3f on validation", self.current_epoch + 1, *figures.values())

    def configure_optimizers(self) -> dict:
        config, steps = self.training_config, self.trainer.estimated_stepping_batches
        trained = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        warmup = max(1, int(steps * config.warmup_ratio))

        def factor(step: int) -> float:
            return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = {f"network.{name}" for name, p in self.network.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["bad_steps"] = self.bad_steps

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.bad_steps = checkpoint["bad_steps"]


class Heartbeat(Callback):
    """A line of progress in the log every few seconds: a silent container is taken for a dead one."""

    def on_train_start(self, trainer, module) -> None:
        self.last, self.messages, self.total = time.monotonic(), 0, trainer.estimated_stepping_batches

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.messages += len(batch["input_ids"])
        seconds = time.monotonic() - self.last
        if seconds >= HEARTBEAT_SECONDS:
            log.info(
                "step %d of %d, loss %.4f, %.0f messages/s",
                trainer.global_step,
                self.total,
                outputs["loss"],
                self.messages / seconds,
            )
            self.last, self.messages = time.monotonic(), 0


def progress() -> list[Callback]:
    """Log lines always, and a bar where somebody watches."""
    from pytorch_lightning.callbacks import TQDMProgressBar

    return [Heartbeat()] + ([TQDMProgressBar()] if sys.stderr.isatty() else [])
