"""What a person sees of a training: a line at least every minute, and a bar where somebody watches."""

import logging
import sys
import threading
import time

import torch
from pytorch_lightning import Callback

log = logging.getLogger(__name__)

STEPS_EVERY = 10  # seconds between lines about steps
STEPS_TOGETHER = 10  # whose losses go to MLflow in one call
SILENCE = 30  # seconds after which what goes on is said again


class Heartbeat:
    """Says what goes on, and says it again while nothing else is said: a silent container is taken for a dead one."""

    def __init__(self, silence: float = SILENCE):
        self.silence, self.phase, self.doing, self.ended = silence, "", "", threading.Event()
        self.phases: dict[str, float] = {}  # seconds that each took which is over
        self.started = self.said = time.monotonic()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def now(self, phase: str, what: str) -> None:
        """Something else goes on from here on."""
        now = time.monotonic()
        if self.phase:
            self.phases[self.phase] = round(self.phases.get(self.phase, 0.0) + now - self.started, 1)
        self.phase, self.doing, self.started = phase, f"{phase} {what}", now
        self.say(self.doing)

    def say(self, text: str) -> None:
        self.said = time.monotonic()
        log.info("%s", text)

    def watch(self) -> None:
        while not self.ended.wait(self.silence / 10):
            if time.monotonic() - self.said >= self.silence:
                self.say(f"still {self.doing}, for {time.monotonic() - self.started:.0f} s now")


class StepLines(Callback):
    """Step, loss, messages/s and memory in the log, every few seconds; every step's loss in MLflow.

    Reading a loss makes Python wait for the GPU, so they are read together, a few steps at a time.
    """

    def __init__(self, heartbeat: Heartbeat):
        self.heartbeat, self.losses = heartbeat, {}
        self.messages, self.seconds = 0, 0.0  # without the first step, which compiles

    def on_train_start(self, trainer, module) -> None:
        self.total, self.first, self.since = len(trainer.datamodule.steps), True, 0
        self.last = time.monotonic()

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.started = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        now = time.monotonic()
        count = sum(len(pack["truth"]) for pack in batch)
        if not self.first:
            self.messages, self.seconds = self.messages + count, self.seconds + now - self.started
        self.since += count
        self.losses[index + 1] = outputs["loss"]
        if len(self.losses) == STEPS_TOGETHER:
            self.flush(trainer)
        if self.first or now - self.last >= STEPS_EVERY:
            speed, memory = self.since / (now - self.last), peak_gib()
            self.heartbeat.say(
                f"step {index + 1} of {self.total}, loss {float(outputs['loss']):.4f}, {speed:.0f} messages/s"
                + (f", {memory:.1f} GiB at most" if memory else "")
            )
            self.last, self.since, self.first = now, 0, False

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        self.flush(trainer)

    def on_train_end(self, trainer, module) -> None:
        self.flush(trainer)

    def flush(self, trainer) -> None:
        from mlflow.entities import Metric

        if self.losses and trainer.logger:
            now, rate = int(time.time() * 1000), trainer.optimizers[0].param_groups[0]["lr"]
            losses = torch.stack(list(self.losses.values())).tolist()
            metrics = [Metric("train_loss", loss, now, step) for step, loss in zip(self.losses, losses)]
            metrics.append(Metric("learning_rate", rate, now, max(self.losses)))
            trainer.logger.experiment.log_batch(trainer.logger.run_id, metrics)
            self.losses.clear()

    @property
    def messages_per_second(self) -> float | None:
        return round(self.messages / self.seconds, 1) if self.seconds else None


def peak_gib() -> float | None:
    """The most memory that tensors took on the GPU, in GiB."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def bar() -> list[Callback]:
    from pytorch_lightning.callbacks import TQDMProgressBar

    return [TQDMProgressBar()] if sys.stderr.isatty() else []
