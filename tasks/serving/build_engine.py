"""Build what Triton loads: a TensorRT plan on a GPU, or the ONNX file as it is on a CPU."""

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from tasks import files
from tasks.config import Config
from tasks.errors import StepFailed, Unsuitable, UsageError
from tasks.promotion import in_service, registry
from tasks.run import Run
from tasks.serving import export_onnx

log = logging.getLogger(__name__)

MODEL_FILE = {"onnx": "model.onnx", "tensorrt": "model.plan"}
NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
FACTS = ("engine", "tensorrt_package", "tensorrt", "gpu", "compute_capability")  # what an engine fits; see build_plan


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name and its compute capability, as in NVIDIA H100 80GB HBM3, SM90."""

    name: str
    capability: str


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
        Unsigned: no step has written what the registry says of the version.
    """
    source, target, made = export_onnx.exported(config, run), folder_of(config, run), run.result("export_onnx")
    if not source.exists() or files.sha256(source) != made["sha256"]:
        raise UsageError(f"{source} is not what run {run.id} has exported: run `python commands.py export_onnx` first")
    tags = registry.require_signed(config, made["version"]).tags
    origin = {name: tags[name] for name in in_service.ORIGIN if name in tags}  # a registry can be lost
    with files.new_folder(target) as folder:
        facts = build(config, source / "model.onnx", folder / MODEL_FILE[config.serving.engine])
        for name in ("tokenizer.json", "settings.json"):
            shutil.copy2(source / name, folder)
        add_buckets(config, folder / "settings.json")
        engine = record(config, folder, **facts, **origin)
    known = {name: engine[name] for name in ("engine", "tensorrt", "gpu") if engine.get(name)}
    registry.record(config, engine["version"], **known, engine_sha256=engine["sha256"])
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
    """Builds any ONNX file into any engine file; beside it, as <name>.json, what it fits and its hash.

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
    built = {"sha256": files.sha256(target), "bytes": target.stat().st_size, **facts}
    files.write_json(target.with_name(f"{target.name}.json"), built)
    return {"step": "build_engine", "output": str(target), **built}


def build(config: Config, onnx: Path, target: Path) -> dict:
    """Writes the engine file; returns what is to be known about the machine it fits."""
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
        raise Unsuitable(f"{onnx} answers with logits that are not finite: run export_onnx again, with another dtype")


def build_plan(config: Config, onnx: Path, target: Path) -> dict:
    """Builds a strongly typed engine, with one optimisation profile per serving bucket.

    Returns {"engine", "tensorrt_package", "tensorrt", "gpu", "compute_capability"}: the TensorRT and the GPU that
    it fits, and no other. `gpu` is None with TensorRT-RTX, whose engines fit every GPU of a compute capability.

    Raises:
        UsageError: it is not an ONNX file, or only a part of one.
        StepFailed: without TensorRT or the right GPU, or where TensorRT does not take the model; the message quotes it.
    """
    trt, gpu = import_tensorrt(config.serving.tensorrt_package), gpu_here()
    capability = capability_to_build_for(config, trt, gpu)
    export_onnx.settings_of(onnx)  # says in plain words that a file was cut off
    listener = listen(trt)
    builder = trt.Builder(listener)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, listener)
    if not parser.parse_from_file(str(onnx)):
        complaints = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)) or listener.last_words()
        raise StepFailed(
            f"{name_of(config, trt)} does not take {onnx}: {' '.join(complaints.split())}: where it lacks an operator, "
            "export with another serving.opset, or build with a newer TensorRT; else bring the whole file, with its "
            ".data, or run export_onnx again"
        )
    options = builder.create_builder_config()
    options.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(config.serving.workspace_gib * 2**30))
    if config.serving.tensorrt_package == "tensorrt_rtx":
        options.num_compute_capabilities = 1
        options.set_compute_capability(trt.ComputeCapability.__members__[capability], 0)
    add_profiles(config, builder, options)
    measured = config.workspace / "models" / "cache" / f"{trt.__name__}-{trt.__version__}-{capability}.timing"
    use_timing_cache(options, measured)
    plan = builder.build_serialized_network(network, options)
    if plan is None:
        raise StepFailed(
            f"{name_of(config, trt)} could not build an engine from {onnx}: {listener.last_words()} Where it lacks "
            f"memory, raise serving.workspace_gib, now {config.serving.workspace_gib:g} GiB, or free some of the GPU's"
        )
    target.write_bytes(plan)
    try:
        files.write_bytes(measured, bytes(options.get_timing_cache().serialize()))
    except OSError as error:  # the engine is built: the next build only takes longer
        log.warning("the timing cache is not kept: %s", error)
    return {
        "engine": "tensorrt",
        "tensorrt_package": config.serving.tensorrt_package,
        "tensorrt": trt.__version__,
        "gpu": gpu.name if config.serving.tensorrt_package == "tensorrt" else None,
        "compute_capability": capability,
    }


def import_tensorrt(package: str):
    """The Python API of TensorRT, or that of TensorRT-RTX, which is the same and builds without a GPU too."""
    try:
        if package == "tensorrt":
            import tensorrt

            return tensorrt
        import onnxruntime_ep_nv_tensorrt_rtx  # noqa: F401, loads the libraries, which the bindings come without
        import tensorrt_rtx_bindings

        return tensorrt_rtx_bindings
    except ImportError as error:
        way_out = {
            "tensorrt": "run this step inside the Triton image that will serve the engine, or choose serving=onnx to "
            "serve with ONNX Runtime on a CPU",
            "tensorrt_rtx": "install the project's extra `tensorrt-rtx`",
        }
        raise StepFailed(f"{NAMES[package]} is not installed here ({error}): {way_out[package]}") from None


def name_of(config: Config, trt) -> str:
    return f"{NAMES[config.serving.tensorrt_package]} {trt.__version__}"


def listen(trt):
    """A TensorRT logger that passes everything on to this project's log, and remembers the errors."""

    class Listener(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors = []

        def log(self, severity, message):
            level = {trt.ILogger.WARNING: logging.WARNING, trt.ILogger.INFO: logging.INFO}
            level |= {trt.ILogger.ERROR: logging.ERROR, trt.ILogger.INTERNAL_ERROR: logging.ERROR}
            log.log(level.get(severity, logging.DEBUG), "TensorRT: %s", message)
            if level.get(severity) == logging.ERROR:
                self.errors.append(message)

        def last_words(self) -> str:
            return " ".join(self.errors[-1].split()) if self.errors else "its log does not say why."

    return Listener()


def capability_to_build_for(config: Config, trt, gpu: Gpu | None) -> str:
    """The compute capability that the engine is to fit, as TensorRT writes it: `SM89`.

    Raises:
        StepFailed: it is not that of this machine's GPU, and must be; or TensorRT-RTX does not build for it.
    """
    wanted, here = config.serving.compute_capability, gpu and gpu.capability
    if wanted == "CURRENT" and gpu is None:
        raise StepFailed(
            "there is no NVIDIA GPU here to build for (NVML finds none): run this step on the GPU host that will serve "
            "the engine; or, to build for another machine, add serving.tensorrt_package=tensorrt_rtx and, say, "
            "serving.compute_capability=SM89"
        )
    if wanted == "CURRENT":
        wanted = here
    is_here = f"{gpu.name} ({here})" if gpu else "no NVIDIA GPU"
    if config.serving.tensorrt_package == "tensorrt":
        if wanted != here:
            raise Unsuitable(
                f"serving.compute_capability={wanted}, but here is {is_here}, and TensorRT builds for no GPU but the "
                "one it runs on: leave it CURRENT, and build where the engine will serve"
            )
        return wanted
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    if wanted not in known:
        raise Unsuitable(
            f"{name_of(config, trt)} does not build for {wanted}, only for {', '.join(known)} (here is {is_here}): "
            "name one with serving.compute_capability, or serving.tensorrt_package=tensorrt"
        )
    return wanted


def add_profiles(config: Config, builder, options) -> None:
    """One optimisation profile per bucket, each tuned for full batches of its own length."""
    for shorter, length in pairwise([0, *config.serving.buckets]):
        profile = builder.create_optimization_profile()
        largest = (config.serving.max_batch_size, length)
        for name in export_onnx.INPUTS:
            profile.set_shape(name, (1, shorter + 1), largest, largest)
        options.add_optimization_profile(profile)


def use_timing_cache(options, measured: Path) -> None:
    """Gives the build what earlier ones have measured: kernels are timed once per TensorRT version and GPU."""
    known = options.create_timing_cache(measured.read_bytes() if measured.exists() else b"")
    if known is None or not options.set_timing_cache(known, ignore_mismatch=False):
        log.warning("%s is of no use to this TensorRT, and is made anew", measured)
        options.set_timing_cache(options.create_timing_cache(b""), ignore_mismatch=False)


# Which engine fits which machine -------------------------------------------------------------------------------------


def gpu_here() -> Gpu | None:
    """The first GPU that this process may use; None without one, or without its driver.

    From NVML, which comes with the driver: no CUDA context, no memory. Where one host has GPUs of several types, CUDA
    counts them in this order only with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    import pynvml

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        pynvml.nvmlInit()
        if first.isdigit():
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(first))
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(first)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return Gpu(pynvml.nvmlDeviceGetName(handle), f"SM{major}{minor}")
    except pynvml.NVMLError as error:
        log.info("NVML finds no GPU: %s", error)
        return None


def require_fit(folder: Path) -> None:
    """To be called where an engine is about to be loaded: in the environment and on the GPU of its server.

    Args:
        folder: with the engine's engine.json. An ONNX file fits everywhere.

    Raises:
        StepFailed: it was built with another TensorRT, or for another GPU.
    """
    built = files.read_json(folder / "engine.json")
    if built.get("engine") != "tensorrt":
        return
    if built.get("tensorrt_package") == "tensorrt_rtx":
        raise StepFailed(
            f"the engine was built with {in_words(built)}, which Triton does not load: build it again with "
            "serving.tensorrt_package=tensorrt, inside the Triton image"
        )
    gpu = gpu_here()
    here = {
        "tensorrt_package": "tensorrt",
        "tensorrt": import_tensorrt("tensorrt").__version__,
        "gpu": gpu and gpu.name,
        "compute_capability": gpu and gpu.capability,
    }
    require_same(built, here)


def fit_alike(one: dict, other: dict) -> bool:
    """Whether two engines' facts (see build_plan) name the same TensorRT and GPU: what loads one, loads the other.

    Engines of the project's first days have not all facts; what only one has does not tell them apart.
    """
    return all(one[fact] == other[fact] for fact in FACTS if fact in one and fact in other)


def require_same(built: dict, here: dict) -> None:
    """Raises StepFailed unless an engine was built (see build_plan) with what there is here."""
    if not fit_alike(built, here):
        raise StepFailed(
            f"the engine was built with {in_words(built)}, but here is {in_words(here)}: an engine fits one version of "
            "TensorRT and one type of GPU, so run build_engine again, in the image and on the GPU that serve"
        )


def in_words(facts: dict) -> str:
    """TensorRT 10.13.3.9 for NVIDIA H100 80GB HBM3 (SM90); or ONNX Runtime, where they are an ONNX file's."""
    if facts.get("engine") == "onnx":
        return "ONNX Runtime"
    package = NAMES[facts.get("tensorrt_package", "tensorrt")]
    if facts.get("compute_capability") is None:
        return f"{package} {facts.get('tensorrt')} and no NVIDIA GPU"
    gpu = facts.get("gpu") or "any GPU"
    return f"{package} {facts.get('tensorrt')} for {gpu} ({facts['compute_capability']})"


# What the engine stands beside ----------------------------------------------------------------------------------------


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
        "score_tolerance": config.serving.score_tolerance,
        **facts,
    }
    files.write_json(folder / "engine.json", engine)
    return engine
