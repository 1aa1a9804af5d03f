"""What it takes to export the classifier to ONNX and to build its engine with TensorRT-RTX, on a host without a GPU.

    python benchmarks/engine.py model.name=FOLDER                 # export a base model with a fresh head, then build
    python benchmarks/engine.py --onnx=models/model.onnx          # only build, from a file that is there
    python benchmarks/engine.py --keep=models model.name=FOLDER   # leave model.onnx and model.plan in a folder
    python benchmarks/engine.py --checkpoint=workspace/models/finetuned/final --messages=512   # export what was trained

Each part runs in a process of its own, whose peak memory is its own. The export is checked on --messages messages: of
the generated sample, or where it is a checkpoint's, of the test split in the workspace. Prints one JSON line per
figure; TensorRT's log goes to stderr. Further arguments are overrides of the configuration, such as
serving.compute_capability=SM120.
"""

import argparse
import logging
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import json_line  # noqa: E402
from tasks import config as configuration  # noqa: E402
from tasks import files  # noqa: E402

RTX = ["serving.tensorrt_package=tensorrt_rtx", "serving.compute_capability=SM89"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--onnx", type=Path, help="an exported file; without one, model.name is exported")
    parser.add_argument("--checkpoint", type=Path, help="a fine-tuned model to export in model.name's place")
    parser.add_argument("--keep", type=Path, help="a folder that keeps what is made")
    parser.add_argument("--messages", type=int, default=16, help="to check the export on")
    arguments, overrides = parser.parse_known_args()
    overrides = ["profile=gpu", *RTX, *overrides]
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        onnx = arguments.onnx
        if onnx is None:
            onnx = folder / "model.onnx"
            by_itself(export, overrides, onnx, arguments.checkpoint, arguments.messages)
        by_itself(build, overrides, onnx, folder / "model.plan")


def by_itself(part, *arguments) -> None:
    """Runs a part in a process of its own and prints its figures."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        figures, facts = pool.submit(measured, part, *arguments).result()
    for name, (value, unit) in figures.items():
        json_line.of_host(f"{part.__name__}_{name}", float(f"{value:.3g}"), unit, **facts)


def measured(part, *arguments) -> tuple[dict, dict]:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    figures, facts = part(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**figures, "peak_host_memory": (peak, "GiB")}, facts


def export(overrides: list[str], onnx: Path, checkpoint: Path | None, count: int) -> tuple[dict, dict]:
    """Writes a checkpoint's merged model as `onnx`, in the engine's dtype; without one, the base model's."""
    from tasks.serving import export_onnx

    config = configuration.load([*overrides, f"gate.parity.messages={count}"])
    with tempfile.TemporaryDirectory(dir=onnx.parent) as place:
        source = checkpoint or untrained(config, Path(place))
        texts = export_onnx.test_messages(config) if checkpoint else messages(config.seed, count)
        started = time.monotonic()
        _, references = export_onnx.export(config, source, 1, onnx, texts)
        exported = time.monotonic()
        parity = export_onnx.compare(config, onnx, source, texts, references)
        seconds = {"seconds": (exported - started, "s"), "parity_seconds": (time.monotonic() - exported, "s")}
    spread = float(references["float32"].std())
    differences = {}
    for dtype in references:
        found, name = parity[dtype], f"parity_{dtype}"
        differences[f"{name}_largest_difference"] = found["max_difference"] / spread, "standard deviations of a logit"
        differences[f"{name}_different"] = found["different"], "decisions"
        differences[f"{name}_near_threshold"] = found["near_threshold"], "decisions"
    size = sum(file.stat().st_size for file in onnx.parent.glob(f"{onnx.name}*"))
    facts = {"dtype": config.serving.dtype, "opset": config.serving.opset, "messages": len(texts)}
    facts["checkpoint"] = "fine-tuned" if checkpoint else "untrained"
    return {**seconds, **differences, "size": (size / 2**30, "GiB")}, facts


def untrained(config, folder: Path) -> Path:
    """A checkpoint of the base model with a fresh head."""
    from tasks.training import base_model, model

    base = base_model.resolve(config.model, config.seed, config.workspace)
    model.load_base(config.model, base, config.seed, weights="plain").save_pretrained(folder / "merged")
    model.load_tokenizer(base).save_pretrained(folder / "merged")
    files.write_json(folder / "training.json", {"max_length": config.model.max_length})
    return folder


def messages(seed: int, count: int) -> list[str]:
    """English and Russian ones by turns."""
    from tasks.data import sample, sample_en, sample_ru

    by_language = [islice(sample.rows(grammar, 0, seed), count) for grammar in (sample_en, sample_ru)]
    return [text for pair in zip(*by_language) for text, _ in pair][:count]


def build(overrides: list[str], onnx: Path, plan: Path) -> tuple[dict, dict]:
    from tasks.serving import build_engine

    with tempfile.TemporaryDirectory() as workspace:  # no timing cache of an earlier build
        config = configuration.load([*overrides, f"workspace={workspace}"])
        started = time.monotonic()
        facts = build_engine.build(config, onnx, plan)
        seconds = time.monotonic() - started
    sizes = {"buckets": config.serving.buckets, "max_batch_size": config.serving.max_batch_size}
    return {"seconds": (seconds, "s"), "size": (plan.stat().st_size / 2**30, "GiB")}, {**facts, **sizes}


if __name__ == "__main__":
    main()
