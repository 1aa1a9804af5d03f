"""Ask a Triton server about messages: text in, answers out, through the ensemble `toxic_text`."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tasks.serving.repository import TEXT


def classify(texts: list[str], url: str, batch_size: int = 32, threads: int = 1, timeout_s: float = 60) -> list[dict]:
    """Answers in the order of the messages: [{"toxic", "labels", "scores", "version"}, …].

    Args:
        url: the server's gRPC address, host:port.
        batch_size: messages a request, at most the server's max_batch_size.
        threads: requests under way at a time.

    Raises:
        tritonclient.utils.InferenceServerException: the server refused a request, or does not answer.
    """
    from tritonclient.grpc import InferenceServerClient

    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    with InferenceServerClient(url) as client, ThreadPoolExecutor(threads) as pool:
        answers = pool.map(lambda batch: ask(client, batch, timeout_s), batches)
        return [answer for batch in answers for answer in batch]


def ask(client, texts: list[str], timeout_s: float = 60, model: str = TEXT) -> list[dict]:
    """One request with an open gRPC client to an ensemble that answers like `toxic_text`."""
    from tritonclient.grpc import InferInput

    # A lone surrogate has no bytes of its own; the cleaning would drop it too.
    rows = np.array([[text.encode("utf-8", errors="replace")] for text in texts], dtype=object)
    message = InferInput("text", list(rows.shape), "BYTES")
    message.set_data_from_numpy(rows)
    found = client.infer(model, [message], client_timeout=timeout_s).as_numpy("answer")
    return [json.loads(answer) for answer in found.ravel()]
