"""Where raw data comes from: every entry of `data.sources` brings one CSV file to data/raw."""

import logging
from pathlib import Path

import polars as pl

from tasks.config import Config, Source, Unpack
from tasks.data import archives, feedback, kaggle, sample
from tasks.errors import StepFailed, UsageError

log = logging.getLogger(__name__)


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
        return feedback.gather(source, target)
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


def read(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """A raw file as it is, or some of its columns: every column a string, an empty cell null.

    Raises:
        StepFailed: it is not a CSV file in UTF-8.
    """
    try:
        return pl.read_csv(path, infer_schema=False, columns=columns)
    except pl.exceptions.PolarsError as error:
        raise StepFailed(not_a_table(path, error)) from None


def header(path: Path) -> list[str]:
    """The names of a raw file's columns."""
    try:
        return pl.read_csv(path, infer_schema=False, n_rows=0).columns
    except pl.exceptions.PolarsError as error:
        raise StepFailed(not_a_table(path, error)) from None


def not_a_table(path: Path, error: Exception) -> str:
    """Why a file cannot be read, by its first line that is not UTF-8, if there is one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as wrong:
                return (
                    f"{path.name} is not a CSV file in UTF-8: line {number} has the byte {line[wrong.start]:#x} at "
                    f"{wrong.start + 1}. Another encoding? `iconv -f cp1251 -t utf-8` makes it UTF-8"
                )
    return f"{path.name} is not a CSV file in UTF-8: {str(error).splitlines()[0]}. Get it again, with its header"


def generate(config: Config, folder: Path) -> Path:
    if config.data.sample is None:
        raise UsageError("data.sources has kind=sample, but data.sample is null: see configs/data/sample.yaml")
    knobs = config.data.sample
    folder.mkdir(parents=True, exist_ok=True)
    sample.write(folder, knobs.english_rows, knobs.russian_rows, knobs.label_noise, config.seed)
    return folder


def find(place: Path, file: str, limits: Unpack) -> Path:
    """`file` in the folder `place`: plain, as .gz, as .zip or inside an archive of another name; or `place` itself.

    Raises:
        UsageError: it is nowhere there.
    """
    if place.is_file():
        return place
    candidates = [place / file, place / f"{file}.gz", place / f"{file}.zip"]
    for path in candidates:
        if path.is_file():
            return path
    for path in sorted(place.glob("*.zip")):
        if archives.members(path, file, limits):
            return path
    raise UsageError(
        f"{place} has no {file}, {file}.gz, {file}.zip, nor another .zip with {file} in it: put it there, or name "
        "another folder or archive"
    )
