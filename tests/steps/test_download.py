"""Sources and download for real: folders, archives, DVC and a registry in SQLite. Kaggle has test_kaggle.py."""

import gzip
import shutil
import zipfile

import polars as pl
import pytest
from raw_data import SMALL, dvc_file, from_folder, registered

from tasks import config as configuration
from tasks import files
from tasks.data import download, prepare, sample, sources
from tasks.errors import Skip, StepFailed, UsageError
from tasks.promotion import registry
from tasks.step import execute


def packed_plain(source, folder):
    shutil.copy(source, folder)


def packed_gz(source, folder):
    (folder / f"{source.name}.gz").write_bytes(gzip.compress(source.read_bytes()))


def packed_zip(source, folder):
    with zipfile.ZipFile(folder / f"{source.name}.zip", "w") as archive:
        archive.write(source, source.name)


def packed_in_an_archive_of_another_name(source, folder):
    with zipfile.ZipFile(folder / "archive.zip", "a") as archive:
        archive.write(source, f"inner/{source.name}")


@pytest.mark.parametrize("pack", [packed_plain, packed_gz, packed_zip, packed_in_an_archive_of_another_name])
def test_a_folder_may_hold_the_files_as_kaggle_or_people_pack_them(workspace, kaggle_files, pack):
    given, raw = workspace / "given", workspace / "raw"
    given.mkdir(), raw.mkdir()
    for name in (sample.JIGSAW_FILE, sample.RUSSIAN_FILE):
        pack(kaggle_files / name, given)
    config = from_folder(given)
    for source in config.data.sources:
        sources.fetch(source, config, raw, workspace / "incoming")
    for name in (sample.JIGSAW_FILE, sample.RUSSIAN_FILE):
        assert (raw / name).read_bytes() == (kaggle_files / name).read_bytes()
    assert sorted(path.name for path in raw.iterdir()) == ["feedback.csv", sample.JIGSAW_FILE, sample.RUSSIAN_FILE]


def test_a_missing_file_is_named_with_all_that_was_looked_for(tmp_path):
    with pytest.raises(UsageError, match="has no labeled.csv, labeled.csv.gz, labeled.csv.zip, nor another .zip"):
        sources.find(tmp_path, "labeled.csv", configuration.load().unpack)


def test_a_source_may_be_an_archive_itself(workspace, kaggle_files):
    raw = workspace / "raw"
    raw.mkdir()
    for name in (sample.JIGSAW_FILE, sample.RUSSIAN_FILE):
        packed_in_an_archive_of_another_name(kaggle_files / name, workspace)
    config = from_folder(workspace / "archive.zip")
    for source in config.data.sources:
        sources.fetch(source, config, raw, workspace / "incoming")
    for name in (sample.JIGSAW_FILE, sample.RUSSIAN_FILE):
        assert (raw / name).read_bytes() == (kaggle_files / name).read_bytes()


def test_moderators_labels_come_beside_kaggles_files_from_a_folder(workspace, kaggle_files):
    overrides = ["profile=demo", "data=folder", f"data.folder={kaggle_files}", "data.min_rows=500"]
    overrides += ["disk.min_free_gib=0"]
    without = execute("download", download.run, overrides)
    assert without["rows"]["feedback.csv"] == 0
    assert execute("prepare", prepare.run, overrides)["dropped"]["overruled"] == 0
    text, toxic = (
        sources.read(kaggle_files / sample.RUSSIAN_FILE)
        .filter(pl.col("comment").is_unique())
        .select("comment", "toxic")
        .row(0)
    )
    (workspace / "feedback").mkdir()
    decided = pl.DataFrame({"text": [text], "toxic": [1 - int(float(toxic))], "decided_at": ["2026-11-20"]})
    decided.with_columns(language=pl.lit("ru")).write_csv(workspace / "feedback" / "week-47.csv")
    result = execute("download", download.run, overrides)
    assert result["rows"]["feedback.csv"] == 1 and result["fingerprint"] != without["fingerprint"]
    assert execute("prepare", prepare.run, overrides)["dropped"]["overruled"] > 0


