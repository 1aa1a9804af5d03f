"""Download, validation, preparation and versions for real: files, DVC, Great Expectations and a registry in SQLite.

Only Kaggle itself is played, by a server behind Kaggle's own client.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest

from tasks import config as configuration
from tasks import files
from tasks.data import download, prepare, sample, sources, validate, versions
from tasks.errors import Skip, StepFailed, UsageError
from tasks.promotion import registry
from tasks.run import find
from tasks.step import execute

SMALL = [
    "profile=demo",
    "data.sample.english_rows=500",
    "data.sample.russian_rows=500",
    "data.min_rows=500",
    "disk.min_free_gib=0",
]


@pytest.fixture(scope="module")
def kaggle_files(tmp_path_factory):
    """Both files, as Kaggle names them."""
    folder = tmp_path_factory.mktemp("kaggle")
    sample.write(folder, 500, 500, label_noise=0.02, seed=1)
    return folder


@pytest.fixture
def raw(workspace, kaggle_files):
    """A workspace with raw data in place: (config, run, folder)."""
    folder = workspace / "data" / "raw"
    shutil.copytree(kaggle_files, folder)
    return configuration.load(SMALL), find(workspace, "a-run"), folder


def from_folder(folder, **values):
    overrides = ["data=folder", f"data.folder={folder}", *(f"{key}={value}" for key, value in values.items())]
    return configuration.load(["profile=demo", *overrides])


def rewrite(path, change):
    """Changes a CSV file: `change` gets and returns a frame of strings."""
    change(sources.read(path)).write_csv(path)


# Sources -------------------------------------------------------------------------------------------------------------


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
def test_a_folder_may_hold_the_files_as_kaggle_or_people_pack_them(tmp_path, kaggle_files, pack):
    given, raw = tmp_path / "given", tmp_path / "raw"
    given.mkdir(), raw.mkdir()
    for name in (sample.JIGSAW_FILE, sample.RUSSIAN_FILE):
        pack(kaggle_files / name, given)
    config = from_folder(given)
    for source in config.data.sources:
        path = sources.fetch(source, config, raw)
        assert path == raw / source.file and path.read_bytes() == (kaggle_files / source.file).read_bytes()
    assert sorted(path.name for path in raw.iterdir()) == [sample.JIGSAW_FILE, sample.RUSSIAN_FILE]


def test_a_missing_file_is_named_with_all_that_was_looked_for(tmp_path):
    with pytest.raises(UsageError, match="has no labeled.csv, labeled.csv.gz, labeled.csv.zip, nor another .zip"):
        sources.find(tmp_path, "labeled.csv")


@pytest.mark.parametrize("member", ["../labeled.csv", "/labeled.csv", "a/../../labeled.csv", "..\\labeled.csv"])
def test_an_archive_that_points_out_of_its_folder_is_refused(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "labeled.csv.zip", "w") as archive:
        archive.writestr(member, "comment,toxic\n")
    with pytest.raises(StepFailed, match="points out of its folder"):
        sources.unpack(tmp_path / "labeled.csv.zip", "labeled.csv", tmp_path / "out.csv")


def test_an_archive_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_MEMBERS", 2)
    with zipfile.ZipFile(tmp_path / "labeled.csv.zip", "w") as archive:
        for name in ("labeled.csv", "a", "b"):
            archive.writestr(name, "comment,toxic\n")
    with pytest.raises(StepFailed, match="3 files, at most 2"):
        sources.unpack(tmp_path / "labeled.csv.zip", "labeled.csv", tmp_path / "out.csv")


@pytest.mark.parametrize("pack", [packed_gz, packed_zip])
def test_a_file_that_unpacks_to_too_much_is_stopped(tmp_path, monkeypatch, kaggle_files, pack):
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    pack(kaggle_files / "labeled.csv", tmp_path)
    with pytest.raises(StepFailed, match="labeled.csv is larger than"):
        sources.unpack(sources.find(tmp_path, "labeled.csv"), "labeled.csv", tmp_path / "labeled.csv")


@pytest.mark.parametrize("suffix", [".gz", ".zip"])
def test_a_truncated_archive_is_named(tmp_path, kaggle_files, suffix):
    {".gz": packed_gz, ".zip": packed_zip}[suffix](kaggle_files / "labeled.csv", tmp_path)
    path = tmp_path / f"labeled.csv{suffix}"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StepFailed, match="cannot be read"):
        sources.unpack(path, "labeled.csv", tmp_path / "out.csv")


# Kaggle --------------------------------------------------------------------------------------------------------------


class Kaggle(BaseHTTPRequestHandler):
    """Kaggle as its client sees it: a method that answers with a redirect to the file, zipped."""

    refuse = {}  # method -> status

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        method = self.path.rsplit("/", 1)[1]
        if method in self.refuse:
            self.answer(self.refuse[method], b'{"message": "refused"}')
        elif method == "GetDatasetMetadata":
            self.answer(200, b'{"info": {"licenses": [{"name": "CC0-1.0"}]}}')
        elif method in ("DownloadDataFile", "DownloadDataset"):
            name = {"DownloadDataFile": sample.JIGSAW_FILE, "DownloadDataset": sample.RUSSIAN_FILE}[method]
            self.send_response(302)
            self.send_header("Location", f"http://localhost/files/{name}.zip?signature=secret")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.answer(404, b"{}")

    def do_GET(self):
        name = self.path.split("?")[0].rsplit("/", 1)[1]
        self.answer(200, (self.server.folder / name).read_bytes(), "application/zip")

    def answer(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def kaggle(tmp_path, kaggle_files, monkeypatch):
    """A server that Kaggle's client takes for Kaggle, and an account."""
    served = tmp_path / "served"
    served.mkdir()
    for path in kaggle_files.iterdir():
        packed_zip(path, served)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Kaggle)
    server.folder = served
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "")
    for name in ("HTTP_PROXY", "NO_PROXY", "KAGGLE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", "0123456789abcdef")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Kaggle, "refuse", {})
    yield Kaggle
    server.shutdown()
    server.server_close()


