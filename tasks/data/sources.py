"""Where raw data comes from: every entry of `data.sources` brings one CSV file to data/raw."""

import logging
from pathlib import Path

import polars as pl

from tasks.config import Config, Source, Unpack
from tasks.data import archives, cells, feedback, kaggle, sample, tables
from tasks.errors import StepFailed, Unsuitable, UsageError

log = logging.getLogger(__name__)

ROW = "#row"  # the number of a row, from 1, beside the file's own columns


def fetch(source: Source, config: Config, folder: Path, incoming: Path, state: dict | None = None) -> list[str]:
    """Brings `source.file` into `folder` as plain CSV.

    Args:
        incoming: a folder for what is not whole yet; a later try goes on from there.
        state: of a Kaggle source, what Kaggle said about it.

    Returns:
        A sentence for each row that is set aside; only feedback has such rows.

    Raises:
        UsageError: the file, or the right to have it, is not there.
        StepFailed: it cannot be downloaded or unpacked.
    """
    target, called = folder / source.file, None
    if source.kind == "feedback":
        return feedback.gather(source, target, config.unpack)
    if source.kind in kaggle.KINDS:
        path, called = kaggle.download(source, state, config, incoming)
    elif source.kind == "sample":
        path = generate(config, incoming) / source.file
    else:
        path = find(Path(source.name).expanduser(), source.file, config.unpack)
    try:
        archives.unpack(path, source.file, target, config.unpack, called)
    except StepFailed:
        if source.kind in kaggle.KINDS:  # whole, and yet of no use: the next try must not find it
            kaggle.forget(path)
        raise
    return []


def raw_file(source: Source, config: Config) -> Path:
    """A source's file in data/raw.

    Raises:
        UsageError: it has not been downloaded.
    """
    path = config.workspace / "data" / "raw" / source.file
    if not path.is_file():
        raise UsageError(f"{path} does not exist: run `python commands.py download` first")
    return path


def scan(path: Path) -> pl.LazyFrame:
    """A raw file's rows as they are: every column a string, an empty cell null, and each row's number in ROW. Rows
    without any cell, which a spreadsheet leaves, are no rows.

    Raises:
        pl.exceptions.PolarsError: it is not a CSV file in UTF-8, here or when it is collected.
    """
    every = every_row(path)
    names = every.collect_schema().names()
    asked = "toxic" if "toxic" in names else names[-1]  # one that most rows fill: all of them take much longer
    return without_empty_rows(every, every.select(ROW, asked).collect(engine="streaming"), every)


def read(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """What `scan` finds, or ROW and some of the columns.

    Raises:
        StepFailed: it is not a CSV file in UTF-8.
    """
    try:
        every = every_row(path)
        frame = (every.select(ROW, *columns) if columns else every).collect()
        return without_empty_rows(every, frame, frame)
    except pl.exceptions.PolarsError as error:
        raise Unsuitable(not_a_table(path, error)) from None


def every_row(path: Path) -> pl.LazyFrame:
    return pl.scan_csv(path, infer_schema=False, glob=False, row_index_name=ROW, row_index_offset=1)


def without_empty_rows(every: pl.LazyFrame, asked: pl.DataFrame, rows: pl.LazyFrame | pl.DataFrame):
    """`rows` without those that have no cell: the few that have none in the columns `asked` are looked at whole."""
    suspect = asked
    for name in reversed(asked.columns[1:]):  # the text comes first, and takes longest
        suspect = suspect.filter(cells.blanks(pl.col(name)))
    if suspect.is_empty():
        return rows
    whole = every.filter(pl.col(ROW).is_in(suspect[ROW].implode())).collect(engine="streaming")
    empty = [number for number, *row in whole.iter_rows() if all(map(cells.is_blank, row))]
    return rows.filter(~pl.col(ROW).is_in(empty))


def header(path: Path) -> list[str]:
    """The names of a raw file's columns."""
    try:
        return pl.read_csv(path, infer_schema=False, n_rows=0, glob=False).columns
    except pl.exceptions.PolarsError as error:
        raise Unsuitable(not_a_table(path, error)) from None


def not_a_table(path: Path, error: Exception) -> str:
    """Why a file cannot be read, with the first line that keeps it from being."""
    why = tables.first_problem(path) or f"{str(error).splitlines()[0]}. Get it again, with its header"
    return f"{path.name} is not a CSV file in UTF-8: {why}"


def generate(config: Config, folder: Path) -> Path:
    if config.data.sample is None:
        raise UsageError("data.sources has kind=sample, but data.sample is null: see configs/data/sample.yaml")
    knobs = config.data.sample
    folder.mkdir(parents=True, exist_ok=True)
    sample.write(folder, knobs.english_rows, knobs.russian_rows, knobs.label_noise, config.seed)
    return folder


def find(place: Path, file: str, limits: Unpack) -> Path:
    """`file` in the folder `place`: plain, as .gz, as .zip or inside an archive of another name; or `place` itself.
    Names may be in another case; hidden files are passed over.

    Raises:
        UsageError: it is nowhere there.
    """
    try:
        if place.is_file():
            return place
        there = [path for path in sorted(place.iterdir()) if path.is_file() and not archives.is_hidden(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        there = []
    except OSError as error:
        raise UsageError(f"{place} cannot be read: {error.strerror}") from None
    for wanted in (file, f"{file}.gz", f"{file}.zip"):
        found = [path for path in there if path.name.casefold() == wanted.casefold()]
        if found:
            return next((path for path in found if path.name == wanted), found[0])
    for path in there:
        if path.suffix.lower() == ".zip" and archives.members(path, file, limits):
            return path
    spreadsheets = [path.name for path in there if path.suffix.lower() in archives.SPREADSHEETS]
    raise UsageError(
        f"{place} has no {file}, {file}.gz, {file}.zip, nor another .zip with {file} in it: put it there, or name "
        "another folder or archive"
        + (f"; {', '.join(spreadsheets[:3])} would have to be saved as “CSV UTF-8”" if spreadsheets else "")
    )
