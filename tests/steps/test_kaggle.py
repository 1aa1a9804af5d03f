"""Kaggle's own client, in its process, against a server on loopback: a test for each way to fail."""

import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from fake_kaggle import SIGNATURE, TOKEN, FakeKaggle
from raw_data import files_of_at_most, registered

from tasks import config as configuration
from tasks import files
from tasks.data import download, kaggle, sample
from tasks.errors import Skip, StepFailed, UsageError
from tasks.step import execute

QUICK = ["kaggle.backoff_s=0.01", "kaggle.attempts=3", "kaggle.stall_s=20", "disk.min_free_gib=0"]
JIGSAW = "data.sources=[{kind: kaggle_competition, name: a-competition, file: %s, schema: jigsaw, language: en}]"
RUSSIAN = "data.sources=[{kind: kaggle_dataset, name: somebody/comments, file: %s, schema: russian, language: ru}]"
COMPETITION = [*QUICK, JIGSAW % sample.JIGSAW_FILE]
DATA_SET = [*QUICK, RUSSIAN % sample.RUSSIAN_FILE]


def packed(content, name=sample.RUSSIAN_FILE, **more):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:  # stored, so that sizes are known
        for member, text in {name: content, **more}.items():
            archive.writestr(member, text)
    return whole.getvalue()


@pytest.fixture
def server(workspace, kaggle_files, monkeypatch):
    """Kaggle with both files, one plain and one zipped, and an account there."""
    server = FakeKaggle()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in list(os.environ):
        if name.startswith("KAGGLE_") or name.lower() in ("http_proxy", "no_proxy"):
            monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(workspace / "home"))
    jigsaw, russian = ((kaggle_files / name).read_bytes() for name in (sample.JIGSAW_FILE, sample.RUSSIAN_FILE))
    server.files = {
        sample.JIGSAW_FILE: (sample.JIGSAW_FILE, jigsaw),
        sample.RUSSIAN_FILE: (f"{sample.RUSSIAN_FILE}.zip", packed(russian)),
    }
    yield server
    server.shutdown()
    server.server_close()


def get(overrides, **knobs):
    """What `download` fetches, without a version by DVC and a look into the registry."""
    return download.fetch(configuration.load([*overrides, *(f"kaggle.{key}={value}" for key, value in knobs.items())]))


def serve(server, content, name=sample.RUSSIAN_FILE, served=None):
    server.files = {name: (served or f"{name}.zip", content)}
    server.version += 1


@pytest.fixture(scope="module")
def data_of_a_good_run(tmp_path_factory):
    """Where the first run that goes well leaves a copy of its data: each takes Kaggle's client a second or two."""
    return tmp_path_factory.mktemp("good") / "data"


@pytest.fixture
def last_good(server, workspace, data_of_a_good_run):
    """A run that went well: what it left must survive whatever comes after. Checked when the test ends."""
    if data_of_a_good_run.exists():
        shutil.copytree(data_of_a_good_run, workspace / "data")
    else:
        get(DATA_SET)
        shutil.copytree(workspace / "data", data_of_a_good_run)
    path = workspace / "data" / "raw" / sample.RUSSIAN_FILE
    before = path.read_bytes()
    server.calls.clear()
    yield path
    assert path.read_bytes() == before
    assert not list(workspace.glob("data/.raw*"))


# What goes well -------------------------------------------------------------------------------------------------------


def test_both_kinds_come_through_kaggles_client(server, workspace, kaggle_files):
    copies = get(QUICK)  # the default sources
    for source in configuration.load().data.sources[:2]:
        copy = workspace / "data" / "raw" / source.file
        assert copy.read_bytes() == (kaggle_files / source.file).read_bytes()
        assert copies[source.file].sha256 == files.sha256(copy) and copies[source.file].rows == 500
    assert copies[sample.RUSSIAN_FILE].state["version"] == 1
    assert copies[sample.JIGSAW_FILE].state["created"] == "2020-03-19T12:00:00"
    assert not (workspace / "data" / "incoming").exists()


