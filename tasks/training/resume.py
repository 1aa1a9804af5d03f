"""Lightning's checkpoints of a training that goes on: written whole or not at all, the last two kept."""

import io
import logging
import os
import pickle
import signal
import time
import zipfile
from pathlib import Path

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import Callback

from tasks.errors import StepFailed

log = logging.getLogger(__name__)

KEPT = 2


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place first: Lightning's own way can leave half a file there."""

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        """
        Raises:
            StepFailed: it could not be written, for lack of space say; earlier checkpoints are as they were.
        """
        path = Path(path)
        beside = path.with_name(f".{path.name}.tmp")
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as stream:
                stream.write(content.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise StepFailed(
                f"no checkpoint could be written to {path.parent}: {error.strerror} ({content.tell() >> 20} MiB are "
                "needed). The one before is intact: free some disk and start `train` again, it goes on from there"
            ) from None


class Saves(Callback):
    """A checkpoint every few minutes, and one before a SIGTERM ends the process (exit 143).

    They are written between two steps, when what validation follows from a step is done.
    """

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.seconds, self.stopping = folder, minutes * 60, False

    def on_train_start(self, trainer, module) -> None:
        self.last = time.monotonic()
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, signum, frame) -> None:
        self.stopping = True

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if not self.stopping and time.monotonic() - self.last < self.seconds:
            return
        file = self.folder / f"step-{index:08d}.ckpt"
        trainer.save_checkpoint(file, weights_only=False)
        for old in found(self.folder)[KEPT:]:
            old.unlink()
        if self.stopping:
            log.warning("stopped by SIGTERM before step %d: start `train` again, it goes on from %s", index + 1, file)
            raise SystemExit(128 + signal.SIGTERM)
        self.last = time.monotonic()


def found(folder: Path) -> list[Path]:
    """Checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that can be read; those that can't are removed."""
    for file in found(folder):
        try:
            torch.load(file, map_location="cpu", weights_only=True)
            return file
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            log.warning("%s can't be read (%s): the one before is used", file, str(error).splitlines()[0])
            file.unlink()
    return None
