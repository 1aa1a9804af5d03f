"""Cleaning, merging, sampling and near duplicates."""

from datetime import datetime, timezone

import polars as pl
import pytest

from tasks import config as configuration
from tasks.data import duplicates, messages, prepare, sampling, split_key
from tasks.labels import LABELS, TYPES
from tasks.text import clean


def rows(*given, language="en"):
    """Rows of (text, toxic[, insult[, day of decision]]), as `prepare.read` has them."""
    made = []
    for number, (text, toxic, *rest) in enumerate(given, 1):
        insult, day = (*rest, None, None)[:2]
        decided_at = day and datetime(2026, 11, day, tzinfo=timezone.utc)
        made.append([number, text, language, "file.csv", decided_at, toxic, None, None, None, insult, None])
    schema = {"row": pl.UInt32, "text": pl.String, "language": pl.String, "source": pl.String}
    schema |= {"decided_at": pl.Datetime("us", "UTC")} | dict.fromkeys(LABELS, pl.Int8)
    return pl.DataFrame(made, schema, orient="row").with_columns(hash=messages.hashed(messages.key(pl.col("text"))))


def merged(*given):
    """What is kept, as {text: toxic}, and how many rows went for which reason."""
    kept, gone = duplicates.merged(rows(*given))
    return dict(kept.select("text", "toxic").rows()), {name: g.height for name, g in gone.items() if g.height}


def insults(*given):
    return dict(duplicates.merged(rows(*given))[0].select("text", "insult").rows())


@pytest.fixture(scope="module")
def many():
    """2000 messages: half of them English, a tenth of those toxic and a few threats; a third of the Russian ones."""
    english = rows(*((f"message {k}", int(k % 10 == 0)) for k in range(1000)))
    english = english.with_columns(
        insult=(pl.col("row") % 20 == 1).cast(pl.Int8), threat=(pl.col("row") % 200 == 1).cast(pl.Int8)
    )
    russian = rows(*((f"сообщение {k}", int(k % 3 == 0)) for k in range(1000)), language="ru")
    return pl.concat([english, russian])


def data(max_samples=40_000, **values):
    config = configuration.load(["profile=demo", *(f"data.{key}={value}" for key, value in values.items())])
    return config.data.model_copy(update={"max_samples": max_samples})  # fewer than data.min_rows, too


def kept(frame, **values):
    return frame.filter(sampling.sampled(frame, data(**values)))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Hi &amp; bye\r\n", "Hi & bye"),
        ("&amp;amp;quot;Hi&amp;amp;quot;", '"Hi"'),
        ("a\x00b\x1bc\x85d", "a b c d"),
        ("id\u200biot\u00ad", "idiot"),
        ("cafe\u0301", "café"),
        ("<you clown>", "<you clown>"),
        ("1 < 2 & 3 > 2", "1 < 2 & 3 > 2"),
        ("🤷\u200d♂️", "🤷\u200d♂️"),
        ("lone \ud800", "lone"),
    ],
)
def test_only_what_harms_is_cleaned_away(text, expected):
    assert clean(text) == expected == clean(expected)


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("You  FOOL!!!", "you fool", True),
        ("well-known", "Well known.", True),
        ("f**k you", "f you", False),
        ("love you 🖕", "love you ❤", False),
        ("?!", "!", False),
        ("ёлка", "Ёлка…", True),
    ],
)
def test_copies_differ_in_case_and_punctuation_alone(one, other, same):
    keys = pl.DataFrame({"text": [clean(one), clean(other)]}).select(messages.key(pl.col("text")))["text"]
    assert (keys[0] == keys[1]) is same


def test_hashes_are_those_of_every_machine_and_version():
    """If these change, every split is shuffled anew, and no two versions can be compared."""
    frame = pl.DataFrame({"text": ["you fool", "ты дурак", ""]}).with_columns(hash=messages.hashed(pl.col("text")))
    assert prepare.ids(frame["hash"]).to_list() == ["9dacf7f9f03c925e", "49faed32628aaa18", "ef46db3751d8e999"]
    places = frame.select(messages.place(pl.col("hash"), "salt", "split").round(6))
    assert places.to_series().to_list() == [0.688041, 0.194798, 0.644409]


