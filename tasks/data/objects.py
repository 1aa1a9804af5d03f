"""The objects of a DVC repository, in its cache and its remote: each a file that is named by the MD5 of its content.

DVC goes by the name: what lies there and is read-only is whole to it, is never written again, and is "up-to-date". Here
an object is what its content says. A folder's version is an object too, its listing (`….dir`): JSON with the name and
the MD5 of every file in it.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from tasks.errors import without_credentials
from tasks.files import DISK_FULL

log = logging.getLogger(__name__)

LISTING = ".dir"


def of(version, name: str) -> dict[str, str]:
    """The objects of a version that is loaded or built, {MD5: the file's name}: the files first, and their listing
    last, since DVC takes a listing that is there as a sign that its files are.
    """
    if not is_listing(version.oid):
        return {version.oid: name}
    return {**{oid.value: f"{name}/{'/'.join(key)}" for key, _, oid in version}, version.oid: f"the listing of {name}"}


def is_listing(oid: str) -> bool:
    return oid.endswith(LISTING)


def damage(store, oid: str) -> str | None:
    """What is wrong with an object in a cache or a remote; None where it is whole. All of it is read.

    Raises whatever a remote that does not answer raises: that says nothing about what it holds.
    """
    from dvc_data.hashfile.hash import file_md5
    from dvc_objects.fs import LocalFileSystem

    path = store.oid_to_path(oid)
    try:
        if file_md5(path, store.fs) == oid.removesuffix(LISTING):
            return None
        return f"damaged (its {store.fs.size(path) or 0:,} bytes have another MD5)"
    except FileNotFoundError:
        return "missing"
    except IsADirectoryError:
        return "a folder"
    except OSError as error:
        if not isinstance(store.fs, LocalFileSystem):
            raise
        return f"unreadable ({error.strerror or error})"


def keep(store, objects: dict[str, str], source) -> None:
    """Puts into a cache or remote, from a source where they are whole, those objects that are not whole there.

    What was there by its name is read and hashed; what is written now is measured by its size.

    Raises:
        OSError: something could not be written, or what came to be is not as long as it should be.
    """
    wrong = {oid: said for oid in objects if (said := damage(store, oid))}
    for oid, said in wrong.items():
        if said != "missing":
            log.warning("%s is %s: written anew", where(store, oid), said)
    sources = {oid: source.get(oid) for oid in wrong}
    by_kind = defaultdict(list)  # a listing just built is in memory, the files it names are on disk
    for oid, found in sources.items():
        by_kind[found.fs].append(oid)
    for fs, oids in by_kind.items():
        write(fs, [sources[oid].path for oid in oids], store, [store.oid_to_path(oid) for oid in oids])
    for oid, found in sources.items():
        path = store.oid_to_path(oid)
        written, wanted = store.fs.size(path), found.fs.size(found.path)
        if written not in (wanted, None):  # not every web server says it
            raise OSError(f"{where(store, oid)} has {written} bytes, not {wanted}, just after it was written")
        store.protect(path)


def write(fs, paths: list[str], store, targets: list[str]) -> None:
    """Copies files into a cache or remote, over what is there. On a disk each is written beside its place first, and
    renamed; an object store does the like.
    """
    from dvc_objects.fs import generic

    for target in targets:
        if store.fs.isdir(target):
            store.fs.remove(target, recursive=True)
        store.makedirs(store.fs.parent(target))
    generic.copy(fs, paths, store.fs, targets)


def bring(cache, objects: dict[str, str], remote, spares: Callable[[], Iterable]) -> list[str]:
    """Makes objects whole in the cache, from the remote or else from `spares`, files of the workspace that may be the
    same. Nothing whole is touched, and nothing damaged before what takes its place has been read and hashed.

    Returns a sentence for each object that is whole nowhere: which file it is, and what is wrong in both places.

    Raises:
        OSError: the disk is full.
    """
    lost = {}
    for oid, name in objects.items():
        here = damage(cache, oid)
        if here is None:
            continue
        there = take(cache, oid, remote)
        if there is None:
            log.warning("%s is %s in the cache: taken from the remote", name, here)
        else:
            lost[oid] = f"{name} is {here} in the cache ({where(cache, oid)}) and {there} in the remote"
            lost[oid] += f" ({where(remote, oid)})" if remote.fs else ""
    for spare in spares() if lost else ():
        for oid in [oid for oid in lost if spare.exists(oid) and take(cache, oid, spare) is None]:
            log.warning("%s: taken from the workspace", lost.pop(oid))
    return list(lost.values())


def take(cache, oid: str, source) -> str | None:
    """Brings an object into the cache if it is whole in `source`; else returns what is wrong with it there."""
    from dvc_data.hashfile.hash import file_md5
    from dvc_objects.fs.utils import tmp_fname

    target = Path(cache.oid_to_path(oid))
    beside = target.parent / tmp_fname()
    cache.makedirs(str(target.parent))
    try:
        found = source.get(oid)
        found.fs.get_file(found.path, str(beside))
        if beside.is_dir():
            return "a folder"
        if file_md5(str(beside), cache.fs) != oid.removesuffix(LISTING):
            return f"damaged (its {beside.stat().st_size:,} bytes have another MD5)"
        if target.is_dir():
            cache.fs.remove(str(target), recursive=True)
        beside.replace(target)
        cache.protect(str(target))
        return None
    except FileNotFoundError:
        return "missing"
    except IsADirectoryError:
        return "a folder"
    except Exception as error:  # every remote's library has its own
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        return f"not to be had ({without_credentials(str(error)) or type(error).__name__})"
    finally:
        cache.fs.remove(str(beside), recursive=True)


class Silent:
    """Stands for a remote that does not answer, so that it is not asked for each object anew."""

    fs = None

    def __init__(self, error: Exception):
        self.error = error

    def get(self, oid: str):
        raise self.error

    oid_to_path = get


def remote_of(repo):
    """The repository's remote, or what stands for it where it does not answer."""
    try:
        remote = repo.cloud.get_remote_odb()
        remote.fs.exists(remote.path)
        return remote
    except Exception as error:  # every remote's library has its own
        return Silent(error)


def where(store, oid: str) -> str:
    return without_credentials(store.fs.unstrip_protocol(store.oid_to_path(oid)))
