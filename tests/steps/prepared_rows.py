"""Prepared rows for the tests of training and evaluation."""

import numpy as np
import polars as pl

from tasks.labels import LABELS


def rows(count: int, seed: int) -> pl.DataFrame:
    """Prepared rows that two words tell apart; Russian ones have no types, and two types never occur."""
    generator = np.random.default_rng(seed)
    made = []
    for k in range(count):
        toxic, russian = bool(generator.integers(2)), k % 3 == 0
        words = ["ты дурак", "вот отчёт"] if russian else ["you fool", "the report"]
        text = " ".join([words[not toxic], *map(str, generator.integers(100, size=generator.integers(1, 9)))])
        types = [None] * 5 if russian else [0, int(toxic and k % 2), 0, int(toxic), 0]
        made.append([f"{seed}-{k}", text, "ru" if russian else "en", "test", int(toxic), *types])
    schema = {"id": str, "text": str, "language": str, "source": str, **{name: pl.Int8 for name in LABELS}}
    return pl.DataFrame(made, schema=schema, orient="row")
