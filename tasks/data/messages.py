"""Messages by the million, in Polars: cleaned as tasks/text.py does it, and named by a hash that never changes."""

import polars as pl
import polars_hash  # noqa: F401  (registers the namespace `nchash`)

from tasks.text import CONTROL, clean

# Characters that nothing in `clean` but the closing of gaps can change, alone or beside each other: ASCII without `&`,
# and the letters and marks of common English and Russian text. A message with any other goes through `clean` itself.
_SIMPLE = r"\x00-%'-\xac\xae-\u02ff\u0400-\u0482\u048a-\u052f\u2010-\u2027\u20a0-\u20bf"
_NEEDS_PYTHON = f"[^{_SIMPLE}]"
_GAP = rf" *[\s{CONTROL}--\x20][\s{CONTROL}]*| {{2,}}"  # `--` takes the space away: a single one is no gap

# Copies of a message may differ in case and in punctuation, but not in what masks a letter: f**k, @ss, $hit.
_PUNCTUATION = r"[^\p{L}\p{M}\p{N}\p{S}*@# ]"


def cleaned(text: pl.Expr) -> pl.Expr:
    """`tasks.text.clean` of each text (string, without nulls), most of them without leaving Polars."""
    return text.map_batches(_cleaned, return_dtype=pl.String, is_elementwise=True)


def _cleaned(texts: pl.Series) -> pl.Series:
    hard = texts.str.contains(_NEEDS_PYTHON)
    easy = texts.str.replace_all(_GAP, " ").str.strip_chars(" ")
    if not hard.any():
        return easy
    by_hand = pl.Series([clean(text) for text in texts.filter(hard)], dtype=pl.String)
    place = (hard.cum_sum().cast(pl.Int64) - 1).clip(0)  # of a hard text in `by_hand`
    return easy.zip_with(~hard, by_hand.gather(place))


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
