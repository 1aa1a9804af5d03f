"""What the raw files look like, and how each becomes rows in the project's own columns."""

import logging
from pathlib import Path

import polars as pl

from tasks.config import Config, Source
from tasks.data import cells, feedback, sources, tables
from tasks.errors import StepFailed, Unsuitable
from tasks.labels import LABELS
from tasks.text_files import Unreadable

log = logging.getLogger(__name__)

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
        Unsuitable: it is not what its schema says.
    """
    path = sources.raw_file(source, config)
    columns, frame = columns_of(source), table(path, source)
    if source.schema_ == "feedback":
        return feedback.rows(frame, source, sources.ROW)
    known = [name for name in LABELS if name in columns]
    labels = {name: label(frame, columns[name], name, source, path) for name in known}
    return frame.select(
        pl.col(sources.ROW).alias("row"),
        pl.col(columns["text"]).fill_null("").alias("text"),
        pl.lit(source.language).alias("language"),
        pl.lit(source.file).alias("source"),
        pl.lit(None, pl.Datetime("us", "UTC")).alias("decided_at"),
        *(labels[name].alias(name) if name in known else pl.lit(None, pl.Int8).alias(name) for name in LABELS),
    )


def label(frame: pl.DataFrame, column: str, name: str, source: Source, path: Path) -> pl.Series:
    """A label column as 0 and 1, as `cells.labels` reads it.

    Only a set that is mapped by the configuration may leave the cell of a type empty, for unknown.

    Raises:
        Unsuitable: a cell is something else; the message names the first.
    """
    found = frame.select(cells.labels(pl.col(column), source.threshold).alias(name)).to_series()
    wrong = found.is_null().arg_true()
    if source.schema_ == "messages" and name != "toxic":
        wrong = wrong.filter(~frame[wrong].select(cells.blanks(pl.col(column))).to_series())
    if len(wrong):
        row, given = frame.select(sources.ROW, column).row(wrong[0])
        wanted = "neither 0 nor 1" if source.threshold is None else "no share between 0 and 1"
        a_share = given is not None and source.threshold is None and cells.number(given) is not None
        hint = "; a source of schema messages may set `threshold`" if a_share else ""
        raise Unsuitable(f"{path} row {row}: {column} is {given!r}, {wanted}{hint}")
    return found


def table(path: Path, source: Source) -> pl.DataFrame:
    """The columns of a raw file that its schema knows, under the file's own names, as strings; and `sources.ROW`.

    Raises:
        Unsuitable: one is missing, or the file is not a CSV in UTF-8.
    """
    wanted, has = list(dict.fromkeys(columns_of(source).values())), sources.header(path)
    if missing := [name for name in wanted if name not in has]:
        raise Unsuitable(
            f"{path.name} has no column {', '.join(missing)}, which schema {source.schema_} needs: it has "
            f"{', '.join(has[:12])}. Is `file` the right one, or has the set changed? For other columns there is "
            "schema messages with `columns`"
        )
    return sources.read(path, wanted)


def tidied(path: Path, source: Source) -> int:
    """Makes a raw file that has just come a plain one, whichever program has saved it, and returns its number of rows.

    One that Polars reads with the schema's columns stays byte by byte as it is.

    Raises:
        Unsuitable: it is no table, or not what its schema says.
    """
    known = (*columns_of(source).values(), "id")
    try:
        if tables.is_plain(path, known):
            return table(path, source).height
    except StepFailed as error:  # further down, too: rows of other lengths, say
        log.info("%s", error)
    try:
        tables.make_plain(path, known)
    except Unreadable as error:
        raise Unsuitable(f"{path.name} is not a CSV file in UTF-8: {error}") from None
    log.info("%s was not a plain CSV file: it is written anew, in UTF-8 and with commas", path.name)
    return table(path, source).height
