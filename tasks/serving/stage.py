"""Prove the candidate in the form in which it will serve: a second, short-lived Triton answers the whole test split as
text, and a third one serves the champion for comparison. The live server is not touched."""

import logging
import shutil
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from tasks import files, metrics
from tasks.config import Config
from tasks.data import splits
from tasks.errors import StepFailed, Unsuitable
from tasks.labels import LABELS
from tasks.promotion import gate, registry
from tasks.run import Run
from tasks.serving import build_engine, client, export_onnx, memory, repository, triton

log = logging.getLogger(__name__)

THREADS = 4  # requests under way at a time in the replay
ROUNDS, SINGLES = 5, 100  # behind the latency figures: rounds, and requests of one message in each
WARM_UP = 20  # such requests before the clock counts
GOLDEN = 8  # test messages whose answers swap and rollback ask for again
FIXED = Path(__file__).parents[2] / "expectations" / "golden.yaml"  # messages that every version is asked beside them


def run(config: Config, run: Run) -> dict:
    """Serves the engine from a repository of its own, and holds its answers against the gate and against torch.

    Returns the gate's two figures on the served answers, agreement with torch, latency beside the champion's, memory
    and the golden messages with their answers.

    Raises:
        StepFailed: there is too little memory, the server does not start, a figure is under its limit, or decisions
            differ from torch's.
        Unsigned: no step has written what the registry says of the version.
    """
    version, engine = build_engine.of_run(config, run)
    registry.require_signed(config, version, "build_engine")
    build_engine.require_fit(engine)
    gate.record_overrides(config, version, "stage")
    test = splits.read(config.workspace, "test")
    texts, fixed = test["text"].to_list(), yaml.safe_load(FIXED.read_text(encoding="utf-8"))
    with triton.staging_folder(config, run.id) as folder:
        models = folder / "candidate"
        install(config, engine, models, version)
        with serving(config, models, run.folder / "stage") as (server, memory_figures):
            answers, replay_s = replay(config, texts, server.url)
            fixed_answers, _ = replay(config, [message["text"] for message in fixed], server.url)
            latency = measure_beside_champion(config, run, folder / "champion", version, texts, server.url)
            peak = triton.peak_memory(server.pid)
    truth, decisions = metrics.truth_of(test), decisions_of(answers)
    thresholds = np.array(files.read_json(engine / "settings.json")["thresholds"])
    near = near_threshold(answers, thresholds, config.gate.parity.near_threshold)
    doubtful = in_doubt(config, answers, thresholds)
    figures = {
        "version": version,
        "sha256": files.read_json(engine / "engine.json")["sha256"],
        "messages": len(test),
        "f1_toxic": metrics.f1_toxic(truth, decisions),
        "f1_types": metrics.f1_types(truth, decisions),
        "parity": compare(config, run, test, decisions, near),
        "messages_per_second": len(test) / replay_s,
        **latency,
        **memory_figures,
        "peak_memory_mib": round(peak / 2**20),
        "golden": golden(texts, answers, doubtful) + asked_of_all(config, fixed, fixed_answers, thresholds),
    }
    judge(config, figures, {answer["version"] for answer in answers})
    return figures


@contextmanager
def serving(config: Config, models: Path, log_folder: Path):
    """A server on a staging repository, started empty and loaded when it has the memory: a Server, and what was free.

    Raises:
        StepFailed: there is too little memory, or the version does not load.
    """
    version = repository.served(models)
    with triton.running(config, models, log_folder, load=()) as server:
        figures = memory.require(config, repository.folder(models, repository.CLASSIFIER, version), server.metrics_url)
        triton.load(config, server, repository.TEXT, log_folder / "triton.log")
        yield server, figures


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


