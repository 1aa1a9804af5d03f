"""Moderators' own labels: every CSV file of a folder becomes one file in data/raw, each row with what is wrong with it.

docs/data.md says how to export. A row that breaks a rule is set aside and named: one typo must not cost a retraining,
and a wrong label must not outweigh a good one. Too many of them, or a file of which nothing can be said, stop the run.
"""

import io
import logging
import os
import tempfile
from pathlib import Path

import polars as pl

from tasks import text_files
from tasks.config import Source, Unpack
from tasks.data import archives, cells, tables
from tasks.errors import Unsuitable
from tasks.labels import LABELS, LANGUAGES, TYPES
from tasks.text import clean
from tasks.text_files import Unreadable

log = logging.getLogger(__name__)

REQUIRED = ("text", "toxic", "decided_at")
OPTIONAL = (*TYPES, "language")
# What the file in data/raw holds: `where` is the row's id, `problem` is empty for a good row.
COLUMNS = ("where", *REQUIRED, *OPTIONAL, "problem")

EXPORTS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SYSTEM_FILES = ("thumbs.db", "desktop.ini")


def gather(source: Source, target: Path, limits: Unpack) -> list[str]:
    """Writes all rows of the folder's CSV files to `target`, as they are and with `where` and `problem`.

    Files are taken by name, rows in their order, so that the same exports give the same file. A folder that is missing
    or empty gives a file without rows.

    Returns:
        One sentence for each row that is set aside.

    Raises:
        Unsuitable: a file cannot be read or lacks a column, or more rows are wrong than `max_bad_rows` and
            `max_bad_share` of the source allow.
    """
    folder = Path(source.name).expanduser()
    found = exports(folder)
    if not found:
        log.info("no feedback yet: %s has no CSV file; moderators' exports go there", folder)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacked-") as place:
        rows = pl.concat([empty(), *(table(path, Path(place), limits) for path in found)])
    rows.write_csv(target)
    wrong = rows.filter(pl.col("problem") != "")
    sentences = [f"{where}: {problem}" for where, problem in wrong.select("where", "problem").rows()]
    for sentence in sentences[:20]:
        log.warning("set aside: %s", sentence)
    if len(sentences) > source.max_bad_rows and len(sentences) > source.max_bad_share * rows.height:
        raise Unsuitable(
            f"{len(sentences)} of {rows.height} rows of feedback in {folder} are wrong, more than max_bad_rows "
            f"{source.max_bad_rows} and max_bad_share {source.max_bad_share:g}; the first: {'; '.join(sentences[:3])}. "
            "Correct the export (docs/data.md), or take the file out of the folder"
        )
    if found:
        log.info("feedback: %d rows of %d files, %d set aside", rows.height, len(found), len(sentences))
    return sentences


def exports(folder: Path) -> list[Path]:
    """The folder's exports, by name; whatever else lies there is logged.

    Raises:
        Unsuitable: the folder cannot be read, or one of them is a link to nothing.
    """
    try:
        there = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unsuitable(f"{folder} cannot be read as the folder of feedback: {error.strerror}") from None
    found = []
    for path in there:
        name = path.name.lower()
        if archives.is_hidden(name) or name in SYSTEM_FILES:
            log.info("passed over: %s, a hidden file or one of the system's", path)
        elif path.is_symlink() and not path.exists():
            raise Unsuitable(
                f"{path} is a link to {os.readlink(path)}, which is not there: bring it, or remove the link"
            )
        elif not path.is_file():
            log.warning("passed over: %s is no file; exports lie in %s itself", path, folder)
        elif name.endswith(EXPORTS):
            found.append(path)
        elif name.endswith(archives.SPREADSHEETS):
            log.warning("passed over: %s is a spreadsheet: save it as “CSV UTF-8”, or its rows are not used", path)
        else:
            log.warning("passed over: %s is no export: only %s are read", path, ", ".join(EXPORTS))
    return found


