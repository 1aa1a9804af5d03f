"""Prove the candidate in the form in which it will serve: a second, short-lived Triton answers the whole test split as
text. The live server is not touched."""

import logging
import time
from pathlib import Path

import numpy as np
import polars as pl

from tasks import files, metrics
from tasks.config import Config
from tasks.errors import StepFailed
from tasks.labels import LABELS
from tasks.promotion import gate
from tasks.run import Run
from tasks.serving import build_engine, client, repository, triton

log = logging.getLogger(__name__)

THREADS = 4  # requests under way at a time in the replay
SINGLES = 200  # requests of one message, one after another, behind the latency figures
GOLDEN = 8  # messages whose answers swap and rollback ask for again


def run(config: Config, run: Run) -> dict:
    """Serves the engine from a repository of its own, and holds its answers against the gate and against torch.

    Returns the gate's two figures on the served answers, agreement with torch, latency, memory and the golden messages
    with their answers.

    Raises:
        StepFailed: the server does not start, a figure is under its limit, or decisions differ from torch's.
    """
    version, engine = build_engine.of_run(config, run)
    gate.record_overrides(config, version, "stage")
    test = pl.read_parquet(config.workspace / "data" / "processed" / "test.parquet")
    with triton.staging_folder(config, run.id) as folder:
        install(config, engine, folder / "models", version)
        with triton.running(config, folder / "models", log_folder(run)) as server:
            answers, replay_s = replay(config, test["text"].to_list(), server.url)
            latency = measure_latency(test["text"].to_list(), server.url)
            memory = triton.peak_memory(server.pid)
    truth, decisions = metrics.truth_of(test), decisions_of(answers)
    thresholds = np.array(files.read_json(engine / "settings.json")["thresholds"])
    near = near_threshold(answers, thresholds, config.gate.parity.near_threshold)
    figures = {
        "version": version,
        "sha256": files.read_json(engine / "engine.json")["sha256"],
        "messages": len(test),
        "f1_toxic": metrics.f1_toxic(truth, decisions),
        "f1_types": metrics.f1_types(truth, decisions),
        "parity": compare(run, test, decisions, near),
        "messages_per_second": len(test) / replay_s,
        **latency,
        "peak_memory_mib": round(memory / 2**20),
        "golden": golden(test["text"].to_list(), answers, near),
    }
    judge(config, figures, {answer["version"] for answer in answers})
    return figures


def install(config: Config, engine: Path, models: Path, version: int) -> None:
    repository.create(config, models)
    repository.install(engine, models, version)
    repository.verify(models, version)
    repository.write(models, repository.text_config(config, version))


def replay(config: Config, texts: list[str], url: str) -> tuple[list[dict], float]:
    """Answers to all messages, and the seconds they took."""
    started = time.monotonic()
    answers = client.classify(texts, url, config.serving.max_batch_size, THREADS)
    return answers, time.monotonic() - started


def measure_latency(texts: list[str], url: str) -> dict[str, float]:
    """p50 and p99 in milliseconds of requests of one message, one at a time."""
    from tritonclient.grpc import InferenceServerClient

    took = []
    with InferenceServerClient(url) as connection:
        for i in range(SINGLES):
            started = time.perf_counter()
            client.ask(connection, [texts[i % len(texts)]])
            took.append(1000 * (time.perf_counter() - started))
    return {"latency_p50_ms": float(np.percentile(took, 50)), "latency_p99_ms": float(np.percentile(took, 99))}


def log_folder(run: Run) -> Path:
    """Where the staging server's triton.log is kept."""
    return run.folder / "stage"


def decisions_of(answers: list[dict]) -> np.ndarray:
    """What was answered, bool [N, 6]; no type without `toxic`."""
    return np.array([[answer["toxic"], *(name in answer["labels"] for name in LABELS[1:])] for answer in answers])


def near_threshold(answers: list[dict], thresholds: np.ndarray, distance: float) -> np.ndarray:
    """Where an answer may go either way, bool [N, 6]: its logit, or that of `toxic`, is so close to the threshold."""
    from scipy.special import logit

    scores = np.array([[answer["scores"][name] for name in LABELS] for answer in answers])
    near = np.abs(logit(scores) - logit(thresholds)) < distance
    return near | near[:, :1]


def compare(run: Run, test: pl.DataFrame, decisions: np.ndarray, near: np.ndarray) -> dict | None:
    """Agreement with the merged model's decisions in torch, which `evaluate` kept; None where it did not."""
    file = run.folder / "predictions.parquet"
    if not file.exists():
        return None
    columns = ["id", *(f"decision_{name}" for name in LABELS)]
    kept = test.select("id").join(pl.read_parquet(file, columns=columns), on="id", how="left", maintain_order="left")
    expected = metrics.answered(kept.select(columns[1:]).to_numpy())
    different = (expected != decisions) & ~near
    return {
        "equal": float(1 - different.sum() / max((~near).sum(), 1)),
        "near_threshold": int(near.sum()),
        "different": int(different.sum()),
    }


def golden(texts: list[str], answers: list[dict], near: np.ndarray) -> list[dict]:
    """Some messages over the whole split whose answers are beyond doubt, half of them toxic where there are so many."""
    clear = [(text, answer) for text, answer, row in zip(texts, answers, near) if not row.any()]
    toxic = [pair for pair in clear if pair[1]["toxic"]]
    harmless = [pair for pair in clear if not pair[1]["toxic"]]
    chosen = [
        pair for group in (toxic, harmless) for pair in group[:: max(len(group) // (GOLDEN // 2), 1)][: GOLDEN // 2]
    ]
    return [{"text": text, "answer": answer} for text, answer in chosen]


def judge(config: Config, figures: dict, versions: set[int]) -> None:
    if versions != {figures["version"]}:
        raise StepFailed(f"the staging server answered as version {versions}, not {figures['version']}: build it again")
    for name, limit in (("toxic", config.gate.toxic), ("types", config.gate.types)):
        if limit.binds and figures[f"f1_{name}"] < limit.min:
            raise StepFailed(
                f"served F1 {name} {figures[f'f1_{name}']:.4f} is below {limit.min}: compare with the evaluate step's "
                "figure; what lies between them is export, engine and tokenizer"
            )
    parity = figures["parity"]
    if parity and parity["equal"] < config.gate.parity.min_equal:
        raise StepFailed(
            f"{parity['different']} served decisions differ from torch's, {parity['equal']:.4%} are equal; "
            f"gate.parity.min_equal is {config.gate.parity.min_equal:.2%}: check serving.dtype and the tokenizer"
        )
    log.info("served F1 toxic %(f1_toxic).3f, types %(f1_types).3f, p99 %(latency_p99_ms).1f ms", figures)