def measure_beside_champion(config: Config, run: Run, models: Path, version: int, texts: list[str], url: str) -> dict:
    """Latency of the candidate and, where another version is in service, of that one in a third server, in turns.

    The server's machine is the same for both at every moment: what else goes on there does not tip the scales.
    """
    with ExitStack() as stack:
        urls = {"": url}
        champion = repository.served(repository.live(config))
        if champion not in (None, version):
            try:
                copy_champion(config, models, champion)
                server, _ = stack.enter_context(serving(config, models, run.folder / "stage" / "champion"))
                urls["champion_"] = server.url
            except StepFailed as error:
                if config.gate.latency.binds:
                    raise
                log.warning("the latency of version %d, the champion, is not measured: %s", champion, error)
        took = measure_latency(texts, urls)
    figures = {f"{whose}latency_p{p}_ms": percentile(took[whose], p) for whose in took for p in (50, 99)}
    if "champion_" in took:
        figures["latency_ratio"] = figures["latency_p99_ms"] / figures["champion_latency_p99_ms"]
    return figures


def percentile(took: list[float], p: int) -> float:
    """The median over the rounds of each one's percentile: what disturbs the machine for a moment is in few of them."""
    return float(np.median(np.percentile(np.reshape(took, (ROUNDS, SINGLES)), p, axis=1)))


def copy_champion(config: Config, models: Path, champion: int) -> None:
    """Makes a staging repository of the files with which the champion serves. Raises StepFailed if they are damaged."""
    live = repository.live(config)
    repository.verify(live, champion)
    for part in repository.PARTS:
        source = repository.folder(live, part, champion)
        shutil.copytree(source, repository.folder(models, part, champion), copy_function=repository.link)
    built = repository.as_built(config, repository.folder(models, repository.CLASSIFIER, champion))
    repository.create(built, models)
    repository.write(models, repository.text_config(built, champion))


def measure_latency(texts: list[str], urls: dict[str, str]) -> dict[str, list[float]]:
    """Milliseconds of requests of one message, one at a time, each server asked in turn: ROUNDS x SINGLES of them."""
    took = {whose: [] for whose in urls}
    with ExitStack() as stack:
        connections = {whose: stack.enter_context(client.connect(url)) for whose, url in urls.items()}
        for i in range(-WARM_UP, ROUNDS * SINGLES):
            for whose, connection in connections.items():
                started = time.perf_counter()
                client.ask(connection, [texts[i % len(texts)]])
                took[whose] += [1000 * (time.perf_counter() - started)] if i >= 0 else []
    return took


def decisions_of(answers: list[dict]) -> np.ndarray:
    """What was answered, bool [N, 6]; no type without `toxic`."""
    return np.array([[answer["toxic"], *(name in answer["labels"] for name in LABELS[1:])] for answer in answers])


def near_threshold(answers: list[dict], thresholds: np.ndarray, distance: float) -> np.ndarray:
    """Where an answer may go either way, bool [N, 6]: its logit, or that of `toxic`, is so close to the threshold."""
    from scipy.special import logit

    scores = np.array([[answer["scores"][name] for name in LABELS] for answer in answers])
    near = np.abs(logit(scores) - logit(thresholds)) < distance
    return near | near[:, :1]


def in_doubt(config: Config, answers: list[dict], thresholds: np.ndarray) -> np.ndarray:
    """Which messages may be decided otherwise in service, bool [N]: other neighbours in a batch, and so other kernels,
    move the scores by up to serving.score_tolerance."""
    scores = np.array([[answer["scores"][name] for name in LABELS] for answer in answers])
    near = near_threshold(answers, thresholds, config.gate.parity.near_threshold)
    return (near | (np.abs(scores - thresholds) <= config.serving.score_tolerance)).any(axis=1)


