"""Asking a live `toxic_text` over HTTP, once or all the time."""

import json
import threading
import time
from contextlib import nullcontext

import httpx

CLIENTS = 4
TEXT = "You are an idiot."


def ask(url: str, text: str = TEXT, client=httpx) -> dict:
    """The answer of the server at `url`, its HTTP address."""
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [[text]]}]}
    answer = client.post(f"{url}/v2/models/toxic_text/infer", json=body, timeout=60).raise_for_status().json()
    return json.loads(answer["outputs"][0]["data"][0])


class Clients:
    """Threads that ask all the time, some of them on a new connection each time; every answer's version, how long it
    took, and every failure is kept."""

    def __init__(self, url: str, kept: int = CLIENTS, new: int = 0):
        self.url, self.versions, self.seconds, self.failures = url, [], [], []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(number >= kept,)) for number in range(kept + new)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def run(self, new: bool):
        with httpx.Client(trust_env=False) as kept:
            while not self.stopped.is_set():
                with httpx.Client(trust_env=False) if new else nullcontext(kept) as client:
                    started = time.monotonic()
                    try:
                        self.versions.append(ask(self.url, client=client)["version"])
                        self.seconds.append(time.monotonic() - started)
                    except Exception as error:  # an answer that is no answer, too
                        self.failures.append(repr(error))
                time.sleep(0.1)  # leaves the cores to the training

    def p99(self) -> float:
        """Seconds."""
        return sorted(self.seconds)[int(len(self.seconds) * 0.99)]
