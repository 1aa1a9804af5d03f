"""What the raw files look like, and how each becomes rows in the project's own columns."""

from pathlib import Path

import polars as pl

from tasks.config import Config, Source
from tasks.data import feedback, sources
from tasks.errors import StepFailed
from tasks.labels import LABELS

# The project's column → the file's. A source with schema `messages` says its own in the configuration.
COLUMNS = {
    "jigsaw": {"text": "comment_text", **{name: name for name in LABELS}},
    "russian": {"text": "comment", "toxic": "toxic"},
    "feedback": {name: name for name in feedback.COLUMNS},
}


def columns_of(source: Source) -> dict[str, str]:
    """What the project's columns are called in the source's file: `text` and the labels that it knows, at least."""
    return COLUMNS.get(source.schema_) or source.columns


def read(source: Source, config: Config) -> pl.DataFrame:
    """The rows of a raw file, in its order; of feedback, those that have not been set aside.

    Returns the columns `row` (uint32, from 1), `text` (string, "" for none), `language`, `source` (the file's name),
    `decided_at` (datetime in UTC, null where the set does not say) and the six labels (int8, null where unknown).

    Raises:
        UsageError: it has not been downloaded.
        StepFailed: it is not what its schema says.
    """
    path = sources.raw_file(source, config)
    columns, frame = columns_of(source), table(path, source)
    if source.schema_ == "feedback":
        return feedback.rows(frame, source)
    known = [name for name in LABELS if name in columns]
    labels = {name: label(frame[columns[name]], name, source, path) for name in known}
    return frame.with_row_index("row", 1).select(
        "row",
        pl.col(columns["text"]).fill_null("").alias("text"),
        pl.lit(source.language).alias("language"),
        pl.lit(source.file).alias("source"),
        pl.lit(None, pl.Datetime("us", "UTC")).alias("decided_at"),
        *(labels[name].alias(name) if name in known else pl.lit(None, pl.Int8).alias(name) for name in LABELS),
    )


def label(cells: pl.Series, name: str, source: Source, path: Path) -> pl.Series:
    """A label column as 0 and 1: as it is, or what reaches the source's threshold.

    Only a set that is mapped by the configuration may leave the cell of a type empty, for unknown.

    Raises:
        StepFailed: a cell is something else; the message names the first.
    """
    numbers = cells.cast(pl.Float64, strict=False)
    if source.threshold is None:
        good, wanted = numbers.is_in([0.0, 1.0]), "neither 0 nor 1"
    else:
        good, wanted = numbers.is_between(0, 1), "no share between 0 and 1"
    unknown = cells.is_null() & (source.schema_ == "messages" and name != "toxic")
    wrong = (~good.fill_null(False) & ~unknown).arg_true()
    if len(wrong):
        hint = "; a source of schema messages may set `threshold`" if numbers[wrong[0]] is not None else ""
        raise StepFailed(f"{path} row {wrong[0] + 1}: {cells.name} is {cells[wrong[0]]!r}, {wanted}{hint}")
    return (numbers >= (source.threshold or 1)).cast(pl.Int8)


def table(path: Path, source: Source) -> pl.DataFrame:
    """The columns of a raw file that its schema knows, under the file's own names, as strings.

    Raises:
        StepFailed: one is missing, or the file is not a CSV in UTF-8.
    """
    wanted, has = list(dict.fromkeys(columns_of(source).values())), sources.header(path)
    if missing := [name for name in wanted if name not in has]:
        raise StepFailed(
            f"{path.name} has no column {', '.join(missing)}, which schema {source.schema_} needs: it has "
            f"{', '.join(has[:12])}. Is `file` the right one, or has the set changed? For other columns there is "
            "schema messages with `columns`"
        )
    return sources.read(path, wanted)
