"""Hot swaps under load, every fifth of them to a version that must not come into service.

    python benchmarks/swap_under_load.py                       # 50 swaps under 8 clients: a few minutes
    python benchmarks/swap_under_load.py --swaps 10 --clients 4

A Triton, a registry and four versions of their own: tiny models with the demo's sizes and random weights, exported,
built and staged as any version is. Half the clients ask over HTTP, half over gRPC, all without a pause, in a process of
their own. The time without swaps is measured before and after. Prints one JSON line per figure; exit 1 where a request
failed or met a version that was not in service, a flawed version came into service or a good one did not.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import json_line, tiny_versions  # noqa: E402
from tasks import files, integrity  # noqa: E402
from tasks.errors import StepFailed  # noqa: E402
from tasks.promotion import registry  # noqa: E402
from tasks.serving import build_engine, client, exchange, live_servers, repository, swap, triton  # noqa: E402

VERSIONS = (1, 2, 3, 4)
FLAWED_EVERY = 5
STEADY_SECONDS = 20  # without swaps, before and after
LOAD_TIMEOUT_S = 20  # the slow start takes longer
TEXT = "You are an idiot, and thank you for the article."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        config = tiny_versions.configure(
            Path(place), f"serving.load_timeout_s={LOAD_TIMEOUT_S}", "serving.keep_previous_loaded=true"
        )
        store = make_versions(config)
        found = measure(config, store, arguments.swaps, arguments.clients)
    for name, value, unit in found:
        json_line.of_host(name, round(value, 2), unit, swaps=arguments.swaps, clients=arguments.clients)
    values = {name: value for name, value, _ in found}
    wrong = ("swap_failed_requests", "swap_answers_of_a_wrong_version", "swap_wrong_outcomes")
    return int(any(values[name] for name in wrong))


# Versions -------------------------------------------------------------------------------------------------------------


def make_versions(config) -> Path:
    """A repository beside the live one that holds every version as it is installed."""
    tiny_versions.prepare(config)
    store = config.workspace / "store"
    for version in VERSIONS:
        run = tiny_versions.staged(config, version)
        _, engine = build_engine.of_run(config, run)
        repository.install(engine, store, version, golden=run.result("stage")["golden"])
    return store


# Flaws ----------------------------------------------------------------------------------------------------------------


def truncated_file(models: Path, version: int) -> None:
    file = repository.folder(models, repository.CLASSIFIER, version) / "model.onnx"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    record_as_installed(file)


def wrong_answers(models: Path, version: int) -> None:
    append(models, repository.LABELS, version, "right = answer\n\n\ndef answer(decided):\n    return right(~decided)\n")


def exception(models: Path, version: int) -> None:
    code = "def broken(self, requests):\n    raise RuntimeError('broken')\n\n\nTritonPythonModel.execute = broken\n"
    append(models, repository.TOKENIZER, version, code)


def slow_start(models: Path, version: int) -> None:
    append(models, repository.LABELS, version, f"import time\n\ntime.sleep({2 * LOAD_TIMEOUT_S})\n")


FLAWS = (truncated_file, wrong_answers, exception, slow_start)


def append(models: Path, part: str, version: int, code: str) -> None:
    file = repository.folder(models, part, version) / "model.py"
    file.write_text(f"{file.read_text()}\n\n{code}")
    record_as_installed(file)


def record_as_installed(file: Path) -> None:
    """So that it does its harm: a part does not load a file of another hash."""
    record = file.with_name(integrity.RECORD)
    files.write_json(record, {**files.read_json(record), file.name: integrity.sha256(file)})


# Swaps under load -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swap:
    """One swap of the series: when it began and ended, which version served before it and which after it."""

    began: float
    ended: float
    flaw: str | None
    before: int
    target: int
    after: int

    @property
    def as_expected(self) -> bool:
        return self.after == (self.before if self.flaw else self.target)


def measure(config, store: Path, swaps: int, clients: int) -> list[tuple[str, float, str]]:
    live = repository.live(config)
    repository.create(config, live)
    with triton.running(config, live, config.workspace, load=()) as server:
        config.serving.urls = [server.url]
        for version in VERSIONS[:2]:  # from the second on a version before stays loaded
            put_in_service(config, store, version)
        before, done = memory_of(server.pid), []
        with load(server, clients) as asked:
            time.sleep(STEADY_SECONDS)
            for number in range(1, swaps + 1):
                flaw = FLAWS[number // FLAWED_EVERY % len(FLAWS)] if number % FLAWED_EVERY == 0 else None
                done.append(one_swap(config, store, server.url, done[-1].after if done else VERSIONS[1], flaw))
                print(f"swap {number}: {done[-1]}", file=sys.stderr)
            time.sleep(STEADY_SECONDS)
        put_in_service(config, store, next_of(done[-1].after))  # two versions loaded again, whatever the last one was
        after = memory_of(server.pid)
    return figures(done, asked, before, after)


def one_swap(config, store: Path, url: str, serves: int, flaw) -> Swap:
    began, target = time.monotonic(), next_of(serves)
    put_in_service(config, store, target, flaw)
    ended = time.monotonic()
    answered = client.classify([TEXT], url)[0]["version"]
    return Swap(began, ended, flaw.__name__ if flaw else None, serves, target, answered)


def next_of(version: int) -> int:
    return version % len(VERSIONS) + 1


def figures(done: list[Swap], asked, before: int, after: int) -> list[tuple[str, float, str]]:
    """Requests count as during a swap when they were sent in one, but for a slow start's, which is mostly waiting."""
    good = [one.ended - one.began for one in done if not one.flaw]
    at, took, versions = (np.array(column) for column in zip(*asked.answers))
    swapping, wrong = np.zeros(len(at), dtype=bool), np.zeros(len(at), dtype=bool)
    for one, following in zip(done, [*done[1:], None]):
        within = (at >= one.began) & (at < one.ended)
        until_next = (at >= one.ended) & (at < (following.began if following else np.inf))
        swapping |= within & (one.flaw != slow_start.__name__)
        wrong |= within & ~np.isin(versions, [one.before, one.before if one.flaw else one.target])
        wrong |= until_next & (versions != one.after)
    steady = (at < done[0].began) | (at >= done[-1].ended)
    percentiles = {
        (p, name): float(np.percentile(took[rows], p))
        for p in (50, 99)
        for name, rows in (("steady", steady), ("swapping", swapping))
    }
    return [
        ("swap_failed_requests", len(asked.failures), "requests"),
        ("swap_answers_of_a_wrong_version", int(wrong.sum()), "requests"),
        ("swap_requests", len(at), "requests"),
        ("swap_wrong_outcomes", sum(not one.as_expected for one in done), "swaps"),
        ("swap_flawed_versions", sum(one.flaw is not None for one in done), "swaps"),
        ("swap_seconds_median", float(np.median(good)), "s"),
        ("swap_seconds_max", max(good), "s"),
        *((f"swap_p{p}_{name}", value, "ms") for (p, name), value in percentiles.items()),
        ("swap_p99_ratio", percentiles[99, "swapping"] / percentiles[99, "steady"], "times"),
        ("swap_memory_before", before / 2**20, "MiB"),
        ("swap_memory_after", after / 2**20, "MiB"),
    ]


