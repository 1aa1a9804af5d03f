"""Moderators' exports: what they may look like, what is set aside, what stops a run."""

import logging
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
        ("a,1,,,,,,20.11.2026,", "decided_at is '20.11.2026'"),
        pytest.param(f"a,1,,,,,,{FUTURE},", "a moment from 2000 until now", id="in three days"),
        ("a,1,,,,,,1970-01-01,", "decided_at is '1970-01-01', a moment from 2000"),
        ("a,1,,,,,,2026-11-20,de", "language is 'de', en, ru or nothing is expected"),
    ],
)
def test_a_wrong_row_is_set_aside_and_named(folder, caplog, row, words):
    (folder / "typo.csv").write_text(HEADER + row + "\n" + GOOD)
    rows, said = gathered(folder)
    assert rows["row"].to_list() == [2, 3]
    assert len(said) == 1 and said[0].startswith("typo.csv row 1: ") and words in said[0]
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
        (b"", "has no column text|is not a CSV file"),
        (
            b"text,toxic,decided_at\nhello, you,1,2026-11-20\n",
            "row 1 has 4 cells, the header has 3: .*in double quotes",
        ),
        (b'text,toxic,decided_at\n"never closed,1,2026-11-20\n', "is not a CSV file: unexpected end of data"),
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
