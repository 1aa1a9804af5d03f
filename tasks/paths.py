"""Which folders the project and its workspace may lie in: nearly any; what is impossible is refused first thing.

Standard library only, and any Python 3: it is used before anything is installed, too.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from tasks.errors import UsageError

# What a folder is called in words, what must not be in its path and why not, and what to do.
PROJECT = ("the project's folder", os.pathsep, "PATH and PYTHONPATH end a folder's name there", "move it")
WORKSPACE = ("the workspace", "\\{}", "DVC fails on it", "name another folder in TOXIC_WORKSPACE")


def require_usable(project: Path, workspace: Path) -> None:
    """Raises UsageError where a folder's path can't be handed on to a program that needs it; the workspace may be below
    the project's folder, or elsewhere."""
    require(project, *PROJECT)
    require(workspace, *WORKSPACE)


def require(path: Path, what: str, forbidden: str, why: str, way_out: str) -> None:
    """Raises UsageError where a path will not do: one of PROJECT or WORKSPACE."""
    if problem := unusable(str(path), forbidden, why):
        raise UsageError(f"{what}, {str(path)!r}, {problem}: {way_out}; nothing was installed or started")


def unusable(path: str, forbidden: str, why: str) -> str | None:
    """What is wrong with a path, in words; None where it will do."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "has bytes in its path that are not UTF-8"
    if control := next((c for c in path if unicodedata.category(c) in ("Cc", "Zl", "Zp")), None):
        return f"has {control!r} in its path, where no configuration file can hold it"
    if found := next((c for c in path if c in forbidden), None):
        return f"has {found!r} in its path, and {why}"
    if os.path.expandvars(path) != path:
        return "names in its path, after a $, a variable that is set: Airflow would put its value there"
    return None


def can_write(folder: Path) -> bool:
    """Whether a folder is there, or can be made, and takes files."""
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return False
    return os.access(folder, os.W_OK | os.X_OK)
