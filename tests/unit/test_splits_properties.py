"""What must hold for any messages: cleaning is one and the same everywhere, and a split never leaks or moves."""

import itertools
import unicodedata

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import config as configuration
from tasks.data import duplicates, messages, sampling, split_key
from tasks.labels import TYPES
from tasks.text import clean

# Pieces that cleaning has to do with, beside any text that Polars can hold.
PIECES = [
    "&",
    "amp;",
    "&lt;",
    "&#39;",
    "&#x41;",
    "&hearts",
    ";",
    "#",
    "\u037e",
    " ",
    "\n",
    "\t\r",
    "\x00",
    "\x85",
    "\xa0",
]
PIECES += [
    "\u2028",
    "\u3000",
    "\u200b",
    "\ufeff",
    "\u00ad",
    "\u202e",
    "e",
    "\u0301",
    "И",
    "\u0306",
    "\u212b",
    "가",
    "<b>",
    "f**k",
    "A",
]
ANY = st.text(st.characters(exclude_categories=["Cs"]))
TEXT = st.one_of(ANY, st.lists(st.one_of(st.sampled_from(PIECES), ANY), max_size=12).map("".join))
SMALL_WORDS = st.lists(
    st.sampled_from(["you", "FOOL", "fool", "Hi", "!", "?", "дурак", "f**k"]), min_size=1, max_size=3
)
LONG = 10_000  # characters: none of these texts is cut
ROWS = st.lists(st.tuples(SMALL_WORDS.map(" ".join), st.integers(0, 1)), min_size=1, max_size=60)


def in_polars(texts: list[str]) -> list[str]:
    frame = pl.DataFrame({"text": texts}, {"text": pl.String})
    return frame.select(messages.cleaned(pl.col("text"), LONG))["text"].to_list()


def framed(rows) -> pl.DataFrame:
    """(text, toxic) as `prepare.read` has them."""
    frame = pl.DataFrame(rows, {"text": pl.String, "toxic": pl.Int8}, orient="row")
    unknown = [pl.lit(None, pl.Int8).alias(name) for name in TYPES]
    return frame.with_columns(
        pl.lit(None, pl.Datetime("us", "UTC")).alias("decided_at"),
        *unknown,
        language=pl.when(pl.col("text").str.contains("[а-я]")).then(pl.lit("ru")).otherwise(pl.lit("en")),
        hash=split_key.hashed(pl.col("text"), LONG),
    )


def data(**values):
    return configuration.load(["profile=demo", *(f"data.{key}={value}" for key, value in values.items())]).data


DEFAULT = data()
TIGHT = DEFAULT.model_copy(update={"max_samples": 10})  # the configuration itself asks for data.min_rows


def places(rows, chosen=DEFAULT) -> dict[int, str]:
    """{hash: split} of what is kept."""
    unique, _ = duplicates.merged(framed(rows))
    splits = sampling.split(unique.filter(sampling.sampled(unique, chosen)), chosen)
    return {hash_: name for name, frame in splits.items() for hash_ in frame["hash"]}


@given(st.lists(TEXT, max_size=20))
@settings(deadline=None)
def test_a_million_messages_are_cleaned_as_one_is(texts):
    assert in_polars(texts) == [clean(text) for text in texts]


def test_every_character_is_cleaned_alike_wherever_it_stands():
    # Beyond these planes are Han characters, private and unassigned ones, all alike.
    codes = itertools.chain(range(0xD800), range(0xE000, 0x20000), range(0xE0000, 0xE1000), range(0x10FFF0, 0x110000))
    characters = list(map(chr, codes))
    texts = [
        f"{before}{character}{after}"
        for before, after in (("", ""), ("e", "e"), ("И ", " "))
        for character in characters
    ]
    assert in_polars(texts) == [clean(text) for text in texts]


@given(TEXT)
@settings(deadline=None)
def test_cleaning_twice_changes_nothing(text):
    assert clean(clean(text)) == clean(text)
    assert unicodedata.is_normalized("NFC", clean(text))


@given(ROWS)
@settings(deadline=None, max_examples=50)
def test_no_normalised_text_is_in_two_splits_nor_twice_in_one(rows):
    unique, gone = duplicates.merged(framed(rows))
    keys = [
        key
        for frame in sampling.split(unique, DEFAULT).values()
        for key in frame.select(messages.key(pl.col("text")))["text"].to_list()
    ]
    assert len(keys) == len(set(keys)) == unique.height
    assert unique.height + sum(frame.height for frame in gone.values()) == len(rows)


@given(ROWS, ROWS)
@settings(deadline=None, max_examples=50)
def test_new_rows_never_move_an_old_message_to_another_split(old, new):
    for chosen in (DEFAULT, TIGHT):
        before, after = places(old, chosen), places([*new, *old], chosen)
        assert all(before[hash_] == after[hash_] for hash_ in before.keys() & after.keys())


@given(st.permutations(range(40)))
@settings(deadline=None, max_examples=50)
def test_what_is_kept_does_not_depend_on_the_order_of_the_rows(order):
    rows = [(f"message {k}", k % 3 == 0) for k in range(40)]
    assert places(rows, TIGHT) == places([rows[k] for k in order], TIGHT)


@given(st.integers(1, 80), st.integers(0, 80), st.integers(1, 100), st.sampled_from([0, 0.25, 0.5]), st.integers(0, 40))
@settings(deadline=None, max_examples=50)
def test_each_language_keeps_its_floor_under_the_cap_and_new_rows_displace_none_of_lower_hash(
    english, russian, limit, least, more
):
    """However many rows a language has, and whatever comes in the other."""
    chosen = DEFAULT.model_copy(update={"max_samples": limit, "min_language_share": least})
    rows = [(f"message {k}", k % 3 == 0) for k in range(english)] + [(f"сообщение {k}", 0) for k in range(russian)]
    unique = framed(rows)
    kept = unique.filter(sampling.sampled(unique, chosen))
    assert kept.height == min(limit, unique.height)
    for language, number in (("en", english), ("ru", russian)):
        assert kept.filter(language=language).height >= min(int(limit * least), number)
    later = framed([*rows, *((f"new message {k}", k % 3 == 0) for k in range(more))])
    later = later.filter(sampling.sampled(later, chosen))
    stays = set(later.filter(language="ru")["hash"])
    before = set(kept.filter(language="ru")["hash"])
    assert stays <= before  # English rows can only take room, and those of the highest second hash go first
    place = messages.place(pl.col("hash"), chosen.split.salt, "keep")
    last = unique.filter(pl.col("hash").is_in(list(before))).sort(place)["hash"]
    assert set(last.head(len(stays))) == stays


@pytest.mark.parametrize("salt", ["toxic-classificator", "another", "third"])
def test_shares_are_within_a_point_from_20_000_rows_on(salt):
    chosen = data(**{"split.salt": salt})
    splits = sampling.split(framed([(f"message number {k}", k % 2) for k in range(20_000)]), chosen)
    for name, share in (("train", 0.70), ("val", 0.15), ("test", 0.15)):
        assert splits[name].height / 20_000 == pytest.approx(share, abs=0.01)
        assert splits[name]["toxic"].mean() == pytest.approx(0.5, abs=0.03)