def test_a_missing_folder_is_named_before_anything_is_fetched(workspace, tmp_path):
    with pytest.raises(UsageError, match="nowhere has no jigsaw.*: put it there, or name another folder or archive"):
        execute("download", download.run, ["data=folder", f"data.folder={tmp_path}/nowhere", "disk.min_free_gib=0"])
    assert not (workspace / "data" / "raw").exists()


def test_download_brings_versions_and_names_what_it_brought(workspace):
    result = execute("download", download.run, SMALL)
    raw = workspace / "data" / "raw"
    assert result["rows"] == {sample.JIGSAW_FILE: 500, sample.RUSSIAN_FILE: 500}
    assert result["files"] == {path.name: files.sha256(path) for path in raw.iterdir()}
    assert dvc_file(workspace / "dvc-remote", result["data_version"]).is_file()
    again = execute("download", download.run, SMALL)
    assert (again["data_version"], again["fingerprint"]) == (result["data_version"], result["fingerprint"])


def test_download_skips_what_already_has_a_verdict_unless_forced(workspace):
    first = execute("download", download.run, SMALL)
    version = registered(SMALL, first)
    assert execute("download", download.run, SMALL)["status"] == "done"  # registered, but no verdict yet
    registry.record(configuration.load(SMALL), version, verdict="rejected")
    with pytest.raises(Skip, match=f"nothing new since run {first['run_id']}: version 1 was rejected") as skip:
        execute("download", download.run, SMALL)
    assert skip.value.result["fingerprint"] == first["fingerprint"]
    assert execute("download", download.run, [*SMALL, "force=true"])["status"] == "done"
    assert execute("download", download.run, [*SMALL, "training.num_train_epochs=1"])["status"] == "done"


def test_the_last_good_copy_stays_when_a_source_fails(workspace, kaggle_files, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(kaggle_files, given)
    overrides = ["profile=demo", "data=folder", f"data.folder={given}", "disk.min_free_gib=0"]
    execute("download", download.run, overrides)
    (given / sample.RUSSIAN_FILE).write_bytes(b"comment,toxic\n\xff\xfe broken,1.0\n")
    with pytest.raises(StepFailed, match="labeled.csv is not a CSV file in UTF-8"):
        execute("download", download.run, overrides)
    raw = workspace / "data" / "raw"
    assert (raw / sample.RUSSIAN_FILE).read_bytes() == (kaggle_files / sample.RUSSIAN_FILE).read_bytes()
    assert not list(workspace.glob("data/.raw*"))


def test_old_runs_go_but_not_those_the_registry_names(workspace):
    config = configuration.load(SMALL)
    first = execute("download", download.run, SMALL)["run_id"]
    registry.ensure_model(config)
    registry.client(config).create_model_version(config.mlflow.registered_model, "file:///x", tags={"run_id": first})
    registry.set_alias(config, "champion", 1)
    later = [execute("download", download.run, [*SMALL, "disk.keep_runs=2"])["run_id"] for _ in range(3)]
    assert {path.name for path in (workspace / "runs").iterdir()} == {first, *later[-2:]}


def test_a_full_disk_stops_before_anything_is_fetched(workspace):
    with pytest.raises(StepFailed, match="GiB are needed"):
        execute("download", download.run, [*SMALL, "disk.min_free_gib=1000000"])
    assert not (workspace / "data").exists()


def test_two_sources_cannot_have_the_same_file(workspace):
    twice = "{kind: sample, name: sample, file: labeled.csv, schema: russian, language: ru}"
    with pytest.raises(UsageError, match="each file needs a name of its own"):
        execute("download", download.run, [*SMALL, f"data.sources=[{twice},{twice}]"])


@pytest.mark.parametrize("file", ["jigsaw.json", "behaviour.yaml"])
def test_expectations_are_part_of_the_fingerprint(tmp_path, monkeypatch, file):
    for folder in ("tasks", "expectations"):
        shutil.copytree(download.SOURCE_ROOT / folder, tmp_path / folder)
    config = configuration.load(SMALL)
    monkeypatch.setattr(download, "SOURCE_ROOT", tmp_path)
    before = download.fingerprint(config, {})
    path = tmp_path / "expectations" / file
    path.write_text(path.read_text() + "\n")
    assert download.fingerprint(config, {}) != before
