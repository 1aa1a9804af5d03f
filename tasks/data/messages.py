"""Messages by the million, in Polars: cleaned as tasks/text.py does it, and named by a hash that never changes."""

from collections.abc import Callable

import polars as pl
import polars_hash  # noqa: F401  (registers the namespace `nchash`)

from tasks.text import CONTROL, MIXED, SIMPLE, clean_start

_NEEDS_PYTHON = f"[^{SIMPLE}]|{MIXED}"
_SHOWN = "[A-Za-zА-яё0-9]"
_GAP = rf" *[\s{CONTROL}--\x20][\s{CONTROL}]*| {{2,}}"  # `--` takes the space away: a single one is no gap

# Copies of a message may differ in case and in punctuation, but not in what masks a letter: f**k, @ss, $hit.
_PUNCTUATION = r"[^\p{L}\p{M}\p{N}\p{S}*@# ]"


def cleaned(text: pl.Expr, length: int) -> pl.Expr:
    """`tasks.text.clean_start` of each text (string, without nulls), most of them without leaving Polars."""

    def of_batch(texts: pl.Series) -> pl.Series:
        whole = by_hand(texts, texts.str.contains(_NEEDS_PYTHON), lambda one: clean_start(one, length))
        return whole.str.slice(0, length).str.strip_chars_end(" ")

    return text.map_batches(of_batch, return_dtype=pl.String, is_elementwise=True)


def empty(text: pl.Expr, length: int) -> pl.Expr:
    """Whether cleaning leaves nothing of each text (string, without nulls); most show a letter or a digit."""

    def of_batch(texts: pl.Series) -> pl.Series:
        unsure = ~texts.str.contains(_SHOWN) | texts.str.contains("&", literal=True)
        if not unsure.any():
            return unsure
        return unsure & in_place([not clean_start(one, length) for one in texts.filter(unsure)], unsure)

    return text.map_batches(of_batch, return_dtype=pl.Boolean, is_elementwise=True)


def by_hand(texts: pl.Series, hard: pl.Series, clean: Callable[[str], str]) -> pl.Series:
    """The `hard` texts (bool) as `clean` leaves them; in the others the gaps are closed, all that they need."""
    easy = texts.str.replace_all(_GAP, " ").str.strip_chars(" ")
    return easy.zip_with(~hard, in_place([clean(text) for text in texts.filter(hard)], hard)) if hard.any() else easy


def in_place(values: list, chosen: pl.Series) -> pl.Series:
    """The values, one at least, in the rows that are chosen (bool), in their order; in the others any of them."""
    place = (chosen.cum_sum().cast(pl.Int64) - 1).clip(0)
    return pl.Series(values).gather(place)


def key(text: pl.Expr) -> pl.Expr:
    """What the copies of a cleaned message have in common: letters, digits and symbols, in lower case.

    It serves to compare and is never trained on. A message of nothing but punctuation is its own key.
    """
    lower = text.str.to_lowercase()
    bare = lower.str.replace_all(rf"(?: *{_PUNCTUATION})+ *", " ").str.strip_chars(" ")
    return pl.when(bare == "").then(lower).otherwise(bare)


def hashed(text: pl.Expr) -> pl.Expr:
    """xxHash64, seed 0, as uint64: the same on every machine and in every version, which Polars' own hash is not.

    Among two million different messages, two share a hash with a chance of one in ten million.
    """
    return text.nchash.xxhash64()


def place(hash_: pl.Expr, salt: str, purpose: str) -> pl.Expr:
    """A number in [0, 1) for each message, evenly spread, that depends on its hash, the salt and the purpose alone."""
    named = pl.concat_str(pl.lit(f"{salt}:{purpose}:"), hash_.cast(pl.String))
    return hashed(named).cast(pl.Float64) / 2.0**64
