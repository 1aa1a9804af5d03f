"""Text files that people bring: which encoding one is in, and what is wrong with it, by line.

Spreadsheets and editors write UTF-8 with and without a byte order mark, and UTF-16 (Excel's “Unicode text”). Everything
else is refused: an eight-bit encoding looks like any other, and a wrong guess is text that nobody has written.
"""

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE

# UTF-32's mark begins as UTF-16's does, so that it is looked for first.
_MARKS = {
    BOM_UTF8: "utf-8-sig",
    BOM_UTF32_LE: "utf-32",
    BOM_UTF32_BE: "utf-32",
    BOM_UTF16_LE: "utf-16",
    BOM_UTF16_BE: "utf-16",
}
# Without a mark: the bytes of each character that are nearly all 0, or 4 as in Cyrillic, and in no UTF-8 are.
_HIGH_BYTES = {
    "utf-32-le": (slice(2, None, 4), slice(3, None, 4)),
    "utf-32-be": (slice(0, None, 4), slice(1, None, 4)),
    "utf-16-le": (slice(1, None, 2),),
    "utf-16-be": (slice(0, None, 2),),
}
_NOT_TEXT = {
    b"\x1f\x8b": "it is packed with gzip: unpack it first",
    b"PK\x03\x04": "it is a zip archive or a spreadsheet's own file (.xlsx): unpack it, or save it as “CSV UTF-8”",
    b"\xd0\xcf\x11\xe0": "it is an old Excel workbook (.xls): save it as “CSV UTF-8”",
    b"%PDF": "it is a PDF: export the table as CSV",
}
_CYRILLIC = ("cp1251", "cp866", "koi8-r")
_CYRILLIC_WORD = re.compile("[А-ЯЁа-яё][а-яё]+")


class Unreadable(ValueError):
    """A file is not what it is taken for; the words go behind its name and a colon."""


def encoding(head: bytes) -> str:
    """Python's name for the encoding that the first bytes of a file show; "utf-8" where they show none."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    head = head[: min(1024, len(head) // 4 * 4)]
    for name, places in _HIGH_BYTES.items():
        high = b"".join(head[place] for place in places)
        if high and high.count(0) + high.count(4) > 0.8 * len(high):
            return name
    return "utf-8"


def decoded(content: bytes) -> str:
    """The text of a whole file, without its byte order mark.

    Raises:
        Unreadable: it is no text, or not all of it is in its encoding; the message has line, byte, and a way out.
    """
    for magic, words in _NOT_TEXT.items():
        if content.startswith(magic):
            raise Unreadable(words)
    name = encoding(content)
    try:
        return content.decode(name)
    except UnicodeDecodeError as error:
        whole, start = error.object, error.start  # not `content`: a mark at its beginning may have been taken off
        before = content[: len(content) - len(whole) + start].decode(name, errors="replace")
        line = len(re.findall(r"\r\n|\r|\n", before)) + 1
        called = "UTF-8" if name.startswith("utf-8") else name[:6].upper()
        raise Unreadable(
            f"line {line} is not {called} (byte {whole[start]:#x}): {_way_out(whole, start, name)}"
        ) from None


def _way_out(content: bytes, start: int, name: str) -> str:
    if not name.startswith("utf-8"):
        return "the file was cut or is damaged: export it again, as “CSV UTF-8”"
    if b"\x00" in content[:1024]:
        return "it is no text at all: take it away, or export it again as “CSV UTF-8”"
    if start >= len(content) - 3 and _cut(content[start:]):
        return "the file ends in the middle of a character, as a cut copy does: get it again"
    sample = content[max(0, start - 10_000) : start + 10_000]
    lenient = sample.decode("utf-8", errors="replace")
    damaged = lenient.count("\ufffd")
    if sum(not character.isascii() for character in lenient) > 2 * damaged:
        return "the rest is: correct the text there, it is damaged or was pasted from a file in another encoding"
    found = {name: sample.decode(name, errors="replace") for name in _CYRILLIC}
    letters = {name: sum(map(len, _CYRILLIC_WORD.findall(text))) for name, text in found.items()}
    best = max(_CYRILLIC, key=letters.get)
    if letters[best] > 0.7 * sum(byte > 127 for byte in sample):
        return f"save it as “CSV UTF-8”, or `iconv -f {best} -t utf-8`"
    return "save it as “CSV UTF-8”; iconv needs to be told which encoding the program that wrote it has used"


def _cut(rest: bytes) -> bool:
    try:
        rest.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
