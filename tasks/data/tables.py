"""Tables as spreadsheets, databases and editors export them, read so that every refusal names its line and its cause.

The separator, the `sep=` line before the header, empty rows, cells beyond the header, the case of column names and the
encoding are taken as they come. What Polars reads itself, as Kaggle's own files, is left byte by byte as it is.
"""

import csv
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks import text_files
from tasks.data.cells import bare, is_blank
from tasks.text_files import Unreadable

SEPARATORS = (",", ";", "\t")
HEAD = 1 << 16  # bytes that a header ends within

_SEP_LINE = re.compile(r'"?sep=(.)"?[,;\t]*(?:\r\n|\r|\n|$)', re.IGNORECASE)  # Excel's own hint, before the header
_BREAK = re.compile(r"\r\n|\r|\n")
_QUOTED = re.compile(r'"(?:[^"]|"")*("?)')


@dataclass(frozen=True)
class Row:
    number: int  # from 1, without the header; empty rows count, as they do in a spreadsheet
    line: int  # of the file, from 1, where it begins
    cells: list[str]  # as many as the header has; none of a row that is empty
    problem: str  # what cannot be read of the row; "" if nothing


@dataclass(frozen=True)
class Table:
    """A table whose header has been read; `rows` go on from there, once."""

    names: list[str]  # of the columns: those that are known as the caller spells them, the others as they stand
    header: str  # as it stands
    rows: Iterator[Row]


def read(stream: io.TextIOBase, known: tuple[str, ...]) -> Table:
    """The table in a text that was opened with newline="".

    Args:
        known: the columns that the caller knows; the header may have them in other case, and with other spaces.

    Raises:
        Unreadable: it is empty, its quotes do not match, or its header has a known column twice. Of the rows, while
            they are read.
    """
    csv.field_size_limit(sys.maxsize)  # a message may be longer than csv's own limit of 131,072 characters
    start = stream.read(HEAD)
    hint = _SEP_LINE.match(start)
    separators = (*([hint[1]] if hint else []), *SEPARATORS)
    begins = hint.end() if hint else 0
    separator = max(separators, key=lambda sign: len(header_of(start[begins:], sign, known)))
    stream.seek(0)
    source = _Lines(stream)
    if hint:
        next(iter(source))
    records = _records(source, separator)
    for _, names in records:
        if not all(map(is_blank, names)):
            return Table(renamed(names, known), source.record().strip(), _rows(records, names, separator))
    raise Unreadable("it is empty, a header and rows are expected")


def header_of(text: str, separator: str, known: tuple[str, ...]) -> set[str]:
    """The known columns that the first row has, if `separator` is what stands between them."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        first = next((row for row in rows if not all(map(is_blank, row))), [])
    except csv.Error:
        return set()
    return {folded(name) for name in first} & set(map(folded, known))


def renamed(names: list[str], known: tuple[str, ...]) -> list[str]:
    """The names of the columns, the known ones spelt as in `known`."""
    spelling = {folded(name): name for name in known}
    found = [name if name in known else spelling.get(folded(name), name.strip()) for name in names]
    for name in known:
        exact = names.count(name)
        if found.count(name) > 1 and exact == 1:  # `toxic` beside `Toxic`
            found = [old if new == name != old else new for old, new in zip(names, found)]
        elif found.count(name) > 1:
            raise Unreadable(f"it has {found.count(name)} columns called {name}: which one is meant? Rename the others")
    return found


def folded(name: str) -> str:
    """What spellings of a column's name have in common: `Decided at`, ` decided_at`."""
    return bare(name).casefold().replace(" ", "_").replace("-", "_")


def _rows(records: Iterator[tuple[int, list[str]]], names: list[str], separator: str) -> Iterator[Row]:
    width = len(names)
    for number, (line, cells) in enumerate(records, 1):
        if all(map(is_blank, cells)):
            yield Row(number, line, [], "")
            continue
        problem = ""
        if len(cells) > width and not all(map(is_blank, cells[width:])):
            problem = (
                f"line {line} has {len(cells)} cells, the header has {width}: a text with {separator!r} or a line "
                "break in it stands in double quotes"
            )
        yield Row(number, line, [*cells[:width], *[""] * (width - len(cells))], problem)


def _records(source: "_Lines", separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, cells) of every row."""
    reader = csv.reader(source, delimiter=separator, strict=True)
    while True:
        source.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise Unreadable(_quotes(source, error)) from None
        yield source.began, cells


def _quotes(source: "_Lines", error: csv.Error) -> str:
    """Where the quotes of the row that is being read do not match."""
    if "end of data" not in str(error):
        return (
            f"line {source.line} has text behind a closing double quote ({error}), in the row that begins in line "
            f"{source.began}: a quote inside a text is written twice, and the text stands in quotes"
        )
    record = source.record()
    opened = next((cell.start() for cell in _QUOTED.finditer(record) if not cell[1]), 0)
    line = source.began + len(_BREAK.findall(record[:opened]))
    return f"line {line} opens a double quote that is never closed: a quote inside a text is written twice"


class _Lines:
    """The lines of a stream, as csv's reader asks for them, that knows which belong to the row that is being read."""

    def __init__(self, stream: io.TextIOBase):
        self.stream, self.line, self.began, self.seen = stream, 0, 1, []

    def begin(self) -> None:
        self.began, self.seen = self.line + 1, []

    def record(self) -> str:
        return "".join(self.seen)

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line = next(self.stream)
        self.line += 1
        self.seen.append(line)
        return line


# Raw files, which Polars reads --------------------------------------------------------------------------------------


def is_plain(path: Path, known: tuple[str, ...]) -> bool:
    """Whether the file begins as Polars reads it: UTF-8, commas, line feeds, the known columns as the caller spells
    them, each once."""
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    if not text_files.encoding(head).startswith("utf-8"):
        return False
    text = head.decode("utf-8-sig", errors="replace").lstrip("\r\n")
    end = _BREAK.search(text)
    if _SEP_LINE.match(text) or end and end[0] == "\r":
        return False
    names = next(csv.reader(io.StringIO(text, newline="")), [])
    here = [name for name in names if name in known]
    most = max(len(header_of(text, sign, known)) for sign in SEPARATORS)
    return len(here) == len(set(here)) == most


def make_plain(path: Path, known: tuple[str, ...]) -> None:
    """Writes a file anew as Polars reads it. Rows keep their numbers: one that is empty stays, as an empty line.

    Raises:
        Unreadable: it is no table, or a row has more cells than the header.
    """
    with path.open("rb") as stream:
        encoding = text_files.encoding(stream.read(HEAD))
    beside = path.with_name(f".{path.name}.plain")
    try:
        with (
            path.open(encoding=encoding, newline="") as stream,
            beside.open("w", encoding="utf-8", newline="") as out,
        ):
            table = read(stream, known)
            writer = csv.writer(out, lineterminator="\r\n")
            writer.writerow(table.names)
            for row in table.rows:
                if row.problem:
                    raise Unreadable(f"row {row.number} in {row.problem}")
                writer.writerow(row.cells)
        os.replace(beside, path)
    except UnicodeDecodeError:
        text_files.decoded(path.read_bytes())  # says where, in words
        raise
    finally:
        beside.unlink(missing_ok=True)


def first_problem(path: Path) -> str | None:
    """Why a file cannot be read, with the line; None if nothing is found."""
    try:
        table = read(io.StringIO(text_files.decoded(path.read_bytes()), newline=""), ())
        return next((f"row {row.number} in {row.problem}" for row in table.rows if row.problem), None)
    except Unreadable as error:
        return str(error)
