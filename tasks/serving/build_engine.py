"""Build what Triton loads: a TensorRT plan on a GPU, or the ONNX file as it is on a CPU."""

import logging
import os
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from tasks import files
from tasks.config import Config
from tasks.errors import StepFailed, UsageError
from tasks.promotion import registry
from tasks.run import Run
from tasks.serving import export_onnx

log = logging.getLogger(__name__)

MODEL_FILE = {"onnx": "model.onnx", "tensorrt": "model.plan"}


def folder_of(config: Config, run: Run) -> Path:
    """The run's own folder, which no other run touches; gone once its version is in service."""
    return config.workspace / "models" / "engine" / run.id


def is_there(config: Config, run: Run) -> bool:
    return folder_of(config, run).exists()


def run(config: Config, run: Run) -> dict:
    """Writes models/engine/<run id>/: model.onnx or model.plan, tokenizer.json, settings.json and engine.json with the
    hashes of the others.

    Raises:
        UsageError: what the run has exported is not there, or has changed since.
    """
    source, target, made = export_onnx.exported(config, run), folder_of(config, run), run.result("export_onnx")
    if not source.exists() or files.sha256(source) != made["sha256"]:
        raise UsageError(f"{source} is not what run {run.id} has exported: run `python commands.py export_onnx` first")
    with files.new_folder(target) as folder:
        facts = build(config, source / "model.onnx", folder / MODEL_FILE[config.serving.engine])
        for name in ("tokenizer.json", "settings.json"):
            shutil.copy2(source / name, folder)
        add_buckets(config, folder / "settings.json")
        engine = record(config, folder, **facts)
    known = {name: engine[name] for name in ("engine", "tensorrt", "gpu") if engine.get(name)}
    registry.tag(config, engine["version"], **known, engine_sha256=engine["sha256"])
    size = (target / MODEL_FILE[engine["engine"]]).stat().st_size
    return {"version": engine["version"], "sha256": engine["sha256"], "bytes": size, **facts}


def of_run(config: Config, run: Run) -> tuple[int, Path]:
    """The version this run is about, and the folder with its engine.

    Raises:
        UsageError: what the run has built is not there, or has changed since.
    """
    folder, built = folder_of(config, run), run.result("build_engine")
    if not folder.exists() or files.read_json(folder / "engine.json")["sha256"] != built["sha256"]:
        raise UsageError(f"{folder} is not what run {run.id} has built: run `python commands.py build_engine` first")
    return built["version"], folder


def build_by_hand(overrides, onnx, output_path, config_path, config_name) -> dict:
    """Builds any ONNX file into any engine file.

    Raises:
        UsageError: there is no such ONNX file.
    """
    from tasks.step import open_run

    source, target = Path(onnx), Path(output_path)
    _, config, _ = open_run("build_engine", [str(o) for o in overrides], config_path, config_name)
    if not source.is_file():
        raise UsageError(f"--onnx={source} does not exist: `python commands.py export_onnx` writes one")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        facts = build(config, source, Path(place) / target.name)
        for file in Path(place).iterdir():
            os.replace(file, target.parent / file.name)
    return {
        "step": "build_engine",
        "output": str(target),
        "sha256": files.sha256(target),
        "bytes": target.stat().st_size,
        **facts,
    }


def build(config: Config, onnx: Path, target: Path) -> dict:
    """Writes the engine file and tries it; returns what is to be known about the machine it fits."""
    if config.serving.engine == "tensorrt":
        return build_plan(config, onnx, target)
    place_onnx(config, onnx, target)
    return {"engine": "onnx"}


def place_onnx(config: Config, onnx: Path, target: Path) -> None:
    """Puts the ONNX file in place and has ONNX Runtime answer a message with it.

    Its external data keeps its name, which stands in the file.
    """
    shutil.copy2(onnx, target)
    for data in onnx.parent.glob(f"{onnx.name}.data"):
        shutil.copy2(data, target.parent)
    one = np.ones((1, config.serving.buckets[0]), dtype=np.int64)
    try:
        logits = export_onnx.open_session(target).run(["logits"], {name: one for name in export_onnx.INPUTS})[0]
    except Exception as error:
        raise StepFailed(f"ONNX Runtime cannot run {onnx}: {error}: run export_onnx again") from None
    if not np.isfinite(logits).all():
        raise StepFailed(f"{onnx} answers with logits that are not finite: run export_onnx again, with another dtype")


def build_plan(config: Config, onnx: Path, target: Path) -> dict:
    """Builds a strongly typed TensorRT engine for messages of the serving buckets' lengths.

    Raises:
        StepFailed: without TensorRT, or where TensorRT does not take the model; the message quotes it.
    """
    trt = import_tensorrt()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        complaints = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise StepFailed(f"TensorRT {trt.__version__} cannot read {onnx}: {complaints}")
    options = builder.create_builder_config()
    options.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(config.serving.workspace_gib * 2**30))
    # One profile per bucket, each tuned for full batches of its own length.
    for shorter, length in pairwise([0, *config.serving.buckets]):
        profile = builder.create_optimization_profile()
        largest = (config.serving.max_batch_size, length)
        for name in export_onnx.INPUTS:
            profile.set_shape(name, (1, shorter + 1), largest, largest)
        options.add_optimization_profile(profile)
    measured = config.workspace / "models" / "cache" / "tensorrt.timing"
    cache = options.create_timing_cache(measured.read_bytes() if measured.exists() else b"")
    options.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, options)
    if plan is None:
        raise StepFailed(
            f"TensorRT {trt.__version__} could not build an engine from {onnx}: its log above says why; often "
            f"serving.workspace_gib={config.serving.workspace_gib} is too little, or the GPU's memory is taken"
        )
    target.write_bytes(plan)
    measured.parent.mkdir(parents=True, exist_ok=True)
    measured.write_bytes(options.get_timing_cache().serialize())
    return {"engine": "tensorrt", "tensorrt": trt.__version__, "gpu": gpu_name()}


def import_tensorrt():
    try:
        import tensorrt
    except ImportError as error:
        raise StepFailed(
            f"TensorRT is not installed here ({error}): build inside the Triton image that will serve the engine, "
            "or choose serving=onnx to serve with ONNX Runtime on a CPU"
        ) from None
    return tensorrt


def gpu_name() -> str | None:
    """The GPU that the engine is built for, which is the only type it runs on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def add_buckets(config: Config, settings_file: Path) -> None:
    """The lengths that the tokenizer pads to: the engine's, up to the one that holds the longest message."""
    settings = files.read_json(settings_file)
    longest = settings["max_length"]
    buckets = [bucket for bucket in config.serving.buckets if bucket < longest] + [longest]
    if longest > config.serving.buckets[-1]:
        raise UsageError(
            f"the model reads up to {longest} tokens, but serving.buckets ends at {config.serving.buckets[-1]}: "
            f"add {longest} to them"
        )
    files.write_json(settings_file, {**settings, "buckets": buckets})


def record(config: Config, folder: Path, **facts) -> dict:
    """Writes engine.json: the version, and the SHA-256 of every file, which install and swap check again."""
    hashes = {file.name: files.sha256(file) for file in sorted(folder.iterdir())}
    engine = {
        "version": files.read_json(folder / "settings.json")["version"],
        "sha256": files.sha256(folder),
        "files": hashes,
        "max_batch_size": config.serving.max_batch_size,
        "buckets": config.serving.buckets,
        **facts,
    }
    files.write_json(folder / "engine.json", engine)
    return engine
