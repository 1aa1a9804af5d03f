"""Sources and download for real: archives, DVC and a registry in SQLite; only Kaggle itself is played, by a server
behind Kaggle's own client."""

import gzip
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from raw_data import SMALL, dvc_file, from_folder

from tasks import config as configuration
from tasks import files
from tasks.data import download, sample, sources
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
