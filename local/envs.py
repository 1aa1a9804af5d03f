"""The environments that everything runs in: `.venv/tasks`, `.venv/airflow` and `.venv/triton`, made by uv.

    python3 -m local.envs [envs | tests | constraints]

`envs` makes those that are missing or older than their lists of packages, `tests` adds what the tests alone need, and
`constraints` resolves the newest versions. Any Python 3.8 or newer runs this; the environments get PYTHON, or the first
of 3.11 and 3.12 that is here, or a 3.11 that uv brings. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tasks import paths, proxies
from tasks.errors import StepFailed, UsageError

ROOT = Path(__file__).resolve().parents[1]
VENVS = ROOT / ".venv"
# Triton's Python models need NumPy 1, which has no packages for 3.13 and later.
PYTHONS = ("3.11", "3.12")
TASKS = ["--constraint", "constraints.txt", "--editable"]
PACKAGES = {  # what an environment holds; the file that its versions are from is the second word
    "tasks": [*TASKS, ".[dev]"],
    "airflow": ["--constraint", "constraints.txt", "--group", "airflow"],
    "triton": ["--constraint", "constraints-triton.txt", "--group", "triton"],
}
FOR_TESTS = [*TASKS, ".[dev,tensorrt-rtx]"]  # builds engines without a GPU: 150 MB
RESOLVED = {
    "constraints.txt": "pyproject.toml --extra dev --extra tensorrt-rtx --group airflow --group airflow-image "
    "--group mlflow-image",
    "constraints-triton.txt": "--group triton --generate-hashes",
}
# The versions of constraints.txt with the hashes of their files, and those of DVC's remotes: what the images install.
HASHED = "constraints-images.txt"
IMAGES = "pyproject.toml --group airflow-image --group mlflow-image --extra s3 --extra gs --extra ssh --generate-hashes"


def make(for_tests: bool = False) -> None:
    """Makes the environments that are missing or out of date; what was cut off is made anew.

    Raises:
        UsageError: the folder, a proxy or the Python will not do; nothing was installed.
        StepFailed: something could not be installed.
    """
    paths.require_usable(ROOT, Path(os.environ.get("TOXIC_WORKSPACE") or ROOT / "workspace"))
    environment = surroundings()
    missing = [name for name, packages in PACKAGES.items() if is_older(VENVS / name / ".done", packages)]
    if missing:
        python = chosen_python()
        for name in missing:
            print(f"installing .venv/{name} …", file=sys.stderr, flush=True)
            uv(environment, "venv", "--quiet", "--clear", "--python", python, str(VENVS / name), python=python)
            install(environment, name, PACKAGES[name])
            (VENVS / name / ".done").touch()
    added = VENVS / "tasks" / ".tensorrt-rtx"
    if for_tests and is_older(added, FOR_TESTS):
        install(environment, "tasks", FOR_TESTS)
        added.touch()


def is_older(stamp: Path, packages: list[str]) -> bool:
    """Whether what a stamp stands for is missing, or older than the lists of packages that it was made from."""
    sources = [ROOT / "pyproject.toml", ROOT / packages[1]]
    return not stamp.exists() or stamp.stat().st_mtime < max(source.stat().st_mtime for source in sources)


def install(environment: dict[str, str], name: str, packages: list[str]) -> None:
    python = str(VENVS / name / "bin" / "python")
    uv(environment, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, *packages)


def resolve() -> None:
    """Resolves the newest versions into the constraints files, whose comments stay."""
    environment = surroundings()
    for name, groups in {**RESOLVED, HASHED: IMAGES}.items():
        file = ROOT / name
        head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        more = ["--constraint", "constraints.txt"] if name == HASHED else ["--upgrade"]
        options = [*"--universal --python-version 3.11 --no-annotate --no-header --quiet".split(), *more]
        uv(environment, "pip", "compile", *groups.split(), *options, "-o", name)
        found = file.read_text(encoding="utf-8")
        # A CPU's torch is another file than PyPI's, from PyTorch's own index.
        found = re.sub(r"^(torch==[^\\]*?) *\\\n(?: +--hash=.*\n)+", r"\1\n", found, flags=re.MULTILINE)
        file.write_text("\n".join([*head, found]), encoding="utf-8")


def surroundings() -> dict[str, str]:
    """uv's environment. It looks for wheels, and for an index, where pip is told to look."""
    environment = {**os.environ, **proxies.in_order(os.environ)}
    for name, of_pip in (("UV_FIND_LINKS", "PIP_FIND_LINKS"), ("UV_DEFAULT_INDEX", "PIP_INDEX_URL")):
        if not environment.get(name) and environment.get(of_pip):
            environment[name] = environment[of_pip]
    # Where nothing is told, torch comes from PyTorch's own CPU index: PyPI's build brings 3 GB of CUDA, of no use to a
    # laptop. Behind a mirror of PyPI alone: TORCH_BACKEND=
    backend = environment.get("TORCH_BACKEND", "" if environment.get("UV_FIND_LINKS") else "cpu")
    if backend:
        environment["UV_TORCH_BACKEND"] = backend
    if not paths.can_write(Path(environment.get("XDG_CACHE_HOME") or "~/.cache")):
        environment.setdefault("UV_CACHE_DIR", str(VENVS / "cache"))
    if not paths.can_write(Path(environment.get("XDG_DATA_HOME") or "~/.local/share")):
        environment.setdefault("UV_PYTHON_INSTALL_DIR", str(VENVS / "python"))
    return environment


