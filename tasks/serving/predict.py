"""Classify messages: with a checkpoint, or through a server."""

import io
import logging
import re
from pathlib import Path

import numpy as np

from tasks import address, files, proxies, step, text_files
from tasks.errors import StepFailed, UsageError
from tasks.labels import answer
from tasks.text import clean_start
from tasks.training import checkpoint

log = logging.getLogger(__name__)


def run(overrides, text, input_file, output_file, checkpoint_folder, url, config_path, config_name):
    """Answers one message, or a file with one a line; returns a list of {"text", "toxic", "labels"}, from a server
    with "scores" and "version" too.

    With `output_file` the list is written there, and its path and length are returned.

    Raises:
        UsageError: neither or both of `text` and `input_file`, both of `checkpoint_folder` and `url`, a `url` that is
            no address, or a missing file or checkpoint.
        StepFailed: the server gives no answer.
    """
    if (text is None) == (input_file is None):
        raise UsageError('name what to classify: --text="…" or --input-file=FILE, one of the two')
    if url is not None and checkpoint_folder is not None:
        raise UsageError("name who answers: --url=HOST:PORT or --checkpoint=FOLDER, one of the two")
    if url is not None:
        require_address(url)
    _, config, _ = step.open_run("predict", list(overrides), config_path, config_name)
    texts = [text] if text is not None else read_lines(Path(input_file))
    if url is not None:
        found = answers_from(url, texts)
    else:
        found = answers_of(checkpoint.require(Path(checkpoint_folder or checkpoint.final(config))), texts)
    answers = [{"text": message, **answer} for message, answer in zip(texts, found)]
    if output_file is None:
        return answers
    files.write_json(Path(output_file), answers)
    return {"output_file": output_file, "messages": len(answers)}


def read_lines(file: Path) -> list[str]:
    """The messages of a file, one a line: in UTF-8 or UTF-16. Ctrl-Z, as DOS ends a file, is none.

    Raises:
        UsageError: it is not there, or not text; the message names the line.
    """
    try:
        text = text_files.decoded(file.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"--input-file={file} does not exist") from None
    except OSError as error:
        raise UsageError(f"--input-file={file} can't be read: {error.strerror}") from None
    except text_files.Unreadable as error:
        raise UsageError(f"--input-file={file} can't be read: {error}") from None
    # str.splitlines would cut a message at U+2028 too
    return [line.rstrip("\n") for line in io.StringIO(re.sub(r"\x1a\s*\Z", "", text), newline=None)]


def require_address(url: str) -> None:
    try:
        address.grpc(url)
    except ValueError as error:
        raise UsageError(f"--url={url}: {error}") from None


def answers_from(url: str, texts: list[str]) -> list[dict]:
    from tasks.serving.client import ServingError, ToxicClient

    try:
        with ToxicClient(url) as client:
            client.batch_size = client.max_batch_size()
            return client.classify(texts)
    except ServingError as error:
        raise StepFailed(f"--url={url}{proxies.in_the_way(url)}: {error.message()}") from None


def answers_of(folder: Path, texts: list[str]) -> list[dict]:
    from tasks.training import model

    network, tokenizer = model.load_merged(folder)
    return classify(network, tokenizer, checkpoint.thresholds(folder), checkpoint.settings(folder), texts)


def classify(network, tokenizer, thresholds: np.ndarray, settings: dict, texts: list[str]) -> list[dict]:
    """{"toxic", "labels"} for each message.

    Args:
        thresholds: probabilities, [6]: a label is given from there on.
        settings: of the checkpoint; how many characters and tokens of a message are read.
    """
    from tasks.training import model

    cleaned = [clean_start(text, settings["max_chars"]) for text in texts]
    logits = model.logits(network, tokenizer, cleaned, settings["max_length"])
    return [answer(row) for row in logits >= np.log(thresholds / (1 - thresholds))]
