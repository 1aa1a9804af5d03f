"""Building with TensorRT-RTX, whose Python API is TensorRT's, and which needs no GPU."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise

import onnx
import pytest
from serving_parts import ROOT, load_config, messages

from tasks import files
from tasks.errors import StepFailed, UsageError
from tasks.promotion import registry
from tasks.serving import build_engine, export_onnx, repository, stage, triton
from tasks.serving.build_engine import Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", "SM90")
RTX = (
    "serving=tensorrt",
    "serving.tensorrt_package=tensorrt_rtx",
    "serving.compute_capability=SM89",
    "serving.buckets=[16,32]",
    "serving.max_batch_size=8",
)


@pytest.fixture(scope="session")
def rtx():
    """TensorRT-RTX's Python module."""
    try:
        return build_engine.import_tensorrt("tensorrt_rtx")
    except StepFailed as error:
        if os.environ.get("CI"):
            pytest.fail(f"{error}; with CI set that is a failure: see `make test`")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bfloat16(made, tmp_path_factory):
    """Version 1 as it is exported for TensorRT: bfloat16 weights, beside the graph as those of a large model are."""
    file = tmp_path_factory.mktemp("bfloat16") / "model.onnx"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export_onnx, "ONE_FILE_BYTES", 1000)
        config, trained = load_config(made, *RTX), made / "models" / "1" / "final"
        _, references = export_onnx.export(config, trained, 1, file, messages())
        parity = export_onnx.compare(config, file, trained, messages(), references)
    assert file.with_name("model.onnx.data").stat().st_size > 100_000
    assert parity["float32"]["equal"] == 1.0 and parity["float32"]["max_difference"] < 1e-4
    # The wide random weights of this model make much of bfloat16's rounding.
    assert parity["bfloat16"]["equal"] > 0.98 and 1e-3 < parity["bfloat16"]["max_difference"] < 0.5
    return file


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def build(workspace, file, *overrides):
    return build_engine.build(load_config(workspace, *RTX, *overrides), file, workspace / "model.plan")


def damaged(source, workspace, operator):
    """The exported model with its softmax called otherwise."""
    model = onnx.load(source)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = operator
    onnx.save(model, workspace / "model.onnx")
    return workspace / "model.onnx"


def test_the_engine_of_a_bfloat16_model_is_built_without_a_gpu(rtx, bfloat16, workspace, no_gpu):
    facts = build(workspace, bfloat16)
    assert facts == {
        "engine": "tensorrt",
        "tensorrt_package": "tensorrt_rtx",
        "tensorrt": rtx.__version__,
        "gpu": None,
        "compute_capability": "SM89",
    }
    plan = (workspace / "model.plan").read_bytes()
    assert len(plan) > 1_000_000 and all(name.encode() in plan for name in (*export_onnx.INPUTS, *export_onnx.OUTPUTS))


def test_every_bucket_has_a_profile_of_its_own(rtx, workspace):
    config = load_config(workspace, *RTX)
    shapes = []

    class Options:  # hears what TensorRT's own would keep to itself
        def add_optimization_profile(self, profile):
            assert profile
            shapes.append([[tuple(shape) for shape in profile.get_shape(name)] for name in export_onnx.INPUTS])

    build_engine.add_profiles(config, rtx.Builder(build_engine.listen(rtx)), Options())
    for found, (shorter, length) in zip(shapes, pairwise([0, *config.serving.buckets]), strict=True):
        assert found == 2 * [[(1, shorter + 1), (8, length), (8, length)]]


def test_what_was_timed_is_kept_and_what_can_not_be_read_is_made_anew(rtx, bfloat16, workspace):
    cache = workspace / "models" / "cache" / f"{rtx.__name__}-{rtx.__version__}-SM89.timing"
    build(workspace, bfloat16)
    kept = cache.read_bytes()
    assert kept
    given = []

    class Options:  # hears what TensorRT's own is given
        real = rtx.Builder(build_engine.listen(rtx)).create_builder_config()

        def create_timing_cache(self, known):
            given.append(known)
            return self.real.create_timing_cache(known)

        def set_timing_cache(self, known, ignore_mismatch):
            return self.real.set_timing_cache(known, ignore_mismatch)

    build_engine.use_timing_cache(Options(), cache)
    assert given == [kept]
    cache.write_bytes(b"damaged")
    build(workspace, bfloat16)
    assert cache.read_bytes() == kept


