"""How long a newcomer waits for `make demo`, and how much memory it takes.

    python benchmarks/demo.py [--cold]

Runs in a fresh clone of this repository, in a workspace and on ports of its own. `--cold` installs into an empty cache
first; without it the environments are made before the clock starts. Prints one JSON line per figure.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import json_line  # noqa: E402

PORTS = ("MLFLOW_PORT", "TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT", "AIRFLOW_PORT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cold", action="store_true", help="install into an empty cache, within the time measured")
    cold = parser.parse_args().cold
    with tempfile.TemporaryDirectory() as place:
        clone, workspace = f"{place}/clone", f"{place}/workspace"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        own = {**os.environ, **free_ports(), "TOXIC_WORKSPACE": workspace}
        if cold:
            own["UV_CACHE_DIR"] = f"{place}/cache"
        else:
            subprocess.run(["make", "envs"], cwd=clone, env=own, check=True, stdout=subprocess.DEVNULL)
        try:
            started = time.monotonic()
            with PeakMemory(workspace) as memory:
                done = subprocess.run(["make", "demo"], cwd=clone, env=own, check=True, capture_output=True, text=True)
            seconds = round(time.monotonic() - started)
        finally:
            subprocess.run(["make", "down"], cwd=clone, env=own, stdout=subprocess.DEVNULL)
    found = json.loads(done.stdout.splitlines()[-1])
    json_line.of_host(f"demo_{'cold' if cold else 'warm'}", seconds, "s")
    json_line.of_host("demo_peak_memory", round(memory.peak / 2**30, 2), "GiB")
    for name in ("f1_toxic", "f1_types"):
        json_line.of_host(f"demo_{name}", found[name], "F1")


def free_ports() -> dict[str, str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    ports = {name: str(one.getsockname()[1]) for name, one in zip(PORTS, sockets)}
    for one in sockets:
        one.close()
    return ports


class PeakMemory:
    """The most memory that all processes of a workspace held together, in bytes: shared pages counted once (PSS)."""

    def __init__(self, workspace: str):
        self.workspace, self.peak, self.ended = workspace, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.ended.wait(2):
            self.peak = max(self.peak, sum(map(self.memory, psutil.process_iter())))

    def memory(self, process: psutil.Process) -> int:
        try:
            ours = process.environ().get("TOXIC_WORKSPACE") == self.workspace
            return process.memory_full_info().pss if ours else 0
        except psutil.Error:
            return 0


if __name__ == "__main__":
    main()
