"""Versions of data and models in a DVC repository inside the workspace, pushed to its remote."""

import fcntl
import logging
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from tasks import files
from tasks.config import Config
from tasks.data import objects
from tasks.errors import StepFailed, without_credentials

log = logging.getLogger(__name__)

COMMITTED_CONFIG = Path(__file__).resolve().parents[2] / ".dvc" / "config"


def version(config: Config, path: Path) -> str:
    """Keeps a file or folder of the workspace in DVC's cache and its remote; returns its MD5 (`….dir` for a folder).

    The same content gives the same version, so a repeated step changes nothing. What is there already under its name
    is read: where it is damaged, it is written anew.

    Raises:
        StepFailed: it could not be written to the cache or the remote.
    """
    from dvc.fs import localfs
    from dvc_data.hashfile.build import build

    with repository(config, f"keep a version of {path}") as repo:
        staged, _, made = build(repo.cache.local, str(path), localfs, "md5", ignore=repo.dvcignore)
        parts = objects.of(made, path.name)
        objects.keep(repo.cache.local, parts, staged)
        objects.keep(repo.cloud.get_remote_odb(), parts, repo.cache.local)
        files.write_text(pointer_file(path), pointer(path.name, made.oid))
    log.info("DVC version of %s: %s", path.relative_to(config.workspace), made.oid)
    return made.oid


def pointer_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.dvc")


def pointer(name: str, md5: str) -> str:
    """The content of the file `<name>.dvc` that stands for a version."""
    return yaml.safe_dump({"outs": [{"md5": md5, "hash": "md5", "path": name}]}, sort_keys=False)


def pointed_to(file: Path) -> str | None:
    """The MD5 that a .dvc file stands for, or None where it is damaged."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))["outs"][0]["md5"]
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError):
        return None
    return found if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", str(found)) else None


def current(config: Config, path: Path) -> str:
    """The version that the files at `path` are, hashed anew, whether DVC knows it or not."""
    from dvc.fs import localfs
    from dvc_data.hashfile.build import build

    with repository(config, f"hash {path}") as repo:
        _, _, found = build(repo.cache.local, str(path), localfs, "md5", dry_run=True)
    return found.hash_info.value


@contextmanager
def fetched(config: Config, wanted: dict[str, str]):
    """Yields a folder with the versions {name: MD5} in it, and removes it afterwards.

    Cache and remote are both read: what is damaged in one is taken from the other, or from the workspace's own files.

    Raises:
        StepFailed: a part of one is whole nowhere, or could not be written.
    """
    from dvc.fs import localfs
    from dvc_data.hashfile.checkout import checkout

    place = config.workspace / "data" / ".fetched"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        for name, md5 in wanted.items():
            with repository(config, f"bring back version {md5} of {name}") as repo:
                made = whole(repo, md5, name)
                checkout(str(place / name), localfs, made, repo.cache.local, force=True)
            if (found := current(config, place / name)) != md5:
                raise StepFailed(f"what came back as version {md5} of {name} is {found}: start again")
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def whole(repo, md5: str, name: str):
    """A version that is whole in the cache, loaded from there; in the remote too, where that can be written to."""
    from dvc_data.hashfile import load
    from dvc_data.hashfile.hash_info import HashInfo

    cache, remote = repo.cache.local, objects.remote_of(repo)
    first = {md5: f"the listing of {name}" if objects.is_listing(md5) else name}
    lost = objects.bring(cache, first, remote, lambda: own_files(repo))
    parts = first if lost else objects.of(made := load(cache, HashInfo("md5", md5)), name)
    lost = lost or objects.bring(cache, parts, remote, lambda: own_files(repo))
    if lost:
        raise StepFailed(f"version {md5} of {name} can't be brought back: {'; '.join(lost)}. {WAY_OUT}")
    try:
        objects.keep(remote, parts, cache)
    except Exception as error:  # every remote's library has its own
        log.warning("version %s of %s is whole in the cache; the remote could not be mended: %s", md5, name, error)
    return made


WAY_OUT = (
    "Put a whole copy into one of the two places, from a backup, say, and start again; or have the step that made "
    "the files (download, prepare, register) make and keep the same ones anew"
)


def own_files(repo):
    """The workspace's own files that have a version, each as a store of what the cache would have of them."""
    from dvc.fs import localfs
    from dvc_data.hashfile.build import build

    for file in pointers(Path(repo.root_dir)):
        with suppress(OSError):  # it may be gone, or hard to read itself
            yield build(repo.cache.local, str(file.with_suffix("")), localfs, "md5", ignore=repo.dvcignore)[0]


def pointers(workspace: Path) -> list[Path]:
    """The .dvc files that `version` has written."""
    return sorted([*workspace.glob("data/*.dvc"), *workspace.glob("models/*/*.dvc")])