def chosen_python() -> str:
    """The Python of the environments, as uv takes it: a path, or the version that uv shall find or bring.

    Raises:
        UsageError: PYTHON names none that will do.
    """
    if named := os.environ.get("PYTHON"):
        found = version_of(named)
        if found not in PYTHONS:
            what = f"is Python {found}" if found else "does not run"
            raise UsageError(f"PYTHON={named} {what}: name a Python {' or '.join(PYTHONS)}; nothing was installed")
        return shutil.which(named) or named
    for name in [*(f"python{version}" for version in PYTHONS), "python3", "python"]:
        found = version_of(name)
        if found in PYTHONS:
            if found != PYTHONS[0]:
                print(
                    f"Python {found} is used, {shutil.which(name)}: there is no {PYTHONS[0]} on PATH", file=sys.stderr
                )
            return shutil.which(name)
    return PYTHONS[0]


def version_of(python: str) -> str | None:
    """ "3.11"; None where there is no such program, or it does not run."""
    ask = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=60).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def uv(environment: dict[str, str], *arguments: str, python: str | None = None) -> None:
    """Runs uv, the one on PATH or one of our own.

    Args:
        python: of the environment that is made, as `chosen_python` gives it.
    """
    program = shutil.which("uv") or own_uv(environment)
    done = subprocess.run([program, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return
    said = " ".join(done.stderr.split())
    if python in PYTHONS:
        here = ", ".join(sorted({version_of(name) or "" for name in ("python3", "python")} - {""})) or "none"
        raise UsageError(
            f"there is no Python {' or '.join(PYTHONS)} on PATH, only {here}, and uv could not bring one: install one, "
            f"or name it with PYTHON=/path/to/python3.11; uv says: {said[:300]}"
        )
    proxy = proxies.in_the_way(environment.get("UV_DEFAULT_INDEX", "https://pypi.org"))
    raise StepFailed(f"uv {' '.join(arguments[:2])} failed{proxy}: {said[:1000]}")


def own_uv(environment: dict[str, str]) -> str:
    """A uv in an environment of its own, where there is none on PATH."""
    folder = VENVS / "uv"
    if not (folder / "bin" / "uv").exists():
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "uv"],
        ):
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0:
                said = " ".join(done.stdout.split())[:1000]
                proxy = proxies.in_the_way("https://pypi.org")
                raise StepFailed(
                    f"there is no uv on PATH, and {sys.executable} could not install one{proxy} ({said}): install uv "
                    "(https://docs.astral.sh/uv/), or Python's venv and pip (Debian: python3-venv)"
                )
    return str(folder / "bin" / "uv")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local.envs", description="The environments in .venv")
    parser.add_argument("action", nargs="?", default="envs", choices=["envs", "tests", "constraints"])
    action = parser.parse_args().action
    try:
        if action == "constraints":
            resolve()
        else:
            make(for_tests=action == "tests")
    except (UsageError, StepFailed) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        print(f"{VENVS} can't be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
