"""Moderators' exports: what they may look like, what is set aside, what stops a run."""

import gzip
import logging
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from raw_data import SMALL

from tasks import config as configuration
from tasks.data import download, schemas, sources
from tasks.errors import StepFailed
from tasks.labels import LABELS
from tasks.step import execute

HEADER = "text,toxic,severe_toxic,obscene,threat,insult,identity_hate,decided_at,language\n"
GOOD = "You clown,1,0,0,0,1,,2026-11-20T10:00:00+03:00,en\nДобрый день,0,,,,,,2026-11-21,ru\n"
SOURCE = "{kind: feedback, name: %s, file: feedback.csv, schema: feedback, language: en%s}"


@pytest.fixture
def folder(workspace):
    (workspace / "feedback").mkdir()
    return workspace / "feedback"


def config_of(folder, **knobs):
    more = "".join(f", {key}: {value}" for key, value in knobs.items())
    return configuration.load([*SMALL, f"data.sources=[{SOURCE % (folder, more)}]"])


def gathered(folder, **knobs):
    """(the rows that count, the sentences about those that do not)."""
    config = config_of(folder, **knobs)
    (source,) = config.data.sources
    raw = config.workspace / "data" / "raw"
    raw.mkdir(parents=True)
    said = sources.fetch(source, config, raw, raw / "incoming")
    return schemas.read(source, config), said


def test_rows_come_in_the_projects_columns(folder):
    (folder / "week-47.csv").write_text(HEADER + GOOD)
    rows, said = gathered(folder)
    assert said == []
    assert rows.columns == ["row", "text", "language", "source", "decided_at", *LABELS]
    assert rows["decided_at"].to_list() == [
        datetime(2026, 11, 20, 7, tzinfo=timezone.utc),
        datetime(2026, 11, 21, tzinfo=timezone.utc),
    ]
    assert rows["language"].to_list() == ["en", "ru"]
    # A cell left empty is unknown; but what is not toxic has no type.
    assert rows.select(LABELS).rows() == [(1, 0, 0, 0, 1, None), (0, 0, 0, 0, 0, 0)]


def test_the_three_columns_are_enough_and_others_are_passed_over(folder):
    (folder / "short.csv").write_text("decided_at,moderator,text,toxic\n2026-11-20,anna,Idiot,1\n")
    rows, _ = gathered(folder)
    assert rows.select("text", "language", *LABELS).rows() == [("Idiot", "en", 1, None, None, None, None, None)]