def compare(config: Config, run: Run, test: pl.DataFrame, decisions: np.ndarray, near: np.ndarray) -> dict:
    """Agreement with the merged model's decisions in torch: those of the whole split, which `evaluate` kept, or where
    another run evaluated the version, those of the messages that `export_onnx` has compared.

    Raises:
        StepFailed: there are none, or none of those messages is in the test split.
    """
    file, key = run.folder / "predictions.parquet", "id"
    if not file.exists():
        file, key = export_onnx.exported(config, run) / export_onnx.DECISIONS, "text"
    if not file.exists():
        raise StepFailed(
            f"{file} does not exist, so nothing says what torch decides: run export_onnx and build_engine again"
        )
    columns = [f"decision_{name}" for name in LABELS]
    kept = pl.read_parquet(file, columns=[key, *columns], glob=False).unique(key)
    both = test.select(key).with_row_index("row").join(kept, on=key, how="inner", maintain_order="left")
    if not len(both):
        raise StepFailed(f"{file} has none of the test split's messages: run export_onnx and build_engine again")
    rows = both["row"].to_numpy()
    expected = metrics.answered(both.select(columns).to_numpy())
    return metrics.agreement(expected, decisions[rows], near[rows])


def golden(texts: list[str], answers: list[dict], doubtful: np.ndarray) -> list[dict]:
    """Some messages over the whole split whose answers are beyond doubt, half of them toxic where there are so many."""
    clear = [(text, answer) for text, answer, row in zip(texts, answers, doubtful) if not row]
    toxic = [pair for pair in clear if pair[1]["toxic"]]
    harmless = [pair for pair in clear if not pair[1]["toxic"]]
    chosen = [
        pair for group in (toxic, harmless) for pair in group[:: max(len(group) // (GOLDEN // 2), 1)][: GOLDEN // 2]
    ]
    return [{"text": text, "answer": answer} for text, answer in chosen]


def asked_of_all(config: Config, fixed: list[dict], answers: list[dict], thresholds: np.ndarray) -> list[dict]:
    """The messages of expectations/golden.yaml with this version's answers, in the form of `golden`.

    Where an answer may go either way, only its scores are held against a later one.
    """
    for message, answer in zip(fixed, answers):
        if message["toxic"] != answer["toxic"]:
            log.warning("%r is answered with toxic %s: see %s", message["text"], answer["toxic"], FIXED.name)
    return [
        {"text": message["text"], "answer": answer, "near_threshold": bool(either_way)}
        for message, answer, either_way in zip(fixed, answers, in_doubt(config, answers, thresholds))
    ]


def judge(config: Config, figures: dict, versions: set[int]) -> None:
    if versions != {figures["version"]}:
        raise StepFailed(f"the staging server answered as version {versions}, not {figures['version']}: build it again")
    for name, limit in (("toxic", config.gate.toxic), ("types", config.gate.types)):
        if limit.binds and figures[f"f1_{name}"] < limit.min:
            raise Unsuitable(
                f"served F1 {name} {figures[f'f1_{name}']:.4f} is below {limit.min}: compare with the evaluate step's "
                "figure; what lies between them is export, engine and tokenizer"
            )
    parity = figures["parity"]
    if parity["equal"] < config.gate.parity.min_equal:
        raise Unsuitable(
            f"{parity['different']} served decisions differ from torch's, {parity['equal']:.4%} are equal; "
            f"gate.parity.min_equal is {config.gate.parity.min_equal:.2%}: check serving.dtype and the tokenizer"
        )
    log.info("served F1 toxic %(f1_toxic).3f, types %(f1_types).3f, p99 %(latency_p99_ms).1f ms", figures)
    judge_latency(config, figures)


def judge_latency(config: Config, figures: dict) -> None:
    """Warns of a candidate that is slower than the champion by more than gate.latency allows, or stops it.

    A warning is kept as the version's tag `stage_warned`.
    """
    ratio, limit = figures.get("latency_ratio"), config.gate.latency
    if ratio is not None and ratio > limit.max_ratio:
        sentence = (
            f"served p99 {figures['latency_p99_ms']:.1f} ms is {ratio:.2f} times the champion's "
            f"{figures['champion_latency_p99_ms']:.1f} ms, measured the same way; gate.latency.max_ratio is "
            f"{limit.max_ratio:g}"
        )
        if limit.binds:
            raise StepFailed(f"{sentence}: make the model smaller, or see whether serving.buckets fit the messages")
        log.warning(sentence)
        figures["warned"] = ["latency"]
        registry.tag(config, figures["version"], stage_warned=sentence)
    else:
        registry.untag(config, figures["version"], "stage_warned")
