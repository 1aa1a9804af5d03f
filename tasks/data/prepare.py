"""Makes the train, validation and test split of the raw files: cleaned, without duplicates, with stable ids."""

import logging

import polars as pl

from tasks import files
from tasks.config import Config, Data
from tasks.data import card, duplicates, messages, schemas, split_key, versions
from tasks.data.sampling import sampled, split
from tasks.data.splits import SPLITS
from tasks.errors import Unsuitable
from tasks.labels import LABELS
from tasks.run import Run

log = logging.getLogger(__name__)

# `original` is the text as it was written, where cleaning found something hidden or in disguise; else null.
COLUMNS = ("id", "text", "language", "source", *LABELS, "original")


def run(config: Config, run: Run) -> dict:
    """Writes data/processed/{train,val,test}.parquet and a data card, and says what became of every raw row.

    Returns {"train": n, "val": n, "test": n, "labels": {split: {language: {"rows": n, label: n positive}}},
    "dropped": {reason: n}, "natural_toxic_share": {language: share before sampling}, "data_version": DVC's MD5,
    "card": path of the page}. The card itself is `card.read`'s.

    Raises:
        Unsuitable: fewer than `data.min_rows` messages are left.
        StepFailed: a raw file is not what its schema says.
    """
    rows, empty = read(config)
    raw_rows = rows.height + empty.height
    unique, gone = duplicates.merged(rows)
    del rows  # at full size, half of the memory
    keep = sampled(unique, config.data)
    gone |= {"empty": empty, "over_max_samples": unique.filter(~keep)}
    splits = split(cleaned(unique.filter(keep), config.data), config.data)
    splits, gone["disguised"] = without_disguised_copies(splits)
    splits["train"], gone["near_duplicate"] = without_near_duplicates(splits, config.data)
    dropped = {reason: gone[reason].height for reason in card.REASONS}
    left = sum(frame.height for frame in splits.values())
    log.info("%d raw rows, %d messages kept; dropped: %s", raw_rows, left, dropped)
    if left < config.data.min_rows:
        raise Unsuitable(
            f"{left} messages are left of {raw_rows} raw rows (dropped: {dropped}), data.min_rows "
            f"asks for {config.data.min_rows}: bring more data, or lower data.min_rows"
        )
    found = {
        **{name: splits[name].height for name in SPLITS},
        "labels": {name: label_counts(splits[name]) for name in SPLITS},
        "dropped": dropped,
        "natural_toxic_share": dict(unique.group_by("language").agg(pl.mean("toxic")).sort("language").rows()),
    }
    page = card.build(config, found, splits, gone, unique)
    folder = config.workspace / "data" / "processed"
    with files.new_folder(folder) as new:
        for name, frame in splits.items():
            finished(frame).write_parquet(new / f"{name}.parquet")
        card.write(page, new)
    found["data_version"] = versions.version(config, folder)
    return {**found, "card": str(card.write(page, run.folder))}


def read(config: Config) -> tuple[pl.DataFrame, pl.DataFrame]:
    """All raw rows, as they are, with the `hash` that names the message; and those without any text.

    Cleaned text itself is not kept: at full size it would be all of it twice, for the few rows that stay.
    """
    filled, empty = [], []
    for source in config.data.sources:
        raw = schemas.read(source, config)
        named = raw.lazy().select(
            hash=split_key.hashed(pl.col("text"), config.data.max_chars),
            empty=messages.empty(pl.col("text"), config.data.max_chars),
        )
        named = named.collect(engine="streaming")
        rows = raw.with_columns(named["hash"])
        empty.append(rows.filter(named["empty"]))
        filled.append(rows.filter(~named["empty"]))
    return pl.concat(filled), pl.concat(empty)


def cleaned(rows: pl.DataFrame, data: Data) -> pl.DataFrame:
    """The rows with the text as it is trained on, cleaned and cut to `max_chars`; and with `original`, the text as it
    was written, where a reader of it saw something else than what stood there."""
    raw = pl.col("text")
    before = split_key.cleaned(raw, data.max_chars)
    rows = rows.with_columns(shown=messages.cleaned(raw, data.max_chars))
    original = pl.when(pl.col("shown") != before).then(raw.str.slice(0, data.max_chars))
    return rows.with_columns(original=original, text="shown").drop("shown")


def without_disguised_copies(splits: dict[str, pl.DataFrame]) -> tuple[dict[str, pl.DataFrame], pl.DataFrame]:
    """The splits without copies that only cleaning shows, and those rows.

    A message keeps the split of its `hash`, whatever is found out later about its disguise. So copies are merged inside
    their split; between splits, test keeps its copy rather than val, and either rather than train.
    """
    shown = messages.hashed(messages.key(pl.col("text")))
    kept, gone = {}, []
    for name in reversed(SPLITS):
        frame, merged = duplicates.merged(splits[name].with_columns(shown=shown), by="shown")
        elsewhere = frame["shown"].is_in([one for other in kept.values() for one in other["shown"]])
        kept[name] = frame.filter(~elsewhere)
        gone += [*merged.values(), frame.filter(elsewhere)]
    return {name: kept[name].drop("shown") for name in SPLITS}, pl.concat(gone).drop("shown")


def without_near_duplicates(splits: dict[str, pl.DataFrame], data: Data) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The train split without messages that are nearly one of val or test, and those messages with `other`,
    `similarity` and the other's text and split: a model that has learned them has seen the answer.
    """
    measured = pl.concat([splits[name].with_columns(split=pl.lit(name)) for name in ("val", "test")])
    train = splits["train"]
    if data.near_duplicate is None:
        measured = measured.clear()
    found = duplicates.near(train, measured, data.near_duplicate or 1)
    theirs = measured.select("split", other="hash", other_text="text")
    gone = train.join(found, on="hash").join(theirs, on="other", how="left")
    return train.join(found, on="hash", how="anti", maintain_order="left"), gone


def finished(rows: pl.DataFrame) -> pl.DataFrame:
    """The columns that training reads, in the order of the ids."""
    return rows.with_columns(id=ids(rows["hash"])).sort("id").select(COLUMNS)


def ids(hashes: pl.Series) -> pl.Series:
    """A message's id: its hash in 16 hexadecimal digits."""
    return pl.Series("id", [f"{hash_:016x}" for hash_ in hashes], pl.String)


def label_counts(frame: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Per language: the number of rows, and of positive ones per label (unknown ones are not counted)."""
    counts = frame.group_by("language").agg(pl.len().alias("rows"), pl.sum(*LABELS).cast(pl.Int64)).sort("language")
    return {row.pop("language"): row for row in counts.to_dicts()}
