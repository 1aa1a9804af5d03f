"""The prepared splits as optimiser steps: each a few packs of messages, in an order that the seed alone decides."""

import random

import numpy as np
import polars as pl
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from tasks import metrics
from tasks.config import Config
from tasks.data import splits
from tasks.training import packed
from tasks.training.memory import Plan


class Messages(Dataset):
    """Token ids (lists of int, never empty) and truth (float [6], -1 unknown) of each message."""

    def __init__(self, frame: pl.DataFrame, tokenizer, max_length: int):
        texts = frame["text"].to_list()
        ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        self.ids = [row or [tokenizer.pad_token_id] for row in ids]
        self.lengths = [len(row) for row in self.ids]
        self.truth = metrics.truth_of(frame).astype(np.float32)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int):
        return self.ids[index], self.truth[index]


class Steps(Sampler):
    """The messages of every optimiser step of a training, as lists of indices: what fits in one pack of `shape`.

    Lightning sees one long epoch, so that a training's position is one number. Every pass over the messages is shuffled
    anew, has the same number of steps, a multiple of `parts`, and shows every message once.

    Args:
        start: steps that are already done.
    """

    def __init__(self, lengths: list[int], shape: packed.Shape, epochs: int, parts: int, seed: int):
        self.lengths, self.shape, self.seed, self.start = lengths, shape, seed, 0
        self.per_epoch = -(-len(self.pass_over(0)) // parts) * parts
        self.steps = [step for epoch in range(epochs) for step in evened(self.pass_over(epoch), self.per_epoch)]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):
        yield from self.steps[self.start :]

    def pass_over(self, epoch: int) -> list[list[int]]:
        order = list(range(len(self.lengths)))
        random.Random(f"{self.seed}-{epoch}").shuffle(order)
        return filled(order, self.lengths, self.shape)


def filled(order: list[int], lengths: list[int], shape: packed.Shape) -> list[list[int]]:
    """Messages in their order, cut where the next would not fit in one pack."""
    steps, total = [[]], 0
    for index in order:
        if total + lengths[index] > shape.tokens or len(steps[-1]) == shape.messages:
            steps.append([])
            total = 0
        steps[-1].append(index)
        total += lengths[index]
    return steps


def evened(steps: list[list[int]], number: int) -> list[list[int]]:
    """The same messages in exactly `number` steps: the longest are halved, or the last two joined."""
    steps = list(steps)
    while len(steps) > number:
        steps[-2:] = [steps[-2] + steps[-1]]
    while len(steps) < number:
        k = max(range(len(steps)), key=lambda i: len(steps[i]))
        half = -(-len(steps[k]) // 2)
        steps[k : k + 1] = [steps[k][:half], steps[k][half:]]
    return steps


class ToxicData(LightningDataModule):
    """Batches are lists of packs (see packed.pack), each with `truth`, float [B, 6]."""

    def __init__(self, config: Config, tokenizer, plan: Plan):
        super().__init__()
        self.config, self.plan, self.pad_token_id = config, plan, tokenizer.pad_token_id
        self.train, self.val = (
            Messages(splits.read(config.workspace, split), tokenizer, config.model.max_length)
            for split in ("train", "val")
        )
        epochs, parts = config.training.num_train_epochs, config.training.validations_per_epoch
        longest = max(self.train.lengths + self.val.lengths)
        self.shape = packed.Shape.of(self.train.lengths, plan.pack_tokens, longest)
        whole = packed.Shape.of(self.train.lengths, plan.step_tokens, longest)
        self.steps = Steps(self.train.lengths, whole, epochs, parts, config.seed)

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.train, self.steps)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.val, filled(list(range(len(self.val))), self.val.lengths, self.shape))

    def loader(self, messages: Messages, batches) -> DataLoader:
        """On a GPU a process of its own packs ahead, so that the GPU never waits for Python."""
        gpu = torch.cuda.is_available()
        return DataLoader(
            messages, batch_sampler=batches, collate_fn=self.collate, num_workers=int(gpu), pin_memory=gpu
        )

    def collate(self, rows) -> list[dict[str, torch.Tensor]]:
        ids, truth = zip(*rows)
        truth = torch.from_numpy(np.stack(truth))
        return packs(ids, truth, self.pad_token_id, self.shape)


def packs(ids, truth: torch.Tensor, pad_token_id: int, shape: packed.Shape) -> list[dict[str, torch.Tensor]]:
    """Messages in as few packs as they fit in, each with its messages' `truth`."""
    return [
        {**packed.pack([ids[i] for i in rows], pad_token_id, shape), "truth": truth[rows]}
        for rows in packed.split([len(row) for row in ids], shape)
    ]


def repacked(batch: list[dict], pad_token_id: int, shape: packed.Shape) -> list[dict[str, torch.Tensor]]:
    """The same messages in packs of another shape."""
    ids = [row for pack in batch for row in packed.messages(pack)]
    return packs(ids, torch.cat([pack["truth"].cpu() for pack in batch]), pad_token_id, shape)
