import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import polars as pl
import psutil
import pytest
import yaml
from serving_parts import (
    ROOT,
    add_fault,
    answer,
    damage_model,
    empty_engine,
    load_config,
    messages,
    own_files,
    run_of,
)

from tasks import files
from tasks.errors import StepFailed, UsageError
from tasks.promotion import registry
from tasks.serving import export_onnx, memory, repository, stage, triton


def servers(workspace) -> list[int]:
    """Triton's processes that serve from this workspace, and those of its models."""
    found = psutil.process_iter(["cmdline"])
    return [process.pid for process in found if triton.serves_from(workspace, process, process.info["cmdline"] or [])]


TIGHT = ["gate.latency.max_ratio=0.001", "gate.override_reason=a test"]
WIDE = ["gate.latency.max_ratio=1000", "gate.override_reason=a test"]


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
    assert figures["memory_free_gib"] > figures["memory_needed_gib"] > figures["peak_memory_mib"] / 2**10 / 3
    drawn = [message for message in figures["golden"] if message["text"] in messages()]
    assert len(drawn) == stage.GOLDEN and {m["answer"]["toxic"] for m in drawn} == {True, False}
    fixed = [message["text"] for message in yaml.safe_load(stage.FIXED.read_text(encoding="utf-8"))]
    assert [message["text"] for message in figures["golden"]] == [m["text"] for m in drawn] + fixed


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


def test_a_release_is_compared_with_torch_too(config, bring):
    """The run that evaluated the version was another one: export_onnx has kept what torch decides of its messages."""
    run = bring(1)
    (run.folder / "predictions.parquet").unlink()
    assert stage.run(config, run)["parity"]["equal"] == 1.0
    file = export_onnx.exported(config, run) / export_onnx.DECISIONS
    decisions = pl.read_parquet(file)
    decisions.with_columns(decision_toxic=~decisions["decision_toxic"]).write_parquet(file)
    with pytest.raises(StepFailed, match="served decisions differ from torch's"):
        stage.run(config, run)
    file.unlink()
    with pytest.raises(StepFailed, match="torch.parquet does not exist.*export_onnx"):
        stage.run(config, run)


def test_an_engine_of_another_run_is_not_staged(config, bring):
    bring(1)
    with pytest.raises(UsageError, match="build_engine"):
        stage.run(config, run_of(config.workspace, 2))


def test_a_changed_engine_file_is_not_staged(config, bring):
    run = bring(1)
    with (config.workspace / "models" / "engine" / run.id / "model.onnx").open("ab") as file:
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


def test_too_little_memory_is_said_before_anything_is_loaded(config, bring):
    run = bring(1)
    with pytest.raises(
        StepFailed,
        match=r"needs about 0\.\d+ GiB of memory, and serving.memory_headroom_gib=100000 beside it; \d+\.\d\d GiB",
    ):
        stage.run(load_config(config.workspace, "serving.memory_headroom_gib=100000"), run)
    assert servers(config.workspace) == []
    assert "toxic_classificator" not in (run.folder / "stage" / "triton.log").read_text().partition("Server Options")[0]


def test_a_containers_limit_counts_as_the_memory_that_there_is(tmp_path):
    assert memory.control_groups(tmp_path) == []
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.control_groups(tmp_path) == []
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("active_file 7\ninactive_file 500\n")
    assert memory.control_groups(tmp_path) == [(3000, 2000)]
    assert 0 < memory.free_here() <= psutil.virtual_memory().total


def test_a_server_says_how_much_memory_is_free_on_its_machine(config, tmp_path):
    repository.create(config, tmp_path / "models")
    with triton.running(config, tmp_path / "models", tmp_path, load=()) as server:
        free = memory.free_by_metrics(config, server.metrics_url)
        assert abs(free - psutil.virtual_memory().available) < 2 * memory.GIB
        tensorrt = load_config(config.workspace, "serving=tensorrt")
        assert memory.free_by_metrics(tensorrt, server.metrics_url, timeout_s=0.5) is None  # it has no GPU
    assert memory.free_by_metrics(config, server.metrics_url) is None
    gpus = 'nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 1.5e+09\nnv_gpu_memory_used_bytes{gpu_uuid="GPU-2"} 7\n'
    found = memory.read_gauge(gpus, "nv_gpu_memory_used_bytes")
    assert found == {'{gpu_uuid="GPU-1"}': 1_500_000_000, '{gpu_uuid="GPU-2"}': 7}


