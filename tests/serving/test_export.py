import subprocess

import numpy as np
import onnx
import pytest
from scipy.special import logit
from serving_parts import MAX_LENGTH, ROOT, VERSIONS, load_config, messages, run_of

from tasks import files
from tasks.errors import StepFailed, UsageError
from tasks.serving import build_engine, export_onnx, triton
from tasks.training import checkpoint, model


@pytest.fixture
def exported(made):
    return made / "models" / "1" / "exported" / "model.onnx"


@pytest.fixture
def trained(made):
    return made / "models" / "1" / "final"


def ask(file, ids, mask):
    return export_onnx.open_session(file).run(export_onnx.OUTPUTS, {"input_ids": ids, "attention_mask": mask})


def test_the_exported_model_decides_like_torch(made):
    result = run_of(made, 1).result("export_onnx")
    assert result["version"] == 1 and result["bytes"] > 100_000
    assert result["parity"]["messages"] == len(messages())
    assert result["parity"].keys() == {"messages", "float32"}
    assert result["parity"]["float32"]["equal"] == 1.0 and result["parity"]["float32"]["max_difference"] < 1e-4


def test_a_message_is_answered_the_same_alone_and_padded_in_a_batch(exported, trained, workspace):
    one_by_one = load_config(workspace, "serving.max_batch_size=1")
    alone, decided = export_onnx.classify(one_by_one, exported, trained, messages())
    ids = np.full((len(messages()), 128), 599)  # what stands in the padding does not matter
    mask = np.zeros_like(ids)
    tokenizer = model.load_tokenizer(str(trained / "merged"))
    for row, text in enumerate(messages()):
        tokens = tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    logits, decisions, versions = ask(exported, ids, mask)
    np.testing.assert_allclose(logits, alone, atol=1e-4)
    assert (decisions == decided).all() and decisions.any(axis=0).all() and not decisions.all(axis=0).any()
    assert versions.shape == (len(ids), 1) and (versions == 1).all()


def test_the_thresholds_are_in_the_graph(exported, trained):
    ids = np.random.default_rng(0).integers(1, 600, (64, 9))
    logits, decisions, _ = ask(exported, ids, np.ones_like(ids))
    assert (decisions == (logits >= logit(checkpoint.thresholds(trained)))).all()
    assert (decisions != (logits >= 0)).any()


def test_a_message_without_tokens_is_answered(exported):
    logits, *_ = ask(exported, np.zeros((1, 16), dtype=np.int64), np.zeros((1, 16), dtype=np.int64))
    assert np.isfinite(logits).all()


def test_the_graph_is_of_the_opset_and_the_sizes_that_were_asked_for(exported):
    model = onnx.load(exported)
    assert {entry.version for entry in model.opset_import if not entry.domain} == {20}
    kinds = {"logits": "FLOAT", "decisions": "BOOL", "model_version": "INT64"}
    for tensor in (*model.graph.input, *model.graph.output):
        sizes = [size.dim_param or size.dim_value for size in tensor.type.tensor_type.shape.dim]
        last = {"logits": 6, "decisions": 6, "model_version": 1}.get(tensor.name, "sequence")
        assert sizes == ["batch", last]
        assert tensor.type.tensor_type.elem_type == onnx.TensorProto.DataType.Value(kinds.get(tensor.name, "INT64"))
    assert [o.name for o in model.graph.output] == list(export_onnx.OUTPUTS)


def test_float16_is_refused_with_the_reason(workspace):
    with pytest.raises(UsageError, match="float16 overflows.*bfloat16"):
        load_config(workspace, "serving.dtype=float16")


def test_the_file_says_what_it_is_and_nothing_of_this_machine(exported, trained):
    settings = export_onnx.settings_of(exported)
    assert settings == files.read_json(exported.parent / "settings.json")
    assert settings["version"] == 1 and settings["max_length"] == MAX_LENGTH
    assert settings["thresholds"] == checkpoint.thresholds(trained).tolist()
    assert settings["tokenizer_sha256"] == files.sha256(exported.parent / "tokenizer.json")
    assert str(ROOT).encode() not in exported.read_bytes()


def test_other_decisions_than_torchs_stop_the_export(exported, trained, workspace):
    config = load_config(workspace)
    reference, _ = export_onnx.classify(config, exported, trained, messages())

    def compare(**references):
        return export_onnx.compare(config, exported, trained, messages(), references)

    export_onnx.require_parity(config, compare(float32=reference, bfloat16=reference))
    bad = compare(float32=reference + 1)
    assert bad["float32"]["different"] > 0 and bad["float32"]["equal"] < 0.999
    with pytest.raises(StepFailed, match="in float32 on .* 99.90%.*tokenizer"):
        export_onnx.require_parity(config, bad)
    with pytest.raises(StepFailed, match="in bfloat16 on .* 99.90%.*rounding"):
        export_onnx.require_parity(config, compare(float32=reference, bfloat16=reference + 1))


