"""What the suites judge: a lean table per file, measured once by Polars.

Great Expectations works on pandas, where two million messages take minutes and gigabytes. It gets a row for every row
of the file, with the columns that its suite asks about and, in place of the text, what stands below. A column that no
expectation looks into is there by its name alone; an editor who adds an expectation of it thereby brings it in.

text_chars           characters of the message without outer spaces; null where there is no message
copy                 the message occurs before, but for case and punctuation, as `prepare` compares
conflict             the message occurs again with another value of `toxic`; one that is no number is none
script               cyrillic (at least one such letter), latin, or neither
mojibake             UTF-8 that was read as Latin-1
type_without_toxic   a type is set and `toxic` is not
age_days             feedback only: days since `decided_at`, negative for the future; null where the row is set aside
set_aside            feedback only: the row breaks a rule, as `download` finds too, and nothing is made of it
in_train … in_test   prepared only: the row is in that split
in_two_splits        prepared only: the message is in another split too, but for case and punctuation
"""

from datetime import datetime, timezone
from pathlib import Path

import polars as pl

from tasks.config import Config, Source
from tasks.data import cells, feedback, messages, schemas, sources
from tasks.data.splits import SPLITS
from tasks.errors import StepFailed, UsageError
from tasks.labels import LABELS, TYPES

SCRIPTS = pl.Enum(["cyrillic", "latin", "neither"])
MOJIBAKE = "Ã[\u0080-¿]|â€|Ð[\u0080-¿]"


def raw(source: Source, config: Config, wanted: set[str]):
    """The measures of a raw file and its columns `wanted`, in pandas, with the row's number, from 1, as its index.

    Labels are numbers, 0 and 1 by the source's threshold where it has one; what is no label stays what it is, a number
    or text, so that a verdict can show it. A source of schema `messages` has the project's names for its columns.

    Raises:
        UsageError: the file has not been downloaded.
        StepFailed: it is not a CSV file in UTF-8.
    """
    path = sources.raw_file(source, config)
    columns = schemas.columns_of(source)
    try:
        lazy = sources.scan(path)
        if source.schema_ == "feedback":
            lazy = feedback.judged_again(lazy.collect()).lazy()
        if source.schema_ == "messages":
            lazy, columns = in_our_names(lazy, columns), {"text": "text"}
        return measured(lazy, columns["text"], wanted, source.threshold)
    except pl.exceptions.PolarsError as error:
        raise StepFailed(sources.not_a_table(path, error)) from None


def prepared(paths: list[Path], wanted: set[str]):
    """The same of the three splits together, the split's name as a column.

    Raises:
        UsageError: a split is not there.
    """
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path} does not exist: run `python commands.py prepare` first")
    splits = [pl.scan_parquet(path, glob=False).with_columns(split=pl.lit(path.stem)) for path in paths]
    return measured(pl.concat(splits).with_row_index(sources.ROW, 1), "text", wanted | {"split", "language"})


def in_our_names(lazy: pl.LazyFrame, columns: dict[str, str]) -> pl.LazyFrame:
    """The columns that a source maps, under the project's names, and its `id` if it has one; a type that it does not
    map is empty, and a column that the file does not have is not there."""
    has = lazy.collect_schema().names()
    mapped = {ours: theirs for ours, theirs in columns.items() if theirs in has}
    return lazy.select(
        sources.ROW,
        *(pl.col(theirs).alias(ours) for ours, theirs in mapped.items()),
        *(pl.lit(None, pl.String).alias(name) for name in TYPES if name not in columns),
        *(["id"] if "id" in has else []),
    )