def table(path: Path, place: Path, limits: Unpack) -> pl.DataFrame:
    """The rows of an export in COLUMNS, as they are but for `where` and `problem`.

    Args:
        place: a folder for the unpacked copy.

    Raises:
        Unsuitable: it cannot be read, is not a table, or has not the columns.
    """
    name = os.fsencode(path.name).decode("utf-8", errors="replace")
    copy = place / "export.csv"
    archives.unpack(path, path.name, copy, limits)
    try:
        found = tables.read(io.StringIO(text_files.decoded(copy.read_bytes()), newline=""), REQUIRED + OPTIONAL)
        if missing := [column for column in REQUIRED if column not in found.names]:
            raise Unsuitable(
                f"{path} has no column {', '.join(missing)}: its header is {found.header!r}. Required are "
                f"{', '.join(REQUIRED)}; {', '.join(OPTIONAL)} may be there"
            )
        rows = list(found.rows)
    except Unreadable as error:
        raise Unsuitable(f"{path} is not a CSV file that can be read: {error}") from None
    filled = [judged(row, found.names, name) for row in rows if row.cells]
    if not filled:
        log.warning("%s has a header and no rows", path)
    if len(filled) < len(rows):
        log.info("%s: %d empty rows passed over", path, len(rows) - len(filled))
    return pl.DataFrame(filled, schema=dict.fromkeys(COLUMNS, pl.String), orient="row")


def judged(row: tables.Row, names: list[str], file: str) -> tuple[str, ...]:
    """A row of the file `file` in COLUMNS, with its problem."""
    given = dict(zip(names, row.cells))
    whole = {name: given.get(name, "") for name in REQUIRED + OPTIONAL}
    return (f"{file} row {row.number}", *whole.values(), row.problem or problem(whole))


def problem(row: dict[str, str]) -> str:
    """What is wrong with a row, with the value and what is allowed; "" if nothing is."""
    if not clean(row["text"]):
        return "text is empty, the message is expected"
    toxic = cells.number(row["toxic"])
    if toxic not in (0, 1):
        return f"toxic is {shown(row['toxic'])}, 0 or 1 is expected"
    for name in TYPES:
        if cells.is_blank(row[name]):
            continue
        if (label := cells.number(row[name])) not in (0, 1):
            return f"{name} is {shown(row[name])}, 0, 1 or nothing is expected"
        if label == 1 and toxic == 0:
            return f"{name} is 1 and toxic is 0: a message with a type is toxic, one that is not toxic has none"
    if language(row["language"]) not in ("", *LANGUAGES):
        return f"language is {shown(row['language'])}, {', '.join(LANGUAGES)} or nothing is expected"
    try:
        cells.moment(row["decided_at"])
    except ValueError as error:
        return f"decided_at is {shown(row['decided_at'])}, {error}"
    return ""


def shown(cell: str) -> str:
    return repr(cell if len(cell) <= 80 else f"{cell[:80]}…")


def language(cell: str) -> str:
    return cells.bare(cell).lower()


def empty() -> pl.DataFrame:
    return pl.DataFrame(schema=dict.fromkeys(COLUMNS, pl.String))


def judged_again(frame: pl.DataFrame) -> pl.DataFrame:
    """The file that `gather` wrote, an empty cell "", with the problem of each row as the code finds it now.

    An older version of it may have written the file, or a person changed it: what validate and prepare make of a row is
    what download would.
    """
    filled = frame.with_columns(pl.col(*COLUMNS).fill_null(""))
    problems = [row["problem"] or problem(row) for row in filled.iter_rows(named=True)]
    for where, before, now in zip(filled["where"], filled["problem"], problems):
        if now != before:
            log.warning("set aside: %s: %s", where, now)
    return filled.with_columns(pl.Series("problem", problems, pl.String))


def rows(frame: pl.DataFrame, source: Source, number: str) -> pl.DataFrame:
    """The good rows of the file that `gather` wrote, in the columns of `schemas.read`.

    A type that a row does not give is unknown, but a message that is not toxic has none of them.

    Args:
        number: the column that has the row's number.
    """
    good = judged_again(frame).filter(problem="")
    labels = {name: cells.labels(pl.col(name)) for name in LABELS}
    none = pl.when(labels["toxic"] == 0).then(pl.lit(0, pl.Int8))
    return good.select(
        pl.col(number).alias("row"),
        "text",
        pl.Series("language", [language(cell) or source.language for cell in good["language"]], pl.String),
        pl.lit(source.file).alias("source"),
        pl.Series("decided_at", [cells.moment(cell) for cell in good["decided_at"]], pl.Datetime("us", "UTC")),
        labels["toxic"].alias("toxic"),
        *(none.otherwise(labels[name]).alias(name) for name in TYPES),
    )
