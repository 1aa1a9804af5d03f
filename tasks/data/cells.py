"""The one reader of a cell: what a label and a date look like in what people, spreadsheets and databases export.

download, validate and prepare all ask here, so that a row is judged once: what the first takes, no later one refuses.
docs/data.md lists for people what is taken.
"""

import math
import re
import unicodedata
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone

import polars as pl

from tasks.text import IGNORABLE

OLDEST = datetime(2000, 1, 1, tzinfo=timezone.utc)
AHEAD = timedelta(days=1)  # a clock may be wrong by its time zone, not by more

LONGEST = 64  # characters of a cell that is a label or a date
# What nobody sees in a text either, NUL, and the Ctrl-Z that ends a file in DOS.
_UNSEEN = re.compile(rf"[{IGNORABLE}\x00\x1a]")
_DASHES = re.compile("[\u2010-\u2015\u2212]")

_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d{1,3})?", re.IGNORECASE)
# What spreadsheets (Excel in English and in Russian) and databases (PostgreSQL) write for 1 and 0. Words that a person
# types, such as yes, are left out: they answer a question that is not there.
_WORDS = {"TRUE": 1.0, "FALSE": 0.0, "ИСТИНА": 1.0, "ЛОЖЬ": 0.0, "T": 1.0, "F": 0.0}

_EXCEL_EPOCH = datetime(1899, 12, 30, tzinfo=timezone.utc)
_SERIAL = re.compile(r"\d{5}([.,]\d+)?")  # 46346.58: 2026-11-20, 13:55; eight digits are a date in ISO 8601
_MOMENT = re.compile(
    r"""(?: (?P<iso> \d{4}-\d\d-\d\d | \d{8} | \d{4}-?W\d\d(?:-?\d)? )
          | (?P<year> \d{4}) (?P<sign> [-./]) (?P<month> \d{1,2}) (?P=sign) (?P<day> \d{1,2})
          | (?P<first> \d{1,2}) \. (?P<second> \d{1,2}) \. (?P<last> \d{4}) )
        (?: (?: T | ,?[ ] )
            (?P<time> \d{1,2} (?: : \d\d (?: : \d\d (?: [.,] \d+ )? )? )? | \d{4} | \d{6} (?: [.,] \d+ )? )
            [ ]? (?P<zone> Z | UTC | GMT | [+-] \d\d (?: :? \d\d )? )? )?""",
    re.VERBOSE,
)
_EITHER_WAY = re.compile(r"\d{1,2}([/-])\d{1,2}\1\d{2,4}\b.*")
_SHORT_YEAR = re.compile(r"\d{1,2}\.\d{1,2}\.\d{2}\b.*")


def bare(cell: str) -> str:
    """A short cell without what is not seen in it: no outer spaces, each space a plain one, each digit an ASCII one,
    each dash a hyphen. One that is longer than a label or a date can be only loses its outer spaces.
    """
    if cell.isascii() and cell.isalnum():  # nearly all labels
        return cell
    if len(cell) > LONGEST and len(cell := cell.strip()) > LONGEST:
        return cell
    plain = _UNSEEN.sub("", unicodedata.normalize("NFKC", cell))
    if not plain.isascii():
        plain = "".join(str(unicodedata.decimal(character, character)) for character in _DASHES.sub("-", plain))
    return " ".join(plain.split())


def is_blank(cell: str | None) -> bool:
    return not cell or not bare(cell)


def number(cell: str) -> float | None:
    """The number that a cell stands for, TRUE being 1; None where it is none."""
    text = bare(cell).upper()
    if text in _WORDS:
        return _WORDS[text]
    if not _NUMBER.fullmatch(text):
        return None
    found = float(text.replace(",", "."))
    return found if math.isfinite(found) else None


