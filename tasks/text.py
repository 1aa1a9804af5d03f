"""How a message is cleaned before it is tokenised: the same in training, in evaluation and inside Triton.

Standard library only: the serving repository carries a copy of this file beside its tokenizer, so that a model is
served with the cleaning it was trained with. `tasks/data/messages.py` does the same to millions of rows at once.
"""

import html
import re
import unicodedata

# Soft hyphens, zero-width spaces and marks of writing direction: unseen, they only hide words ("id\u200biot"). The
# joiners of emoji (U+200D) and of Persian (U+200C) stay.
INVISIBLE = "\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"
CONTROL = "\x00-\x1f\x7f-\x9f"

_INVISIBLE = re.compile(f"[{INVISIBLE}]")
_GAP = re.compile(rf"[\s{CONTROL}\ud800-\udfff]+")
_MAX_ESCAPES = 8  # `&amp;amp;quot;` is escaped three times; a message made to go on for ever is not worth the time


def clean(text: str) -> str:
    """What harms is gone: HTML entities become what they stand for; runs of spaces, line breaks, control characters and
    lone surrogates become one space; what nobody sees goes. Unicode is in composed form (NFC).

    Nothing else changes: words in angle brackets stay, as people write there too. Cleaning twice changes nothing.
    """
    for _ in range(_MAX_ESCAPES):
        plain = unicodedata.normalize("NFC", _INVISIBLE.sub("", html.unescape(text)))
        if plain == text:
            break
        text = plain
    return _GAP.sub(" ", text).strip()


def clean_start(text: str, length: int) -> str:
    """`clean(text)[:length]`, within some tens of milliseconds for a megabyte too.

    Composing accents takes time with the square of their number, minutes for a megabyte of them, so that a long text is
    cut before it. What harms is taken out first, or spaces that nobody reads would push a message out of sight; only an
    insult behind many thousand entities that are escaped twice is.
    """
    if len(text) > 2 * length:
        text = _GAP.sub(" ", _INVISIBLE.sub("", html.unescape(text)))[: 2 * length]
    return clean(text)[:length].rstrip(" ")