@pytest.mark.parametrize("outcome", [None, "warned", "stopped"])
def test_latency_is_held_against_the_champions_in_a_server_of_its_own(config, live, promote, bring, outcome):
    promote(1)
    registry.tag(config, 2, stage_warned="of an earlier try")
    before, run = set(servers(config.workspace)), bring(2)
    overrides = {None: WIDE, "warned": TIGHT, "stopped": [*TIGHT, "gate.latency.binds=true"]}[outcome]
    limited = load_config(config.workspace, *overrides)
    sentence = r"served p99 \d+\.\d ms is \d+\.\d\d times the champion's \d+\.\d ms, .*gate.latency.max_ratio is 0.001"
    if outcome == "stopped":
        with pytest.raises(StepFailed, match=sentence):
            stage.run(limited, run)
    else:
        figures = stage.run(limited, run)
        ratio = figures["latency_p99_ms"] / figures["champion_latency_p99_ms"]
        assert figures["latency_ratio"] == ratio > 0.001 and 0 < figures["champion_latency_p50_ms"]
        assert figures.get("warned") == (["latency"] if outcome else None)
        tags = registry.tags(config, 2)
        assert re.match(sentence, tags["stage_warned"]) if outcome else "stage_warned" not in tags
    assert set(servers(config.workspace)) == before and answer(config)["version"] == 1


def fail_as_it_loads(folder):
    add_fault(folder / "model.py", "raise MemoryError\n")


@pytest.mark.parametrize(
    "harm, complaint",
    [
        (fail_as_it_loads, "Triton can't load toxic_text: .*stage/champion/triton.log"),
        (damage_model, "model.onnx has SHA-256 .* trigger toxicity_release for version 1"),
        (empty_engine, "engine.json can't be read .* trigger toxicity_release for version 1"),
        (shutil.rmtree, "hashes.json is missing"),
    ],
)
def test_a_champion_that_no_longer_loads_is_not_compared_with_unless_the_limit_binds(
    config, promote, bring, live, harm, complaint
):
    promote(1)
    harm(own_files(config, 1))
    run = bring(2)
    assert "latency_ratio" not in stage.run(config, run)
    with pytest.raises(StepFailed, match=complaint):
        stage.run(load_config(config.workspace, "gate.latency.binds=true", "gate.override_reason=a test"), run)
    assert staged(config.workspace) == []


def test_the_committed_templates_are_what_triton_reads(config):
    for model in (*repository.PARTS, repository.TEXT):
        parsed = repository.read(repository.TEMPLATES / model / "config.pbtxt")
        assert parsed.name == model and parsed.max_batch_size > 0
    gpu = repository.read(repository.TEMPLATES / repository.CLASSIFIER / "config.tensorrt.pbtxt")
    cpu = repository.read(repository.TEMPLATES / repository.CLASSIFIER / "config.pbtxt")
    assert gpu.platform == "tensorrt_plan" and cpu.backend == "python"
    for tensor in cpu.input:  # what ONNX Runtime gets model.py makes batches of; TensorRT wants them made
        tensor.allow_ragged_batch = False
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


@pytest.mark.parametrize("instances", [1, 2])
def test_an_engine_is_warmed_up_for_every_length_unless_a_failure_could_end_the_server(workspace, instances):
    config = load_config(workspace, "serving=tensorrt", f"serving.instances={instances}")
    warm = repository.part_config(config, repository.CLASSIFIER, [4]).model_warmup
    found = [(one.inputs["input_ids"].dims[0], one.batch_size) for one in warm]
    expected = [(length, size) for length in config.serving.buckets for size in (1, config.serving.max_batch_size)]
    assert found == (expected if instances == 1 else [])


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
    # A removal that was killed has taken away the first part, an install that was killed has made no more than that.
    repository.install(engine, tmp_path, 8, parts=repository.PARTS[1:])
    (tmp_path / repository.TOKENIZER / ".9.new").mkdir()
    repository.prune(tmp_path, history=[])
    assert repository.installed(tmp_path) == [2, 4, 7]
    for part in repository.PARTS:
        assert sorted(path.name for path in (tmp_path / part).iterdir() if path.is_dir()) == ["2", "4", "7"]
    repository.create(config, tmp_path)  # a server that starts again
    assert repository.served(tmp_path) == 4
    assert files.read_json(repository.folder(tmp_path, repository.CLASSIFIER, 4) / "engine.json")["version"] == 1