def moment(cell: str) -> datetime:
    """The moment that a cell names, in UTC: a date, or date and time; UTC where it names no zone.

    Raises:
        ValueError: it is no date, one that can be read in two ways, or not between OLDEST and now; the message says
            what is expected.
    """
    try:
        found = _read(bare(cell).upper())
    except OverflowError:  # a date near the years 1 or 9999 that its zone moves beyond them
        found = None
    if found is None or not OLDEST <= found <= datetime.now(timezone.utc) + AHEAD:
        raise ValueError("a moment from 2000 until now is expected")
    return found


def _read(text: str) -> datetime:
    if _SERIAL.fullmatch(text):
        return _EXCEL_EPOCH + timedelta(seconds=round(float(text.replace(",", ".")) * 86400))
    parts = _MOMENT.fullmatch(text)
    if not parts:
        if _EITHER_WAY.fullmatch(text):
            raise ValueError("which may be read with the month first or the day: 2026-11-23 or 23.11.2026 is expected")
        if _SHORT_YEAR.fullmatch(text):
            raise ValueError("a year of two digits: 2026-11-23 or 23.11.2026 is expected")
        raise ValueError("an ISO date such as 2026-11-23T14:05:00Z is expected")
    try:
        day = _day(parts)
        clock = (parts["time"] or "00").replace(",", ".")
        zone = (parts["zone"] or "").replace("UTC", "Z").replace("GMT", "Z") or "Z"
        found = datetime.fromisoformat(f"{day.isoformat()}T{'0' * (len(clock.split(':')[0]) == 1)}{clock}{zone}")
    except ValueError:
        raise ValueError("there is no such day or time: a date such as 2026-11-23T14:05:00Z is expected") from None
    return found.astimezone(timezone.utc)


def _day(parts: re.Match) -> date:
    if parts["iso"]:
        return date.fromisoformat(parts["iso"])
    if parts["year"]:
        return date(int(parts["year"]), int(parts["month"]), int(parts["day"]))
    return date(int(parts["last"]), int(parts["second"]), int(parts["first"]))


# By the million ------------------------------------------------------------------------------------------------------


def numbers(cells: pl.Expr) -> pl.Expr:
    """`number` of each cell (string), as float64; null where it is none, or there is no cell."""
    return _mapped(cells, number, pl.Float64)


def labels(cells: pl.Expr, threshold: float | None = None) -> pl.Expr:
    """`label_of` the number of each cell (string)."""
    return label_of(numbers(cells), threshold)


def label_of(number: pl.Expr, threshold: float | None = None) -> pl.Expr:
    """Each number as a label, int8: 0 and 1 as they are, or whether a share of 1 reaches the threshold; else null."""
    if threshold is None:
        return pl.when(number.is_in([0.0, 1.0])).then(number.cast(pl.Int8, strict=False))
    return pl.when(number.is_between(0, 1)).then((number >= threshold).cast(pl.Int8))


def moments(cells: pl.Expr) -> pl.Expr:
    """`moment` of each cell, datetime in UTC; null where it is none."""

    def read(cell: str) -> datetime | None:
        try:
            return moment(cell)
        except ValueError:
            return None

    return _mapped(cells, read, pl.Datetime("us", "UTC"))


def blanks(cells: pl.Expr) -> pl.Expr:
    """Whether each cell is empty, but for what is not seen."""
    return _mapped(cells, is_blank, pl.Boolean).fill_null(True)


def _mapped(cells: pl.Expr, read: Callable[[str], object], dtype: pl.DataType) -> pl.Expr:
    """`read` of each cell, called once for each of the few that differ."""

    def of(series: pl.Series) -> pl.Series:
        distinct = series.unique().drop_nulls()
        values = pl.Series([read(cell) for cell in distinct], dtype=dtype)
        which = series.cast(pl.Enum(distinct)).to_physical()
        return values.gather(which) if len(distinct) else pl.Series([None] * len(series), dtype=dtype)

    return cells.cast(pl.String).map_batches(of, return_dtype=dtype, is_elementwise=True)
