"""Cleaning, merging, sampling and splitting of messages."""

import polars as pl
import pytest

from tasks import config as configuration
from tasks.data import prepare
from tasks.labels import LABELS


def rows(*given, language="en"):
    """Rows of (text, toxic) or (text, toxic, insult), in the project's columns."""
    made = [
        [text, language, "file.csv", toxic, None, None, None, *(rest or [None]), None] for text, toxic, *rest in given
    ]
    schema = {"text": pl.String, "language": pl.String, "source": pl.String} | dict.fromkeys(LABELS, pl.Int8)
    return pl.DataFrame(made, schema, orient="row")


def unique(*given):
    return prepare.deduplicated(prepare.without_conflicts(rows(*given)))


@pytest.fixture(scope="module")
def many():
    """2000 messages: half of them English, a tenth of those toxic; a third of the Russian ones."""
    english = rows(*((f"message {k}", int(k % 10 == 0)) for k in range(1000)))
    russian = rows(*((f"сообщение {k}", int(k % 3 == 0)) for k in range(1000)), language="ru")
    return prepare.deduplicated(prepare.without_conflicts(pl.concat([english, russian])))


def data(**values):
    config = configuration.load(["profile=demo", *(f"data.{key}={value}" for key, value in values.items())])
    return config.data


def test_cleaned_cuts_and_drops_empty_texts():
    given = rows(("<br>Hi &amp; bye\r\n", 0), ("  \n ", 0), ("<b></b>", 1), ("a" * 50, 0))
    assert prepare.cleaned(given, max_chars=8)["text"].to_list() == ["Hi & bye", "a" * 8]


def test_copies_become_one_message_whatever_their_case():
    assert unique(("You Fool", 1), ("you fool", 1), ("other", 0))["text"].to_list() == ["You Fool", "other"]


def test_conflicting_copies_go_with_the_majority_and_a_tie_drops_them():
    found = unique(("a", 1), ("A", 1), ("a", 0), ("b", 0), ("b", 1), ("c", 0))
    assert dict(found.select("text", "toxic").rows()) == {"a": 1, "c": 0}


def test_a_type_comes_from_the_copies_that_know_it():
    found = unique(("a", 1), ("a", 1, 1), ("b", 1), ("c", 1, 0))
    assert dict(found.select("text", "insult").rows()) == {"a": 1, "b": None, "c": 0}


def test_an_outvoted_copy_has_no_say_in_the_types():
    assert unique(("a", 0, 0), ("a", 0, 0), ("a", 1, 1))["insult"].to_list() == [0]


def test_ids_depend_on_the_message_alone():
    first, second = unique(("a", 1), ("b", 0)), unique(("c", 0), ("B", 1), ("a", 1))
    assert first["id"].to_list() == [second.filter(text="a")["id"][0], second.filter(text="B")["id"][0]]
    assert first["id"].str.contains("^[0-9a-f]{12}$").all()


def test_nothing_is_sampled_away_below_the_limit(many):
    assert prepare.sampled(many, data(max_samples=2000, toxic_share=0.35), seed=1).equals(many)


def test_sampling_keeps_languages_and_raises_the_english_toxic_share(many):
    natural = prepare.sampled(many, data(max_samples=400), seed=1)
    assert natural["language"].value_counts(sort=True)["count"].to_list() == [200, 200]
    assert natural.filter(language="en")["toxic"].mean() == pytest.approx(0.1)
    raised = prepare.sampled(many, data(max_samples=400, toxic_share=0.35), seed=1)
    assert raised.filter(language="en")["toxic"].mean() == pytest.approx(0.35)
    assert raised.filter(language="ru")["toxic"].mean() == pytest.approx(1 / 3, abs=0.01)
    beyond = prepare.sampled(many, data(max_samples=400, toxic_share=0.9), seed=1)
    assert beyond.filter(language="en", toxic=1).height == 100  # all there are


def test_sampling_goes_by_the_seed(many):
    kept = [set(prepare.sampled(many, data(max_samples=400), seed)["id"]) for seed in (1, 1, 2)]
    assert kept[0] == kept[1] != kept[2]


def test_splits_are_disjoint_complete_and_alike(many):
    splits = prepare.split(many, data(), seed=1)
    assert sorted(pl.concat(splits.values())["id"]) == sorted(many["id"])
    for name, share in (("train", 0.70), ("val", 0.15), ("test", 0.15)):
        for language, toxic_share in (("en", 0.1), ("ru", 1 / 3)):
            part = splits[name].filter(language=language)
            assert part.height / 1000 == pytest.approx(share, abs=0.04)
            assert part["toxic"].mean() == pytest.approx(toxic_share, abs=0.07)


def test_a_message_stays_in_its_split_when_others_come_and_go(many):
    before, after = (
        prepare.split(rows, data(), seed=1) for rows in (many, many.filter(pl.int_range(pl.len()) % 3 > 0))
    )
    for name in prepare.SPLITS:
        assert set(after[name]["id"]) <= set(before[name]["id"])


def test_splitting_is_independent_of_sampling(many):
    """The same hash for both would put all that was kept into train."""
    splits = prepare.split(prepare.sampled(many, data(max_samples=400), seed=1), data(), seed=1)
    assert all(splits[name].height > 30 for name in prepare.SPLITS)