def measured(lazy: pl.LazyFrame, text: str, wanted: set[str], threshold: float | None = None):
    names = lazy.collect_schema().names()
    labels = [label for label in LABELS if label in names]
    as_read = [cells.numbers(pl.col(label)).alias(f"{label}_number") for label in labels]
    as_read += [cells.blanks(pl.col(label)).alias(f"{label}_blank") for label in labels]
    # Streamed, so that only a part of the texts is in memory at a time.
    frame = (
        lazy.with_columns(as_read)
        .select(
            *(name for name in names if name == sources.ROW or name in wanted and name not in labels),
            *(of_label(label, threshold) for label in labels),
            *(is_text(label, threshold) for label in labels),
            *(of_text(pl.col(text)) if text in names else ()),
            *(of_feedback() if {"decided_at", "problem"} <= set(names) else ()),
        )
        .collect(engine="streaming")
    )
    if text in names:
        frame = frame.with_columns(**among_rows(frame))
    if "toxic" in labels:
        types = [pl.col(label) > 0 for label in labels if label in TYPES] or [pl.lit(False)]
        some_type = pl.any_horizontal(types).fill_null(False)
        frame = frame.with_columns(type_without_toxic=some_type & (pl.col("toxic") == 0).fill_null(False))
    if "split" in names:
        frame = frame.with_columns((pl.col("split") == split).alias(f"in_{split}") for split in SPLITS)
    return in_pandas(frame, lazy, labels, [name for name in names if name not in frame.columns])


def of_label(label: str, threshold: float | None) -> pl.Expr:
    """A label as 0 or 1; what is none, as the number that it is."""
    number = pl.col(f"{label}_number")
    return pl.coalesce(cells.label_of(number, threshold), number).cast(pl.Float32).alias(label)


def is_text(label: str, threshold: float | None) -> pl.Expr:
    """Whether a cell is neither a label, nor a number that as float32 is still another one than 0 and 1, nor empty."""
    number = pl.col(f"{label}_number")
    no_label = cells.label_of(number, threshold).is_null() & ~pl.col(f"{label}_blank")
    another = ~number.cast(pl.Float32).is_in([0.0, 1.0])
    return (no_label & ~another.fill_null(False)).alias(f"{label}_is_text")


def of_text(text: pl.Expr) -> list[pl.Expr]:
    message = text.str.strip_chars()
    some = message.str.len_chars() > 0
    script = (
        pl.when(message.str.contains("[А-Яа-яЁё]"))
        .then(pl.lit("cyrillic", SCRIPTS))
        .when(message.str.contains("[A-Za-z]"))
        .then(pl.lit("latin", SCRIPTS))
        .otherwise(pl.lit("neither", SCRIPTS))
    )
    return [
        pl.when(some).then(message.str.len_chars()).alias("text_chars"),
        pl.when(some).then(messages.hashed(messages.key(message))).alias("key"),
        pl.when(some).then(script).alias("script"),
        message.str.contains(MOJIBAKE).fill_null(False).alias("mojibake"),
    ]


def of_feedback() -> list[pl.Expr]:
    good = pl.col("problem") == ""
    day = cells.moments(pl.when(good).then("decided_at")).dt.date()
    return [
        (pl.lit(datetime.now(timezone.utc).date()) - day).dt.total_days().alias("age_days"),
        good.not_().alias("set_aside"),
    ]


def among_rows(frame: pl.DataFrame) -> dict[str, pl.Expr | pl.Series]:
    """What takes all rows to tell; most messages occur once, and are left alone."""
    repeated = frame.filter(pl.col("key").is_not_null() & pl.col("key").is_duplicated())
    found = {"copy": pl.col("key").is_not_null() & ~pl.col("key").is_first_distinct()}
    for name, column in (("conflict", "toxic"), ("in_two_splits", "split")):
        if column in frame.columns:
            several = (
                repeated.group_by("key").agg(pl.col(column).drop_nulls().n_unique()).filter(pl.col(column) > 1)["key"]
            )
            found[name] = pl.col("key").is_in(several.implode()).fill_null(False)
    return found


def in_pandas(frame: pl.DataFrame, lazy: pl.LazyFrame, labels: list[str], by_name: list[str]):
    import pandas as pd
    import pyarrow as pa

    result = frame.select(pl.exclude(sources.ROW, "key", "^.*_is_text$")).to_pandas()
    for label in labels:
        if frame[f"{label}_is_text"].any():
            as_read = lazy.select(label).collect()[label].to_pandas()
            result[label] = result[label].astype(object).where(~frame[f"{label}_is_text"].to_pandas(), as_read)
    nothing = pd.arrays.ArrowExtensionArray(pa.chunked_array([pa.nulls(frame.height)]))
    for name in by_name:
        result[name] = nothing
    result.index = pd.Index(frame[sources.ROW].to_numpy(), name="row")
    return result
