"""What names a message, for ever: a key that its id, its split and its place in the sample are hashed from.

It is made from the text as the first release cleaned it. However the cleaning of `tasks/text.py` changes, this stays:
else messages would change places, and a version would be tested on what the one before has learned from. So nothing
here is to be improved. `prepare.without_disguised_copies` finds the copies that only today's cleaning shows.
"""

import html
import itertools
import re
import unicodedata

import polars as pl

from tasks.data import messages

_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
_GAP = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_MAX_ESCAPES = 8

_SIMPLE = r"\x00-%'-\xac\xae-\u02ff\u0400-\u0482\u048a-\u052f\u2010-\u2027\u20a0-\u20bf"
_SHORT = 1000  # characters whose accents Python sorts within a millisecond or two, whatever they are


def hashed(text: pl.Expr, length: int) -> pl.Expr:
    """The hash (uint64) that names each message (string, without nulls), by its first `length` characters."""
    return messages.hashed(messages.key(cleaned(text, length)))


def cleaned(text: pl.Expr, length: int) -> pl.Expr:
    """The first `length` characters of `clean` of each text, most of them without leaving Polars."""
    whole = text.map_batches(
        lambda texts: messages.by_hand(texts, texts.str.contains(f"[^{_SIMPLE}]"), clean),
        return_dtype=pl.String,
        is_elementwise=True,
    )
    return whole.str.slice(0, length).str.strip_chars_end(" ")


def clean(text: str) -> str:
    """The text as the first release cleaned it."""
    for _ in range(_MAX_ESCAPES):
        plain = _composed(_INVISIBLE.sub("", html.unescape(text)))
        if plain == text:
            break
        text = plain
    return _GAP.sub(" ", text).strip()


def _composed(text: str) -> str:
    """NFC. Python takes time with the square of the number of marks on a letter, unless they are in order already."""
    if len(text) > _SHORT and not text.isascii():
        decomposed = "".join(unicodedata.normalize("NFD", character) for character in text)
        runs = itertools.groupby(decomposed, lambda character: unicodedata.combining(character) > 0)
        text = "".join("".join(sorted(run, key=unicodedata.combining) if marks else run) for marks, run in runs)
    return unicodedata.normalize("NFC", text)
