"""The Lightning module: what is learnt from a batch, what is measured on validation, what a checkpoint holds."""

import logging
import math

import numpy as np
import torch
from pytorch_lightning import LightningModule
from scipy.special import expit

from tasks import metrics
from tasks.config import Config
from tasks.errors import StepFailed
from tasks.training import data, model, packed

log = logging.getLogger(__name__)


class ToxicClassifier(LightningModule):
    """A PEFT model with six logits, trained by AdamW: one batch is one optimiser step, computed pack by pack.

    What a step does depends on the weights, the seed and the step's number alone: a resumed training goes the same way.
    """

    automatic_optimization = False
    # A checkpoint holds only what is trained: the frozen base is loaded from where it came.
    strict_loading = False

    def __init__(self, network, config: Config, shape: packed.Shape, pad_token_id: int):
        super().__init__()
        self.network, self.config, self.pad_token_id = network, config.training, pad_token_id
        self.seed, self.shape = config.seed, shape
        self.trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        # Averages of the weights, which validate and are saved in their place; empty where ema_decay is 0.
        self.averages = {name: p.detach().clone() for name, p in self.trained.items() if self.config.ema_decay}
        self.done = 0  # steps, the skipped ones too
        self.bad_steps = 0
        self.best: dict | None = None  # of the validation with the best F1: {"step", "figures", "weights"}
        self.since_best = 0  # validations
        self.validated: list[tuple[torch.Tensor, torch.Tensor]] = []

    def configure_optimizers(self) -> dict:
        config, steps = self.config, len(self.trainer.datamodule.steps)
        optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        warmup = max(1, int(steps * config.warmup_ratio))

        def factor(step: int) -> float:
            left = max(0.0, (steps - step) / max(1, steps - warmup))
            falling = left if config.lr_schedule == "linear" else (1 - math.cos(math.pi * min(1.0, left))) / 2
            return min((step + 1) / warmup, falling)

        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor)}

    def training_step(self, batch: list[dict], index: int) -> torch.Tensor:
        torch.manual_seed(self.seed + index)
        loss = self.in_smaller_packs_if_need_be(self.backward_of, batch)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.max_grad_norm)
        if torch.isfinite(norm):
            self.optimizers().step()
            self.average(index)
        else:
            self.count_bad_step(index)
        self.lr_schedulers().step()
        self.done = index + 1
        return loss

    def backward_of(self, batch: list[dict]) -> torch.Tensor:
        """Leaves the step's gradients in the weights and returns its loss."""
        self.optimizers().zero_grad(set_to_none=True)
        whole = torch.cat([pack["truth"] for pack in batch])
        total = torch.zeros((), device=self.device)
        for pack in batch:
            logits = packed.logits(self.network, pack, self.shape.longest)
            loss = model.loss(logits, pack["truth"], self.config.type_loss_weight, whole)
            self.manual_backward(loss)
            total += loss.detach()
        return total

    def in_smaller_packs_if_need_be(self, compute, batch: list[dict]):
        """compute(batch); when the GPU's memory doesn't suffice, from here on with packs of half the size.

        The messages of a step stay the same, so nothing else changes.

        Raises:
            StepFailed: a pack can't be any smaller.
        """
        while True:
            try:
                if batch[0]["input_ids"].shape[1] > self.shape.tokens:
                    smaller = data.repacked(batch, self.pad_token_id, self.shape)
                    batch = self.transfer_batch_to_device(smaller, self.device, 0)
                return compute(batch)
            except torch.OutOfMemoryError:
                if self.shape.tokens <= self.shape.longest:
                    raise StepFailed(
                        f"out of memory with a pack of {self.shape.tokens} tokens, which is one message: use "
                        "training.memory=low, lower model.max_length, or free memory on the GPU"
                    ) from None
                self.shape = self.shape.halved()
            log.warning("out of memory: from here on packs of %d tokens, and more of them a step", self.shape.tokens)
            self.optimizers().zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def count_bad_step(self, index: int) -> None:
        self.bad_steps += 1
        log.warning("step %d had non-finite gradients and is skipped (%d so far)", index + 1, self.bad_steps)
        if self.bad_steps > self.config.max_bad_steps:
            raise StepFailed(
                f"{self.bad_steps} steps had non-finite gradients, {self.config.max_bad_steps} are allowed: "
                "lower training.learning_rate, or raise training.max_bad_steps"
            )

    @torch.no_grad()
    def average(self, index: int) -> None:
        if self.averages:
            decay = min(self.config.ema_decay, (1 + index) / (10 + index))  # early weights are soon forgotten
            torch._foreach_lerp_(list(self.averages.values()), list(self.trained.values()), 1 - decay)

    def swap_averages(self) -> None:
        for name, average in self.averages.items():
            self.trained[name].data, average.data = average.data, self.trained[name].data

    def on_fit_start(self) -> None:
        self.averages = {name: average.to(self.device) for name, average in self.averages.items()}

    def on_validation_start(self) -> None:
        self.swap_averages()

    def validation_step(self, batch: list[dict], index: int) -> None:
        self.validated += self.in_smaller_packs_if_need_be(self.answers, batch)

    def answers(self, batch: list[dict]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.compiler.set_stance("force_eager"):  # a graph for a few forward passes costs more than it saves
            return [(packed.logits(self.network, pack, self.shape.longest), pack["truth"]) for pack in batch]

    def on_validation_epoch_end(self) -> None:
        logits, truth = (torch.cat(part).cpu().numpy() for part in zip(*self.validated))
        self.validated.clear()
        found = figures(logits, truth)
        steps = self.trainer.datamodule.steps
        log.info(
            "after %.2f epochs: F1 toxic %.3f, types %.3f on validation",
            self.done / steps.per_epoch,
            found["f1_toxic"],
            found["f1_types"],
        )
        if self.logger:
            self.logger.log_metrics({f"val_{name}": value for name, value in found.items()}, self.done)
        if self.best and score(found) <= score(self.best["figures"]):
            self.since_best += 1
        else:
            weights = {name: p.detach().cpu().clone() for name, p in self.trained.items()}
            self.best, self.since_best = {"step": self.done, "figures": found, "weights": weights}, 0
        if self.since_best >= self.config.patience:
            log.info("%d validations without a better F1: training stops early", self.since_best)
            self.trainer.should_stop = True

    def on_validation_end(self) -> None:
        self.swap_averages()

    @torch.no_grad()
    def take_best(self) -> None:
        """Puts the weights of the best validation in place."""
        for name, weight in self.best["weights"].items():
            self.trained[name].copy_(weight)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = {f"network.{name}" for name in self.trained}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        kept = ("done", "bad_steps", "best", "since_best", "averages")
        checkpoint["classifier"] = {name: getattr(self, name) for name in kept}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        for name, value in checkpoint["classifier"].items():
            setattr(self, name, value)
        self.trainer.datamodule.steps.start = self.done


def figures(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """F1 toxic and F1 types, each at the thresholds that are best on these rows, as `evaluate` will choose them."""
    truth = truth.astype(np.int8)
    probabilities = expit(logits.astype(np.float64))
    decisions = probabilities >= metrics.choose_thresholds(truth, probabilities)
    return {"f1_toxic": metrics.f1_toxic(truth, decisions), "f1_types": metrics.f1_types(truth, decisions)}


def score(found: dict[str, float]) -> float:
    """What the better of two models has more of."""
    return found["f1_toxic"] + found["f1_types"]
