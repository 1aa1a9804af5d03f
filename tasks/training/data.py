"""The prepared splits as batches of token ids: messages of similar length together, so that little is padding."""

import random
from pathlib import Path

import numpy as np
import polars as pl
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from tasks import metrics
from tasks.data import splits
from tasks.training import model

SHUFFLED_TOGETHER = 16  # batches among which messages are sorted by length: order stays random, padding small


class Messages(Dataset):
    """Token ids (lists of int) and truth (float [6], -1 unknown) of each message."""

    def __init__(self, frame: pl.DataFrame, tokenizer, max_length: int):
        texts = frame["text"].to_list()
        self.ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        self.truth = metrics.truth_of(frame).astype(np.float32)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int):
        return self.ids[index], self.truth[index]


class LengthBuckets(Sampler):
    """Batches of indices, in an order that depends on the seed and the epoch alone."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self):
        generator = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        pool = self.batch_size * SHUFFLED_TOGETHER
        batches = []
        for start in range(0, len(order), pool):
            near = sorted(order[start : start + pool], key=lambda i: self.lengths[i])
            batches += [near[k : k + self.batch_size] for k in range(0, len(near), self.batch_size)]
        generator.shuffle(batches)
        yield from batches


class ToxicData(LightningDataModule):
    """Train and validation batches: {"input_ids", "attention_mask": int64 [B, T], "truth": float [B, 6]}."""

    def __init__(self, workspace: Path, tokenizer, max_length: int, batch_size: int, seed: int):
        super().__init__()
        self.workspace, self.tokenizer, self.max_length = workspace, tokenizer, max_length
        self.batch_size, self.seed = batch_size, seed

    def setup(self, stage: str) -> None:
        self.train = Messages(splits.read(self.workspace, "train"), self.tokenizer, self.max_length)
        self.val = Messages(splits.read(self.workspace, "val"), self.tokenizer, self.max_length)

    def train_dataloader(self) -> DataLoader:
        buckets = LengthBuckets([len(ids) for ids in self.train.ids], self.batch_size, self.seed)
        return DataLoader(self.train, batch_sampler=buckets, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        order = sorted(range(len(self.val)), key=lambda i: len(self.val.ids[i]))
        batches = [order[k : k + 64] for k in range(0, len(order), 64)]
        return DataLoader(self.val, batch_sampler=batches, collate_fn=self.collate)

    def collate(self, rows) -> dict[str, torch.Tensor]:
        ids, truth = zip(*rows)
        return {**model.pad(list(ids), self.tokenizer.pad_token_id), "truth": torch.from_numpy(np.stack(truth))}