def test_an_engine_outlives_a_timing_cache_that_can_not_be_kept(rtx, bfloat16, workspace, caplog):
    (workspace / "models").mkdir(exist_ok=True)
    (workspace / "models" / "cache").write_text("no folder")
    build(workspace, bfloat16)
    assert "the timing cache is not kept" in caplog.text


def test_a_run_builds_records_and_does_not_stage_what_triton_can_not_load(rtx, bring, workspace):
    run, config = bring(1), load_config(workspace, *RTX)
    run.save("build_engine", build_engine.run(config, run))
    engine = build_engine.folder_of(config, run)
    record = files.read_json(engine / "engine.json")
    assert (record["engine"], record["tensorrt"], record["compute_capability"]) == ("tensorrt", rtx.__version__, "SM89")
    assert record["files"]["model.plan"] == files.sha256(engine / "model.plan")
    assert registry.tags(config, 1)["tensorrt"] == rtx.__version__
    with pytest.raises(StepFailed, match="TensorRT-RTX .* for any GPU .SM89., which Triton does not load"):
        stage.run(config, run)
    assert not (workspace / "triton").exists()


def test_convert_to_tensorrt_builds_with_what_it_is_told(rtx, bfloat16, workspace):
    done = subprocess.run(
        [ROOT / "convert_to_tensorrt.sh", bfloat16, workspace / "models/model.trt", *RTX[1:]],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result, target = json.loads(done.stdout), workspace / "models" / "model.trt"
    assert result["compute_capability"] == "SM89" and result["bytes"] == target.stat().st_size
    assert result["sha256"] == files.sha256(target)
    # Whoever finds the file later learns what it fits.
    recorded = files.read_json(workspace / "models" / "model.trt.json")
    assert recorded == {name: value for name, value in result.items() if name not in ("step", "output")}
    assert recorded["tensorrt_package"] == "tensorrt_rtx" and recorded["tensorrt"]


# What can not be built ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "package, missing, way_out",
    [
        ("tensorrt", "tensorrt", "TensorRT is not installed.*Triton image.*serving=onnx"),
        ("tensorrt_rtx", "tensorrt_rtx_bindings", "TensorRT-RTX is not installed.*`tensorrt-rtx`"),
        ("tensorrt_rtx", "onnxruntime_ep_nv_tensorrt_rtx", "TensorRT-RTX is not installed.*`tensorrt-rtx`"),
    ],
)
def test_without_tensorrt_the_way_out_is_named(made, workspace, monkeypatch, package, missing, way_out):
    monkeypatch.setitem(sys.modules, missing, None)
    exported = made / "models" / "1" / "exported" / "model.onnx"
    with pytest.raises(StepFailed, match=way_out):
        build(workspace, exported, f"serving.tensorrt_package={package}")


def test_too_little_memory_is_named_with_its_limit(rtx, bfloat16, workspace):
    with pytest.raises(StepFailed, match="workspace limit.*raise serving.workspace_gib, now 0.001 GiB"):
        build(workspace, bfloat16, "serving.workspace_gib=0.001")
    assert not (workspace / "model.plan").exists()


def test_without_a_gpu_the_one_to_build_for_has_to_be_named(rtx, bfloat16, workspace, no_gpu):
    with pytest.raises(StepFailed, match="no NVIDIA GPU here.*serving.compute_capability=SM89"):
        build(workspace, bfloat16, "serving.compute_capability=CURRENT")


def test_a_gpu_that_tensorrt_rtx_does_not_know_is_refused(rtx, bfloat16, workspace):
    with pytest.raises(StepFailed, match="does not build for SM90, only for .*SM89.*tensorrt_package=tensorrt"):
        build(workspace, bfloat16, "serving.compute_capability=SM90")


def test_tensorrt_builds_for_no_gpu_but_its_own(workspace):
    config = load_config(workspace, *RTX, "serving.tensorrt_package=tensorrt")
    for gpu, here in ((H100, "NVIDIA H100 80GB HBM3 .SM90."), (None, "no NVIDIA GPU")):
        with pytest.raises(StepFailed, match=f"compute_capability=SM89, but here is {here}"):
            build_engine.capability_to_build_for(config, None, gpu)
    current = load_config(workspace, *RTX, "serving.tensorrt_package=tensorrt", "serving.compute_capability=CURRENT")
    assert build_engine.capability_to_build_for(current, None, H100) == "SM90"


