"""Versions of data and models in a DVC repository inside the workspace, pushed to its remote."""

import fcntl
import logging
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import yaml

from tasks import files
from tasks.config import Config
from tasks.errors import StepFailed

log = logging.getLogger(__name__)

COMMITTED_CONFIG = Path(__file__).resolve().parents[2] / ".dvc" / "config"
URL = "../dvc-remote"  # in it


def version(config: Config, path: Path) -> str:
    """Adds a file or folder of the workspace to DVC, pushes it and returns its MD5 (`….dir` for a folder).

    The same content gives the same version, so a repeated step changes nothing.

    Raises:
        StepFailed: DVC could not add or push it.
    """
    with repository(config, f"keep a version of {path}") as repo:
        (stage,) = repo.add(str(path))
        repo.push(targets=[f"{path}.dvc"])
        found = stage.outs[0].hash_info.value
    log.info("DVC version of %s: %s", path.relative_to(config.workspace), found)
    return found


def pointer(name: str, md5: str) -> str:
    """The content of the file `<name>.dvc` that stands for a version."""
    return yaml.safe_dump({"outs": [{"md5": md5, "hash": "md5", "path": name}]}, sort_keys=False)


def pointed_to(file: Path) -> str:
    """The MD5 that a .dvc file stands for."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))["outs"][0]["md5"]


def current(config: Config, path: Path) -> str:
    """The version that the files at `path` are, hashed anew, whether DVC knows it or not."""
    from dvc.fs import LocalFileSystem
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.state import StateNoop

    with repository(config, f"hash {path}") as repo:
        repo.cache.local.state = StateNoop()  # which remembers hashes, also those that files should have had
        _, _, found = build(repo.cache.local, str(path), LocalFileSystem(), "md5", dry_run=True)
    return found.hash_info.value


@contextmanager
def fetched(config: Config, wanted: dict[str, str]):
    """Yields a folder with the versions {name: MD5} in it, checked against their MD5, and removes it afterwards.

    Raises:
        StepFailed: the remote does not have one, or what it has is damaged.
    """
    place = config.workspace / "data" / ".fetched"
    shutil.rmtree(place, ignore_errors=True)
    try:
        for name, md5 in wanted.items():
            files.write_text(place / f"{name}.dvc", pointer(name, md5))
            with repository(config, f"bring back version {md5} of {name}") as repo:
                repo.pull(targets=[str(place / f"{name}.dvc")])
            found = current(config, place / name)
            if found != md5:
                raise StepFailed(
                    f"what {config.versions.remote} has as version {md5} of {name} is {found}: it is damaged"
                )
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def prune(config: Config, kept: set[str]) -> int:
    """Removes every version but the `kept` ones and those in the workspace now, here and in the remote.

    Returns the number of bytes that this freed in the workspace.
    """
    place = config.workspace / "data" / ".kept"
    before = size(config.workspace)
    try:
        for md5 in sorted(kept):
            files.write_text(place / f"{md5}.dvc", pointer(md5, md5))
        with repository(config, "remove old versions") as repo:
            repo.gc(workspace=True, cloud=True, force=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return before - size(config.workspace)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@contextmanager
def repository(config: Config, purpose: str):
    """Yields the workspace's DVC repository, for one step at a time; what DVC raises becomes a StepFailed."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    own = {"core": {"site_cache_dir": str(config.workspace / ".dvc" / "site_cache")}}
    with alone(config):
        try:
            with Repo(str(config.workspace), config=own) as repo:
                yield repo
        except (DvcException, ImportError, OSError) as error:  # ImportError: the extra of that remote is missing
            said = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
            raise StepFailed(
                f"DVC could not {purpose}: {said}; its remote is {config.versions.remote}, see versions.remote in the "
                "configuration"
            ) from error


@contextmanager
def alone(config: Config):
    """One step at a time in the workspace's repository, which is made where it is missing.

    The kernel drops our lock with the process that held it. DVC's own `rwlock` outlives its process and goes by process
    ids, which mean nothing in another container; whoever holds our lock may remove it, and half-copied files with it.
    """
    folder = config.workspace / ".dvc"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "step.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # All that `dvc init --no-scm` would leave here, and the remote of our own configuration.
        files.write_text(folder / "config", COMMITTED_CONFIG.read_text(encoding="utf-8").replace(URL, url(config)))
        (folder / "tmp" / "rwlock").unlink(missing_ok=True)
        for half_copied in [
            *folder.glob("cache/files/*/*/.*.tmp"),
            *config.workspace.glob("dvc-remote/files/*/*/.*.tmp"),
        ]:
            half_copied.unlink()
        yield


def url(config: Config) -> str:
    """The remote as `.dvc/config` has it: a relative folder starts from there."""
    remote = config.versions.remote
    return remote if "://" in remote or Path(remote).is_absolute() else f"../{remote}"
