"""Ask a Triton server about messages over gRPC: text in, answers out, through the ensemble `toxic_text`.

    with ToxicClient("127.0.0.1:8001") as client:
        answers = client.classify(["You are a clown.", "See you on Thursday."])

Of this project's dependencies it needs tritonclient[grpc] and tenacity alone. A server on this machine is asked without
the proxy that the environment may name.
"""

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

import numpy as np
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from tasks import address, proxies
from tasks.text import LONGEST

MODEL = "toxic_text"
REQUEST_BYTES = 2**22  # messages of a megabyte go out a few at a time, so that others' requests get in between
# A channel that has lost its server waits up to two minutes before it looks again, unless it is told otherwise.
CHANNEL = {
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
}


class Answer(TypedDict):
    """`labels` is empty unless `toxic`; `scores` has a probability for each of the six labels."""

    toxic: bool
    labels: list[str]
    scores: dict[str, float]
    version: int


class ServingError(InferenceServerException):
    """There is no answer; the message says why, and the way out."""


class ServerUnavailable(ServingError):
    """Nobody listens at the address, or the connection broke."""


class ModelNotLoaded(ServingError):
    """The server is there, and serves no such model (yet)."""


class TimedOut(ServingError):
    """The answer did not come in time."""


class TooLarge(ServingError):
    """The request has more bytes than client or server take."""


class Refused(ServingError):
    """The server does not take what was sent, or could not compute it."""


class ToxicClient:
    """A connection that many threads may share. Close it, or use it in a `with` block."""

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        timeout_s: float = 10,
        attempts: int = 8,
        batch_size: int = 32,
        threads: int = 4,
        model: str = MODEL,
    ):
        """Connects when the first request is sent.

        Args:
            url: the server's gRPC address, host:port.
            timeout_s: how long one try waits for an answer.
            attempts: tries of a request that meets no server, or one that has not loaded the model yet, with growing
                pauses between them: 8 take about 11 s. What was refused or took too long is not tried again.
            batch_size: messages a request, at most the server's max_batch_size().
            threads: requests under way at a time.

        Raises:
            ValueError: `url` is no such address.
        """
        self.url = address.grpc(url)
        self.timeout_s, self.attempts, self.batch_size, self.model = timeout_s, attempts, batch_size, model
        self._connection = connect(url)
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._connection.close()

    def classify(self, texts: list[str]) -> list[Answer]:
        """Answers in the order of the messages.

        Raises:
            ServerUnavailable, ModelNotLoaded, TimedOut, TooLarge, Refused: one of the requests has no answer.
            TypeError: `texts` is one string.
        """
        if isinstance(texts, str):
            raise TypeError("classify takes a list of messages: for one, classify([text])")
        answers = self._pool.map(lambda batch: self._try(ask, batch), batches(texts, self.batch_size))
        return [answer for batch in answers for answer in batch]

    def max_batch_size(self) -> int:
        """Messages that the server takes in one request, now: another version may take others. Raises like `classify`,
        each error but TooLarge."""
        return self._try(largest_batch)

    def _try(self, request, *arguments):
        retrying = Retrying(
            retry=retry_if_exception_type((ServerUnavailable, ModelNotLoaded)),
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential_jitter(initial=0.1, max=5, jitter=0.1),
            reraise=True,
        )
        return retrying(self._once, request, *arguments)

    def _once(self, request, *arguments):
        try:
            return request(self._connection, *arguments, self.timeout_s, self.model)
        except ServerUnavailable as error:
            if "failed to connect" in error.message() and speaks_http(self.url):  # no later try finds anything else
                raise Refused(f"{self.url} {HTTP_THERE}", error.status()) from None
            raise


HTTP_THERE = "is an HTTP port: this client speaks gRPC, at Triton's port 8001 unless it was given another"


def speaks_http(url: str) -> bool:
    """Whether an HTTP server answers at an address that was taken for a gRPC server's: Triton's own at 8000, say."""
    host, _, port = url.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2) as probe:
            probe.sendall(b"GET /v2 HTTP/1.1\r\nHost: triton\r\nConnection: close\r\n\r\n")
            return probe.recv(5) == b"HTTP/"
    except OSError:
        return False


def connect(url: str) -> InferenceServerClient:
    """A connection to a server's gRPC address; one on this machine is reached past any proxy, which gRPC would ask."""
    arguments = {**CHANNEL, "grpc.enable_http_proxy": int(not proxies.is_loopback(url))}
    return InferenceServerClient(url, channel_args=list(arguments.items()))


def classify(texts: list[str], url: str, batch_size: int = 32, threads: int = 1, timeout_s: float = 60) -> list[Answer]:
    """Answers of a server that has to be there: `ToxicClient.classify`, each request tried once."""
    with ToxicClient(url, timeout_s=timeout_s, attempts=1, batch_size=batch_size, threads=threads) as client:
        return client.classify(texts)


def ask(connection: InferenceServerClient, texts: list[str], timeout_s: float = 60, model: str = MODEL) -> list[Answer]:
    """One request over an open connection to an ensemble that answers like `toxic_text`; raises like `classify`."""
    rows = np.array([[encode(text)] for text in texts], dtype=object)
    message = InferInput("text", list(rows.shape), "BYTES")
    message.set_data_from_numpy(rows)
    try:
        found = connection.infer(model, [message], client_timeout=timeout_s).as_numpy("answer")
    except InferenceServerException as error:
        raise in_words(error, model, timeout_s) from None
    return [json.loads(answer) for answer in found.ravel()]


def largest_batch(connection: InferenceServerClient, timeout_s: float = 60, model: str = MODEL) -> int:
    try:
        return connection.get_model_config(model, client_timeout=timeout_s).config.max_batch_size
    except InferenceServerException as error:
        raise in_words(error, model, timeout_s) from None


def encode(text: str) -> bytes:
    """UTF-8. A lone surrogate has no bytes of its own: it becomes a space, as the cleaning makes of it."""
    return re.sub("[\ud800-\udfff]", " ", text).encode()


def batches(texts: list[str], size: int) -> Iterator[list[str]]:
    """At most `size` messages each, and no more bytes than REQUEST_BYTES.

    Raises:
        TooLarge: a message has more than servers take.
    """
    batch, total = [], 0
    for text in texts:
        length = len(encode(text))
        if length > LONGEST:
            raise TooLarge(f"a message has {length} bytes, servers take {LONGEST} at most: shorten its text")
        if batch and (len(batch) == size or total + length > REQUEST_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(text)
        total += length
    if batch:
        yield batch


def in_words(error: InferenceServerException, model: str, timeout_s: float) -> ServingError:
    """The kind of error that gRPC's status means, with the way out."""
    status, said = str(error.status()).removeprefix("StatusCode."), error.message()
    if "unknown model" in said or "is not ready" in said:
        kind, what = ModelNotLoaded, f"the server has not loaded {model}: `python commands.py swap` brings a version"
    elif status == "UNAVAILABLE":
        kind, what = (
            ServerUnavailable,
            "Triton does not answer: ./start_triton_server.sh starts it; is it another host?",
        )
    elif status == "DEADLINE_EXCEEDED":
        kind, what = TimedOut, f"no answer within {timeout_s} s: raise timeout_s, or send fewer messages at a time"
    elif status == "RESOURCE_EXHAUSTED":
        kind, what = TooLarge, "the request is too large: shorten its messages, or lower batch_size"
    else:
        kind, what = Refused, f"{model} has not answered"
    return kind(f"{what} ({said})", error.status(), error.debug_details())
