"""What the raw files look like, and how each becomes rows in the project's own columns."""

import polars as pl

from tasks.config import Config, Source
from tasks.data import sources
from tasks.errors import StepFailed, UsageError
from tasks.labels import LABELS

TEXT_COLUMN = {"jigsaw": "comment_text", "russian": "comment"}
LABEL_COLUMNS = {"jigsaw": LABELS, "russian": ("toxic",)}


def read(source: Source, config: Config) -> pl.DataFrame:
    """The rows of a raw file, in its order.

    Returns the columns `row` (uint32, from 1), `text` (string, "" for none), `language`, `source` (the file's name),
    `decided_at` (datetime in UTC, null where the set does not say) and the six labels (int8, null where unknown).

    Raises:
        UsageError: it has not been downloaded.
        StepFailed: it is not what its schema says.
    """
    path = config.workspace / "data" / "raw" / source.file
    if not path.is_file():
        raise UsageError(f"{path} does not exist: run `python commands.py download` first")
    frame, known = sources.read(path), LABEL_COLUMNS[source.schema_]
    missing = {TEXT_COLUMN[source.schema_], *known} - set(frame.columns)
    if missing:
        raise StepFailed(f"{path} has no column {', '.join(sorted(missing))}: it is not in schema {source.schema_}")
    labels = frame.select(pl.col(known).cast(pl.Float64, strict=False))
    for name in known:
        wrong = frame.with_row_index("row", 1).filter(~labels[name].is_in([0.0, 1.0]).fill_null(False))
        if wrong.height:
            raise StepFailed(f"{path} row {wrong['row'][0]}: {name} is {wrong[name][0]!r}, neither 0 nor 1")
    return frame.with_row_index("row", 1).select(
        "row",
        pl.col(TEXT_COLUMN[source.schema_]).fill_null("").alias("text"),
        pl.lit(source.language).alias("language"),
        pl.lit(source.file).alias("source"),
        pl.lit(None, pl.Datetime("us", "UTC")).alias("decided_at"),
        *(labels[name].cast(pl.Int8) if name in known else pl.lit(None, pl.Int8).alias(name) for name in LABELS),
    )
