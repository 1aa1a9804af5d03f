"""DVC versions for real, and the way back from a registered version to its data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from raw_data import SMALL, dvc_file
from signing import signed

import commands
from tasks import config as configuration
from tasks.data import prepare, restore, versions
from tasks.errors import StepFailed, UsageError
from tasks.promotion import register, registry
from tasks.run import find


@pytest.fixture
def config(workspace):
    return configuration.load(SMALL)


def test_a_version_names_the_content_and_is_in_the_remote(workspace, config):
    folder = workspace / "models" / "final"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("one")
    first = versions.version(config, folder)
    (folder / "weights").write_text("two")
    second = versions.version(config, folder)
    (folder / "weights").write_text("one")
    assert versions.version(config, folder) == first != second
    for version in (first, second):
        (entry,) = json.loads(dvc_file(workspace / "dvc-remote", version).read_text())
        assert dvc_file(workspace / "dvc-remote", entry["md5"]).is_file()


def test_a_killed_dvc_does_not_block_the_next_one(workspace, config):
    """Its lock is gone with it; what it wrote about itself is not, and its process id may be somebody else's by now."""
    folder = workspace / "data" / "raw"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("1")
    first = versions.version(config, folder)
    script = f"""
from tasks import config
from tasks.data import versions
with versions.alone(config.load({SMALL!r})):
    print("locked", flush=True)
    input()
"""
    root = Path(__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert holder.stdout.readline() == "locked\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    busy = {"write": {str(folder): {"pid": os.getppid(), "cmd": "dvc add"}}, "read": {}}
    for left_over in (json.dumps(busy), '{"write": {'):
        (workspace / ".dvc" / "tmp" / "rwlock").write_text(left_over)
        assert versions.version(config, folder) == first


def test_a_remote_that_does_not_take_it_is_named(workspace, config):
    folder = workspace / "data" / "raw"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("1")
    (workspace / "dvc-remote").write_text("not a folder")
    with pytest.raises(StepFailed, match="DVC could not keep a version of .*data/raw"):
        versions.version(config, folder)


def test_a_remote_whose_extra_is_not_installed_is_named(workspace):
    (workspace / "a.txt").write_text("a")
    with pytest.raises(StepFailed, match="requires 'dvc-oss' to be installed; its remote is oss://bucket/path, see"):
        versions.version(configuration.load([*SMALL, "versions.remote=oss://bucket/path"]), workspace / "a.txt")


def test_the_remote_is_the_one_of_the_configuration(workspace, tmp_path_factory):
    (workspace / "a.txt").write_text("1")
    elsewhere = tmp_path_factory.mktemp("remote")
    found = versions.version(configuration.load([*SMALL, f"versions.remote={elsewhere}"]), workspace / "a.txt")
    assert dvc_file(elsewhere, found).read_text() == "1"
    assert not (workspace / "dvc-remote").exists()


@pytest.fixture
def registered(raw):
    """A registered version, and other data prepared since: (config, number, {name: MD5 of the version's data})."""
    config, run, folder = raw
    client = registry.client(config)
    registry.ensure_model(config)
    mlflow_run = registry.training_run(config, run)
    for step in ("download", "train"):
        run.save(step, {"data_version": versions.version(config, folder), "mlflow_run": mlflow_run})
    prepared = prepare.run(config, run)
    run.save("prepare", prepared)
    register.log_pointers(config, run, "0" * 32)
    number = signed(config, client.create_model_version("toxic_classificator", "a/source", mlflow_run).version)
    wanted = {"raw": run.result("download")["data_version"], "processed": prepared["data_version"]}
    (folder / "labeled.csv").write_text((folder / "labeled.csv").read_text().replace("1.0", "0.0", 50))
    later = prepare.run(config, find(config.workspace, "b-run"))
    assert later["data_version"] != wanted["processed"]
    return config, number, wanted


def versions_in(config, folder):
    return {name: versions.current(config, folder / name) for name in restore.FOLDERS}


def bring_back(number, output_path=None, replace=False):
    return restore.run(SMALL, number, output_path, replace, "configs", "config")


def test_a_registered_version_brings_its_data_back_beside_the_newer(registered, tmp_path):
    config, number, wanted = registered
    before = versions_in(config, config.workspace / "data")
    found = bring_back(number, str(tmp_path / "out"))
    assert versions_in(config, tmp_path / "out") == wanted == found["data"]
    assert versions_in(config, config.workspace / "data") == before
    assert bring_back(number, str(tmp_path / "out"))["replaced"] == {}


def test_other_data_in_the_workspace_is_replaced_only_on_demand_and_can_be_had_again(registered):
    config, number, wanted = registered
    before = versions_in(config, config.workspace / "data")
    with pytest.raises(UsageError, match="holds other data than version 1 .*raw, processed.*--replace.*--output-path"):
        bring_back(number)
    assert versions_in(config, config.workspace / "data") == before
    assert bring_back(number, replace=True)["replaced"] == before
    assert versions_in(config, config.workspace / "data") == wanted
    with versions.fetched(config, before) as place:
        assert versions_in(config, place) == before


def test_data_comes_back_from_the_remote_alone(registered, tmp_path):
    config, number, wanted = registered
    shutil.rmtree(config.workspace / ".dvc" / "cache")
    bring_back(number, str(tmp_path / "out"))
    assert versions_in(config, tmp_path / "out") == wanted


def test_damaged_or_lost_data_stops_and_changes_nothing(registered, tmp_path):
    config, number, wanted = registered
    before = versions_in(config, config.workspace / "data")
    shutil.rmtree(config.workspace / ".dvc" / "cache")
    entries = json.loads(dvc_file(config.workspace / "dvc-remote", wanted["raw"]).read_text())
    (md5,) = [entry["md5"] for entry in entries if entry["relpath"] == "labeled.csv"]
    file = dvc_file(config.workspace / "dvc-remote", md5)
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_text("damaged")
    with pytest.raises(StepFailed, match="damaged"):
        bring_back(number, replace=True)
    file.unlink()
    with pytest.raises(StepFailed, match="version .* of raw can't be brought back: raw/labeled.csv is missing"):
        bring_back(number, replace=True)
    assert versions_in(config, config.workspace / "data") == before
    file.write_bytes(whole)
    bring_back(number, replace=True)
    assert versions_in(config, config.workspace / "data") == wanted


def test_a_version_without_dvc_files_and_one_that_is_not_there_are_named(registered):
    config, number, _ = registered
    client = registry.client(config)
    bare = client.create_run(client.get_experiment_by_name(config.mlflow.experiment).experiment_id).info.run_id
    signed(config, client.create_model_version("toxic_classificator", "a/source", bare).version)
    for missing, words in ((number + 1, "registered without its .dvc files"), (number + 2, "has no version 3")):
        with pytest.raises(UsageError, match=words):
            bring_back(missing)


def test_pruning_keeps_what_the_registry_a_run_or_the_workspace_names(registered):
    config, number, wanted = registered
    in_place = versions.current(config, config.workspace / "data" / "processed")
    for name, content in (("of a run", "1"), ("of nobody", "2")):
        (config.workspace / "data" / "extra").write_text(content)
        md5 = versions.version(config, config.workspace / "data" / "extra")
        if name == "of a run":
            find(config.workspace, "c-run").save("prepare", {"data_version": md5})
            of_a_run = md5
    (config.workspace / "data" / "extra").unlink()
    (config.workspace / "data" / "extra.dvc").unlink()
    restore.prune(SMALL, "configs", "config")
    shutil.rmtree(config.workspace / ".dvc" / "cache")
    with versions.fetched(config, wanted) as place:
        assert versions_in(config, place) == wanted
    with versions.fetched(config, {"processed": in_place, "extra": of_a_run}) as place:
        assert (place / "extra").read_text() == "1"
    assert not dvc_file(config.workspace / "dvc-remote", md5).exists()


def test_the_command_wants_a_number_or_prune(workspace, capfd):
    for arguments in ([], ["--version"], ["--version=latest"], ["--prune", "--version=1"]):
        assert commands.main(["data", *arguments]) == 2
        assert "data wants --version=N, a version's number in the registry, or --prune" in capfd.readouterr().err