@pytest.mark.parametrize("operator", ["Unique", "Sofmax"])  # one that TensorRT lacks, one that there is not
def test_an_operator_that_tensorrt_lacks_is_named(rtx, made, workspace, operator):
    file = damaged(made / "models" / "1" / "exported" / "model.onnx", workspace, operator)
    with pytest.raises(StepFailed, match=f"does not take .*model.onnx: .*operator: {operator}.*serving.opset"):
        build(workspace, file)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"not a model"])
def test_a_truncated_file_is_not_built(rtx, bfloat16, workspace, damage):
    (workspace / "model.onnx").write_bytes(damage(bfloat16.read_bytes()))
    with pytest.raises(UsageError, match="model.onnx is not an ONNX file, or only a part of one"):
        build(workspace, workspace / "model.onnx")


@pytest.mark.parametrize("kept", [0, 0.9])
def test_a_file_without_all_its_weights_is_not_built(rtx, bfloat16, workspace, kept):
    shutil.copy(bfloat16, workspace)
    data = bfloat16.with_name("model.onnx.data").read_bytes()
    if kept:
        (workspace / "model.onnx.data").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(StepFailed, match="does not take .*bring the whole file, with its .data"):
        build(workspace, workspace / "model.onnx")


# What fits where ------------------------------------------------------------------------------------------------------

BUILT = {
    "tensorrt_package": "tensorrt",
    "tensorrt": "10.13.3.9",
    "gpu": "NVIDIA H100 80GB HBM3",
    "compute_capability": "SM90",
}


@pytest.mark.parametrize(
    "here, shown",
    [
        ({"tensorrt": "10.14.0.1"}, "TensorRT 10.14.0.1 for NVIDIA H100 80GB HBM3 .SM90."),
        ({"gpu": "NVIDIA L4", "compute_capability": "SM89"}, "TensorRT 10.13.3.9 for NVIDIA L4 .SM89."),
        ({"gpu": "NVIDIA H100 PCIe"}, "TensorRT 10.13.3.9 for NVIDIA H100 PCIe .SM90."),
        ({"gpu": None, "compute_capability": None}, "TensorRT 10.13.3.9 and no NVIDIA GPU"),
    ],
)
def test_an_engine_for_another_machine_is_refused_naming_both(here, shown):
    build_engine.require_same({**BUILT, "sha256": "…"}, BUILT)
    build_engine.require_same({"tensorrt": BUILT["tensorrt"], "gpu": BUILT["gpu"]}, BUILT)  # one of the first days
    with pytest.raises(
        StepFailed, match=f"built with TensorRT 10.13.3.9 for NVIDIA H100 80GB HBM3 .SM90., but here is {shown}"
    ):
        build_engine.require_same(BUILT, {**BUILT, **here})


def test_a_server_says_that_its_champion_does_not_fit_and_starts_all_the_same(made, tmp_path, caplog):
    build_engine.require_fit(made / "models" / "1" / "engine")  # an ONNX file fits everywhere
    files.write_json(tmp_path / "engine.json", {"engine": "tensorrt", **BUILT, "tensorrt_package": "tensorrt_rtx"})
    triton.say_whether_it_fits(tmp_path)
    assert "does not fit" in caplog.text and "which Triton does not load" in caplog.text


@pytest.mark.parametrize("found, load", [(b"plan", ["toxic_text"]), (b"plan and a bit", [])])
def test_a_server_that_starts_serves_no_other_plan_than_was_built(config, monkeypatch, caplog, found, load):
    live, asked = repository.live(config), []
    repository.create(config, live)
    repository.write(live, repository.text_config(config, 3))
    classifier = repository.folder(live, repository.CLASSIFIER, 3)
    files.write_bytes(classifier / "model.plan", found)
    files.write_json(classifier / "engine.json", {"engine": "tensorrt", **BUILT})
    files.write_json(classifier / "golden.json", [])
    for part in repository.PARTS:
        files.write_json(repository.folder(live, part, 3) / "hashes.json", {})
    files.write_json(classifier / "hashes.json", {"model.plan": hashlib.sha256(b"plan").hexdigest()})
    monkeypatch.setattr(triton, "become", lambda config, models, ports, load, *more: asked.extend(load))
    triton.serve(config)
    assert asked == load and ("model.plan has SHA-256" in caplog.text) == (not load)


def test_without_a_gpu_there_is_none(no_gpu):
    assert build_engine.gpu_here() is None
