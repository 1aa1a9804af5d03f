"""Versions of data and models in a DVC repository inside the workspace, pushed to its remote."""

import fcntl
import logging
from contextlib import contextmanager
from pathlib import Path

from tasks import files
from tasks.errors import StepFailed

log = logging.getLogger(__name__)

COMMITTED_CONFIG = Path(__file__).resolve().parents[2] / ".dvc" / "config"


def version(workspace: Path, path: Path) -> str:
    """Adds a file or folder of the workspace to DVC, pushes it and returns its MD5 (`….dir` for a folder).

    The same content gives the same version, so a repeated step changes nothing.

    Raises:
        StepFailed: DVC could not add or push it.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with alone(workspace):
        try:
            with Repo(
                str(workspace), config={"core": {"site_cache_dir": str(workspace / ".dvc" / "site_cache")}}
            ) as repo:
                (stage,) = repo.add(str(path))
                repo.push(targets=[f"{path}.dvc"])
                found = stage.outs[0].hash_info.value
        except (DvcException, OSError) as error:
            raise StepFailed(
                f"DVC could not keep a version of {path}: {error}; its remote is set in {workspace / '.dvc' / 'config'}"
            ) from error
    log.info("DVC version of %s: %s", path.relative_to(workspace), found)
    return found


@contextmanager
def alone(workspace: Path):
    """One step at a time in the workspace's repository, which is made where it is missing.

    The kernel drops our lock with the process that held it. DVC's own `rwlock` outlives its process and goes by process
    ids, which mean nothing in another container; whoever holds our lock may remove it, and half-copied files with it.
    """
    config = workspace / ".dvc" / "config"
    if not config.exists():
        # All that `dvc init --no-scm` would leave here; in one step, so that a killed start leaves nothing half-made.
        files.write_text(config, COMMITTED_CONFIG.read_text(encoding="utf-8"))
    with (config.parent / "step.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (config.parent / "tmp" / "rwlock").unlink(missing_ok=True)
        for half_copied in [
            *config.parent.glob("cache/files/*/*/.*.tmp"),
            *workspace.glob("dvc-remote/files/*/*/.*.tmp"),
        ]:
            half_copied.unlink()
        yield