def test_a_message_keeps_its_name_however_cleaning_learns_to_read_it():
    """These are the names that the first release gave: with others, messages would move between train and test."""
    texts = {
        "You are a clown.": "855ce51c90edf718",
        "Yоu аrе а cl\u200dоwn.": "c63de0acfea308a5",
        "ｃｌｏｗｎ &amp;amp; co": "9098b8dd9e5c4059",
        "Hello" + "\u0301\u0316" * 600: "8dfa993e46d077cc",
        "e\u0301\u200b café \x00 x": "54f75816e7f695de",
        "\u200d": "32284c42ecff2f8e",
    }
    frame = pl.DataFrame({"text": list(texts)}).select(hash=split_key.hashed(pl.col("text"), 5000))
    assert prepare.ids(frame["hash"]).to_list() == list(texts.values())


def test_copies_that_only_cleaning_shows_are_merged_inside_their_split():
    splits = {
        "train": rows(("you clown", 1), ("you cl\u200down", 1), ("thanks", 0), ("hello", 0), ("hellо", 1)),
        "val": rows(("thаnks", 0), ("welcome", 0)),
        "test": rows(("ｗelcome", 0), ("good day", 0)),
    }
    splits = {name: prepare.cleaned(frame, data()) for name, frame in splits.items()}
    kept, gone = prepare.without_disguised_copies(splits)
    assert {name: frame["text"].to_list() for name, frame in kept.items()} == {
        "train": ["you clown"],
        "val": ["thanks"],
        "test": ["welcome", "good day"],
    }
    assert gone["text"].sort().to_list() == ["hello", "hello", "thanks", "welcome", "you clown"]
    assert kept["test"]["original"].to_list() == ["ｗelcome", None] and kept["val"]["original"].to_list() == ["thаnks"]


def test_copies_become_one_message():
    assert merged(("You Fool", 1), ("you fool!", 1), ("other", 0)) == (
        {"other": 0, "You Fool": 1},
        {"duplicate": 1},
    )


def test_copies_that_contradict_each_other_all_go():
    assert merged(("a", 1), ("A", 1), ("a", 0), ("b", 0)) == ({"b": 0}, {"conflicting": 3})


def test_the_newest_decision_outweighs_older_and_undated_copies():
    given = [("a", 0), ("a", 0), ("a", 0, None, 2), ("A", 1, None, 9)]
    assert merged(*given) == ({"A": 1}, {"overruled": 3})
    assert merged(("a", 1), ("a", 1, None, 2)) == ({"a": 1}, {"duplicate": 1})


def test_two_newest_decisions_that_disagree_decide_nothing():
    assert merged(("a", 0, None, 9), ("a", 1, None, 9), ("a", 1)) == ({}, {"conflicting": 3})


def test_a_type_comes_from_the_copies_that_know_it():
    assert insults(("a", 1), ("a", 1, 1), ("b", 1), ("c", 1, 0)) == {"a": 1, "b": None, "c": 0}
    assert insults(("a", 1, 0), ("a", 1, 0), ("a", 1, 1)) == {"a": 0}


def test_a_decision_knows_the_types_better_and_an_overruled_copy_has_no_say():
    assert insults(("a", 1, 1), ("a", 1, 1), ("a", 1, 0, 9)) == {"a": 0}
    assert insults(("a", 1, 1), ("a", 1, None, 9)) == {"a": 1}
    assert insults(("a", 1, 1), ("a", 0, None, 9)) == {"a": None}


def test_nothing_is_sampled_away_below_the_limit(many):
    assert kept(many, max_samples=2000, toxic_share=0.35).equals(many)


def test_sampling_keeps_languages_and_raises_the_english_toxic_share(many):
    natural = kept(many, max_samples=400)
    assert natural["language"].value_counts(sort=True)["count"].to_list() == [200, 200]
    assert natural.filter(language="en")["toxic"].mean() == pytest.approx(0.1)
    raised = kept(many, max_samples=400, toxic_share=0.35)
    assert raised.filter(language="en")["toxic"].mean() == pytest.approx(0.35)
    assert raised.filter(language="ru")["toxic"].mean() == pytest.approx(1 / 3, abs=0.01)
    assert kept(many, max_samples=400, toxic_share=0.9).filter(language="en", toxic=1).height == 100  # all there are


