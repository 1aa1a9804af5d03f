"""What a version takes of a server's memory, the GPU's or the machine's, and what is free of it."""

import logging
import re
import time
from pathlib import Path

import httpx
import psutil

from tasks import files, proxies
from tasks.config import Config
from tasks.errors import StepFailed

log = logging.getLogger(__name__)

GIB = 2**30

# What a server takes for a version: its model file so many times, and beside it what does not grow with the model.
# ONNX Runtime was measured at 1.2 times 480 MiB of weights. The Python models bring an interpreter each, 0.2 GiB in
# all; a GPU's context takes 0.5 GiB, the rest is for the activations of a full batch.
TIMES = {"onnx": 1.5, "tensorrt": 1.1}
BESIDE = {"onnx": 0.3 * GIB, "tensorrt": 2.5 * GIB}


def needed(config: Config, engine: Path) -> int:
    """Bytes that a server takes for the version whose model file lies in this folder: on the GPU for TensorRT."""
    kind = files.read_json(engine / "engine.json").get("engine", config.serving.engine)
    size = sum(file.stat().st_size for file in engine.glob("model.*") if file.suffix != ".py")
    return round(BESIDE[kind] + config.serving.instances * TIMES[kind] * size)


def require(config: Config, engine: Path, metrics_url: str) -> dict[str, float]:
    """Raises StepFailed where what is free is not enough to stage this engine and leave the headroom.

    Returns the two figures that were compared, in GiB.
    """
    on_gpu, wanted = config.serving.engine == "tensorrt", needed(config, engine) / GIB
    free, headroom = free_by_metrics(config, metrics_url) if on_gpu else free_here(), config.serving.memory_headroom_gib
    if free is None:
        raise StepFailed(f"{metrics_url} does not say how much memory is free: see the server's log")
    if free / GIB < wanted + headroom:
        kind = "the GPU's memory" if on_gpu else "memory"
        raise StepFailed(
            f"staging needs about {wanted:.2f} GiB of {kind}, and serving.memory_headroom_gib={headroom:g} beside it; "
            f"{free / GIB:.2f} GiB are free: wait until training is over, end what else uses it, or lower "
            "serving.instances, serving.max_batch_size or serving.memory_headroom_gib; "
            "serving.keep_previous_loaded=false frees the version before at the next swap"
        )
    return {"memory_needed_gib": round(wanted, 3), "memory_free_gib": round(free / GIB, 3)}


def free_by_metrics(config: Config, metrics_url: str, timeout_s: float = 10) -> int | None:
    """Bytes free on the fullest GPU of a running server, or on a CPU server's machine; None: it does not say."""
    kind, deadline = "gpu" if config.serving.engine == "tensorrt" else "cpu", time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            here = proxies.is_loopback(metrics_url)  # no proxy leads there
            text = httpx.get(metrics_url, timeout=5, trust_env=not here).raise_for_status().text
        except httpx.HTTPError as error:
            log.warning("%s gives no metrics: %s%s", metrics_url, error, proxies.in_the_way(metrics_url))
            return None
        total, used = (read_gauge(text, f"nv_{kind}_memory_{what}_bytes") for what in ("total", "used"))
        if used and all(used.values()):  # a server measures every two seconds; until then it says 0
            return min(total[which] - used[which] for which in used)
        time.sleep(0.2)
    return None


def read_gauge(text: str, name: str) -> dict[str, int]:
    """The values of one metric in Prometheus' text format, by its labels."""
    found = re.findall(rf"^{name}(\{{.*\}})? ([0-9.e+]+)$", text, re.MULTILINE)
    return {labels: int(float(value)) for labels, value in found}


def free_here() -> int:
    """Bytes of memory that this process and its children may still take: of the machine, and of its control group."""
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in control_groups())])


def control_groups(root: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """Limit and use, in bytes, of the container that this process runs in, as its file system shows them."""
    found = []
    for limit, use, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        if (root / limit).exists() and (allowed := (root / limit).read_text().strip()) != "max":
            # Pages of files that nobody has used lately are counted, but are given up for the asking.
            unused = re.search(rf"^{cache} (\d+)$", (root / statistics).read_text(), re.MULTILINE)
            found.append((int(allowed), int((root / use).read_text()) - int(unused[1])))
    return found
