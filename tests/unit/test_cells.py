"""Each form of a label and of a date that docs/data.md names, and what is no label and no date."""

import re
from datetime import datetime, timezone
from pathlib import Path

import polars as pl
import pytest

from tasks.data import cells


@pytest.mark.parametrize(
    "cell, day, time",
    [
        ("2026-11-20", 20, "00:00:00"),
        ("20261120", 20, "00:00:00"),  # eight digits are a date, five are a spreadsheet's
        ("2026-W47-5", 20, "00:00:00"),
        ("2026W475", 20, "00:00:00"),
        ("2026-11-5", 5, "00:00:00"),
        ("2026/11/5", 5, "00:00:00"),
        ("2026.11.05", 5, "00:00:00"),
        ("5.11.2026", 5, "00:00:00"),
        ("20.11.2026 14:05", 20, "14:05:00"),
        ("20.11.2026 9:05", 20, "09:05:00"),
        ("20.11.2026, 14:05:06", 20, "14:05:06"),
        ("2026-11-20T14:05:06.123456789Z", 20, "14:05:06"),
        ("2026-11-20t14:05:06z", 20, "14:05:06"),
        ("2026-11-20 14:05:06,5", 20, "14:05:06"),
        ("20261120T140506Z", 20, "14:05:06"),
        ("2026-11-20T14", 20, "14:00:00"),
        ("2026-11-20 14:05+03", 20, "11:05:00"),
        ("2026-11-20 14:05:06 +0300", 20, "11:05:06"),
        ("2026-11-20 23:05:06-03:00", 21, "02:05:06"),
        ("2026-11-20 14:05:06 UTC", 20, "14:05:06"),
        ("46346", 20, "00:00:00"),
        ("46346.58", 20, "13:55:12"),
        ("46346,5868055556", 20, "14:05:00"),
        ("\u200e20.\u200e11.\u200e2026", 20, "00:00:00"),
        ("2026–11–20", 20, "00:00:00"),
        ("２０２６－１１－２０", 20, "00:00:00"),
        ("٢٠٢٦-١١-٢٠", 20, "00:00:00"),
        ("\ufeff\u00a02026-11-20\u3000\x1a", 20, "00:00:00"),
    ],
)
def test_a_date_is_read(cell, day, time):
    found = cells.moment(cell)
    assert (found.year, found.month, found.day, f"{found:%H:%M:%S}") == (2026, 11, day, time)
    assert found.tzinfo == timezone.utc


@pytest.mark.parametrize(
    "cell, words",
    [
        ("", "an ISO date"),
        ("yesterday", "an ISO date"),
        ("2026-11", "an ISO date"),
        ("2026-11-20-05:00", "an ISO date"),  # a zone, or five o'clock
        ("20261120314", "an ISO date"),
        ("1763647500", "an ISO date"),
        ("20.11.2026" * 10, "an ISO date"),
        ("11/20/2026", "month first or the day"),
        ("20/11/2026 14:05", "month first or the day"),
        ("20-11-2026", "month first or the day"),
        ("5/6/26", "month first or the day"),
        ("20.11.26", "a year of two digits"),
        ("2026-02-30", "no such day or time"),
        ("32.01.2026", "no such day or time"),
        ("2026-W54-1", "no such day or time"),
        ("2026-11-20T24:30", "no such day or time"),
        ("2026-11-20T10:00+25:00", "no such day or time"),
        ("0001-01-01T00:00:00+03:00", "from 2000 until now"),
        ("9999-12-31T23:59:59-03:00", "from 2000 until now"),
        ("36525", "from 2000 until now"),
        ("99999,99", "from 2000 until now"),
        ("1999-12-31T23:59:59Z", "from 2000 until now"),
    ],
)
def test_what_is_no_date_says_what_is_expected(cell, words):
    with pytest.raises(ValueError, match=words):
        cells.moment(cell)


def documented(after, until):
    """The cells that docs/data.md shows in a table: the code in its first column."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    rows = [line for line in page.split(after)[1].split(until)[0].splitlines() if line.startswith("| `")]
    return [cell for row in rows for cell in re.findall("`([^`]+)`", row.split(" | ")[0]) if "…" not in cell]


def test_every_date_and_label_that_the_page_shows_is_read():
    dates = documented("A date, in UTC", "A row is set aside")
    assert len(dates) > 15 and {cells.moment(cell).year for cell in dates} == {2026}
    labels = documented("A label:", "| nothing")
    assert len(labels) > 10 and {cells.number(cell) for cell in labels} == {0, 1}


LABELS = {
    1: ["1", "1.0", "1,0", "1.", "+1", "1e0", "TRUE", "True", "ИСТИНА", "t", " 1", "1\u00a0", "\u200b1", "１", "1\x1a"],
    0: ["0", "0.0 ", "0,00", "-0", "FALSE", "ложь", "f", "٠"],
    None: [
        "",
        " ",
        "2",
        "0.5",
        "-1",
        "nan",
        "inf",
        "1e999",
        "yes",
        "да",
        "1_0",
        "0x1",
        "1 0",
        "1.00000001",
        "½",
        "1" * 99,
    ],
}


@pytest.mark.parametrize("label, cell", [(label, cell) for label, given in LABELS.items() for cell in given])
def test_a_label_is_read_alike_alone_and_by_the_million(label, cell):
    number = cells.number(cell)
    assert (number if number in (0, 1) else None) == label
    frame = pl.DataFrame({"cell": [cell, None, cell]})
    assert frame.select(cells.labels(pl.col("cell"))).to_series().to_list() == [label, None, label]


def test_a_share_is_a_label_from_the_threshold_on():
    given = ["0.3", "0,29999", "1.0", "TRUE", "0", "1.01", "-0.1", "nan", "", None]
    found = pl.DataFrame({"cell": given}).select(cells.labels(pl.col("cell"), 0.3)).to_series()
    assert found.to_list() == [1, 0, 1, 1, 0, None, None, None, None, None]


def test_no_cells_have_no_labels():
    nothing = pl.DataFrame({"cell": [None, None]}, {"cell": pl.String})
    assert nothing.select(cells.labels(pl.col("cell"))).to_series().to_list() == [None, None]
    assert nothing.clear().select(cells.moments(pl.col("cell"))).to_series().dtype == pl.Datetime("us", "UTC")


def test_moments_by_the_million():
    found = pl.DataFrame({"cell": ["20.11.2026", "?", None]}).select(cells.moments(pl.col("cell"))).to_series()
    assert found.to_list() == [datetime(2026, 11, 20, tzinfo=timezone.utc), None, None]