def test_what_has_not_changed_at_kaggle_is_not_downloaded_again(server, last_good):
    result = get(DATA_SET)
    assert "file" not in server.calls and "GetDataset" in server.calls
    assert result[sample.RUSSIAN_FILE].how == "unchanged" and result[sample.RUSSIAN_FILE].rows == 500


def test_a_damaged_record_of_what_is_there_costs_a_download(server, last_good, workspace):
    (workspace / "data" / "raw.json").write_text('{"labeled.csv": {"orig')
    assert get(DATA_SET)[sample.RUSSIAN_FILE].how == "fetched"
    assert get(DATA_SET)[sample.RUSSIAN_FILE].how == "unchanged"


def test_a_competition_file_is_known_by_name_size_and_date(server):
    get(COMPETITION)
    server.calls.clear()
    assert get(COMPETITION)[sample.JIGSAW_FILE].how == "unchanged"
    server.created = "2026-11-01T00:00:00.000Z"
    assert get(COMPETITION)[sample.JIGSAW_FILE].how == "fetched"
    assert server.calls.count("file") == 1


def test_a_new_version_is_downloaded_and_takes_the_place_of_the_old(server, workspace):
    get(DATA_SET)
    serve(server, packed("comment,toxic\nновое,1.0\n"))
    result = get(DATA_SET)
    assert result[sample.RUSSIAN_FILE].state["version"] == 2
    assert (workspace / "data" / "raw" / sample.RUSSIAN_FILE).read_text() == "comment,toxic\nновое,1.0\n"


def test_a_copy_that_somebody_changed_is_not_taken_for_kaggles(server, workspace):
    get(DATA_SET)
    copy = workspace / "data" / "raw" / sample.RUSSIAN_FILE
    copy.unlink()
    copy.write_text("comment,toxic\nchanged,0.0\n")
    assert get(DATA_SET)[sample.RUSSIAN_FILE].how == "fetched"
    assert copy.read_text() != "comment,toxic\nchanged,0.0\n"


def test_nothing_new_is_found_out_without_a_download(server):
    overrides = ["profile=demo", *DATA_SET]
    first = execute("download", download.run, overrides)
    registered(overrides, first, verdict="promoted")
    server.calls.clear()
    with pytest.raises(Skip, match=f"nothing new since run {first['run_id']}: version 1 was promoted"):
        execute("download", download.run, overrides)
    assert "file" not in server.calls


def test_a_download_that_is_cut_goes_on_from_there(server, workspace, caplog):
    caplog.set_level(logging.INFO)
    serve(server, packed("comment,toxic\n" + "слово,0.0\n" * 30_000))
    server.cuts = [200_000, None, 300_000]  # the client asks for the whole file, and then for what it lacks
    get(DATA_SET)
    assert [text and int(text[6:-1]) for text in server.ranges] == [None, None, 196_608, None, 262_144]
    assert "going on from byte 196608" in caplog.text and "was truncated after 0.2 MiB" in caplog.text


def test_a_later_run_goes_on_from_what_an_earlier_one_left(server, workspace):
    serve(server, packed("comment,toxic\n" + "слово,0.0\n" * 30_000))
    server.cuts = [200_000]
    with pytest.raises(
        StepFailed, match="truncated after 0.2 MiB.*196608 bytes of it are kept, and the next try goes on"
    ):
        get(DATA_SET, attempts=1)
    get(DATA_SET)
    assert server.ranges[-1] == "bytes=196608-"
    assert len((workspace / "data" / "raw" / sample.RUSSIAN_FILE).read_text().splitlines()) == 30_001


def test_a_part_of_an_older_version_is_not_gone_on_from(server, workspace):
    serve(server, packed("comment,toxic\n" + "слово,0.0\n" * 30_000))
    server.cuts = [200_000]
    with pytest.raises(StepFailed):
        get(DATA_SET, attempts=1)
    serve(server, packed("comment,toxic\n" + "другое,1.0\n" * 30_000))
    get(DATA_SET)
    assert "слово" not in (workspace / "data" / "raw" / sample.RUSSIAN_FILE).read_text()