@pytest.fixture
def kaggle_config():
    return configuration.load(["data=toxic_data"])


def test_both_sets_come_through_kaggles_client(tmp_path, kaggle, kaggle_config, kaggle_files):
    for source in kaggle_config.data.sources:
        path = sources.fetch(source, kaggle_config, tmp_path)
        assert path.read_bytes() == (kaggle_files / source.file).read_bytes()


def test_a_competition_whose_rules_are_not_accepted_names_the_page(tmp_path, kaggle, kaggle_config):
    kaggle.refuse["DownloadDataFile"] = 403
    with pytest.raises(StepFailed, match="accept the competition's rules.*multilingual-toxic-comment.*/rules"):
        sources.fetch(kaggle_config.data.sources[0], kaggle_config, tmp_path)


def test_another_failure_says_what_the_client_said(tmp_path, kaggle, kaggle_config):
    kaggle.refuse["DownloadDataset"] = 500
    with pytest.raises(StepFailed, match="could not download labeled.csv of blackmoon/.*500"):
        sources.fetch(kaggle_config.data.sources[1], kaggle_config, tmp_path)


def test_a_competition_needs_an_account(tmp_path, kaggle, kaggle_config, monkeypatch):
    monkeypatch.delenv("KAGGLE_KEY")
    with pytest.raises(UsageError, match="set KAGGLE_API_TOKEN.*or take the files from a folder: data=folder"):
        sources.fetch(kaggle_config.data.sources[0], kaggle_config, tmp_path)


def test_tokens_and_signed_addresses_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "0123456789abcdef")
    said = sources.without_secrets("Traceback\n403 for url: http://storage/file?X-Signature=abc key 0123456789abcdef\n")
    assert said == "403 for url: http://storage/file?… key ***"


