"""Makes the train, validation and test split of the raw files: cleaned, without duplicates, with stable ids."""

import hashlib
import logging

import polars as pl

from tasks import files
from tasks.config import Config, Data
from tasks.data import schemas, versions
from tasks.errors import StepFailed
from tasks.labels import LABELS, TYPES
from tasks.run import Run
from tasks.text import clean

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


def run(config: Config, run: Run) -> dict:
    """Writes data/processed/{train,val,test}.parquet and says what became of every raw row.

    Returns {"train": n, "val": n, "test": n, "labels": {split: {language: {"rows": n, label: n positive}}},
    "dropped": {reason: n}, "natural_toxic_share": {language: share before sampling}, "data_version": DVC's MD5}.

    Raises:
        StepFailed: fewer than `data.min_rows` messages are left, or a raw file is not what its schema says.
    """
    raw = pl.concat([schemas.read(source, config) for source in config.data.sources])
    tidy = cleaned(raw, config.data.max_chars)
    agreed = without_conflicts(tidy)
    unique = deduplicated(agreed)
    kept = sampled(unique, config.data, config.seed)
    dropped = {
        "empty": raw.height - tidy.height,
        "conflicting": tidy.height - agreed.height,
        "duplicate": agreed.height - unique.height,
        "over_max_samples": unique.height - kept.height,
    }
    log.info("%d raw rows, %d messages kept; dropped: %s", raw.height, kept.height, dropped)
    if kept.height < config.data.min_rows:
        raise StepFailed(
            f"{kept.height} messages are left of {raw.height} raw rows (dropped: {dropped}), data.min_rows asks for "
            f"{config.data.min_rows}: bring more data, or lower it"
        )
    splits = split(kept, config.data, config.seed)
    folder = config.workspace / "data" / "processed"
    with files.new_folder(folder) as new:
        for name, frame in splits.items():
            frame.write_parquet(new / f"{name}.parquet")
    return {
        **{name: frame.height for name, frame in splits.items()},
        "labels": {name: label_counts(frame) for name, frame in splits.items()},
        "dropped": dropped,
        "natural_toxic_share": dict(unique.group_by("language", maintain_order=True).agg(pl.mean("toxic")).rows()),
        "data_version": versions.version(config.workspace, folder),
    }


def cleaned(raw: pl.DataFrame, max_chars: int) -> pl.DataFrame:
    """Rows with cleaned text, cut to `max_chars`; those without any text are gone."""
    texts = [clean(text)[:max_chars].rstrip() for text in raw["text"]]
    return raw.with_columns(pl.Series("text", texts, pl.String)).filter(pl.col("text") != "")


def without_conflicts(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows that agree with most copies of the same message on `toxic`; a tie drops them all.

    Upper and lower case are the same message; `key` is what they have in common.
    """
    keyed = rows.with_columns(key=pl.col("text").str.to_lowercase())
    share = pl.mean("toxic").over("key")
    return keyed.filter(share != 0.5, (pl.col("toxic") == 1) == (share > 0.5))


def deduplicated(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per `key`; a type is what half of the copies that know it say. The id is a hash of the message."""
    merged = rows.group_by("key", maintain_order=True).agg(
        pl.first("text", "language", "source", "toxic"), *((pl.mean(name) >= 0.5).cast(pl.Int8) for name in TYPES)
    )
    ids = [hashlib.sha1(key.encode()).hexdigest()[:12] for key in merged["key"]]
    return merged.select(pl.Series("id", ids, pl.String), "text", "language", "source", *LABELS)


def sampled(rows: pl.DataFrame, data: Data, seed: int) -> pl.DataFrame:
    """At most `max_samples` rows, languages in their own proportions, English toxic ones up to `toxic_share`.

    Which rows stay depends on the seed and their ids alone, so that most stay the same from week to week.
    """
    if rows.height <= data.max_samples:
        return rows
    rows = rows.with_columns(place=hashed(rows["id"], f"{seed}-keep"))
    kept = []
    for (language,), group in rows.group_by("language", maintain_order=True):
        budget = data.max_samples * group.height // rows.height
        natural = group["toxic"].mean()
        share = max(natural, data.toxic_share or 0) if language == "en" else natural
        toxic, others = (group.filter(toxic=label).sort("place") for label in (1, 0))
        number = min(round(budget * share), toxic.height)
        kept += [toxic.head(number), others.head(budget - number)]
    return pl.concat(kept).drop("place")


def split(rows: pl.DataFrame, data: Data, seed: int) -> dict[str, pl.DataFrame]:
    """Train, val and test, each with the languages and the share of toxic messages of the whole.

    A message's place is a hash of its id: it stays in its split from week to week, whatever comes beside it, so that
    no later model is tested on what an earlier one has learned from. Every stratum is divided at the same two places.
    """
    place = hashed(rows["id"], f"{seed}-split")
    bounds = (0.0, data.split.train, data.split.train + data.split.val, 1.0)
    return {
        name: rows.filter((place >= low) & (place < high)).sort("id")
        for name, low, high in zip(SPLITS, bounds, bounds[1:])
    }


def hashed(ids: pl.Series, salt: str) -> pl.Series:
    """A number in [0, 1) for each id, evenly spread."""
    digests = (hashlib.sha1(f"{salt}-{id_}".encode()).digest() for id_ in ids)
    return pl.Series("place", [int.from_bytes(digest[:6]) / 2**48 for digest in digests], pl.Float64)


def label_counts(frame: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Per language: the number of rows, and of positive ones per label (unknown ones are not counted)."""
    counts = frame.group_by("language").agg(pl.len().alias("rows"), pl.sum(*LABELS).cast(pl.Int64)).sort("language")
    return {row.pop("language"): row for row in counts.to_dicts()}
