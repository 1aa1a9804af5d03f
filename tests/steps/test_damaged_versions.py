"""What lies in DVC's cache or remote under its name, and is not what the name says: found, and taken from elsewhere."""

import json
import os
import shutil
import signal
import threading
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from raw_data import SMALL, dvc_file, files_of_at_most
from signing import signed

import commands
from tasks import config as configuration
from tasks.data import objects, restore, splits, versions
from tasks.errors import StepFailed, UsageError
from tasks.promotion import registry
from tasks.run import find

FILES = {"labeled.csv": "comment,toxic\n" + "you are nice,0.0\n" * 500, "train.csv": "id,comment_text\n" * 200}


def truncated(file):
    rewritten(file, file.read_bytes()[:10])


def altered(file):
    rewritten(file, file.read_bytes().replace(b"e", b"a"))


def altered_in_the_same_instant(file):
    """What a failing disk does: the time of the change is the old one."""
    before = file.stat()
    altered(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def empty(file):
    rewritten(file, b"")


def missing(file):
    file.unlink()


def a_folder(file):
    file.unlink()
    file.mkdir()
    (file / "inside").write_text("1")


def unreadable(file):
    """For root, too."""
    file.unlink()
    file.symlink_to(file)


def rewritten(file, content):
    file.chmod(0o644)
    file.write_bytes(content)
    file.chmod(0o444)  # which DVC takes for proof that nobody has changed it


DAMAGES = [truncated, altered, altered_in_the_same_instant, empty, missing, a_folder, unreadable]


@pytest.fixture
def config(workspace):
    return configuration.load(SMALL)


@pytest.fixture
def folder(workspace):
    folder = workspace / "data" / "raw"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_text(content)
    return folder


def stores(config):
    return {"cache": config.workspace / ".dvc" / "cache", "remote": config.workspace / "dvc-remote"}


def parts(store):
    return sorted(path for path in store.glob("files/md5/*/*"))


def is_whole(store):
    """Three objects, each what its name says and protected, and nothing else."""
    found = parts(store)
    assert len(found) == 3
    for file in found:
        assert md5(file.read_bytes()).hexdigest() == (file.parent.name + file.name).removesuffix(".dir")
    assert not list(store.rglob("*.tmp"))


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def gone_from_the_workspace(folder):
    shutil.rmtree(folder)
    versions.pointer_file(folder).unlink()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", ["cache", "remote"])
def test_what_is_damaged_in_one_place_is_taken_from_the_other(config, folder, damage, place):
    version = versions.version(config, folder)
    gone_from_the_workspace(folder)
    for file in parts(stores(config)[place]):  # the listing among them
        damage(file)
    with versions.fetched(config, {"raw": version}) as found:
        assert contents(found / "raw") == FILES
    for store in stores(config).values():
        is_whole(store)
    assert all(oct(file.stat().st_mode)[-3:] == "444" for file in parts(stores(config)["cache"]))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("places", [["remote"], ["cache", "remote"]], ids="+".join)
def test_adding_the_files_again_heals(config, folder, damage, places):
    version = versions.version(config, folder)
    for file in [file for place in places for file in parts(stores(config)[place])]:
        damage(file)
    assert versions.version(config, folder) == version
    for store in stores(config).values():
        is_whole(store)
    assert contents(folder) == FILES


def test_what_is_whole_nowhere_is_named_and_left_as_it_is(config, folder, tmp_path, caplog):
    version = versions.version(config, folder)
    gone_from_the_workspace(folder)
    labeled, train = (md5(FILES[name].encode()).hexdigest() for name in ("labeled.csv", "train.csv"))
    truncated(dvc_file(stores(config)["cache"], labeled))
    missing(dvc_file(stores(config)["remote"], labeled))
    a_folder(dvc_file(stores(config)["cache"], train))
    empty(dvc_file(stores(config)["remote"], train))
    before = {file: file.read_bytes() for file in config.workspace.rglob("files/md5/*/*") if file.is_file()}
    with pytest.raises(StepFailed) as error:
        with versions.fetched(config, {"raw": version}):
            pass
    said = str(error.value)
    assert said.startswith(f"version {version} of raw can't be brought back: ")
    cache, remote = (dvc_file(stores(config)[place], labeled) for place in ("cache", "remote"))
    assert "raw/labeled.csv is damaged (its 10 bytes have another MD5) in the cache" in said
    assert f"in the cache ({cache}) and missing in the remote ({remote})" in said
    assert "raw/train.csv is a folder in the cache" in said
    assert "and damaged (its 0 bytes have another MD5) in the remote" in said
    assert "Put a whole copy into one of the two places" in said
    assert {file: file.read_bytes() for file in config.workspace.rglob("files/md5/*/*") if file.is_file()} == before
    remote.write_text(FILES["labeled.csv"])  # as it says
    dvc_file(stores(config)["remote"], train).chmod(0o644)
    dvc_file(stores(config)["remote"], train).write_text(FILES["train.csv"])
    with versions.fetched(config, {"raw": version}) as found:
        assert contents(found / "raw") == FILES
    is_whole(stores(config)["cache"])


def test_a_lost_listing_is_named(config, folder):
    version = versions.version(config, folder)
    gone_from_the_workspace(folder)
    for store in stores(config).values():
        truncated(dvc_file(store, version))
    with pytest.raises(StepFailed, match="the listing of raw is damaged .* in the cache .* and damaged .* in the remo"):
        with versions.fetched(config, {"raw": version}):
            pass


def test_what_is_whole_in_the_workspace_alone_is_taken_from_there(config, folder):
    version = versions.version(config, folder)
    for file in [file for store in stores(config).values() for file in parts(store)]:
        truncated(file)
    with versions.fetched(config, {"raw": version}) as found:
        assert contents(found / "raw") == FILES
    for store in stores(config).values():
        is_whole(store)


def test_a_file_that_two_versions_share_is_mended_for_both(config, folder):
    first = versions.version(config, folder)
    (folder / "train.csv").write_text("other")
    second = versions.version(config, folder)
    truncated(dvc_file(stores(config)["cache"], md5(FILES["labeled.csv"].encode()).hexdigest()))
    assert versions.version(config, folder) == second
    gone_from_the_workspace(folder)
    with versions.fetched(config, {"raw": first}) as found:
        assert contents(found / "raw") == FILES


@pytest.mark.parametrize("place", ["cache", "remote"])
def test_a_full_disk_while_mending_loses_nothing(config, folder, place):
    large = "x" * 3_000_000  # larger than what DVC writes beside
    (folder / "train.csv").write_text(large)
    version = versions.version(config, folder)
    damaged, good = (dvc_file(stores(config)[name], md5(large.encode()).hexdigest()) for name in ("cache", "remote"))
    if place == "remote":
        damaged, good = good, damaged
    truncated(damaged)
    with files_of_at_most(2_000_000):
        with pytest.raises(StepFailed, match="DVC could not keep a version of .*raw: .*File too large"):
            versions.version(config, folder)
    assert good.read_text() == large
    assert not list(config.workspace.rglob(".*.tmp"))
    gone_from_the_workspace(folder)
    truncated(damaged)
    if place == "cache":
        with files_of_at_most(2_000_000):
            with pytest.raises(StepFailed, match=f"DVC could not bring back version {version} of raw: .*File too larg"):
                with versions.fetched(config, {"raw": version}):
                    pass
        assert damaged.stat().st_size == 10
        assert good.read_text() == large
        assert not list(config.workspace.rglob(".*.tmp"))
    with versions.fetched(config, {"raw": version}) as found:
        assert contents(found / "raw") == {**FILES, "train.csv": large}
    for store in stores(config).values():
        is_whole(store)


@pytest.mark.parametrize("moment", ["before it takes its place", "between two objects"])
def test_killed_while_mending_it_ends_whole_the_next_time(config, folder, moment, monkeypatch):
    version = versions.version(config, folder)
    gone_from_the_workspace(folder)
    for file in parts(stores(config)["cache"]):
        truncated(file)
    child = os.fork()
    if not child:
        try:
            taken = []
            real = objects.take

            def take(*arguments):
                if taken and moment == "between two objects":
                    os.kill(os.getpid(), signal.SIGKILL)
                if moment == "before it takes its place":
                    monkeypatch.setattr(objects.Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                taken.append(arguments)
                return real(*arguments)

            monkeypatch.setattr(objects, "take", take)
            with versions.fetched(config, {"raw": version}):
                pass
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert bool(list(stores(config)["cache"].rglob(".*.tmp"))) == (moment == "before it takes its place")
    with versions.fetched(config, {"raw": version}) as found:
        assert contents(found / "raw") == FILES
    for store in stores(config).values():
        is_whole(store)


@pytest.mark.parametrize("name", ["with space", "a#b, c;d", "100%41 é'\"", "q?x=[y]$HOME"])
def test_a_remote_elsewhere_may_be_called_anything(workspace, folder, tmp_path_factory, name):
    elsewhere = tmp_path_factory.mktemp("remote") / name
    configured = json.dumps(str(elsewhere), ensure_ascii=False)
    config = configuration.load([*SMALL, f"versions.remote={configured.replace('$', chr(92) + '$')}"])
    if config.versions.remote != str(elsewhere):  # how a name is typed is another matter
        config = config.model_copy(update={"versions": config.versions.model_copy(update={"remote": str(elsewhere)})})
    version = versions.version(config, folder)
    is_whole(elsewhere)
    for file in parts(elsewhere):
        truncated(file)
    assert versions.version(config, folder) == version
    is_whole(elsewhere)
    gone_from_the_workspace(folder)
    shutil.rmtree(stores(config)["cache"])
    with versions.fetched(config, {"raw": version}) as found:
        assert contents(found / "raw") == FILES


class WebRemote(BaseHTTPRequestHandler):
    """Takes what is posted and gives it back, as DVC's remote of kind `http` wants it."""

    def do_GET(self):
        content = self.server.kept.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def do_POST(self):
        content = self.body()
        if not self.server.read_only:
            self.server.kept[self.path] = content
        self.send_response(403 if self.server.read_only else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def body(self):
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def log_message(self, *_):
        pass


@pytest.fixture
def web_remote(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), WebRemote)
    server.kept, server.read_only = {}, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_remote_on_the_web_is_mended_and_mends(workspace, folder, web_remote, caplog):
    remote = f"http://127.0.0.1:{web_remote.server_port}/versions"
    config = configuration.load([*SMALL, f"versions.remote={remote}"])
    version = versions.version(config, folder)
    good = dict(web_remote.kept)
    assert len(good) == 3
    for name in good:
        web_remote.kept[name] = good[name][:10]
    assert versions.version(config, folder) == version
    assert web_remote.kept == good
    gone_from_the_workspace(folder)
    for file in parts(stores(config)["cache"]):
        truncated(file)
    with versions.fetched(config, {"raw": version}) as found:
        assert contents(found / "raw") == FILES
    is_whole(stores(config)["cache"])

    web_remote.kept.clear()  # and takes nothing: the cache is enough
    web_remote.read_only = True
    with versions.fetched(config, {"raw": version}) as found:
        assert contents(found / "raw") == FILES
    assert "is whole in the cache; the remote could not be mended: " in caplog.text
    for file in parts(stores(config)["cache"]):
        truncated(file)
    with pytest.raises(StepFailed, match="the listing of raw is damaged .*and missing in the remote .http://127.0.0.1"):
        with versions.fetched(config, {"raw": version}):
            pass


def test_a_remote_that_is_not_to_be_had_does_not_stop_what_the_cache_has(config, folder, caplog):
    version = versions.version(config, folder)
    gone_from_the_workspace(folder)
    elsewhere = configuration.load([*SMALL, "versions.remote=oss://bucket/path"])  # whose library is not installed
    with versions.fetched(elsewhere, {"raw": version}) as found:
        assert contents(found / "raw") == FILES
    assert "requires 'dvc-oss' to be installed" in caplog.text
    truncated(dvc_file(stores(config)["cache"], version))
    with pytest.raises(StepFailed, match="the listing of raw is damaged .* and not to be had .*dvc-oss"):
        with versions.fetched(elsewhere, {"raw": version}):
            pass


def test_what_dvc_keeps_beside_may_be_damaged(config, folder):
    version = versions.version(config, folder)
    own = config.workspace / ".dvc"
    for memory in own.rglob("*.db"):
        memory.write_bytes(b"SQLite format 3\0" + b"x" * 50)
    (own / "config").write_text("[core")
    versions.pointer_file(folder).write_text("outs:\n- md")
    assert versions.version(config, folder) == version
    assert versions.pointed_to(versions.pointer_file(folder)) == version
    (own / "config.local").write_text("[core")
    with pytest.raises(StepFailed, match="DVC could not keep a version of .*config"):
        versions.version(config, folder)


@pytest.mark.parametrize("place", ["cache", "remote"])
def test_pruning_mends_a_listing_before_it_asks_which_files_are_needed(config, folder, place):
    """DVC takes a listing that it can't read for one of no files, and removes all of them, in both places."""
    version = versions.version(config, folder)
    gone_from_the_workspace(folder)
    truncated(dvc_file(stores(config)[place], version))
    versions.prune(config, {version: "version 1"})
    with versions.fetched(config, {"raw": version}) as found:
        assert contents(found / "raw") == FILES


def test_pruning_removes_nothing_while_a_listing_is_lost(config, folder):
    version = versions.version(config, folder)
    gone_from_the_workspace(folder)
    (folder.parent / "extra").write_text("of nobody")
    extra = versions.version(config, folder.parent / "extra")
    versions.pointer_file(folder.parent / "extra").unlink()
    truncated(dvc_file(stores(config)["cache"], version))
    missing(dvc_file(stores(config)["remote"], version))
    before = [parts(store) for store in stores(config).values()]
    with pytest.raises(StepFailed, match="nothing is removed, since the listing of version 1's raw is damaged"):
        versions.prune(config, {version: "version 1's raw"})
    assert [parts(store) for store in stores(config).values()] == before
    assert not (config.workspace / "data" / ".kept").exists()
    versions.prune(config, {})
    assert not dvc_file(stores(config)["cache"], extra).exists()


@pytest.mark.parametrize("content", ["", "outs:\n- md5: fc98", "\0\0", "[]"])
def test_pruning_keeps_what_a_damaged_pointer_stands_for(config, folder, content):
    version = versions.version(config, folder)
    versions.pointer_file(folder).write_text(content)
    versions.prune(config, {})
    assert versions.pointed_to(versions.pointer_file(folder)) == version
    for store in stores(config).values():
        is_whole(store)
    by_hand = config.workspace / "by-hand.dvc"
    by_hand.write_text(content)
    with pytest.raises(StepFailed, match="nothing is removed, since .*by-hand.dvc is damaged"):
        versions.prune(config, {})


@pytest.fixture
def registered(config, folder):
    """A registered version without a model: (config, number, its MLflow run, {name: MD5})."""
    processed = folder.parent / "processed"
    processed.mkdir()
    (processed / "train.parquet").write_text("rows")
    wanted = {path.name: versions.version(config, path) for path in (folder, processed)}
    client = registry.client(config)
    registry.ensure_model(config)
    run = find(config.workspace, "a-run")
    run.save("download", {"data_version": wanted["raw"]})
    mlflow_run = registry.training_run(config, run)
    for name, version in wanted.items():
        client.log_artifact(mlflow_run, str(versions.pointer_file(folder.parent / name)), "dvc")
    tags = {"run_id": "a-run", "data_version": wanted["processed"]}
    made = client.create_model_version("toxic_classificator", "a/source", mlflow_run, tags=tags)
    number = signed(config, made.version)
    return config, number, mlflow_run, wanted


def test_a_truncated_object_does_not_stop_the_command(registered, tmp_path_factory, capfd):
    config, number, _, wanted = registered
    shutil.rmtree(config.workspace / "data")
    truncated(dvc_file(stores(config)["cache"], md5(FILES["labeled.csv"].encode()).hexdigest()))
    out = tmp_path_factory.mktemp("out")
    assert commands.main(["data", *SMALL, f"--version={number}", f"--output-path={out}"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["data"] == wanted
    assert contents(out / "raw") == FILES
    for store in stores(config).values():
        empty(dvc_file(store, md5(b"rows").hexdigest()))
    shutil.rmtree(out)
    assert commands.main(["data", *SMALL, f"--version={number}", f"--output-path={out}"]) == 1
    assert "processed/train.parquet is damaged" in capfd.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_replacing_gives_both_folders_or_none(registered, monkeypatch):
    config, number, _, wanted = registered
    for name in wanted:
        (config.workspace / "data" / name / "newer").write_text("1" * 10)
    before = {name: contents(config.workspace / "data" / name) for name in wanted}
    real = shutil.copytree
    seen = []

    def second_fails(source, target, **options):
        seen.append(target)
        if len(seen) == 2:
            raise OSError(28, "No space left on device")
        return real(source, target, **options)

    monkeypatch.setattr(shutil, "copytree", second_fails)
    with pytest.raises(OSError, match="No space left"):
        restore.run(SMALL, number, None, True, "configs", "config")
    assert {name: contents(config.workspace / "data" / name) for name in wanted} == before
    assert not list((config.workspace / "data").glob(".*"))
    monkeypatch.undo()


@pytest.mark.parametrize("content", [b"", b"outs:\n- md5: fc98", None])
def test_a_damaged_pointer_of_a_version_is_known_from_its_tags_and_run(registered, content):
    config, number, mlflow_run, wanted = registered
    (artifacts,) = config.workspace.glob(f"mlflow/**/{mlflow_run}/artifacts/dvc")
    for name in wanted:
        if content is None and name == "raw":
            (artifacts / f"{name}.dvc").unlink()
        else:
            (artifacts / f"{name}.dvc").write_bytes(content or b"[")
    assert restore.data_of(config, number) == wanted
    assert {file.stem: versions.pointed_to(file) for file in artifacts.iterdir()} == wanted
    restore.prune(SMALL, "configs", "config")
    (artifacts / "raw.dvc").write_bytes(content or b"[")
    find(config.workspace, "a-run").forget_from("download")
    for command in (lambda: restore.data_of(config, number), lambda: restore.prune(SMALL, "configs", "config")):
        with pytest.raises(
            (StepFailed, UsageError), match=f"dvc/raw.dvc of MLflow run {mlflow_run} is damaged or gone"
        ):
            command()


def test_pruning_reads_results_of_steps_alone_and_stops_at_a_damaged_one(registered):
    """Run folders hold lists and curves beside them."""
    config, number, _, wanted = registered
    runs = config.workspace / "runs" / "a-run"
    (runs / "errors.json").write_text('[{"text": "x"}]')
    (runs / "behaviour.json").write_text("{")
    assert restore.prune(SMALL, "configs", "config")["kept"] == len(wanted)
    (runs / "prepare.json").write_text("{")
    with pytest.raises(StepFailed, match="runs/a-run/prepare.json is damaged"):
        restore.prune(SMALL, "configs", "config")


@pytest.mark.parametrize("content", [b"", b"PAR1 and then", b"\0" * 100], ids=["empty", "cut", "zeros"])
def test_a_damaged_split_is_named_with_the_way_out(workspace, content):
    file = workspace / "data" / "processed" / "test.parquet"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(StepFailed, match=f"{file} is damaged .*: run `python commands.py prepare` again"):
        splits.read(workspace, "test")