def test_what_is_too_close_to_a_threshold_is_only_counted(exported, trained, workspace):
    config = load_config(workspace, "gate.parity.near_threshold=1000", "gate.override_reason=a test")
    reference, _ = export_onnx.classify(config, exported, trained, messages())
    parity = export_onnx.compare(config, exported, trained, messages(), {"float32": -reference})["float32"]
    assert parity["near_threshold"] == reference.size and parity["different"] == 0 and parity["equal"] == 1.0


def test_bfloat16_weights_are_exported_and_compared(trained, bring, tmp_path):
    bring(1)
    looser = ["gate.parity.min_equal=0.98", "gate.override_reason=wide weights make much of the rounding"]
    result = export_onnx.export_by_hand(
        ["profile=demo", "serving=tensorrt", *looser], trained, tmp_path / "model.onnx", "configs", "config"
    )
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds and onnx.TensorProto.FLOAT16 not in kinds
    assert result["dtype"] == "bfloat16" and result["parity"]["float32"]["equal"] == 1.0
    with pytest.raises(UsageError, match="bfloat16.*serving=onnx"):
        triton.install_by_hand(load_config(tmp_path), tmp_path, tmp_path / "models")


def test_for_tensorrt_no_input_leads_outside_the_embeddings_or_the_message(trained, bring, tmp_path):
    bring(1)
    config = load_config(tmp_path, "serving=tensorrt")
    export_onnx.export(config, trained, 1, tmp_path / "model.onnx", messages()[:2])
    session = export_onnx.open_session(export_onnx.in_float32(tmp_path / "model.onnx", tmp_path))
    last = model.load_merged(trained)[0].config.vocab_size - 1

    def logits(ids, mask):
        return session.run(["logits"], {"input_ids": np.array([ids]), "attention_mask": np.array([mask])})[0]

    expected = logits([3, 0, last, last], [1, 1, 1, 0])
    for most in (2**31, 2**62):
        np.testing.assert_array_equal(logits([3, -most, last + 1, most], [1, 1, 1, 0]), expected)
        np.testing.assert_array_equal(logits([3, 0, last, last], [most, 1, most, -most]), expected)


def test_by_hand_only_a_checkpoint_is_exported(tmp_path):
    with pytest.raises(UsageError, match="is not a checkpoint"):
        export_onnx.export_by_hand([], tmp_path, tmp_path / "model.onnx", "configs", "config")


def test_an_engine_for_the_cpu_is_the_file_itself_with_its_hashes(made):
    engine = made / "models" / "1" / "engine"
    record = files.read_json(engine / "engine.json")
    assert record["version"] == 1 and record["engine"] == "onnx"
    assert record["files"]["model.onnx"] == files.sha256(made / "models" / "1" / "exported" / "model.onnx")
    buckets = load_config(made).serving.buckets
    assert files.read_json(engine / "settings.json")["buckets"] == [*(b for b in buckets if b < MAX_LENGTH), MAX_LENGTH]


def test_every_run_keeps_files_of_its_own(made):
    config = load_config(made)
    for version in VERSIONS:
        run = run_of(made, version)
        assert export_onnx.settings_of(export_onnx.exported(config, run) / "model.onnx")["version"] == version
        assert build_engine.of_run(config, run) == (version, build_engine.folder_of(config, run))


def test_what_the_run_has_not_exported_itself_is_not_built(bring, config):
    run = bring(1)
    with pytest.raises(UsageError, match="run-2 has exported.*export_onnx"):
        build_engine.run(config, run_of(config.workspace, 2))
    (export_onnx.exported(config, run) / "settings.json").write_text("{}")
    with pytest.raises(UsageError, match="run-1 has exported.*export_onnx"):
        build_engine.run(config, run)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"not a model"])
def test_a_damaged_onnx_file_is_not_built(exported, workspace, damage):
    (workspace / "model.onnx").write_bytes(damage(exported.read_bytes()))
    with pytest.raises(StepFailed, match="cannot load"):
        build_engine.build_by_hand(
            ["profile=demo"], workspace / "model.onnx", workspace / "out.onnx", "configs", "config"
        )
    assert not (workspace / "out.onnx").exists()


def test_a_model_that_reads_more_than_the_longest_bucket_is_refused(bring, workspace):
    config = load_config(workspace, "serving.buckets=[8,16]")
    with pytest.raises(UsageError, match="serving.buckets"):
        build_engine.run(config, bring(1))


def test_convert_to_tensorrt_needs_two_files(workspace):
    done = subprocess.run([ROOT / "convert_to_tensorrt.sh", "one"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage:")
    done = subprocess.run([ROOT / "convert_to_tensorrt.sh", "no.onnx", "no.trt"], capture_output=True, text=True)
    assert done.returncode == 2 and "no.onnx does not exist" in done.stderr.splitlines()[-1]
