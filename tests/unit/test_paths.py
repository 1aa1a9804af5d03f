"""In which folders the project and its workspace may lie, and that their paths reach programs as they are."""

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from sqlalchemy.engine import make_url

import commands
from local import envs, services
from tasks import config as configuration
from tasks import files, paths
from tasks.data import splits, versions
from tasks.errors import UsageError

ROOT = Path(__file__).parents[2]
ODD = [
    "with space",
    "проект (1)",
    "50% of a%20b%2F",
    "what? #1",
    'it\'s "mine"',
    "$b & `c`; *[x]",
    "=a,b@c!~^+",
    " -lead and trail ",
]


@pytest.fixture(params=ODD)
def odd(request, tmp_path) -> Path:
    folder = tmp_path / request.param
    folder.mkdir()
    return folder


def test_nearly_any_folder_will_do(odd):
    paths.require_usable(odd, odd / "workspace")


@pytest.mark.parametrize(
    "name, said",
    [
        ("two\nlines", r"'\\n' in its path"),
        ("a\ttab", r"'\\t'"),
        ("a\udcff", "not UTF-8"),
        ("a$HOME", "a variable that is set"),
    ],
)
def test_what_no_program_takes_is_refused_in_one_line(tmp_path, monkeypatch, name, said):
    monkeypatch.setenv("HOME", "/root")
    for project, workspace in ((tmp_path / name, tmp_path), (tmp_path, tmp_path / name)):
        with pytest.raises(UsageError, match=f"{said}.*nothing was installed or started") as refused:
            paths.require_usable(project, workspace)
        assert len(str(refused.value).splitlines()) == 1
        assert ("TOXIC_WORKSPACE" in str(refused.value)) == (workspace.name == name)


def test_what_one_of_both_cannot_have_the_other_may(tmp_path):
    paths.require_usable(tmp_path / "{a}\\b", tmp_path / "a:b")
    with pytest.raises(UsageError, match="':' in its path, and PATH"):
        paths.require_usable(tmp_path / "a:b", tmp_path)
    for name in ("{run}", "back\\slash"):
        with pytest.raises(UsageError, match="the workspace.*DVC fails on it"):
            paths.require_usable(tmp_path, tmp_path / name)


def test_services_refuse_before_anything_is_there(tmp_path):
    at = services.Place(tmp_path / "a\nb", {name: 1 for name in services.PORTS})
    with pytest.raises(UsageError, match="nothing was installed or started"):
        services.start(at)
    assert list(tmp_path.iterdir()) == []


def test_so_does_a_step_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path / "a{b}"))
    assert commands.main(["download", "profile=demo"]) == 2
    assert "a{b}" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_database_is_where_its_address_says(odd):
    file = odd / "a.db"
    assert make_url(files.sqlite_url(file)).database == str(file)
    at = services.Place(odd, {name: 1 for name in services.PORTS})
    address = services.airflow_environment(at)["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"]
    assert os.path.expandvars(address) == address  # Airflow does that to what it is told
    database = make_url(address).database
    Path(database).parent.mkdir()
    sqlite3.connect(database).close()
    assert (at.airflow_home / "airflow.db").exists()


def test_mlflow_is_told_nothing_that_it_could_misread(odd):
    at = services.Place(odd, {name: 1 for name in services.PORTS})
    service = services.mlflow(at)
    assert not any(str(odd) in word for word in service.command) and service.folder == odd / "mlflow"


def test_tables_are_read_where_a_path_looks_like_a_pattern(tmp_path):
    workspace = tmp_path / "a[x]*?"
    (workspace / "data" / "processed").mkdir(parents=True)
    pl.DataFrame({"text": ["a"]}).write_parquet(workspace / "data" / "processed" / "train.parquet")
    assert len(splits.read(workspace, "train")) == 1


@pytest.mark.parametrize("remote", ["dvc-remote", "/backup #1, 'old'", '/a "b" %41/проект', "s3://bucket/path"])
def test_dvc_reads_the_remote_that_it_is_told(tmp_path, remote):
    from dvc.config import Config

    config = configuration.load(["profile=demo", f"versions.remote={remote}"])
    files.write_text(tmp_path / "config", versions.settings(config))
    told = Config.load_file(str(tmp_path / "config"))["remote"]["versions"]["url"]
    assert told == ("../dvc-remote" if remote == "dvc-remote" else remote)


