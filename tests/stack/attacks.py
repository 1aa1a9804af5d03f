"""What a stranger without a login does to the gateway, and clients that go on asking meanwhile."""

import contextlib
import http.client
import selectors
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
from asking import ask

INFER = "/v2/models/toxic_text/infer"


class Watchers:
    """Clients on kept connections and on new ones, who ask all the time: every failure and every latency is kept."""

    def __init__(self, url: str, each: int = 2):
        self.url, self.failures, self.seconds, self.stopped = url, [], [], threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(kept,)) for kept in (True, False) for _ in range(each)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def run(self, kept: bool):
        with httpx.Client(trust_env=False) as client:
            while not self.stopped.is_set():
                with contextlib.nullcontext(client) if kept else httpx.Client(trust_env=False) as asking:
                    started = time.monotonic()
                    try:
                        ask(self.url, client=asking)
                        self.seconds.append(time.monotonic() - started)
                    except Exception as error:  # an answer that is no answer, too
                        self.failures.append(repr(error))
                time.sleep(0.05)

    def p99(self) -> float:
        """Seconds."""
        return sorted(self.seconds)[int(len(self.seconds) * 0.99)]


def bomb(unpacked: int) -> bytes:
    """Blanks that gzip packs a thousand times smaller."""
    packer, mebibyte = zlib.compressobj(9, wbits=31), b" " * 2**20
    return b"".join(packer.compress(mebibyte) for _ in range(unpacked // 2**20)) + packer.flush()


def post(port: int, body: bytes | Iterator[bytes], headers: dict[str, str]) -> int:
    """The status that a request gets, also where the answer comes before all of the body is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", INFER, body, headers)
        return connection.getresponse().status


def in_parallel(times: int, call) -> list:
    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(lambda _: call(), range(times)))


def hold_slow_sockets(port: int, number: int, seconds: float, send: bytes) -> int:
    """So many connections that each send a byte in two seconds, opened again where they are closed. Returns how many
    were opened in all."""
    opened, deadline, open_ones = 0, time.monotonic() + seconds, []
    selector = selectors.DefaultSelector()
    while time.monotonic() < deadline:
        while len(open_ones) < number and time.monotonic() < deadline:
            one = socket.socket()
            one.settimeout(1)
            try:
                one.connect(("127.0.0.1", port))
                one.send(send)
            except OSError:
                one.close()
                break
            one.setblocking(False)
            open_ones.append(one)
            selector.register(one, selectors.EVENT_READ)
            opened += 1
        for key, _ in selector.select(timeout=0.1):  # an answer, or the end
            selector.unregister(key.fileobj)
            key.fileobj.close()
        open_ones = [one for one in open_ones if one.fileno() >= 0]
        if int(time.monotonic() * 10) % 20 == 0:
            for one in open_ones:
                with contextlib.suppress(OSError):
                    one.send(b"a")
    for one in open_ones:
        one.close()
    selector.close()
    return opened
