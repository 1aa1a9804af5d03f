"""Files of messages as editors save them, and what is said of those that are no text."""

import pytest

from tasks.errors import UsageError
from tasks.serving.predict import read_lines

LINES = ["You are a clown", "", "Спасибо\u2028за помощь", "last"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", ["", "\n", "\n\x1a", "\n\x1a\r\n"])
def test_one_message_a_line_whichever_editor_has_saved_them(tmp_path, encoding, end, last):
    (tmp_path / "in.txt").write_bytes(("\n".join(LINES) + last).replace("\n", end).encode(encoding))
    assert read_lines(tmp_path / "in.txt") == LINES


@pytest.mark.parametrize(
    "content, words",
    [
        ("one\nпривет всем\n".encode("cp1251"), "line 2 is not UTF-8 .byte 0xef.*iconv -f cp1251 -t utf-8"),
        ("one\nпривет всем\n".encode("koi8-r"), "line 2 .*iconv -f koi8-r"),
        ("one\ntwo\ncafé\n".encode("cp1252"), "line 3 is not UTF-8 .byte 0xe9.*which encoding"),
        ("привет\nвсем".encode()[:-1], "line 2 .*ends in the middle of a character"),
        ("привет\nвсем\n".encode("utf-16")[:-1], "line 2 is not UTF-16"),
        (b"\x1f\x8b\x08", "packed with gzip: unpack it first"),
        (b"PK\x03\x04\x14\x00", "a zip archive or a spreadsheet's own file"),
        (b"text\x00\xff\xfe", "line 1 .*no text at all"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(tmp_path, content, words):
    (tmp_path / "in.txt").write_bytes(content)
    with pytest.raises(UsageError, match=f"--input-file={tmp_path}/in.txt can't be read: .*{words}"):
        read_lines(tmp_path / "in.txt")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UsageError, match="can't be read: Is a directory"):
        read_lines(tmp_path)