def prune(config: Config, kept: dict[str, str]) -> int:
    """Removes every version but the `kept` ones {MD5: who names it} and those in the workspace now, here and in the
    remote.

    Returns the number of bytes that this freed in the workspace.

    Raises:
        StepFailed: the listing of one that is kept is whole nowhere. Without it nobody knows which files are its own,
            and DVC would remove them all.
    """
    require_pointers(config)
    place = config.workspace / "data" / ".kept"
    shutil.rmtree(place, ignore_errors=True)
    before = size(config.workspace)
    try:
        for md5 in sorted(kept):
            files.write_text(place / f"{md5}.dvc", pointer(md5, md5))
        with repository(config, "remove old versions") as repo:
            named = {out.hash_info.value: str(out) for out in repo.index.outs} | kept
            listings = {md5: f"the listing of {name}" for md5, name in named.items() if objects.is_listing(md5)}
            lost = objects.bring(repo.cache.local, listings, objects.remote_of(repo), lambda: own_files(repo))
            if lost:
                raise StepFailed(f"nothing is removed, since {'; '.join(lost)}. {WAY_OUT}; or delete what names it")
            repo.gc(workspace=True, cloud=True, force=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return before - size(config.workspace)


def require_pointers(config: Config) -> None:
    """Writes anew the .dvc files that are damaged, by hashing what they stand for: DVC takes an empty one for the wish
    to keep nothing.

    Raises:
        StepFailed: one that is not ours is damaged, or what it stood for is gone.
    """
    ours = pointers(config.workspace)
    for file in [path for path in config.workspace.rglob("*.dvc") if path.is_file() and not pointed_to(path)]:
        if file not in ours or not file.with_suffix("").exists():
            raise StepFailed(
                f"nothing is removed, since {file} is damaged and may have named a version: put it back from a backup, "
                "or remove it if nobody needs that version"
            )
        log.warning("%s was damaged: written anew", file)
        version(config, file.with_suffix(""))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@contextmanager
def repository(config: Config, purpose: str):
    """Yields the workspace's DVC repository, for one step at a time; what DVC raises becomes a StepFailed."""
    from dvc.repo import Repo, lock_repo

    try:
        with alone(config), Repo(str(config.workspace), config=own_settings(config)) as repo, lock_repo(repo):
            yield repo
    except StepFailed:
        raise
    except Exception as error:  # DVC's, the system's, and those of the library that a remote needs, or lacks
        said = " ".join(re.sub(r"\x1b\[\d*m", "", str(error) or type(error).__name__).split())
        log.debug("DVC could not %s", purpose, exc_info=True)
        raise StepFailed(
            f"DVC could not {purpose}: {without_credentials(said)}; its remote is "
            f"{without_credentials(config.versions.remote)}, see versions.remote in the configuration"
        ) from error


def own_settings(config: Config) -> dict:
    """What DVC remembers (hashes by time and size, what the remote has) is a step's own and starts empty: it would hold
    for unchanged what is damaged, and a damaged memory stops DVC.
    """
    return {"core": {"site_cache_dir": str(config.workspace / ".dvc" / "site_cache")}}


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
        files.write_text(folder / "config", settings(config))
        shutil.rmtree(folder / "site_cache", ignore_errors=True)
        (folder / "tmp" / "rwlock").unlink(missing_ok=True)
        remove_half_copied(config)
        try:
            yield
        finally:
            remove_half_copied(config)


def remove_half_copied(config: Config) -> None:
    """Removes what a full disk or a killed process has left half-copied, in the workspace alone: in a remote outside,
    another workspace's step may be copying.
    """
    remote = (config.workspace / config.versions.remote).resolve()
    ours = "://" not in config.versions.remote and remote.is_relative_to(config.workspace.resolve())
    for store in (config.workspace / ".dvc" / "cache", *([remote] if ours else [])):
        for half_copied in store.glob("files/*/*/.*.tmp"):
            half_copied.unlink()


def settings(config: Config) -> str:
    """All that `dvc init --no-scm` would leave here, and the remote of our own configuration."""
    from configobj import ConfigObj  # what DVC reads it with: it quotes a path with a `#` or a comma in it

    parsed = ConfigObj(COMMITTED_CONFIG.read_text(encoding="utf-8").splitlines(), interpolation=False)
    parsed['remote "versions"']["url"] = url(config)
    return "\n".join(parsed.write()) + "\n"


def url(config: Config) -> str:
    """The remote as `.dvc/config` has it: a relative folder starts from there."""
    remote = config.versions.remote
    return remote if "://" in remote or Path(remote).is_absolute() else f"../{remote}"