@pytest.mark.parametrize(
    "rows, least, budgets",
    [
        ({"en": 223_549, "ru": 14_412}, 0.25, {"en": 30_000, "ru": 10_000}),  # the two published sets
        ({"en": 223_549, "ru": 14_412}, 0, {"en": 37_578, "ru": 2_422}),
        ({"en": 2_125_743, "ru": 14_412}, 0.5, {"en": 25_588, "ru": 14_412}),  # all that there is
        ({"en": 60_000, "ru": 40_000}, 0.25, {"en": 24_000, "ru": 16_000}),  # more than its floor as it is
        ({"en": 100_000}, 0.25, {"en": 40_000}),
    ],
)
def test_a_small_language_keeps_its_floor_and_the_other_makes_room(rows, least, budgets):
    assert sampling.language_budgets(rows, data(max_samples=40_000, min_language_share=least)) == budgets


def test_a_language_on_its_floor_keeps_its_own_toxic_share(many):
    few = pl.concat([many.filter(language="en"), many.filter(language="ru").head(150)])
    found = kept(few, max_samples=400)
    assert found["language"].value_counts().sort("language").rows() == [("en", 300), ("ru", 100)]
    assert found.filter(language="ru")["toxic"].mean() == pytest.approx(1 / 3, abs=0.01)
    assert found.filter(language="en", threat=1).height >= 5 * 300 / 1000


@pytest.mark.parametrize("limit", [100, 400, 1000])
def test_a_rare_type_keeps_its_share(many, limit):
    found = kept(many, max_samples=limit)
    assert found.height <= limit
    for name in ("threat", "insult"):
        assert found[name].sum() >= many[name].sum() * limit / many.height


def test_a_smaller_sample_is_part_of_a_larger_one(many):
    small, large = (set(kept(many, max_samples=limit)["hash"]) for limit in (400, 800))
    assert small < large


def test_splitting_is_independent_of_sampling(many):
    """The same hash for both would put all that was kept into train."""
    splits = sampling.split(kept(many, max_samples=400), data())
    assert all(splits[name].height > 30 for name in sampling.SPLITS)


def test_a_near_copy_is_found_and_named_with_how_near_it_is():
    train = rows(
        ("Please do not vandalize pages as you did with this edit to El Salvador", 0),
        ("I will be at the meeting on Thursday with the report", 0),
        ("thanks", 0),
    )
    test = rows(("Please do not vandalize pages, as you did with this edit to Wyatt Earp!", 0), ("thanks a lot", 0))
    found = duplicates.near(train, test, threshold=0.7)
    assert found.select("hash", "other").rows() == [(train["hash"][0], test["hash"][0])]
    assert found["similarity"][0] == pytest.approx(23 / 31)  # 12 words and 11 pairs of 14 and 13 are the same
    assert duplicates.near(train, test, threshold=0.9).is_empty()
    assert duplicates.near(train, test.clear(), threshold=0.7).is_empty()


def test_a_training_message_that_is_nearly_one_of_the_test_split_goes():
    near = "the very same message was sent to every one of us last night number {}"
    splits = {
        "train": rows((near.format(1), 0), ("another", 0)),
        "val": rows(("third", 0)),
        "test": rows((near.format(2), 0)),
    }
    train, gone = prepare.without_near_duplicates(splits, data())
    assert train["text"].to_list() == ["another"]
    assert gone.select("text", "other_text", "split").rows() == [(near.format(1), near.format(2), "test")]
    untouched, none = prepare.without_near_duplicates(splits, data(near_duplicate="null"))
    assert (untouched.height, none.height) == (2, 0)


def test_the_types_of_a_language_without_any_are_no_stratum(many):
    rarest = many.select("language", rarest=sampling.rarest_type(many))
    assert set(rarest.filter(language="ru")["rarest"]) == {"none"}
    assert rarest["rarest"].value_counts().sort("rarest").rows() == [("insult", 45), ("none", 1950), ("threat", 5)]
    assert set(TYPES) > {"insult", "threat"}
