"""The base model that is fine-tuned: a Hugging Face name, a folder, or a tiny Qwen2 that is made here."""

import hashlib
import json
import logging
import tempfile
from pathlib import Path

from tasks import files, paths, proxies
from tasks.config import Model
from tasks.errors import UsageError

log = logging.getLogger(__name__)

TOKENIZER_ROWS = 2000  # generated messages per language that the tiny model's tokenizer is trained on


def resolve(model: Model, seed: int, workspace: Path) -> str:
    """The folder of the base model. A hub name is downloaded into the hub's cache; the tiny model is made once.

    Raises:
        UsageError: there is no such folder, or the hub neither has it nor answers.
    """
    if model.architecture is None:
        if not model.name.startswith((".", "/", "~")):
            return from_hub(model.name, workspace)
        folder = Path(model.name).expanduser()
        if not (folder / "config.json").is_file():
            raise UsageError(f"model.name={model.name}: no such folder with a config.json")
        return str(folder)
    recipe = json.dumps([model.architecture.model_dump(), seed], sort_keys=True)
    name = f"{model.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    folder = workspace / "models" / "cache" / name
    if not folder.exists():
        log.info("making the base model %s", folder)
        with files.new_folder(folder) as beside:
            make_tiny(model, seed, beside)
    return str(folder)


def from_hub(name: str, workspace: Path) -> str:
    """The hub's model in its own cache, or in the workspace where that one, in somebody's home, can't be written."""
    from httpx2 import HTTPError
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    own = (
        None
        if paths.can_write(Path(constants.HF_HUB_CACHE))
        else workspace / "models" / "cache" / "huggingface" / "hub"
    )
    try:
        return snapshot_download(name, cache_dir=own, allow_patterns=["*.json", "*.txt", "*.safetensors"])
    except (OSError, ValueError, HTTPError, HfHubHTTPError) as error:
        raise UsageError(
            f"model.name={name} is neither in the local cache nor to be had from the Hugging Face hub "
            f"({type(error).__name__}){proxies.in_the_way('https://huggingface.co')}: check the name and the network, "
            "or name a folder that holds the model"
        ) from None


def content_hash(base: str) -> str:
    """SHA-256 over the base's weight files, so that an adapter is never merged onto another base than its own."""
    digest = hashlib.sha256()
    for file in sorted(Path(base).glob("*.safetensors")):
        digest.update(files.sha256(file).encode())
    return digest.hexdigest()


def make_tiny(model: Model, seed: int, folder: Path) -> None:
    """Writes a randomly initialised Qwen2 and a byte-level BPE tokenizer, the same for the same seed."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(model.architecture.vocab_size, seed)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    architecture = Qwen2Config(
        **model.architecture.model_dump(),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(architecture).save_pretrained(folder)


def make_tokenizer(vocab_size: int, seed: int):
    """Qwen2's own tokenizer (byte-level BPE), its merges learnt from generated messages."""
    import polars as pl
    from transformers import Qwen2Tokenizer

    from tasks.data import sample
    from tasks.text import clean

    with tempfile.TemporaryDirectory() as raw:
        sample.write(Path(raw), TOKENIZER_ROWS, TOKENIZER_ROWS, label_noise=0.0, seed=seed)
        english = pl.read_csv(Path(raw) / sample.JIGSAW_FILE, glob=False)["comment_text"].to_list()
        russian = pl.read_csv(Path(raw) / sample.RUSSIAN_FILE, glob=False)["comment"].to_list()
    texts = (clean(text) for text in english + russian if text)
    return Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)
