"""Kaggle's files after a spreadsheet or an editor has had them: download brings them, all steps read the same."""

import gzip
import logging
import zipfile

import pytest
from raw_data import from_folder

from tasks.data import archives, download, measures, schemas, sources
from tasks.errors import StepFailed, UsageError

HEADER = "id,comment_text,toxic,severe_toxic,obscene,threat,insult,identity_hate\n"
ENGLISH = HEADER + "".join(f'{k:04},"Hi, {k}\n",{k % 2},0,0,0,0,0\n' for k in range(4))
RUSSIAN = "comment,toxic\n" + "".join(f'"Доброе утро, {k}\n",{k % 2}.0\n' for k in range(4))


@pytest.fixture
def given(tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "jigsaw-toxic-comment-train.csv").write_text(ENGLISH, "utf-8")
    (folder / "labeled.csv").write_text(RUSSIAN, "utf-8")
    return folder


def brought(given, tmp_path):
    """What download brings of labeled.csv, as prepare's rows and validate's measures, which are of the same rows."""
    config = from_folder(given, workspace=str(tmp_path), **{"disk.min_free_gib": 0})
    copies = download.fetch(config)
    source = config.data.sources[1]
    rows, measured = schemas.read(source, config), measures.raw(source, config, set())
    assert measured.index.to_list() == rows["row"].to_list() and copies["labeled.csv"].rows == rows.height
    assert measured["toxic"].to_list() == rows["toxic"].to_list()
    return rows


GOOD = [(k, f"Доброе утро, {k}\n", k % 2) for k in range(4)]
SAVED = {
    "empty rows at the end": RUSSIAN + ",\n \u00a0,\n,\n\x1a",
    "quotes of nothing": RUSSIAN + '"",""\n',
    "semicolons": "comment;toxic\n" + "".join(f'"{text}";{toxic},0\n' for _, text, toxic in GOOD),
    "the separator's own line": "sep=;\ncomment;toxic\n" + "".join(f'"{text}";{toxic}\n' for _, text, toxic in GOOD),
    "separators at the end": "comment,toxic\n" + "".join(f'"{text}",{toxic},,\n' for _, text, toxic in GOOD),
    "a header in other case": RUSSIAN.replace("comment,toxic", '" Comment", Toxic '),
    "lines of an old Mac": RUSSIAN.replace(".0\n", ".0\r").replace("toxic\n", "toxic\r"),
    "spaces behind labels": RUSSIAN.replace(".0\n", ".0 \n"),
    "words for labels": RUSSIAN.replace(",0.0", ",ЛОЖЬ").replace(",1.0", ",TRUE"),
}


