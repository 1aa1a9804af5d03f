import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import yaml

from tasks import config, files, run, step
from tasks.errors import Skip, StepFailed, UsageError, without_credentials


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path))
    monkeypatch.delenv("TOXIC_RUN_ID", raising=False)
    return tmp_path


def done(config, run):
    return {"answer": 42}


def test_a_step_leaves_its_result_its_config_and_its_log(workspace, caplog):
    caplog.set_level("INFO")
    result = step.execute("download", done, ["profile=demo"])
    folder = workspace / "runs" / result["run_id"]
    assert files.read_json(folder / "download.json") == result
    assert result["answer"] == 42 and result["status"] == "done"
    assert "tiny-qwen2" in (folder / "config.yaml").read_text()
    assert f"download of run {result['run_id']}" in (workspace / "logs" / f"{result['run_id']}.log").read_text()


def everything_in(folder) -> str:
    return "".join(file.read_text() for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("address", ["postgresql://toxic:S3cret@db/mlflow", "http://toxic:S3c@ret@mlflow:8080"])
def test_a_password_in_an_address_stays_out_of_the_run_folder(workspace, monkeypatch, address):
    with pytest.raises(UsageError, match=r"://\*\*\*@.* holds a password.*MLFLOW_TRACKING_URI"):
        step.execute("download", done, ["profile=demo", f"mlflow.tracking_uri={address}"])
    assert "S3c" not in everything_in(workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    run_id = step.execute("download", lambda config, run: {"is": config.mlflow.tracking_uri == address})["run_id"]
    assert step.execute("prepare", lambda config, run: {"is": config.mlflow.tracking_uri == address})["is"] is True
    kept = (workspace / "runs" / run_id / "config.yaml").read_text()
    shown = without_credentials(address)
    assert yaml.safe_load(kept)["mlflow"]["tracking_uri"] == shown and "://***@" in shown
    assert "S3c" not in everything_in(workspace) and "toxic:" not in shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("no answer of http://a:b@h:80/x?y, tried", "no answer of http://***@h:80/x?y, tried"),
        ("postgresql://a:b/c@h/d", "postgresql://***@h/d"),
        ("http://h:80/x, write to me@h", "http://h:80/x, write to me@h"),
        ("models:/toxic@champion sqlite:////a/b.db", "models:/toxic@champion sqlite:////a/b.db"),
    ],
)
def test_credentials_in_addresses_are_not_shown(text, shown):
    assert without_credentials(text) == shown


def test_by_hand_download_opens_a_run_and_the_others_go_on_with_it(workspace):
    first = step.execute("download", done, ["profile=demo"])
    assert step.execute("prepare", done)["run_id"] == first["run_id"]
    assert step.execute("download", done)["run_id"] != first["run_id"]


def test_a_later_step_keeps_the_overrides_of_its_run(workspace):
    step.execute("download", done, ["profile=demo", "seed=7"])
    seen = step.execute("prepare", lambda config, run: {"seed": config.seed, "model": config.model.name})
    assert (seen["seed"], seen["model"]) == (7, "tiny-qwen2")


def test_repeating_a_step_takes_back_what_came_after_it(workspace):
    step.execute("download", done)
    step.execute("prepare", done)
    step.execute("train", done)
    step.execute("prepare", done)
    found = run.newest(workspace)
    assert found.has("download") and found.has("prepare") and not found.has("train")
    with pytest.raises(UsageError, match="run `python commands.py train` first"):
        found.result("train")


def test_in_the_dag_finished_work_is_not_done_twice(workspace, monkeypatch):
    monkeypatch.setenv("TOXIC_RUN_ID", "scheduled__2026-11-23")
    monkeypatch.setenv("TOXIC_OVERRIDES", json.dumps(["profile=demo"]))
    first = step.execute("train", done, reuse=True)
    again = step.execute("train", lambda config, run: pytest.fail("trained twice"), reuse=True)
    assert again == first


def test_a_skip_is_kept_as_a_verdict(workspace):
    def nothing_new(config, run):
        raise Skip("nothing new", fingerprint="abc")

    with pytest.raises(Skip):
        step.execute("download", nothing_new)
    found = run.newest(workspace).result("download")
    assert (found["status"], found["fingerprint"], found["reason"]) == ("skipped", "abc", "nothing new")


@pytest.mark.parametrize("run_id", ["../escape", "", "a/b", "-x", "a" * 300])
def test_a_run_id_that_is_no_slug_is_refused(workspace, monkeypatch, run_id):
    monkeypatch.setenv("TOXIC_RUN_ID", run_id or " ")
    with pytest.raises(UsageError, match="is not a slug"):
        step.execute("download", done)


