"""A row is judged once, whatever its cells hold: what download takes, validate and prepare take."""

import csv
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import config as configuration
from tasks.data import cells, feedback, measures, schemas
from tasks.errors import StepFailed
from tasks.labels import LABELS, TYPES

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
AROUND = st.sampled_from(["", "", "", " ", "\u00a0", "\ufeff", "\x1a", "\u200e", "\u3000", "\n"])
LABEL = st.one_of(
    st.sampled_from(
        ["0", "1", "0.0", "1,0", "+1", "1e0", "TRUE", "ложь", "t", "yes", "nan", "0.5", "2", "-0", "１", ""]
    ),
    st.sampled_from(["0", "1"]),
    st.floats().map(str),
    ANY,
)
PIECES = st.lists(st.sampled_from([*"0123456789-./:, TWZ+", "2026", "11", "20", "UTC", "٢"]), max_size=12).map("".join)
DATE = st.one_of(
    st.dates().map(str),
    st.datetimes(timezones=st.one_of(st.none(), st.timezones())).map(lambda moment: moment.isoformat()),
    st.datetimes().map(lambda moment: f"{moment:%Y%m%dT%H%M%SZ}"),
    st.dates().map(lambda day: f"{day:%d.%m.%Y}"),
    st.dates().map(lambda day: "{}-W{:02}-{}".format(*day.isocalendar())),
    st.floats(30_000, 50_000).map(str),
    st.integers(36_500, 46_400).map(str),
    PIECES,
    ANY,
)
TEXT = st.one_of(st.just("You clown"), ANY)
LANGUAGE = st.sampled_from(["", "", "en", "RU ", "de"])


def around(cell):
    return st.tuples(AROUND, cell, AROUND).map("".join)


EXPORTED = st.lists(
    st.tuples(TEXT, around(LABEL), around(DATE), around(LABEL), LANGUAGE), min_size=1, max_size=12
)  # text, toxic, decided_at, insult, language


def loaded(place: Path, source: str):
    (place / "data" / "raw").mkdir(parents=True)
    knobs = ["profile=demo", f"workspace={place}", f"data.sources=[{{{source}, language: en, max_bad_share: 1}}]"]
    config = configuration.load(knobs)
    return config, config.data.sources[0], place / "data" / "raw" / config.data.sources[0].file


@pytest.fixture(scope="module")
def moderators(tmp_path_factory):
    """(config, source, file in data/raw, an export)"""
    place = tmp_path_factory.mktemp("moderators")
    (place / "exports").mkdir()
    source = f"kind: feedback, name: '{place}/exports', file: feedback.csv, schema: feedback"
    return *loaded(place, source), place / "exports" / "week.csv"


@given(exported=EXPORTED, separator=st.sampled_from(",;\t"), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
@settings(deadline=None, max_examples=60)
def test_what_download_takes_of_moderators_labels_validate_and_prepare_take(moderators, exported, separator, encoding):
    config, source, gathered, export = moderators
    with export.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "toxic", "decided_at", "insult", "language"), *exported])
    said = feedback.gather(source, gathered, config.unpack)
    rows = schemas.read(source, config)
    measured = measures.raw(source, config, {"where"})
    some = [row for row in exported if not all(map(cells.is_blank, row))]
    assert rows.height + len(said) == len(measured) == len(some)
    taken = measured[~measured["set_aside"].astype(bool)]
    assert taken.index.to_list() == rows["row"].to_list()
    assert rows.select("text", "language", "decided_at", "toxic").null_count().row(0) == (0, 0, 0, 0)
    # What the suite asks of rows that were not set aside:
    assert taken["toxic"].isin([0, 1]).all() and (taken["insult"].isna() | taken["insult"].isin([0, 1])).all()
    assert taken["toxic"].to_list() == rows["toxic"].to_list()
    assert (taken["age_days"] >= -1).all() and (taken["text_chars"] > 0).all()


@pytest.fixture(scope="module", params=["null", "0.3"])
def published(tmp_path_factory, request):
    """(config, source, file in data/raw) of a set with the threshold."""
    columns = "{text: text, toxic: toxic, insult: insult}"
    source = f"kind: folder, name: x, file: more.csv, schema: messages, columns: {columns}, threshold: {request.param}"
    return loaded(tmp_path_factory.mktemp("published"), source)


@given(labels=st.lists(st.tuples(around(LABEL), around(LABEL)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=40)
def test_validate_and_prepare_say_the_same_of_a_published_label(published, labels):
    config, source, file = published
    toxic, insult = map(list, zip(*labels))
    pl.DataFrame({"text": ["a"] * len(labels), "toxic": toxic, "insult": insult}).write_csv(file)
    measured = measures.raw(source, config, set())
    passes = measured["toxic"].isin([0, 1]).all() and all(
        (measured[name].isna() | measured[name].isin([0, 1])).all() for name in TYPES
    )
    try:
        rows = schemas.read(source, config)
    except StepFailed as error:
        assert not passes and "more.csv row " in str(error)
    else:
        assert passes
        for name in LABELS:
            assert measured[name].astype("float").fillna(-1).to_list() == rows[name].fill_null(-1).to_list()