@pytest.mark.parametrize("content", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_file_that_a_program_has_saved_is_the_one_that_it_was(given, tmp_path, content, encoding):
    (given / "labeled.csv").write_bytes(content.encode(encoding))
    rows = brought(given, tmp_path)
    assert [(row - 1, text, toxic) for row, text, toxic in rows.select("row", "text", "toxic").rows()] == GOOD


def test_a_plain_file_stays_byte_by_byte_what_it_is(given, tmp_path):
    brought(given, tmp_path)
    for name in ("jigsaw-toxic-comment-train.csv", "labeled.csv"):
        assert (tmp_path / "data" / "raw" / name).read_bytes() == (given / name).read_bytes()


def test_empty_rows_count_where_rows_are_named(given, tmp_path):
    (given / "labeled.csv").write_text("comment,toxic\nа,0\n,\n\nб,1\nв,?\n", "utf-8")
    with pytest.raises(StepFailed, match="labeled.csv row 5: toxic is '.', neither 0 nor 1"):
        brought(given, tmp_path)


def test_a_message_of_any_length_is_used(given, tmp_path):
    (given / "labeled.csv").write_text(f'comment;toxic\n"{"репа " * 40_000}";1\n', "utf-8")
    assert brought(given, tmp_path)["text"].str.len_chars().to_list() == [200_000]


@pytest.mark.parametrize(
    "content, words",
    [
        (RUSSIAN.encode("cp1251"), "line 2 is not UTF-8 .byte 0xc4.*iconv -f cp1251"),
        (RUSSIAN.encode("cp866"), "line 2 is not UTF-8 .*iconv -f cp866"),
        (RUSSIAN.encode() + "кафе,0\n".encode().replace("ф".encode(), b"\xe9"), "line 10 .*correct the text there"),
        (b"", "it is empty"),
        (RUSSIAN.encode() + "в, г,1\n".encode(), "row 5 in line 10 has 3 cells, the header has 2: .*in double quotes"),
        (RUSSIAN.encode() + '"в,1\nг,0\n'.encode(), "line 10 opens a double quote that is never closed"),
        (b"comment,toxic,toxic\na,0,1\n", "it has 2 columns called toxic"),
        (RUSSIAN.encode("utf-16")[:-1], "line 9 is not UTF-16"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(given, tmp_path, content, words):
    (given / "labeled.csv").write_bytes(content)
    with pytest.raises(StepFailed, match=f"labeled.csv is not a CSV file in UTF-8: .*{words}"):
        brought(given, tmp_path)
    assert not (tmp_path / "data" / "raw").exists() and not (tmp_path / "data" / ".raw.new").exists()


def test_a_row_that_was_broken_afterwards_is_named_with_its_line(given, tmp_path):
    rows = brought(given, tmp_path)
    with (tmp_path / "data" / "raw" / "labeled.csv").open("a", encoding="utf-8") as file:
        file.write("в,1\nг, д,1\n")
    config = from_folder(given, workspace=str(tmp_path))
    for read in (schemas.read, lambda source, config: measures.raw(source, config, set())):
        with pytest.raises(StepFailed, match=f"row {rows.height + 2} in line 11 has 3 cells"):
            read(config.data.sources[1], config)


def test_files_are_found_in_whichever_case_and_beside_what_a_mac_leaves(given, tmp_path):
    packed = gzip.compress((given / "labeled.csv").read_bytes())
    (given / "labeled.csv").unlink()
    (given / "._labeled.csv").write_bytes(b"\x00\x05\x16\x07")
    (given / "Labeled.CSV.GZ").write_bytes(packed)
    assert brought(given, tmp_path).height == 4


def test_an_archive_is_found_beside_what_a_mac_leaves(given):
    with zipfile.ZipFile(given / "kaggle.ZIP", "w") as archive:
        archive.writestr("__MACOSX/._more.csv", b"\x00\x05\x16\x07")
        archive.writestr("inner/More.csv", RUSSIAN)
    (given / "._kaggle.ZIP").write_bytes(b"\x00\x05\x16\x07")
    limits = from_folder(given).unpack
    found = sources.find(given, "more.csv", limits)
    archives.unpack(found, "more.csv", given / "out.csv", limits)
    assert found.name == "kaggle.ZIP" and (given / "out.csv").read_text("utf-8") == RUSSIAN


def test_a_spreadsheet_in_place_of_a_file_is_named(given, tmp_path):
    (given / "labeled.csv").unlink()
    with zipfile.ZipFile(given / "labeled.xlsx", "w") as archive:
        archive.writestr("[Content_Types].xml", "")
    with pytest.raises(UsageError, match="has no labeled.csv, .*labeled.xlsx would have to be saved as “CSV UTF-8”"):
        brought(given, tmp_path)
    (given / "labeled.xlsx").rename(given / "labeled.csv")
    with pytest.raises(StepFailed, match="labeled.csv is a spreadsheet in its program's own format"):
        brought(given, tmp_path)


def test_a_file_that_is_written_anew_is_said_to_be(given, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (given / "labeled.csv").write_bytes(RUSSIAN.encode("utf-16"))
    brought(given, tmp_path)
    assert "labeled.csv was not a plain CSV file: it is written anew" in caplog.text