def test_a_spreadsheets_own_csv_will_do(folder):
    text = 'text;toxic;decided_at\r\n"a; b, ""c""\nd";1;2026-11-20 10:00:00\r\n'
    (folder / "excel.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows, _ = gathered(folder)
    assert rows["text"].to_list() == ['a; b, "c"\nd']


def test_files_are_joined_by_name_so_that_the_same_exports_give_the_same_file(folder, workspace):
    for name, text in {"b": "second", "a": "first"}.items():
        (folder / f"{name}.csv").write_text(f"text,toxic,decided_at\n{text},0,2026-11-20\n")
    rows, _ = gathered(folder)
    assert rows["text"].to_list() == ["first", "second"]
    raw = (workspace / "data" / "raw" / "feedback.csv").read_text()
    assert raw.splitlines()[1].startswith("a.csv row 1,first,0")


@pytest.mark.parametrize("name", ["feedback", "not-made-yet"])
def test_the_first_weeks_have_no_feedback_and_go_on_without(folder, workspace, caplog, name):
    caplog.set_level(logging.INFO)
    rows, said = gathered(workspace / name)
    assert (rows.height, said) == (0, []) and rows.columns[1:5] == ["text", "language", "source", "decided_at"]
    assert f"no feedback yet: {workspace / name} has no CSV file; moderators' exports go there" in caplog.text


FUTURE = (datetime.now(timezone.utc) + timedelta(days=3)).isoformat()


@pytest.mark.parametrize(
    "row, words",
    [
        (" ,1,,,,,,2026-11-20,", "text is empty"),
        ("a,maybe,,,,,,2026-11-20,", "toxic is 'maybe', 0 or 1 is expected"),
        ("a,,,,,,,2026-11-20,", "toxic is '', 0 or 1 is expected"),
        ("a,0.5,,,,,,2026-11-20,", "toxic is '0.5', 0 or 1"),
        ("a,1,,2,,,,2026-11-20,", "obscene is '2', 0, 1 or nothing is expected"),
        ("a,0,,,,1,,2026-11-20,", "insult is 1 and toxic is 0: a message with a type is toxic"),
        ("a,1,,,,,,yesterday,", "decided_at is 'yesterday', an ISO date such as 2026-11-23T14:05:00Z"),
        ("a,1,,,,,,11/20/2026,", "decided_at is '11/20/2026', which may be read with the month first or the day"),
        ("a,1,,,,,,20.11.26,", "decided_at is '20.11.26', a year of two digits"),
        ("a,1,,,,,,30.02.2026,", "decided_at is '30.02.2026', there is no such day"),
        ("a,1,,,,,,0001-01-01T00:00:00+03:00,", "decided_at is '0001-01-01T00:00:00.03:00', a moment from 2000"),
        ("a,1,,,,,,9999-12-31T23:00:00-03:00,", "decided_at is '9999-12-31T23:00:00-03:00', a moment from 2000"),
        ("a,1,,,,,,1763647500,", "decided_at is '1763647500', an ISO date"),
        ("&nbsp;\u200b,1,,,,,,2026-11-20,", "text is empty"),
        ("a,yes,,,,,,2026-11-20,", "toxic is 'yes', 0 or 1 is expected"),
        ("a,nan,,,,,,2026-11-20,", "toxic is 'nan', 0 or 1 is expected"),
        ("hello, you,1,,,,,,2026-11-20,en", "line 2 has 10 cells, the header has 9: .*in double quotes"),
        ("a,1", "decided_at is '', an ISO date"),
        pytest.param(f"a,1,,,,,,{FUTURE},", "a moment from 2000 until now", id="in three days"),
        ("a,1,,,,,,1970-01-01,", "decided_at is '1970-01-01', a moment from 2000"),
        ("a,1,,,,,,2026-11-20,de", "language is 'de', en, ru or nothing is expected"),
    ],
)
def test_a_wrong_row_is_set_aside_and_named(folder, caplog, row, words):
    (folder / "typo.csv").write_text(HEADER + row + "\n" + GOOD)
    rows, said = gathered(folder)
    assert rows["row"].to_list() == [2, 3]
    assert len(said) == 1 and re.match(f"typo.csv row 1: .*{words}", said[0])
    assert f"set aside: {said[0]}" in caplog.text


def test_too_many_wrong_rows_stop_the_run(folder):
    (folder / "shifted.csv").write_text(HEADER + "a,?,,,,,,2026-11-20,\n" * 3 + GOOD * 10)
    assert len(gathered(folder, max_bad_rows=3, max_bad_share=0.01)[1]) == 3


@pytest.mark.parametrize("knobs, stops", [({"max_bad_share": 0.2}, False), ({"max_bad_share": 0.1}, True)])
def test_a_share_of_wrong_rows_is_allowed(folder, knobs, stops):
    (folder / "shifted.csv").write_text(HEADER + "a,?,,,,,,2026-11-20,\n" * 3 + GOOD * 10)
    if stops:
        message = (
            "3 of 23 rows .* max_bad_rows 2 and max_bad_share 0.1; the first: shifted.csv row 1: toxic is '.'.*Correct"
        )
        with pytest.raises(StepFailed, match=message):
            gathered(folder, max_bad_rows=2, **knobs)
    else:
        assert len(gathered(folder, max_bad_rows=2, **knobs)[1]) == 3


@pytest.mark.parametrize(
    "content, words",
    [
        (
            HEADER.encode() + "привет,0,,,,,,2026-11-20,ru\n".encode("cp1251"),
            "line 2 is not UTF-8 .byte 0xef.*CSV UTF-8",
        ),
        (
            b"text,toxic\na,1\n",
            "has no column decided_at: its header is 'text,toxic'. Required are text, toxic, decided",
        ),
        (b"", "is not a CSV file that can be read: it is empty"),
        (b"\xef\xbb\xbf\r\n,,\r\n", "it is empty"),
        (
            b'text,toxic,decided_at\n"a\nb",0,2026-11-20\n"never closed,1,2026-11-20\n',
            "line 4 opens a double quote that is never closed",
        ),
        (b'text,toxic,decided_at\na,0,2026-11-20\n"so" he said,1,2026-11-20\n', "line 3 has text behind a closing"),
        (b"text,toxic,toxic,decided_at\na,0,1,2026-11-20\n", "it has 2 columns called toxic: which one is meant"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xb0\xff", "it is no text at all"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a spreadsheet in its program's own format.*CSV UTF-8"),
        ("text,toxic,decided_at\nпривет,0,2026".encode("utf-16")[:-1], "line 2 is not UTF-16.*export it again"),
        ("text,toxic,decided_at\nпривет".encode()[:-1], "line 2 .*ends in the middle of a character"),
    ],
)
def test_a_file_of_which_nothing_can_be_said_stops_the_run(folder, content, words):
    (folder / "broken.csv").write_bytes(content)
    with pytest.raises(StepFailed, match=f"broken.csv .*{words}"):
        gathered(folder)


def test_the_step_counts_what_it_set_aside_and_keeps_the_last_copy_when_it_stops(folder, workspace):
    overrides = [*SMALL, f"data.sources=[{SOURCE % (folder, '')}]"]
    (folder / "a.csv").write_text(HEADER + GOOD + "a,?,,,,,,2026-11-20,\n")
    result = execute("download", download.run, overrides)
    assert (result["rows"], result["set_aside"]) == ({"feedback.csv": 3}, {"feedback.csv": 1})
    before = (workspace / "data" / "raw" / "feedback.csv").read_bytes()
    (folder / "b.csv").write_text("text,label\n")
    with pytest.raises(StepFailed, match="b.csv has no column toxic, decided_at"):
        execute("download", download.run, overrides)
    assert (workspace / "data" / "raw" / "feedback.csv").read_bytes() == before


def test_the_readmes_example_is_what_it_says(folder):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (folder / "example.csv").write_text(readme.split("```csv\n")[1].split("```")[0])
    rows, said = gathered(folder)
    assert (rows.height, said) == (3, [])
    assert set(rows["language"]) == {"en", "ru"} and rows["insult"].to_list() == [1, 0, 0]


def export(*rows):
    return "\n".join(["text,toxic,decided_at", *rows]) + "\n"


def test_a_date_is_judged_once_in_whichever_form_it_comes(folder):
    """What download takes, prepare reads; validate is asked in test_rows_properties.py."""
    days = ["2026-11-20", "2026-W47-5", "20261120T140500Z", "20261120", "46346", '"46346,58"', "20.11.2026 9:05"]
    days += [
        "\u00a02026-11-20\u202f",
        "2026/11/20",
        "2026-11-20 12:05:00 UTC",
        '"20.11.2026, 14:05:00"',
        "２０２６-11-20",
    ]
    (folder / "week-47.csv").write_text(export(*(f"message {k},0,{day}" for k, day in enumerate(days))), "utf-8")
    rows, said = gathered(folder)
    assert said == [] and rows["decided_at"].dt.date().cast(str).to_list() == ["2026-11-20"] * len(days)


def test_a_label_is_what_spreadsheets_and_databases_write_for_it(folder):
    ones, zeros = ["1", "1.0", '"1,0"', "TRUE", "истина", " 1\u00a0", "+1", "1e0", "t"], ["0.0 ", "ЛОЖЬ", "false", "-0"]
    rows = [f"message {cell},{cell},2026-11-20".replace('message "', '"message ') for cell in ones + zeros]
    (folder / "week-47.csv").write_text(export(*rows).replace('"message 1,0"', "message"), "utf-8")
    rows, said = gathered(folder)
    assert said == [] and rows["toxic"].to_list() == [1] * len(ones) + [0] * len(zeros)


def test_a_message_of_any_length_is_used(folder):
    (folder / "week-47.csv").write_text(export("a,0,2026-11-20", f'"{"turnip " * 22858}",1,2026-11-21'))
    rows, said = gathered(folder)
    assert said == [] and rows["text"].str.len_chars().to_list() == [1, 160006]


LEFT_BEHIND = {
    "empty rows": export("a,0,2026-11-20", ",,", " ,\u00a0,", "", "b,1,2026-11-21", *[",,"] * 40),
    "an end as DOS writes it": export("a,0,2026-11-20", "b,1,2026-11-21") + "\x1a",
    "an end as DOS writes it, in the last cell": export("a,0,2026-11-20", "b,1,2026-11-21\x1a"),
    "the separator's own line": "sep=;\r\n" + export("a,0,2026-11-20", "b,1,2026-11-21").replace(",", ";"),
    "a separator of one's own": '"sep=|"\n' + export("a,0,2026-11-20", "b,1,2026-11-21").replace(",", "|"),
    "separators at the end": "text;toxic;decided_at;\na;0;2026-11-20;;\nb;1;2026-11-21;\n",
    "a header in other words": '"Text ";TOXIC ;Decided at\na;0;2026-11-20\nb;1;2026-11-21\n',
    "a column that is named twice, once exactly": "text,Toxic,toxic,decided_at\na,9,0,2026-11-20\nb,9,1,2026-11-21\n",
    "lines of an old Mac": export("a,0,2026-11-20", "b,1,2026-11-21").replace("\n", "\r"),
    "a NUL": export("a,0,2026-11-20", "b,1,2026-11-21\x00"),
    "empty rows before the header": ",,\n\n" + export("a,0,2026-11-20", "b,1,2026-11-21"),
}


@pytest.mark.parametrize("content", LEFT_BEHIND.values(), ids=LEFT_BEHIND)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_what_spreadsheets_and_editors_leave_behind_is_read(folder, content, encoding):
    (folder / "week-47.csv").write_bytes(content.encode(encoding))
    rows, said = gathered(folder)
    assert said == [] and rows.select("text", "toxic").rows() == [("a", 0), ("b", 1)]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_an_encoding_is_known_by_its_zero_bytes(folder, encoding):
    (folder / "week-47.csv").write_bytes(export("Привет,0,2026-11-20").encode(encoding))
    assert gathered(folder)[0]["text"].to_list() == ["Привет"]


def test_a_row_is_named_by_its_place_in_the_spreadsheet(folder):
    (folder / "week-47.csv").write_text(export("a,0,2026-11-20", ",,", "", "b,?,2026-11-21"))
    _, (said,) = gathered(folder)
    assert said.startswith("week-47.csv row 4: toxic is '?'")


def test_what_lies_beside_the_exports_is_named_and_passed_over(folder, caplog):
    caplog.set_level(logging.INFO)
    good = export("a,0,2026-11-20").encode()
    (folder / "WEEK-46.CSV").write_bytes(good)
    (folder / "week-47.csv.gz").write_bytes(gzip.compress(good))
    (folder / "week-48.tsv").write_bytes(good.replace(b",", b"\t"))
    (folder.parent / "elsewhere").write_bytes(good)
    (folder / "week-49.csv").symlink_to(folder.parent / "elsewhere")
    for name in ("._week-47.csv", "~$week-47.csv", ".~lock.week-47.csv#", "Thumbs.db", "desktop.ini", "week-50.xlsx"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07\xb0\xff")
    (folder / "week-51.csv.crdownload").write_bytes(good)
    (folder / "older.csv").mkdir()
    rows, said = gathered(folder)
    assert (rows.height, said) == (4, [])
    for path in folder.iterdir():
        assert path.suffix.lower() in (".csv", ".gz", ".tsv") or f"passed over: {path}" in caplog.text
    assert f"passed over: {folder}/older.csv is no file" in caplog.text
    assert "week-50.xlsx is a spreadsheet: save it as “CSV UTF-8”" in caplog.text


def test_an_export_that_is_not_there_or_a_bomb_stops_the_run(folder):
    (folder / "week-47.csv").symlink_to(folder / "gone.csv")
    with pytest.raises(StepFailed, match="week-47.csv is a link to .*gone.csv, which is not there"):
        gathered(folder)
    (folder / "week-47.csv").unlink()
    (folder / "week-47.csv.gz").write_bytes(gzip.compress(bytes(5 << 20)))
    (folder.parent / "data" / "raw").rmdir()
    with pytest.raises(StepFailed, match="week-47.csv.gz unpacks to more than .* unpack.max_ratio"):
        gathered(folder)
    assert list((folder.parent / "data" / "raw").iterdir()) == []


def test_a_folder_of_feedback_that_is_a_file_is_no_week_without_feedback(workspace):
    (workspace / "feedback").write_text(export("a,0,2026-11-20"))
    with pytest.raises(StepFailed, match="feedback cannot be read as the folder of feedback: Not a directory"):
        gathered(workspace / "feedback")


def test_what_an_older_version_has_written_is_read_and_judged_as_download_does_now(folder, workspace, caplog):
    gathered(folder)
    header = "where,text,toxic,decided_at,severe_toxic,obscene,threat,insult,identity_hate,language,problem\n"
    good, odd = "a.csv row 1,You clown,1,2026-11-20T10:00:00+03:00,,,,1,,,", "a.csv row 2,a,0,2026-11-20x14:05,,,,,,,"
    (workspace / "data" / "raw" / "feedback.csv").write_text(f"{header}{good}\n{odd}\n")
    config = config_of(folder)
    rows = schemas.read(config.data.sources[0], config)
    assert rows.select("row", "toxic", "insult").rows() == [(1, 1, 1)]
    assert "set aside: a.csv row 2: decided_at is '2026-11-20x14:05'" in caplog.text
