import os
import signal
import subprocess
import sys
import textwrap
import time

import polars as pl
import psutil
import pytest
from serving_parts import ROOT, load_config, messages, run_of

from tasks import files
from tasks.errors import StepFailed, UsageError
from tasks.serving import repository, stage


def servers(workspace) -> list[int]:
    """Triton's processes that serve from this workspace, and those of its models."""
    command_lines = {process.pid: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    starts = (f"--model-repository={workspace}", f"{workspace}/triton")
    return [pid for pid, words in command_lines.items() if any(word.startswith(starts) for word in words)]


def staged(workspace) -> list[str]:
    """The runs that have a staging folder."""
    return sorted(folder.name for folder in (workspace / "triton" / "staging").iterdir())


def test_the_whole_split_is_answered_as_torch_answers_it(made):
    figures = run_of(made, 1).result("stage")
    assert figures["messages"] == len(messages())
    # The split's truth is what torch decides.
    assert figures["f1_toxic"] == 1.0 and figures["f1_types"] == 1.0
    assert figures["parity"]["equal"] == 1.0
    assert 0 < figures["latency_p50_ms"] <= figures["latency_p99_ms"]
    assert figures["peak_memory_mib"] > 50
    golden = figures["golden"]
    assert len(golden) == stage.GOLDEN and {m["answer"]["toxic"] for m in golden} == {True, False}


def test_nothing_is_left_of_the_staging_server(made):
    assert servers(made) == [] and staged(made) == []
    assert (run_of(made, 1).folder / "stage" / "triton.log").stat().st_size > 0


def test_served_figures_under_the_gate_stop_the_release(config, bring):
    run = bring(1)
    split = config.workspace / "data" / "processed" / "test.parquet"
    test = pl.read_parquet(split)
    test.with_columns(toxic=(1 - test["toxic"])).write_parquet(split)
    with pytest.raises(StepFailed, match="served F1 toxic 0.0000 is below 0.85"):
        stage.run(config, run)
    assert servers(config.workspace) == []


def test_decisions_that_differ_from_torchs_stop_the_release(config, bring):
    run = bring(1)
    predictions = pl.read_parquet(run.folder / "predictions.parquet")
    predictions.with_columns(decision_toxic=~predictions["decision_toxic"]).write_parquet(
        run.folder / "predictions.parquet"
    )
    with pytest.raises(StepFailed, match="served decisions differ from torch's"):
        stage.run(config, run)


def test_an_engine_of_another_run_is_not_staged(config, bring):
    bring(1)
    with pytest.raises(UsageError, match="build_engine"):
        stage.run(config, run_of(config.workspace, 2))


def test_a_changed_engine_file_is_not_staged(config, bring):
    run = bring(1)
    with (config.workspace / "models" / "engine" / "model.onnx").open("ab") as file:
        file.write(b" ")
    with pytest.raises(StepFailed, match="model.onnx has SHA-256"):
        stage.run(config, run)


@pytest.fixture
def other(config, bring):
    """A process that stages run 1 and gets no further than its server."""
    bring(1)
    program = f"""
        import time
        from pathlib import Path
        from serving_parts import load_config, run_of
        from tasks.serving import stage
        workspace = Path({str(config.workspace)!r})
        stage.replay = lambda *arguments: time.sleep(1000)
        stage.run(load_config(workspace), run_of(workspace, 1))
    """
    path = f"{ROOT}:{ROOT / 'tests' / 'serving'}"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
    )
    while len(servers(config.workspace)) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    left = [psutil.Process(pid) for pid in servers(config.workspace)]
    yield process
    for one in [process, *(one for one in left if one.is_running())]:
        one.kill()
    process.wait()


def test_only_what_a_killed_stage_has_left_is_removed_by_another(config, bring, other):
    run, there = bring(2), set(servers(config.workspace))
    assert stage.run(config, run)["f1_toxic"] == 1.0
    assert there <= set(servers(config.workspace)) and staged(config.workspace) == ["run-1"]
    bring(1)
    with pytest.raises(StepFailed, match="run run-1 is being staged by another process, in .*run-1: wait"):
        stage.run(config, run_of(config.workspace, 1))
    assert there <= set(servers(config.workspace))

    other.send_signal(signal.SIGKILL)
    other.wait()
    bring(2)
    assert stage.run(config, run)["f1_toxic"] == 1.0
    assert servers(config.workspace) == [] and staged(config.workspace) == []


def test_a_stage_that_starts_again_ends_what_its_killed_self_has_left(config, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert servers(config.workspace) and staged(config.workspace) == ["run-1"]
    assert stage.run(config, run_of(config.workspace, 1))["f1_toxic"] == 1.0
    assert servers(config.workspace) == [] and staged(config.workspace) == []


def test_a_terminated_stage_takes_its_server_with_it(config, bring, monkeypatch):
    run = bring(1)

    def terminated(*arguments):
        raise SystemExit(143)

    monkeypatch.setattr(stage, "replay", terminated)
    with pytest.raises(SystemExit):
        stage.run(config, run)
    assert servers(config.workspace) == [] and staged(config.workspace) == []


def test_the_committed_templates_are_what_triton_reads(config):
    for model in (*repository.PARTS, repository.TEXT):
        parsed = repository.read(repository.TEMPLATES / model / "config.pbtxt")
        assert parsed.name == model and parsed.max_batch_size > 0
    gpu = repository.read(repository.TEMPLATES / repository.CLASSIFIER / "config.tensorrt.pbtxt")
    cpu = repository.read(repository.TEMPLATES / repository.CLASSIFIER / "config.pbtxt")
    assert gpu.platform == "tensorrt_plan" and cpu.backend == "python"
    assert (gpu.input, gpu.output) == (cpu.input, cpu.output)


def test_the_engine_and_the_sizes_of_the_configuration_reach_the_server(workspace):
    sizes = ("serving.instances=3", "serving.max_batch_size=7", "serving.max_queue_delay_us=11")
    for engine in ("onnx", "tensorrt"):
        config = load_config(workspace, f"serving={engine}", *sizes)
        parsed = repository.part_config(config, repository.CLASSIFIER, [4])
        assert (parsed.platform == "tensorrt_plan") == (engine == "tensorrt")
        assert parsed.max_batch_size == 7 and parsed.instance_group[0].count == 3
        assert parsed.dynamic_batching.max_queue_delay_microseconds == 11
        assert list(parsed.version_policy.specific.versions) == [4]
        buckets = len(config.serving.buckets) if engine == "tensorrt" else 0
        assert len(parsed.instance_group[0].profile) == buckets


def test_what_serves_and_what_served_last_stays_on_disk(config, made, tmp_path):
    engine = made / "models" / "1" / "engine"
    repository.create(config, tmp_path)
    for version in range(1, 8):
        repository.install(engine, tmp_path, version)
    assert repository.served(tmp_path) is None
    repository.write(tmp_path, repository.text_config(config, 4))
    assert repository.served(tmp_path) == 4
    # 8 served too and is gone from the disk; 5 is bad; 6 and 7 never served.
    repository.prune(tmp_path, history=[4, 8, 2])
    assert repository.installed(tmp_path) == [2, 4, 7]
    repository.prune(tmp_path, history=[])
    assert repository.installed(tmp_path) == [2, 4, 7]
    repository.create(config, tmp_path)  # a server that starts again
    assert repository.served(tmp_path) == 4
    assert files.read_json(repository.folder(tmp_path, repository.CLASSIFIER, 4) / "engine.json")["version"] == 1