def test_a_whole_download_is_not_repeated_because_another_source_failed(server, workspace, kaggle_files):
    missing = "{kind: kaggle_competition, name: a-competition, file: jigsaw-toxic-comment-train.csv, schema: jigsaw"
    both = DATA_SET[-1][:-1] + "," + missing + ", language: en}]"
    server.fail["DownloadDataFile"] = [(403, {})]
    with pytest.raises(UsageError, match="accept the competition's rules"):
        get([*QUICK, both])
    del server.fail["DownloadDataFile"]
    get([*QUICK, both])
    assert server.calls.count("DownloadDataset") == 1


def test_progress_is_told_while_it_lasts(server, caplog):
    caplog.set_level(logging.INFO)
    server.pause["file"] = 1.5
    get(COMPETITION, progress_s=0.3)
    assert caplog.text.count("MiB/s") >= 2


def test_a_restarted_step_meets_no_client_of_a_killed_one(server, workspace):
    server.pause["DownloadDataset"] = 60
    command = [sys.executable, "commands.py", "download", *DATA_SET]
    step = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    client = wait_for(lambda: "DownloadDataset" in server.calls and children(step.pid))
    step.send_signal(signal.SIGKILL)
    step.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in client))


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


# What a person must do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [COMPETITION, DATA_SET], ids=["competition", "data set"])
def test_without_credentials_the_preflight_says_how_to_have_them(server, monkeypatch, overrides):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(UsageError, match="needs an account: set KAGGLE_API_TOKEN.*or take the files from a folder"):
        get(overrides)
    assert server.calls == []


@pytest.mark.parametrize("method", ["ListDataFiles", "DownloadDataFile"])
def test_rules_that_are_not_accepted_name_the_page_to_open(server, method):
    server.fail[method] = [(403, {})]
    with pytest.raises(
        UsageError, match="403.: accept the competition's rules.*kaggle.com/competitions/a-competition/rules"
    ):
        get(COMPETITION)
    assert server.calls.count(method) == 1


def test_a_private_data_set_names_its_page(server, last_good):
    server.fail["GetDataset"] = [(403, {})]
    with pytest.raises(UsageError, match="403.: the data set is private.*kaggle.com/datasets/somebody/comments"):
        get(DATA_SET)


@pytest.mark.parametrize("method", ["IntrospectToken", "GetDataset", "DownloadDataset"])
def test_a_wrong_token_says_how_to_replace_it(server, method):
    server.fail[method] = [(401, {})]
    with pytest.raises(UsageError, match="does not accept the token .*401.*Make a new one, then set KAGGLE_API_TOKEN"):
        get(DATA_SET)