# Download ------------------------------------------------------------------------------------------------------------


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
    config = configuration.load(SMALL)
    registry.ensure_model(config)
    known = {"run_id": first["run_id"], "fingerprint": first["fingerprint"]}
    version = registry.client(config).create_model_version(config.mlflow.registered_model, "file:///x", tags=known)
    assert execute("download", download.run, SMALL)["status"] == "done"  # registered, but no verdict yet
    registry.tag(config, int(version.version), verdict="rejected")
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


# Validation ----------------------------------------------------------------------------------------------------------


def test_a_good_sample_passes_both_stages(raw):
    config, run, _ = raw
    found = validate.run(config, run, "raw")
    assert found["passed"] and found["warnings"] == 0
    assert {verdict["suite"] for verdict in found["expectations"]} == {"jigsaw", "russian"}
    prepare.run(config, run)
    found = validate.run(config, run, "prepared")
    assert found["passed"] and found["warnings"] == 0
    assert files.read_json(run.folder / "validation_prepared.json") == found


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.drop("threat"), "expect_table_columns_to_match_set"),
        (lambda rows: rows.head(100), "expect_table_row_count_to_be_between found 100, expected is min_value 500"),
        (lambda rows: rows.with_columns(insult=pl.lit("2")), "expect_column_values_to_be_in_set of insult"),
        (lambda rows: rows.with_columns(toxic=pl.lit(None)), "expect_column_values_to_not_be_null of toxic"),
        (lambda rows: rows.with_columns(toxic=pl.lit("1")), "expect_column_mean_to_be_between of toxic found 1.0"),
        (lambda rows: rows.with_columns(comment_text=pl.lit("same")), "proportion_of_unique_values"),
    ],
)
def test_broken_raw_data_stops_and_says_where(raw, change, message):
    config, run, folder = raw
    rewrite(folder / sample.JIGSAW_FILE, change)
    with pytest.raises(StepFailed, match=f"{sample.JIGSAW_FILE}: .*{message}"):
        validate.run(config, run, "raw")


def test_failing_rows_are_named_by_their_id_or_number(raw):
    config, run, folder = raw
    ids = sources.read(folder / sample.JIGSAW_FILE)["id"]
    broken = pl.int_range(pl.len()).is_in([7, 9])
    for name in (sample.JIGSAW_FILE, sample.RUSSIAN_FILE):
        toxic = pl.when(broken).then(pl.lit("yes")).otherwise("toxic").alias("toxic")
        rewrite(folder / name, lambda rows: rows.with_columns(toxic))
    with pytest.raises(StepFailed, match=f"2 of 500 values fail, such as 'yes' .rows {ids[7]}, {ids[9]}."):
        validate.run(config, run, "raw")
    kept = files.read_json(run.folder / "validation_raw.json")
    failed = [v for v in kept["expectations"] if not v["success"] and v["expectation"].endswith("be_in_set")]
    assert not kept["passed"]
    assert [(v["suite"], v["rows"]) for v in failed] == [("jigsaw", [ids[7], ids[9]]), ("russian", [8, 10])]


def test_a_warning_is_counted_and_does_not_stop(raw):
    config, run, folder = raw
    rewrite(
        folder / sample.JIGSAW_FILE, lambda rows: rows.with_columns(id=rows["id"].shift(1, fill_value=rows["id"][0]))
    )
    found = validate.run(config, run, "raw")
    assert found["passed"] and found["warnings"] == 1
    (failed,) = [verdict for verdict in found["expectations"] if not verdict["success"]]
    assert (failed["column"], failed["severity"]) == ("id", "warning")


