"""Where raw data comes from: every kind of `data.sources` brings one CSV file under Kaggle's own name.

Archives are opened with checks, Kaggle's client runs as a process of its own, and what it says is passed on without
its tokens.
"""

import gzip
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import polars as pl

from tasks.config import Config, Source
from tasks.data import sample
from tasks.errors import StepFailed, UsageError

# Kaggle's Jigsaw archive holds 9 files, its largest 1.6 GB: anything far beyond that is not one of these sets.
MAX_MEMBERS = 1000
MAX_BYTES = 4 * 2**30

SECRETS = ("KAGGLE_API_TOKEN", "KAGGLE_KEY")


def fetch(source: Source, config: Config, folder: Path) -> Path:
    """Brings `source.file` into `folder` as plain CSV and returns its path.

    Raises:
        UsageError: the file, or the account that it takes, is not there.
        StepFailed: it cannot be downloaded or unpacked.
    """
    target = folder / source.file
    with tempfile.TemporaryDirectory(dir=folder) as incoming:
        if source.kind == "sample":
            place = generate(config, Path(incoming))
        elif source.kind == "folder":
            place = Path(source.name).expanduser()
        else:
            place = download(source, Path(incoming))
        unpack(find(place, source.file), source.file, target)
    return target


def read(path: Path) -> pl.DataFrame:
    """A raw file as it is: every column a string, an empty cell null.

    Raises:
        StepFailed: it is not a CSV file in UTF-8.
    """
    try:
        return pl.read_csv(path, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise StepFailed(f"{path} is not a CSV file in UTF-8: {str(error).splitlines()[0]}") from None


def generate(config: Config, folder: Path) -> Path:
    if config.data.sample is None:
        raise UsageError("data.sources has kind=sample, but data.sample is null: see configs/data/sample.yaml")
    knobs = config.data.sample
    sample.write(folder, knobs.english_rows, knobs.russian_rows, knobs.label_noise, config.seed)
    return folder


def find(place: Path, file: str) -> Path:
    """`file` in the folder `place`: plain, as .gz, as .zip or inside an archive of another name. `place` may be a .zip.

    Raises:
        UsageError: it is nowhere there.
    """
    if place.is_file() and place.suffix == ".zip":
        return place
    candidates = [place / file, place / f"{file}.gz", place / f"{file}.zip"]
    archives = [path for path in sorted(place.glob("*.zip")) if path not in candidates and members(path, file)]
    for path in candidates + archives:
        if path.is_file():
            return path
    raise UsageError(f"{place} has no {file}, {file}.gz, {file}.zip, nor another .zip with {file} in it")


def unpack(path: Path, file: str, target: Path) -> None:
    """Copies the CSV in `path` to `target`.

    Raises:
        StepFailed: it is damaged, larger than MAX_BYTES, or an archive not to be trusted.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as packed:
                copy(packed, target)
        elif path.suffix == ".zip":
            found = members(path, file)
            if len(found) != 1:
                raise StepFailed(f"{path} holds {len(found)} files named {file}, 1 is expected")
            with zipfile.ZipFile(path) as archive, archive.open(found[0]) as packed:
                copy(packed, target)
        else:
            with path.open("rb") as plain:
                copy(plain, target)
    except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise StepFailed(f"{path} cannot be read: {error}. Get the file again") from None


def members(path: Path, file: str) -> list[zipfile.ZipInfo]:
    """The members of an archive that are called `file`, in whichever folder, once the archive has been checked."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise StepFailed(f"{path} cannot be read: {error}. Get the file again") from None
    if len(infos) > MAX_MEMBERS:
        raise StepFailed(f"{path} holds {len(infos)} files, at most {MAX_MEMBERS} are unpacked")
    for info in infos:
        name = PurePosixPath(info.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts:
            raise StepFailed(f"{path} holds a file that points out of its folder: {info.filename!r}")
    return [info for info in infos if PurePosixPath(info.filename).name == file]


def copy(stream, target: Path) -> None:
    """Copies at most MAX_BYTES; what an archive says about sizes is not relied on."""
    with target.open("wb") as out:
        written = 0
        while block := stream.read(1 << 20):
            written += len(block)
            if written > MAX_BYTES:
                raise StepFailed(
                    f"{target.name} is larger than {MAX_BYTES / 2**30:.0f} GiB: this is not the set it names"
                )
            out.write(block)


def download(source: Source, folder: Path) -> Path:
    """Lets Kaggle's own client bring the file into `folder`, plain or zipped as Kaggle likes."""
    kind = "competitions" if source.kind == "kaggle_competition" else "datasets"
    if kind == "competitions" and not has_account():  # data sets can be had without one
        raise UsageError(
            f"Kaggle's competition {source.name} needs an account: set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and "
            "KAGGLE_KEY, or save ~/.kaggle/kaggle.json; or take the files from a folder: data=folder data.folder=PATH"
        )
    command = [sys.executable, "-m", "kaggle", "-W", kind, "download", source.name]
    done = subprocess.run(
        [*command, "--file", source.file, "--path", str(folder)], stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if done.returncode == 0:
        return folder
    said = without_secrets(done.stderr)
    if "403" in said and kind == "competitions":
        raise StepFailed(
            f"Kaggle refused {source.file} of {source.name} (403): accept the competition's rules once, in a browser: "
            f"https://www.kaggle.com/competitions/{source.name}/rules"
        )
    raise StepFailed(f"Kaggle's client could not download {source.file} of {source.name}: {said}")


def has_account() -> bool:
    """Whether Kaggle's client will find credentials in one of the places it looks in."""
    if os.environ.get("KAGGLE_API_TOKEN") or (os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY")):
        return True
    folders = [os.environ.get("KAGGLE_CONFIG_DIR"), "~/.kaggle", "~/.config/kaggle"]
    names = ("kaggle.json", "access_token", "credentials.json")
    return any((Path(folder).expanduser() / name).is_file() for folder in folders if folder for name in names)


def without_secrets(text: str) -> str:
    """The last line of what the client said, without tokens and signed addresses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = re.sub(r"\?\S+", "?…", lines[-1]) if lines else "it said nothing"
    for secret in filter(None, map(os.environ.get, SECRETS)):
        last = last.replace(secret, "***")
    return last