def put_in_service(config, store: Path, version: int, flaw=None) -> None:
    """One swap as the step does it, of a version that is installed and then harmed."""
    live = repository.live(config)
    for part in repository.PARTS:
        with files.new_folder(repository.folder(live, part, version)) as beside:
            shutil.copytree(repository.folder(store, part, version), beside, dirs_exist_ok=True)
    if flaw:
        flaw(live, version)
    with registry.lease(config, "benchmark") as still_mine, live_servers.connect(config) as servers:
        exchange.finish_or_undo(config, servers)
        change = swap.going_forward(config, registry.alias(config, "champion"), version)
        try:
            exchange.replace(config, servers, still_mine, version, **change)
        except StepFailed as error:
            print(str(error)[:300], file=sys.stderr)


def memory_of(pid: int) -> int:
    """Bytes that a server and the processes of its models hold in memory (RSS)."""
    time.sleep(5)  # until those of a version that was let go of have ended
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_info().rss for process in tree)


# Clients --------------------------------------------------------------------------------------------------------------


class Asked:
    """What the clients have got: (when it was sent, milliseconds, version) of each answer, and each failure."""

    def __init__(self):
        self.answers, self.failures = [], []


@contextmanager
def load(server, clients: int):
    """Clients in a process of their own, which ask without a pause while the block lasts; yields what they have got."""
    context, asked = multiprocessing.get_context("spawn"), Asked()
    here, there = context.Pipe()
    process = context.Process(target=ask_until_told, args=(server.url, server.http_url, clients, there))
    process.start()
    here.recv()
    try:
        yield asked
    finally:
        here.send("stop")
        asked.answers, asked.failures = here.recv()
        process.join()
    for failure in asked.failures[:10]:
        print(failure, file=sys.stderr)


def ask_until_told(url: str, http_url: str, clients: int, pipe) -> None:
    stopped, answers, failures = threading.Event(), [], []

    def until_stopped(ask):
        while not stopped.is_set():
            at = time.monotonic()
            try:
                version = ask()
                answers.append((at, 1000 * (time.monotonic() - at), version))
            except Exception as error:
                failures.append(f"{at}: {error!r}")

    def over_grpc():
        with client.connect(url) as connection:
            until_stopped(lambda: client.ask(connection, [TEXT])[0]["version"])

    def over_http():
        body = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [TEXT]}]}

        def ask():
            found = connection.post(f"{http_url}/v2/models/toxic_text/infer", json=body).raise_for_status()
            return json.loads(found.json()["outputs"][0]["data"][0])["version"]

        with httpx.Client(timeout=60) as connection:
            until_stopped(ask)

    threads = [threading.Thread(target=over_http if i % 2 else over_grpc) for i in range(clients)]
    for thread in threads:
        thread.start()
    pipe.send("asking")
    pipe.recv()
    stopped.set()
    for thread in threads:
        thread.join()
    pipe.send((answers, failures))


if __name__ == "__main__":
    sys.exit(main())
