"""Ways in which people hide a word from a filter and not from a reader, for the behavioural checks.

Each takes a message and changes every word of four letters or more, always in the same way. Cleaning (`tasks/text.py`)
undoes the first four; the last two a model has to read for itself.
"""

import re

# Letters that look alike in both scripts, and what stands for a letter in leetspeak.
_LATIN, _CYRILLIC = "aeopcyxABCEHKMOPTX", "аеорсухАВСЕНКМОРТХ"
_TWINS = str.maketrans(_LATIN + _CYRILLIC, _CYRILLIC + _LATIN)
_LEET = str.maketrans("aeioAEIOаочзбАОЧЗБ", "@310@310@0436@0436")
_FULL_WIDTH = {
    ord(letter): ord(letter) + 0xFEE0 for letter in map(chr, range(ord("A"), ord("z") + 1)) if letter.isalpha()
}
_HIDDEN = ("\u200d", "\u2060", "\u034f")
_MARKS = "\u0301\u0316\u0334\u0348"

_WORD = re.compile(r"[^\W\d_]{4,}")


def zero_width(word: str) -> str:
    return "".join(letter + _HIDDEN[place % len(_HIDDEN)] for place, letter in enumerate(word[:-1])) + word[-1]


def look_alikes(word: str) -> str:
    """Every second letter that has a twin in the other script is that one."""
    twins = [place for place, letter in enumerate(word) if ord(letter) in _TWINS]
    chosen = {place for place in twins[::2] if len(twins) < len(word) or place}  # a word of twins alone stays mixed
    return "".join(letter.translate(_TWINS) if place in chosen else letter for place, letter in enumerate(word))


def full_width(word: str) -> str:
    """The letters of a full-width form; of Russian words, which have none, those that look like a Latin one."""
    return "".join(
        (
            letter.translate(_FULL_WIDTH if letter.isascii() else _TWINS).translate(_FULL_WIDTH)
            if place % 2 or letter.isascii()
            else letter
        )
        for place, letter in enumerate(word)
    )


def scribbled(word: str) -> str:
    return "".join(letter + _MARKS for letter in word)


def leetspeak(word: str) -> str:
    return word.translate(_LEET)


def spaced(word: str) -> str:
    return " ".join(word)


WAYS = {way.__name__: way for way in (zero_width, look_alikes, full_width, scribbled, leetspeak, spaced)}


def disguised(text: str, way: str) -> str:
    """The message with its longer words in disguise, by one of WAYS."""
    return _WORD.sub(lambda word: WAYS[way](word[0]), text)
