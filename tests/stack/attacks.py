"""What a stranger without a login does to the gateway."""

import contextlib
import http.client
import selectors
import socket
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

INFER = "/v2/models/toxic_text/infer"


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
    next_byte = time.monotonic() + 2
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
        if time.monotonic() >= next_byte:
            next_byte += 2
            for one in open_ones:
                with contextlib.suppress(OSError):
                    one.send(b"a")
    for one in open_ones:
        one.close()
    selector.close()
    return opened
