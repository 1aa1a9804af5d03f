"""How a message is cleaned before it is tokenised: the same in training, in evaluation and inside Triton.

Standard library only: the serving repository carries a copy of this file beside its tokenizer, so that a model is
served with the cleaning it was trained with.
"""

import html
import re
import unicodedata

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_SPACE = re.compile(r"\s+")


def clean(text: str) -> str:
    """Markup, control characters, lone surrogates and runs of spaces removed; Unicode in composed form (NFC)."""
    text = html.unescape(text)
    text = _TAG.sub(" ", text)
    text = _CONTROL.sub(" ", text)
    return _SPACE.sub(" ", unicodedata.normalize("NFC", text)).strip()