def test_a_message_in_two_splits_stops(raw):
    config, run, _ = raw
    prepare.run(config, run)
    processed = config.workspace / "data" / "processed"
    train, test = (pl.read_parquet(processed / f"{split}.parquet") for split in ("train", "test"))
    pl.concat([train, test.head(1)]).write_parquet(processed / "train.parquet")
    with pytest.raises(StepFailed, match=f"expect_column_values_to_be_unique of id.*{test['id'][0]}"):
        validate.run(config, run, "prepared")


def test_a_suite_that_was_edited_wrongly_is_named(raw, tmp_path, monkeypatch):
    config, run, _ = raw
    shutil.copytree(validate.SUITES, tmp_path / "suites")
    monkeypatch.setattr(validate, "SUITES", tmp_path / "suites")
    for content in ("{", '{"name": "jigsaw", "meta": {"row_id": "id"}, "expectations": [{"type": "expect_magic"}]}'):
        (tmp_path / "suites" / "jigsaw.json").write_text(content)
        with pytest.raises(UsageError, match="jigsaw.json is not a suite of Great Expectations"):
            validate.run(config, run, "raw")


# Preparation and versions --------------------------------------------------------------------------------------------


def test_prepare_accounts_for_every_row_and_is_repeatable(raw):
    config, run, _ = raw
    found = prepare.run(config, run)
    splits = {split: pl.read_parquet(config.workspace / f"data/processed/{split}.parquet") for split in prepare.SPLITS}
    assert {split: found[split] for split in splits} == {split: frame.height for split, frame in splits.items()}
    assert sum(found[split] for split in splits) + sum(found["dropped"].values()) == 1000
    assert min(found["dropped"][reason] for reason in ("empty", "duplicate", "conflicting")) > 0
    train = splits["train"]
    assert found["labels"]["train"]["en"]["obscene"] == train["obscene"].sum()
    assert found["labels"]["train"]["ru"]["rows"] == train.filter(language="ru").height
    assert train.filter(language="ru").select(pl.col("insult").is_null().all()).item()
    assert train.filter(language="en").select(pl.col("insult").is_not_null().all()).item()
    assert prepare.run(config, run)["data_version"] == found["data_version"]


def test_prepare_stops_when_too_little_is_left(raw):
    config, run, _ = raw
    config.data.min_rows = 1000
    with pytest.raises(StepFailed, match=r"messages are left of 1000 raw rows .* data.min_rows asks for 1000"):
        prepare.run(config, run)
    assert not (config.workspace / "data" / "processed").exists()


def test_prepare_without_a_download_names_the_command(workspace):
    with pytest.raises(UsageError, match="run `python commands.py download` first"):
        prepare.run(configuration.load(SMALL), find(workspace, "a-run"))


def dvc_file(store, version):
    return store / "files" / "md5" / version[:2] / version[2:]


def test_a_version_names_the_content_and_is_in_the_remote(workspace):
    folder = workspace / "models" / "final"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("one")
    first = versions.version(workspace, folder)
    (folder / "weights").write_text("two")
    second = versions.version(workspace, folder)
    (folder / "weights").write_text("one")
    assert versions.version(workspace, folder) == first != second
    for version in (first, second):
        (entry,) = json.loads(dvc_file(workspace / "dvc-remote", version).read_text())
        assert dvc_file(workspace / "dvc-remote", entry["md5"]).is_file()


def test_a_killed_dvc_does_not_block_the_next_one(workspace):
    """Its lock is gone with it; what it wrote about itself is not, and its process id may be somebody else's by now."""
    folder = workspace / "data" / "raw"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("1")
    first = versions.version(workspace, folder)
    script = f"""
from pathlib import Path
from tasks.data import versions
with versions.alone(Path({str(workspace)!r})):
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
        assert versions.version(workspace, folder) == first


def test_a_remote_that_does_not_take_it_is_named(workspace):
    folder = workspace / "data" / "raw"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("1")
    (workspace / "dvc-remote").write_text("not a folder")
    with pytest.raises(StepFailed, match="DVC could not keep a version of .*data/raw"):
        versions.version(workspace, folder)
