"""Moderators' own labels: every CSV file of a folder becomes one file in data/raw, each row with what is wrong with it.

The README, "Your own labels", says how to export. A row that breaks a rule is set aside and named: one typo must not
cost a retraining, and a wrong label must not outweigh a good one. Too many of them, or a file of which nothing can be
said, stop the run.
"""

import csv
import io
import logging
from datetime import datetime, timedelta, timezone
from pathlib import Path

import polars as pl

from tasks.config import Source
from tasks.errors import StepFailed
from tasks.labels import LABELS, LANGUAGES, TYPES

log = logging.getLogger(__name__)

REQUIRED = ("text", "toxic", "decided_at")
OPTIONAL = (*TYPES, "language")
# What the file in data/raw holds: `where` is the row's id, `problem` is empty for a good row.
COLUMNS = ("where", *REQUIRED, *OPTIONAL, "problem")

OLDEST = datetime(2000, 1, 1, tzinfo=timezone.utc)
AHEAD = timedelta(days=1)  # a clock may be wrong by its time zone, not by more


def gather(source: Source, target: Path) -> list[str]:
    """Writes all rows of the folder's CSV files to `target`, as they are and with `where` and `problem`.

    Files are taken by name, rows in their order, so that the same exports give the same file. A folder that is missing
    or empty gives a file without rows.

    Returns:
        One sentence for each row that is set aside.

    Raises:
        StepFailed: a file is not a CSV in UTF-8, lacks a column, or more rows are wrong than `max_bad_rows` and
            `max_bad_share` of the source allow.
    """
    folder = Path(source.name).expanduser()
    exports = sorted(path for path in folder.glob("*.csv") if path.is_file())
    if not exports:
        log.info("no feedback yet: %s has no CSV file; moderators' exports go there", folder)
    rows = pl.concat([empty(), *(judged(table(path), path.name) for path in exports)])
    rows.write_csv(target)
    wrong = rows.filter(pl.col("problem") != "")
    sentences = [f"{where}: {problem}" for where, problem in wrong.select("where", "problem").rows()]
    for sentence in sentences[:20]:
        log.warning("set aside: %s", sentence)
    if len(sentences) > source.max_bad_rows and len(sentences) > source.max_bad_share * rows.height:
        raise StepFailed(
            f"{len(sentences)} of {rows.height} rows of feedback in {folder} are wrong, more than max_bad_rows "
            f"{source.max_bad_rows} and max_bad_share {source.max_bad_share:g}; the first: {'; '.join(sentences[:3])}. "
            "Correct the export (README, Your own labels), or take the file out of the folder"
        )
    if exports:
        log.info("feedback: %d rows of %d files, %d set aside", rows.height, len(exports), len(sentences))
    return sentences


def table(path: Path) -> pl.DataFrame:
    """An export as it is, every column a string: comma, semicolon or tab between them, as spreadsheets like it.

    Raises:
        StepFailed: it is not UTF-8, not a table, or has not the columns.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise StepFailed(
            f"{path} line {line} is not UTF-8 (byte {error.object[error.start]:#x}): save it as “CSV UTF-8”, or "
            f"`iconv -f cp1251 -t utf-8`"
        ) from None
    header = text.split("\n", 1)[0].strip()
    separator = max(",;\t", key=header.count)
    try:
        cells = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        names, *rows = [[cell.strip() for cell in next(cells)], *filter(None, cells)]
    except (csv.Error, StopIteration) as error:
        raise StepFailed(
            f"{path} is not a CSV file: {error or 'it is empty'}. Export it again, with a header"
        ) from None
    if missing := [name for name in REQUIRED if name not in names]:
        raise StepFailed(
            f"{path} has no column {', '.join(missing)}: its header is {header!r}. Required are {', '.join(REQUIRED)}; "
            f"{', '.join(OPTIONAL)} may be there"
        )
    if odd := next((number for number, row in enumerate(rows, 1) if len(row) != len(names)), None):
        raise StepFailed(
            f"{path} row {odd} has {len(rows[odd - 1])} cells, the header has {len(names)}: a text with {separator!r} "
            "or a line break in it stands in double quotes"
        )
    given = {name: [row[names.index(name)] for row in rows] for name in REQUIRED + OPTIONAL if name in names}
    return pl.DataFrame(given, schema=dict.fromkeys(given, pl.String))


def judged(rows: pl.DataFrame, file: str) -> pl.DataFrame:
    """The rows of one file in COLUMNS, each with its problem."""
    whole = rows.with_columns(pl.lit("").alias(name) for name in OPTIONAL if name not in rows.columns)
    problems = [problem(row) for row in whole.iter_rows(named=True)]
    return whole.with_columns(
        pl.Series("problem", problems, pl.String),
        pl.format("{} row {}", pl.lit(file), pl.int_range(1, whole.height + 1)).alias("where"),
    ).select(COLUMNS)


def problem(row: dict[str, str]) -> str:
    """What is wrong with a row, with the value and what is allowed; "" if nothing is."""
    if not row["text"].strip():
        return "text is empty, the message is expected"
    if number(row["toxic"]) is None:
        return f"toxic is {row['toxic']!r}, 0 or 1 is expected"
    for name in TYPES:
        if row[name].strip() and number(row[name]) is None:
            return f"{name} is {row[name]!r}, 0, 1 or nothing is expected"
        if number(row[name]) == 1 and number(row["toxic"]) == 0:
            return f"{name} is 1 and toxic is 0: a message with a type is toxic, one that is not toxic has none"
    if row["language"].strip() not in ("", *LANGUAGES):
        return f"language is {row['language']!r}, {', '.join(LANGUAGES)} or nothing is expected"
    decided = moment(row["decided_at"])
    if decided is None:
        return f"decided_at is {row['decided_at']!r}, an ISO date such as 2026-11-23T14:05:00Z is expected"
    if not OLDEST <= decided <= datetime.now(timezone.utc) + AHEAD:
        return f"decided_at is {row['decided_at']!r}, a moment from 2000 until now is expected"
    return ""


def number(cell: str) -> int | None:
    return {"0": 0, "0.0": 0, "1": 1, "1.0": 1}.get(cell.strip())


def moment(cell: str) -> datetime | None:
    """A date, or date and time, in ISO 8601; UTC where it names no zone."""
    try:
        found = datetime.fromisoformat(cell.strip())
    except ValueError:
        return None
    return found.replace(tzinfo=timezone.utc) if found.tzinfo is None else found.astimezone(timezone.utc)


def empty() -> pl.DataFrame:
    return pl.DataFrame(schema=dict.fromkeys(COLUMNS, pl.String))


def rows(frame: pl.DataFrame, source: Source) -> pl.DataFrame:
    """The good rows of the file that `gather` wrote, in the columns of `schemas.read`.

    A type that a row does not give is unknown, but a message that is not toxic has none of them.
    """
    numbered = frame.with_row_index("row", 1).filter(pl.col("problem").fill_null("") == "")
    labels = {name: numbered[name].fill_null("").map_elements(number, pl.Int8, skip_nulls=True) for name in LABELS}
    harmless = labels["toxic"] == 0
    return numbered.select(
        "row",
        pl.col("text").fill_null(""),
        pl.col("language").fill_null("").str.strip_chars().replace("", source.language),
        pl.lit(source.file).alias("source"),
        pl.Series("decided_at", [moment(cell) for cell in numbered["decided_at"]], pl.Datetime("us", "UTC")),
        labels["toxic"].alias("toxic"),
        *(pl.when(harmless).then(pl.lit(0, pl.Int8)).otherwise(labels[name]).alias(name) for name in TYPES),
    )
