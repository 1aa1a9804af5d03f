"""Containers of steps whose Airflow task is gone: after a kill, or the death of a worker, nothing else would end them.

Every step's container says by a label which process waits for it. One whose process is gone does work that nobody will
use, in the way of the next try. `python -m dags.orphans` ends those; so does every step before it starts its own.
"""

import logging
import os
import socket
from pathlib import Path

from docker import APIClient
from docker.errors import APIError, NotFound

log = logging.getLogger(__name__)

STACK = "toxic.workspace"  # the label that all containers of one stack's steps share
OWNER = "toxic.owner"


def owner_label() -> str:
    """This process, as no other will ever be called: host, pid and start time."""
    return f"{socket.gethostname()} {os.getpid()} {started(os.getpid())}"


def is_alive(owner: str) -> bool:
    """Whether the process that a label names still runs. All of a stack's steps are started by its one scheduler."""
    host, pid, start = owner.split()
    return host == socket.gethostname() and started(int(pid)) == int(start)


def started(pid: int) -> int | None:
    """When a process started, in clock ticks since the host did, which setting the clock does not change; None without
    one that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # man 5 proc, from the third on
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def end_orphans(engine: APIClient, workspace: str) -> list[str]:
    """Removes the containers of this stack's steps that nobody waits for; returns which steps they were."""
    ended = []
    for container in engine.containers(all=True, filters={"label": [f"{STACK}={workspace}", OWNER]}):
        labels = container["Labels"]
        if is_alive(labels[OWNER]):
            continue
        log.warning("ending the orphaned container of %s of run %s", labels.get("toxic.step"), labels.get("toxic.run"))
        end(engine, container["Id"])
        ended.append(labels.get("toxic.step", "?"))
    return ended


def end(engine: APIClient, container: str, remove: bool = True) -> None:
    """Tells a container to end, so that a training can write its checkpoint, and removes it; fine if it is gone."""
    try:
        engine.stop(container, timeout=30)
        if remove:
            engine.remove_container(container, force=True)
    except NotFound:
        pass  # another was faster
    except APIError as error:
        if error.status_code != 409:  # its removal is already under way
            raise


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    end_orphans(APIClient(os.environ["DOCKER_HOST"]), os.environ["TOXIC_WORKSPACE_VOLUME"])
