"""Writing so that a half-written file or folder is never seen: beside its place first, then renamed into it."""

import errno
import hashlib
import json
import logging
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from tasks.errors import StepFailed

log = logging.getLogger(__name__)


class Damaged(StepFailed, ValueError):
    """A file that the project has written does not hold what it should."""


# What an OSError says where there is no room: on the disk, in the quota, under the limit of a file's size.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_bytes(content)
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path):
    """What a JSON file says.

    Raises:
        Damaged: it is cut off, say, by a machine that lost its power.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(
            f"{path} is damaged ({error}): put it back from a backup, or remove it and run again what writes it"
        ) from None


def read_note(path: Path) -> dict:
    """What a JSON file says that is written anew wherever it is missing; empty where it is missing or damaged."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except Damaged as damaged:
        log.warning("%s", damaged)
        return {}


@contextmanager
def new_folder(target: Path):
    """Yields an empty folder; when the block ends well it takes the place of `target`, else it is removed.

    What a killed process left half-done under the same name is removed first.
    """
    beside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():  # killed between the two renames below
        old.rename(target)
    for left_over in (beside, old):
        shutil.rmtree(left_over, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    beside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def sqlite_url(file: Path) -> str:
    """The address of an SQLite database as SQLAlchemy reads it: a path may hold what means something in a URL."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(file)).render_as_string()


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative file names and contents in sorted order."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def require_free_disk(folder: Path, gib: float) -> None:
    """Raises StepFailed where fewer than `gib` GiB are free: a step that fills the disk takes service with it."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 2**30
    if free < gib:
        raise StepFailed(
            f"{folder} has {free:.1f} GiB free, {gib} GiB are needed: free some, or lower disk.min_free_gib"
        )
