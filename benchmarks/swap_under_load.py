"""Hot swaps under load: a server of its own goes back and forth between the two newest versions of the workspace.

    python benchmarks/swap_under_load.py [--swaps 20] [--clients 4] [profile=demo …]

Needs a workspace whose live repository keeps two versions (`make demo`, then `make demo FORCE=1`). The live server and
the registry are not touched. Prints one JSON line per figure.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferenceServerClient

from tasks import config as configuration
from tasks.serving import client, repository, swap, triton

TEXT = "You are an idiot, and thank you for the article."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    arguments, overrides = parser.parse_known_args()
    config = configuration.load(overrides or ["profile=demo"])
    versions = repository.installed(repository.live(config))[-2:]
    if len(versions) < 2:
        print(f"{repository.live(config)} keeps {len(versions)} version(s), two are needed", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(repository.live(config), Path(place) / "triton" / "models")
        config.workspace = Path(place)
        for figure in measure(config, versions, arguments.swaps, arguments.clients):
            print(json.dumps(figure), flush=True)
    return 0


def measure(config, versions: list[int], swaps: int, clients: int):
    live = repository.live(config)
    with (
        triton.running(config, live, config.workspace) as server,
        InferenceServerClient(server.url) as control,
        Load(server.url, clients) as load,
    ):
        load.phase = "steady"
        time.sleep(5)
        load.phase = "swapping"
        seconds = []
        for _ in range(swaps):
            target = next(version for version in versions if version != repository.served(live))
            seconds.append(swap.replace(config, control, target, aliases={}, tags={}))
        memory = triton.peak_memory(server.pid)
    steady, swapping = (np.array([took for phase, took in load.took if phase == p]) for p in ("steady", "swapping"))
    yield {"figure": "failed_requests", "value": len(load.failures), "of": len(load.took), "swaps": swaps}
    yield {"figure": "swap_seconds", "median": float(np.median(seconds)), "max": max(seconds)}
    yield {"figure": "p99_ms_steady", "value": float(np.percentile(steady, 99))}
    yield {"figure": "p99_ms_swapping", "value": float(np.percentile(swapping, 99))}
    yield {"figure": "peak_memory_mib", "value": round(memory / 2**20)}


class Load:
    """Clients that ask without a pause while the block lasts."""

    def __init__(self, url: str, clients: int):
        self.url, self.phase, self.stopped = url, "start", threading.Event()
        self.took, self.failures = [], []
        self.threads = [threading.Thread(target=self.ask) for _ in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def ask(self):
        with InferenceServerClient(self.url) as connection:
            while not self.stopped.is_set():
                phase, started = self.phase, time.perf_counter()
                try:
                    client.ask(connection, [TEXT])
                except Exception as error:
                    self.failures.append(error)
                self.took.append((phase, 1000 * (time.perf_counter() - started)))


if __name__ == "__main__":
    sys.exit(main())
