"""How a message is cleaned before it is tokenised: the same in training, in evaluation and inside Triton.

Standard library only: the serving repository carries a copy of this file beside its tokenizer, so that a model is
served with the cleaning it was trained with. `tasks/data/messages.py` does the same to millions of rows at once.
docs/text.md says what is done and why, with examples.
"""

import html
import re
import unicodedata

# Letters, by script. A word is a run of them with its digits and accents; what stands between hyphens or apostrophes is
# a word of its own.
ACCENTED = r"\xc0-\xd6\xd8-\xf6\xf8-\u02af\u1e00-\u1eff"
LATIN = rf"A-Za-z{ACCENTED}"
CYRILLIC = r"\u0400-\u0481\u048a-\u052f"
OTHER = (  # scripts with letters that look Latin: Greek, Armenian, Cherokee, Lisu, and Roman numerals
    r"\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u03ff\u1f00-\u1fff\u0531-\u0556\u0561-\u0587"
    r"\u13a0-\u13fd\ua4d0-\ua4f7\u2160-\u217f"
)
IN_WORDS = r"0-9\u0300-\u036f"
CONTROL = r"\x00-\x1f\x7f-\x9f"

# Nothing in `clean` changes one of these characters, but for gaps and in words of two scripts. Most have no other.
SIMPLE = r"\x00-%'-\xac\xae-\u024f\u0400-\u0482\u048a-\u052f\u2010-\u2027\u20a0-\u20bf"
MIXED = "|".join(
    f"[{one}][{IN_WORDS}]*[{other}]"
    for one, other in ((LATIN, CYRILLIC + OTHER), (CYRILLIC, LATIN + OTHER), (OTHER, LATIN + CYRILLIC))
)

_SIMPLE = re.compile(f"[{SIMPLE}]*")
_MIXED = re.compile(MIXED)
_GAP = re.compile(rf"[\s{CONTROL}\ud800-\udfff]+")

# Bytes of a message that a server takes. It judges a start; of more than this, what nobody sees would be nearly all.
LONGEST = 2**20

# `&amp;amp;quot;` is escaped three times. How often an ampersand is does not matter; other things are unpacked as often
# as this. A message made to go on for ever is not worth the time.
_MAX_ESCAPES = 8
_ESCAPED_AMPERSAND = re.compile("&(?:(?:amp|#0*38|#x0*26);)+", re.IGNORECASE)


def clean(text: str) -> str:
    """The message as its reader sees it.

    HTML entities become what they stand for; what nobody sees goes; letters in disguise become the letters that they
    look like; runs of spaces, line breaks, control characters and lone surrogates become one space. Unicode is in
    composed form (NFC). Nothing else changes: words in angle brackets stay, as people write there too.

    Cleaning twice changes nothing. It takes time in proportion to the length.
    """
    if not (_SIMPLE.fullmatch(text) and not _MIXED.search(text)):
        for _ in range(_MAX_ESCAPES):
            plain = _plain(html.unescape(_ESCAPED_AMPERSAND.sub("&", text)))
            if plain == text:
                break
            text = plain
        else:
            text = _plain(text.replace("&", " "))
    return _GAP.sub(" ", text).strip()


def clean_start(text: str, length: int) -> str:
    """The first `length` characters of the cleaned text; of a megabyte within some tens of milliseconds.

    A long text is cut before the slow part. What harms is taken out first, or spaces and marks that nobody reads would
    push a message out of sight; only an insult behind many thousand entities that are escaped twice is.
    """
    if len(text) > 2 * length:
        text = _few_marks(_GAP.sub(" ", _seen(html.unescape(text))))[: 2 * length]
    text = clean(text)
    # Beside the cut, what joined two characters, or made a word, may do so no more.
    return text if len(text) <= length else clean(text[:length])


def _plain(text: str) -> str:
    return _undisguised(_composed(_seen(text)))


# What nobody sees -----------------------------------------------------------------------------------------------------

# Unicode's default-ignorable code points, annotations between lines, and letters and symbols that are blank.
IGNORABLE = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Most texts have nothing of what a pattern here is for. To find that out, Python is ten times as fast with a set of
# characters, or with a pattern that begins with one, as with other patterns.
_ANY_IGNORABLE = re.compile(f"[{IGNORABLE}]")
# A region's flag, Scotland's for one, is a black flag and the region's code in such characters: it stays whole.
_HIDDEN = re.compile(rf"\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{{3,6}}\U000e007f|[{IGNORABLE}]+")
_JOINER, _NON_JOINER, _BRAILLE_SPACE, _KEYCAP = "\u200d", "\u200c", "\u2800", "\u20e3"