@pytest.mark.parametrize("text", ["not json", '{"a": 1}', "[1]"])
def test_overrides_that_are_no_list_are_refused(workspace, monkeypatch, text):
    monkeypatch.setenv("TOXIC_OVERRIDES", text)
    with pytest.raises(UsageError, match="TOXIC_OVERRIDES"):
        step.execute("download", done)


def test_old_runs_are_pruned_but_not_the_protected(workspace):
    ids = [step.execute("download", done)["run_id"] for _ in range(5)]
    removed = run.prune(workspace, keep=2, protected={ids[0]})
    assert removed == ids[1:3]
    assert sorted(folder.name for folder in (workspace / "runs").iterdir()) == sorted([ids[0], *ids[3:]])


def test_what_a_run_has_built_goes_with_it_and_what_no_run_owns_goes_too(workspace):
    ids = [step.execute("download", done)["run_id"] for _ in range(3)]
    places = {kind: workspace / "models" / kind for kind in run.BUILDS}
    for place in places.values():
        for name in (*ids, f".{ids[2]}.new", ".gone.new", ".gone.old", "gone"):
            (place / name).mkdir(parents=True)
            (place / name / "model.onnx").touch()
        (place / "model.onnx").touch()
    run.prune_builds(workspace)
    for place in places.values():
        assert sorted(found.name for found in place.iterdir()) == sorted([*ids, f".{ids[2]}.new"])
    run.prune(workspace, keep=2, protected=set())
    run.remove_builds(workspace, ids[2])
    for place in places.values():
        assert [found.name for found in place.iterdir()] == [ids[1]]


def test_in_the_dag_a_result_is_used_again_while_what_it_stands_for_is_there(workspace, monkeypatch):
    monkeypatch.setenv("TOXIC_RUN_ID", "weekly-1")
    made = workspace / "made"

    def make(config, run):
        made.mkdir()
        return {"made_at": made.stat().st_mtime_ns}

    def again():
        return step.execute("export_onnx", make, reuse=lambda config, run: made.exists())

    first = again()
    assert again() == first
    made.rmdir()
    assert again()["made_at"] > first["made_at"]


def test_a_new_folder_replaces_the_old_one_whole_or_not_at_all(tmp_path):
    target = tmp_path / "data"
    with files.new_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(ZeroDivisionError):
        with files.new_folder(target) as folder:
            (folder / "b").write_text("2")
            1 / 0
    assert [file.name for file in target.iterdir()] == ["a"]
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_a_folder_survives_a_kill_between_the_two_renames(tmp_path):
    (tmp_path / ".data.old").mkdir()
    (tmp_path / ".data.old" / "a").write_text("1")
    with pytest.raises(ZeroDivisionError):
        with files.new_folder(tmp_path / "data"):
            1 / 0
    assert (tmp_path / "data" / "a").read_text() == "1"


def test_too_little_disk_is_named_with_its_limit(tmp_path):
    with pytest.raises(StepFailed, match="GiB free, 1000000000 GiB are needed"):
        files.require_free_disk(tmp_path, 1_000_000_000)


def test_a_stopped_step_cleans_up_and_stdout_stays_for_the_result(tmp_path):
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from tasks import files
        from tasks.step import prepare_process, stdout_for_the_result
        prepare_process()
        with stdout_for_the_result():
            print("chatter")
            os.system("echo chatter of a child")
            with files.new_folder(Path({str(tmp_path / "half")!r})):
                os.kill(os.getpid(), signal.SIGTERM)
        """)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=config.__file__[:-16])
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stdout == ""
    assert "chatter of a child" in ended.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"", b'{"step": "downl', b"\0" * 40, b"\xff\xfe"], ids=["empty", "cut", "zeros", "no UTF-8"]
)
def test_a_damaged_result_is_named_with_the_way_out(workspace, content):
    run_id = step.execute("download", done, ["profile=demo"])["run_id"]
    file = workspace / "runs" / run_id / "download.json"
    file.write_bytes(content)
    with pytest.raises(
        StepFailed, match=f"{file} is damaged .*: put it back from a backup, or remove it and run again"
    ):
        run.find(workspace, run_id).result("download")
    (file.parent / "run.json").write_bytes(content)
    with pytest.raises(StepFailed, match="run.json is damaged"):
        run.newest(workspace)
    assert files.read_note(file) == {} == files.read_note(file.parent / "nothing")
