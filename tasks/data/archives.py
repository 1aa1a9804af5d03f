"""Opens what came from outside: plain, gzip or zip, told apart by content, each checked before and while it unpacks.

Only one file is ever taken out of an archive, and under the name that the configuration gives it, so a member's own
path decides nothing; an archive that tries something with paths, links or sizes is refused all the same.
"""

import gzip
import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tasks.config import Unpack
from tasks.errors import StepFailed
from tasks.files import DISK_FULL

ZIP, EMPTY_ZIP, GZIP = b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b"
OLD_WORKBOOK = b"\xd0\xcf\x11\xe0"
SPREADSHEETS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers")
BLOCK = 1 << 20
AGAIN = "Get the file again"
SPREADSHEET = "is a spreadsheet in its program's own format: open it there and save it as “CSV UTF-8”"


def is_hidden(name: str) -> bool:
    """Whether a name is that of no file of a person's own: AppleDouble (`._x.csv`), a lock (`.~lock.x.csv#`), or the
    owner file of an office program (`~$x.csv`)."""
    return name.startswith((".", "~$"))


def unpack(path: Path, file: str, target: Path, limits: Unpack, name: str | None = None) -> None:
    """Copies the file `file` out of `path` to `target`; a copy that fails leaves nothing behind.

    Args:
        path: the file itself, its .gz, or a .zip that holds it in whichever folder.
        name: what `path` was called where it comes from, if it is called otherwise here.

    Raises:
        StepFailed: it is no archive, damaged, not to be trusted, a web page, or larger than the limits or the disk.
    """
    name = name or path.name
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise StepFailed(
            f"{path} cannot be read: {error.strerror}. The user that runs this step must be able to"
        ) from None
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        raise StepFailed(
            f"{name} is a web page instead of data: it was saved without being logged in, or a proxy answered in "
            "its place. Open the address in a browser, log in, and get the file again"
        )
    if head.startswith(OLD_WORKBOOK):
        raise StepFailed(f"{name} {SPREADSHEET}")
    try:
        if head.startswith((ZIP, EMPTY_ZIP)):
            unpack_zip(path, file, target, limits, name)
        elif name.lower().endswith((".zip", ".gz")) and not head.startswith(GZIP):
            raise StepFailed(f"{name} is not a {name.rsplit('.', 1)[1]} file: it begins with {head[:16]!r}. {AGAIN}")
        elif head.startswith(GZIP):
            with gzip.open(path) as packed:
                copy(packed, target, path.stat().st_size, limits, name)
        else:
            with path.open("rb") as plain:
                copy(plain, target, path.stat().st_size, limits, name)
    except OSError as error:
        target.unlink(missing_ok=True)
        if error.errno in DISK_FULL:
            free = shutil.disk_usage(target.parent).free / 2**30
            raise StepFailed(
                f"{name} does not fit on the disk: {target.parent} has {free:.1f} GiB free ({error.strerror}). What is "
                "unpacked of it is removed again: free some space and run again"
            ) from None
        raise StepFailed(f"{name} cannot be read: {error}. {AGAIN}") from None
    except (EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        target.unlink(missing_ok=True)
        raise StepFailed(f"{name} is truncated or damaged: {error}. {AGAIN}") from None
    except StepFailed:
        target.unlink(missing_ok=True)
        raise


def unpack_zip(path: Path, file: str, target: Path, limits: Unpack, name: str) -> None:
    found = members(path, file, limits, name)
    if not found and is_spreadsheet(path):
        raise StepFailed(f"{name} {SPREADSHEET}")
    if len(found) != 1:
        raise StepFailed(f"{name} holds {len(found)} files named {file}, 1 is expected; {contents(path)}")
    (member,) = found
    if member.flag_bits & 1:
        raise StepFailed(f"{name} is encrypted: unpack it with its password, and name the folder as the source")
    require_size(member.file_size, member.compress_size, limits, f"{file} in {name}")
    free = shutil.disk_usage(target.parent).free
    if member.file_size > free:
        raise StepFailed(
            f"{file} in {name} takes {member.file_size / 2**30:.1f} GiB, {target.parent} has {free / 2**30:.1f} GiB "
            "free: free some space and run again"
        )
    with zipfile.ZipFile(path) as archive, archive.open(member) as packed:
        copy(packed, target, member.compress_size, limits, f"{file} in {name}")


def members(path: Path, file: str, limits: Unpack, name: str | None = None) -> list[zipfile.ZipInfo]:
    """The members of a zip that are called `file`, in whichever folder, once its whole list has been checked.

    Raises:
        StepFailed: it cannot be read, lists too many files, or one that is a link or points out of its folder.
    """
    name = name or path.name
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise StepFailed(f"{name} is truncated or not a zip file: {error}. {AGAIN}") from None
    if len(infos) > limits.max_members:
        raise StepFailed(
            f"{name} holds {len(infos)} files, at most {limits.max_members} are allowed: unpack.max_members"
        )
    for info in infos:
        inner = PurePosixPath(info.filename.replace("\\", "/"))
        if inner.is_absolute() or ".." in inner.parts or inner.parts[:1] and inner.parts[0].endswith(":"):
            raise StepFailed(
                f"{name} holds a file that points out of its folder: {info.filename!r}. It is not what it should be: "
                "do not unpack it by hand either"
            )
        if stat.S_ISLNK(info.external_attr >> 16):
            raise StepFailed(f"{name} holds a symbolic link: {info.filename!r}. Pack the file itself instead")
    names = [PurePosixPath(info.filename.replace("\\", "/")).name for info in infos]
    found = [info for info, own in zip(infos, names) if own == file]
    return found or [info for info, own in zip(infos, names) if own.casefold() == file.casefold()]


def is_spreadsheet(path: Path) -> bool:
    """Whether a zip is what .xlsx and .ods are inside."""
    with zipfile.ZipFile(path) as archive:
        return not {"[Content_Types].xml", "content.xml"}.isdisjoint(archive.namelist())


def contents(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return f"it has {', '.join(names[:10])}{' …' if len(names) > 10 else ''}" if names else "it is empty"


def copy(stream, target: Path, packed: int, limits: Unpack, name: str) -> None:
    """Copies a stream of `packed` bytes, unpacked as it comes: what an archive says about sizes is not relied on."""
    with target.open("wb") as out:
        written = 0
        while block := stream.read(BLOCK):
            written += len(block)
            require_size(written, packed, limits, name)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())  # a full disk may say so only now


def require_size(size: int, packed: int, limits: Unpack, name: str) -> None:
    """Raises StepFailed where `size` bytes are more than the limits let `packed` bytes become."""
    if size > limits.max_gib * 2**30:
        raise StepFailed(
            f"{name} is larger than {limits.max_gib:g} GiB: it is not the set it is taken for, or raise unpack.max_gib"
        )
    if size > BLOCK and size > limits.max_ratio * packed:
        raise StepFailed(
            f"{name} unpacks to more than {limits.max_ratio:g} times its {packed} bytes, as a zip bomb does: get it "
            "from where you trust it, or raise unpack.max_ratio"
        )