_EMOJI = re.compile(  # symbols that may be emoji, and the tones of skin
    r"[\xa9\xae\u203c\u2049\u2122\u2139\u2190-\u21ff\u2300-\u23ff\u24c2\u25a0-\u27bf\u2934\u2935\u2b00-\u2bff\u3030"
    r"\u303d\u3297\u3299\U0001f000-\U0001faff]"
)
_JOINS = (
    re.compile(  # letters that joiners shape: Arabic and its neighbours, Indic scripts, Myanmar, Khmer, Mongolian …
        r"[\u0600-\u061b\u061d-\u0dff\u1000-\u109f\u1780-\u17b3\u17b6-\u17ff\u1810-\u18af\u1a20-\u1aaf\u1b00-\u1bff"
        r"\ua840-\ua87f\ua8e0-\uaadf\U00010a00-\U00010dff\U00011000-\U00011fff\U0001e900-\U0001e95f]"
    )
)
_MONGOLIAN = re.compile(r"[\u1810-\u18af]")
_BRAILLE = re.compile(r"[\u2801-\u28ff]")
_HAN = re.compile(r"[\u2e80-\u2fdf\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_HAS_VARIANTS = re.compile(rf"{_HAN.pattern}|[\u1000-\u109f\u2200-\u22ff\u3001\u3002\uff01-\uff1f]")
# After any other character nothing of it shapes anything: most goes by this, without asking character by character.
_AFTER_NOTHING = re.compile(
    f"(?<![{''.join(one.pattern.strip('[]') for one in (_EMOJI, _JOINS, _BRAILLE, _HAN))}"
    rf"\u2200-\u22ff\u3001\u3002\uff01-\uff1f0-9#*{IGNORABLE}{_KEYCAP}])[{IGNORABLE}]+"
)


def _seen(text: str) -> str:
    """The text without what nobody sees; what shapes the emoji or the letters beside it stays."""
    return _HIDDEN.sub(_shaping, _AFTER_NOTHING.sub("", text)) if _ANY_IGNORABLE.search(text) else text


def _shaping(found: re.Match) -> str:
    if found[0][0] == "\U0001f3f4":
        return found[0]
    text, kept = found.string, found.string[max(found.start() - 1, 0) : found.start()]
    start = len(kept)
    for place in range(found.start(), found.end()):
        if _shapes(kept[-1:], text[place], text[place + 1 : place + 2]):
            kept += text[place]
    return kept[start:]


def _shapes(before: str, char: str, after: str) -> bool:
    """Whether an ignorable character changes how the characters beside it look."""
    if char == _JOINER:
        after_emoji = _EMOJI.match(before) or before in ("\ufe0f", _KEYCAP)
        return bool(after_emoji and _EMOJI.match(after) or _JOINS.match(before))
    if char == _NON_JOINER:
        return bool(_JOINS.match(before) and _JOINS.match(after))
    if char in "\ufe0e\ufe0f":  # as text, or as an emoji
        return bool(_EMOJI.match(before) or after == _KEYCAP and before and before in "0123456789#*")
    if "\ufe00" <= char <= "\ufe0d":
        return bool(_HAS_VARIANTS.match(before))
    if "\U000e0100" <= char <= "\U000e01ef":
        return bool(_HAN.match(before))
    if "\u180b" <= char <= "\u180f":
        return bool(_MONGOLIAN.match(before))
    return char == _BRAILLE_SPACE and bool(_BRAILLE.match(before) and _BRAILLE.match(after))


# Accents --------------------------------------------------------------------------------------------------------------

# So many marks Unicode expects on a letter at most (UAX #15, stream-safe text). Python sorts them in time with the
# square of their number, so that a message of nothing else would take minutes.
_MOST_MARKS = 30


def _marks() -> str:
    """All of Unicode's combining marks, and three that are not called so but become two of them."""
    codes = [code for code in range(0x300, 0x1E950) if unicodedata.combining(chr(code))] + [0xF73, 0xF75, 0xF81]
    return "".join(map(chr, codes))


_MARKS = _marks()
_TOO_MANY_MARKS = re.compile(f"([{_MARKS}]{{{_MOST_MARKS}}})[{_MARKS}]+")
_MANY_MARKS_AT_MOST = re.compile(rf"[^\w\s\x00-\x7f][^\w\s\x00-\x7f]{{{_MOST_MARKS}}}")  # or other symbols

# On a Latin or Cyrillic letter, more than two that do not make one letter with it are scribbled over it. An accent that
# does is one of them, but for letters of the alphabet.
_ALPHABET = set("йёїўЙЁЇЎ")
_OVER = r"\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20f0"
_SEVERAL_OVER = re.compile(f"[{_OVER}][{_OVER}]")
_SCRIBBLED = re.compile(rf"([A-Za-z{CYRILLIC}])[{_OVER}]{{3,}}|([{ACCENTED}])[{_OVER}]{{2,}}")


def _composed(text: str) -> str:
    """NFC, without what is scribbled over letters."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", _few_marks(text))
    return _SCRIBBLED.sub(_bare, text) if _SEVERAL_OVER.search(text) else text


def _bare(found: re.Match) -> str:
    letter = found[1] or found[2]
    return letter if letter in _ALPHABET else unicodedata.normalize("NFD", letter)[0]


def _few_marks(text: str) -> str:
    return _TOO_MANY_MARKS.sub(r"\1", text) if _MANY_MARKS_AT_MOST.search(text) else text


# Letters in disguise --------------------------------------------------------------------------------------------------


def _forms() -> dict[int, str]:
    """Letters and digits that are another one in another form: full-width, mathematical, circled, in squares, joined.

    What Unicode calls compatible is more than that, and stays: ½, №, ™, ², ㎏, Korean letters by themselves.
    """
    found = {}
    ranges = [(0x2102, 0x2149), (0x249C, 0x24E9), (0xFB00, 0xFB06), (0xFF10, 0xFF5A), (0x1D400, 0x1D7FF)]
    for first, last in [*ranges, (0x1F110, 0x1F149)]:
        for code in range(first, last + 1):
            form = unicodedata.normalize("NFKC", chr(code)).strip("()\u3014\u3015")
            if form.isalnum() and (len(form) == 1 or first == 0xFB00) and unicodedata.category(chr(code)) != "No":
                found[code] = form
    for first in (0x1F150, 0x1F170):  # white on black: Unicode says of them by their names alone what they are
        found |= {first + place: chr(ord("A") + place) for place in range(26)}
    return {code: form for code, form in found.items() if chr(code) not in _BLOOD_GROUPS}


_BLOOD_GROUPS = "🅰🅱🅾🅿"  # emoji of their own, the sign for parking too; between letters of that form they are one
_FORMS = _forms()
_LETTER_IN_SQUARE = re.compile(
    rf"(?<=[A-Za-z])[{_BLOOD_GROUPS}](?!\ufe0f)|[{_BLOOD_GROUPS}](?=[A-Za-z])"  # after _FORMS, all others are A to Z
)
_IN_SQUARE = dict(zip(_BLOOD_GROUPS, "ABOP"))
_ANY_FORM = re.compile("[\u2102-\u24e9\ufb00-\uff5a\U0001d400-\U0001d7ff\U0001f110-\U0001f18a]")  # or what is near them


def _tiny() -> dict[int, str]:
    """Small capitals and raised letters, which look Latin: ɪ → i, ᵈ → d."""
    found = {}
    for first, last in ((0x250, 0x2E4), (0x1D00, 0x1DBF), (0x2071, 0x209C), (0xA730, 0xA731), (0xA7AE, 0xA7AF)):
        for code in range(first, last + 1):
            capital = re.fullmatch("LATIN LETTER SMALL CAPITAL ([A-Z])", unicodedata.name(chr(code), ""))
            form = capital[1].lower() if capital else unicodedata.normalize("NFKC", chr(code))
            if form.isascii() and form.isalpha():
                found[code] = form
    return found


_TINY = _tiny()
_ANY_TINY = re.compile(f"[{''.join(map(chr, _TINY))}]")
_TINY_WORD = re.compile(r"[^\W\d_]{3,}")

# What each looks like in Latin letters, and in Cyrillic ones. Only letters that are hard to tell apart in print:
# folding what is merely similar (т and t, п and n) would spoil more words than it mends.
_LATIN_TWINS = str.maketrans(
    "аеорсухіјѕһԁԛԝӏкүАВСЕНІЈКМОРЅТХУҮԚԜӀѴѵёїЁЇ"
    "αοριικνυχγητωϲϳΑΒΕΖΗΙΚΜΝΟΡΤΥΧ"
    "օսոհցյզՕՍԼՏ"
    "ᎠᎡᎢᎥᎪᎫᎬᎳᎷᎻᎽᏀᏃᏙᏚᏞᏟᏢᏦᏧᏴ"
    "ꓐꓑꓓꓔꓖꓗꓙꓚꓜꓝꓟꓠꓡꓢꓣꓦꓧꓪꓫꓬꓮꓰꓲꓳꓴ"
    "ⅠⅤⅩⅬⅭⅮⅯⅰⅴⅹⅼⅽⅾⅿ",
    "aeopcyxijshdqwlkyABCEHIJKMOPSTXYYQWIVvëïËÏ"
    "aopiikvuxyntwcjABEZHIKMNOPTYX"
    "ounhgjqOULS"
    "DRTiAJEWMHYGZVSLCPKdB"
    "BPDTGKJCZFMNLSRVHWXYAEIOU"
    "IVXLCDMivxlcdm",
)
_CYRILLIC_TWINS = str.maketrans(
    "aeopcyxikABCEHIKMOPTXYëïËÏαορκχΑΒΕΗΙΚΜΟΡΤΥΧ",
    "аеорсухікАВСЕНІКМОРТХУёїЁЇаоркхАВЕНІКМОРТУХ",
)
_WORD = re.compile(f"[{LATIN}{CYRILLIC}{OTHER}{IN_WORDS}]+")
_LATIN, _CYRILLIC, _OTHER = (re.compile(f"[{letters}]") for letters in (LATIN, CYRILLIC, OTHER))

# Words of two scripts that are no disguise, though their letters would allow it: an abbreviation or a file's ending of
# nothing but look-alikes, with a Russian ending.
_BORROWED = re.compile(
    "(?:ATM|ATX|BMX|CEO|CMO|COM|CPA|CTO|EXE|HP|HTTP|KPI|MAC|PC|PHP|POP|TCP|XP)[а-яё]{1,6}", re.IGNORECASE
)
# A Russian ending on a foreign word, in a Russian message: "почитай mailу".
_DECLINED = re.compile(f"[{LATIN}]{{3,}}[аеоу]х?")


def _undisguised(text: str) -> str:
    """The text with each letter that poses as another one as that one."""
    if text.isascii():
        return text
    if _ANY_FORM.search(text):
        text = _LETTER_IN_SQUARE.sub(lambda found: _IN_SQUARE[found[0]], text.translate(_FORMS))
    if _ANY_TINY.search(text):
        text = _TINY_WORD.sub(lambda found: _full_size(found[0]), text)
    scripts = sum(letters.search(text) is not None for letters in (_LATIN, _CYRILLIC, _OTHER))
    return _in_one_script(text) if scripts > 1 and _MIXED.search(text) else text


def _full_size(word: str) -> str:
    """A word of tiny letters in common ones; where there are fewer than three, or others, they are phonetic signs."""
    plain = word.translate(_TINY)
    return plain if plain.isascii() and len(_ANY_TINY.findall(word)) >= 3 else word


def _in_one_script(text: str) -> str:
    """Words of two scripts in the one that all their letters may be read in; those that can't be, stay as they are."""
    only_latin = sum(ord(letter) not in _CYRILLIC_TWINS for letter in _LATIN.findall(text))
    only_cyrillic = sum(ord(letter) not in _LATIN_TWINS for letter in _CYRILLIC.findall(text))
    read_as = set()

    def folded(found: re.Match) -> str:
        script = _script_of(found[0], only_latin, only_cyrillic)
        read_as.add(script)
        return found[0].translate({"latin": _LATIN_TWINS, "cyrillic": _CYRILLIC_TWINS}.get(script, {}))

    text = _WORD.sub(folded, text)
    # Beside such words, others may be disguised from the first to the last letter: the `а` in "аn idiоt, а fооl". They
    # are, where the message has no letter of that script that could be meant.
    for script, twins, foreign in (("latin", _LATIN_TWINS, _CYRILLIC), ("cyrillic", _CYRILLIC_TWINS, _LATIN)):
        if script in read_as and all(ord(letter) in twins for letter in foreign.findall(text)):
            text = foreign.sub(lambda found: found[0].translate(twins), text)
    return text


def _script_of(word: str, only_latin: int, only_cyrillic: int) -> str | None:
    """The script that a word of several is meant in; None for a word of one, and for one that is mixed on purpose.

    Args:
        only_latin, only_cyrillic: how many letters of the message are of that script and look like none of the other.
    """
    latin, cyrillic, other = (letters.findall(word) for letters in (_LATIN, _CYRILLIC, _OTHER))
    if bool(latin) + bool(cyrillic) + bool(other) < 2 or other and len(latin + cyrillic + other) < 3:  # μm, λx
        return None
    if _BORROWED.fullmatch(word) or only_cyrillic and _DECLINED.fullmatch(word):
        return None
    as_latin = latin and all(ord(letter) in _LATIN_TWINS for letter in cyrillic + other)
    as_cyrillic = cyrillic and all(ord(letter) in _CYRILLIC_TWINS for letter in latin + other)
    if as_latin and as_cyrillic:
        return "latin" if (only_latin, len(latin)) > (only_cyrillic, len(cyrillic)) else "cyrillic"
    return "latin" if as_latin else "cyrillic" if as_cyrillic else None