def test_data_gets_a_version_in_an_odd_workspace(tmp_path):
    workspace = tmp_path / "it's 50% [of] #1? проект"
    config = configuration.load(["profile=demo"]).model_copy(update={"workspace": workspace})
    files.write_text(workspace / "data" / "raw" / "a.csv", "text\n")
    found = versions.version(config, workspace / "data" / "raw")
    with versions.fetched(config, {"raw": found}) as folder:
        assert (folder / "raw" / "a.csv").exists()


# make -----------------------------------------------------------------------------------------------------------------


def said_by_make(folder: Path, *arguments: str, **environment: str) -> list[str]:
    shutil.copy(ROOT / "Makefile", folder)
    rule = 'show: ; @printf "%s\\n" "$$TOXIC_WORKSPACE" "$$DATA_FOLDER"'
    own = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "TOXIC_WORKSPACE")}
    command = ["make", "--no-print-directory", f"--eval={rule}", "show", *arguments]
    return subprocess.check_output(command, cwd=folder, env={**own, **environment}, text=True).splitlines()


def test_make_hands_on_its_own_folder(odd):
    assert said_by_make(odd)[0] == f"{odd}/workspace"


@pytest.mark.parametrize("path", ["/a b/$c d", '/it\'s "$HOME" #1', "/50%(x)"])
def test_make_hands_on_paths_as_they_were_written(tmp_path, path):
    assert said_by_make(tmp_path, f"DATA={path}", f"TOXIC_WORKSPACE={path}") == [path, path]
    assert said_by_make(tmp_path, DATA=path, TOXIC_WORKSPACE=path) == [path, path]


# The environments -----------------------------------------------------------------------------------------------------


def on_path(folder: Path, monkeypatch, **versions: str) -> None:
    """A PATH with nothing but programs that say they were such a version of Python."""
    folder.mkdir()
    for name, version in versions.items():
        program = folder / name.replace("_", ".")
        program.write_text(f"#!/bin/sh\necho {version}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("PYTHON", raising=False)


def test_the_environments_get_a_python_that_fits(tmp_path, monkeypatch, capfd):
    on_path(tmp_path / "a b", monkeypatch, python3="3.13", python3_12="3.12", python3_13="3.13")
    assert envs.chosen_python() == f"{tmp_path}/a b/python3.12"
    assert "3.12 is used" in capfd.readouterr().err
    on_path(tmp_path / "c", monkeypatch, python3="3.11", python3_12="3.12")
    assert envs.chosen_python() == f"{tmp_path}/c/python3.12"
    on_path(tmp_path / "d", monkeypatch, python3="3.13")
    assert envs.chosen_python() == "3.11"  # which uv is to bring


def test_a_python_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    on_path(tmp_path / "bin", monkeypatch, python3_13="3.13")
    for named, said in {"python3.13": "is Python 3.13", "/no/python": "does not run"}.items():
        monkeypatch.setenv("PYTHON", named)
        with pytest.raises(UsageError, match=f"PYTHON={named} {said}: name a Python 3.11 or 3.12"):
            envs.chosen_python()


def test_a_home_that_cannot_be_written_is_left_alone(tmp_path, monkeypatch):
    for name in ("UV_CACHE_DIR", "UV_PYTHON_INSTALL_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TORCH_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))  # below a file there is no folder, not for root either
    found = envs.surroundings()
    assert found["UV_CACHE_DIR"].startswith(str(envs.VENVS)) and found["UV_PYTHON_INSTALL_DIR"].startswith(
        str(envs.VENVS)
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "UV_CACHE_DIR" not in envs.surroundings()


def test_a_mirror_that_pip_is_told_of_is_uvs_too(monkeypatch):
    for name in ("UV_FIND_LINKS", "UV_DEFAULT_INDEX", "PIP_FIND_LINKS", "TORCH_BACKEND", "UV_TORCH_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    assert envs.surroundings()["UV_TORCH_BACKEND"] == "cpu"
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    found = envs.surroundings()
    assert (found["UV_DEFAULT_INDEX"], found["UV_FIND_LINKS"]) == ("https://mirror.example/simple", "/wheels")
    assert "UV_TORCH_BACKEND" not in found


def test_nothing_is_installed_for_a_workspace_that_will_not_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["envs"])
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path / "a{b}"))
    assert envs.main() == 2
    assert "the workspace" in capsys.readouterr().err