def test_a_token_that_is_no_longer_active_is_a_wrong_one(server, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_something_else")
    with pytest.raises(UsageError, match="does not accept the token"):
        get(DATA_SET)


def test_a_data_set_that_is_gone_names_where_to_look(server, last_good):
    server.fail["GetDataset"] = [(404, {})]
    with pytest.raises(
        UsageError, match="has no labeled.csv of somebody/comments .404.*correct `name`.*copy.*untouched"
    ):
        get(DATA_SET)


def test_a_file_that_is_gone_from_its_data_set_is_named(server, last_good):
    server.version, server.files = 2, {}
    with pytest.raises(UsageError, match="has no labeled.csv of somebody/comments .404."):
        get(DATA_SET)


def test_a_competition_without_the_file_says_what_it_has(server):
    del server.files[sample.JIGSAW_FILE]
    with pytest.raises(UsageError, match="a-competition has no jigsaw.*: it has labeled.csv; correct `file`"):
        get(COMPETITION)


def test_a_file_that_does_not_fit_on_the_disk_is_named_before_it_comes(server):
    server.bytes = 10**15
    with pytest.raises(
        StepFailed, match="GiB free: labeled.csv from Kaggle take up to 1862645.1 GiB, and disk.min_free"
    ):
        get(DATA_SET)
    assert "file" not in server.calls


# What may pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["IntrospectToken", "GetDataset", "DownloadDataset"])
def test_too_many_requests_are_waited_out_on_any_call(server, method):
    # The import of the client meets the first one and keeps it to itself.
    server.fail[method] = [(429, {})] * 3 + [(None, {})]
    assert get(DATA_SET, attempts=5)[sample.RUSSIAN_FILE].rows == 500


def test_retry_after_is_honoured(server, caplog):
    server.fail["GetDataset"] = [(429, {"Retry-After": "1"}), (None, {})]
    started = time.monotonic()
    get(DATA_SET)
    assert time.monotonic() - started > 1 and "too many requests (429)" in caplog.text


def test_waiting_is_bounded(server):
    server.fail["GetDataset"] = [(429, {"Retry-After": "3600"})]
    with pytest.raises(
        kaggle.Unreachable, match="kaggle.max_wait_s=60, and another 3600 s are asked for.*Run again later"
    ):
        get(DATA_SET, max_wait_s=60)
    assert server.calls.count("GetDataset") == 1


def test_so_are_tries(server):
    server.fail["GetDataset"] = [(503, {})]
    with pytest.raises(kaggle.Unreachable, match="out of order .503.*given up after 3 tries .kaggle.attempts=3"):
        get(DATA_SET)
    assert server.calls.count("GetDataset") == 3


def test_kaggle_out_of_reach_is_named_and_costs_nothing(server, last_good, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        kaggle.Unreachable, match="cannot be reached.*Check network.*data/raw is as it was.*last_copy goes on"
    ):
        get(DATA_SET, attempts=1)


def test_a_page_that_answers_in_kaggles_place_is_told(server, last_good):
    server.portal = True
    with pytest.raises(kaggle.Unreachable, match="cannot be reached.*something else answered in its place.*proxy"):
        get(DATA_SET, attempts=1)


def test_out_of_reach_the_last_copy_will_do_where_the_configuration_says_so(server, last_good, caplog):
    server.fail["GetDataset"] = [(503, {})]
    result = get(DATA_SET, when_unreachable="last_copy")
    assert result[sample.RUSSIAN_FILE].how == "unreachable" and "Going on with the copy" in caplog.text


def test_a_download_that_fails_has_the_last_copy_to_fall_back_on(server, last_good):
    server.version = 2
    server.fail["DownloadDataset"] = [(503, {})]
    assert get(DATA_SET, when_unreachable="last_copy")[sample.RUSSIAN_FILE].state["version"] == 1
    del server.fail["DownloadDataset"]
    assert get(DATA_SET)[sample.RUSSIAN_FILE].state["version"] == 2


def test_without_a_last_copy_there_is_nothing_to_go_on_with(server):
    server.fail["GetDataset"] = [(503, {})]
    with pytest.raises(kaggle.Unreachable, match="503"):
        get(DATA_SET, when_unreachable="last_copy")


@pytest.mark.parametrize(
    "method, words", [("GetDataset", "Kaggle does not answer"), ("file", "the download stands still")]
)
def test_a_call_that_makes_no_progress_is_cut(server, method, words):
    server.pause[method] = 30
    server.cuts = [100]
    started = time.monotonic()
    with pytest.raises(kaggle.Unreachable, match=f"{words} for 3 s .kaggle.stall_s"):
        get(DATA_SET, stall_s=3, attempts=1)
    assert time.monotonic() - started < 15


# What comes is not what was sent --------------------------------------------------------------------------------------


def test_a_download_that_is_always_truncated_is_given_up(server, last_good):
    server.version = 2
    server.cuts = [100] * 3
    with pytest.raises(kaggle.Unreachable, match="truncated after .* MiB.*given up after 3 tries"):
        get(DATA_SET)


def test_a_checksum_that_does_not_fit_is_named(server, last_good, workspace):
    server.version, server.damaged = 2, True
    with pytest.raises(StepFailed, match="came with MD5 .*storage sent .*damaged on its way"):
        get(DATA_SET)
    assert not list((workspace / "data" / "incoming").iterdir())


BAD = {
    "not a zip": (b"comment,toxic\n\0\0", None, "labeled.csv.zip is not a zip file: it begins with"),
    "web page": (b"<!DOCTYPE html><p>Log in", "login.html", "login.html is a web page instead of data"),
    "up the tree": (packed("", **{"../x.csv": ""}), None, "points out of its folder: '../x.csv'"),
    "absolute": (packed("", **{"/etc/x.csv": ""}), None, "points out of its folder: '/etc/x.csv'"),
    "member missing": (packed("", "train.csv"), None, "0 files named labeled.csv, 1 is expected; it has train.csv"),
    "wrong columns": (
        packed("text,label\na,1\n"),
        None,
        "labeled.csv has no column comment, toxic, .* it has text, label",
    ),
    "wrong encoding": (
        packed("comment,toxic\nпривет,0\n".encode("cp1251")),
        None,
        "in UTF-8: line 2 is not UTF-8 .byte 0xef",
    ),
    "empty": (packed(""), None, "labeled.csv is not a CSV file in UTF-8"),
}


@pytest.mark.parametrize("content, served, words", BAD.values(), ids=BAD)
def test_what_is_not_the_set_is_named_and_forgotten(server, last_good, workspace, content, served, words):
    serve(server, content, served=served)
    with pytest.raises(StepFailed, match=words):
        get(DATA_SET)
    # Nor does it stand in the way of the next run, when Kaggle has put it right.
    serve(server, packed(last_good.read_bytes()))
    assert get(DATA_SET)[sample.RUSSIAN_FILE].rows == 500


def test_a_zip_bomb_from_kaggle_is_stopped(server, last_good):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(sample.RUSSIAN_FILE, bytes(4 << 20))
    serve(server, whole.getvalue())
    with pytest.raises(StepFailed, match="as a zip bomb does"):
        get(DATA_SET)


def test_a_disk_that_fills_up_is_named_and_given_its_room_back(server, last_good, workspace):
    serve(server, packed("comment,toxic\n" + "слово,0.0\n" * 100_000))
    started = time.monotonic()
    with files_of_at_most(1_000_000), pytest.raises(StepFailed, match="the disk is full: 1.0 MiB of .*free some space"):
        get(DATA_SET)
    assert not list((workspace / "data" / "incoming").iterdir())
    assert time.monotonic() - started < 20 and server.calls.count("file") == 1


# Secrets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 503])
def test_no_token_and_no_signed_address_reaches_a_log(server, workspace, caplog, status):
    caplog.set_level(logging.DEBUG)
    server.fail["DownloadDataset"] = [(status, {})]
    with pytest.raises(StepFailed) as failed:
        execute("download", download.run, DATA_SET)
    server.fail.clear()
    server.cuts = [10] * 3
    with pytest.raises(StepFailed):
        execute("download", download.run, DATA_SET)
    logs = "".join(path.read_text() for path in [*workspace.glob("logs/*"), *workspace.glob("runs/*/*")])
    assert "*** it said" in str(failed.value) and "*** it said" in logs
    for text in (caplog.text, str(failed.value), logs):
        assert TOKEN not in text and SIGNATURE not in text


def test_secrets_are_known_wherever_the_client_finds_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_API_TOKEN", str(tmp_path / "secret"))
    (tmp_path / "secret").write_text("from-a-file\n")
    (tmp_path / ".kaggle").mkdir()
    (tmp_path / ".kaggle" / "kaggle.json").write_text('{"username": "somebody", "key": "legacy-key"}')
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", "env-key")
    said = kaggle.without_secrets(
        "somebody: from-a-file legacy-key\n env-key http://me:pass@proxy/ https://storage/x.zip?sig=1&b=2 (Caused by)"
    )
    assert said == "somebody: *** *** *** http://***@proxy/ https://storage/x.zip?… (Caused by)"
