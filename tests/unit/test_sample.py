"""The generated sample: Kaggle's format, the defects of the real files, and never words alone that tell."""

from itertools import islice
from random import Random

import polars as pl
import pytest

from tasks.data import sample, sample_en, sample_ru
from tasks.labels import LABELS, TYPES
from tasks.text import clean

ENGLISH, RUSSIAN = 3000, 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    sample.write(folder, ENGLISH, RUSSIAN, label_noise=0.02, seed=42)
    return folder


@pytest.fixture(scope="module")
def english(folder):
    return pl.read_csv(folder / sample.JIGSAW_FILE)


@pytest.fixture(scope="module")
def russian(folder):
    return pl.read_csv(folder / sample.RUSSIAN_FILE)


def test_the_files_are_like_kaggles(english, russian):
    assert english.columns == ["id", "comment_text", *LABELS]
    assert english["id"].str.contains("^[0-9a-f]{16}$").all() and english["id"].is_unique().all()
    assert english.select(pl.col(LABELS).is_in([0, 1]).all()).row(0) == (True,) * 6
    assert russian.columns == ["comment", "toxic"]
    assert russian["toxic"].dtype == pl.Float64 and set(russian["toxic"]) == {0.0, 1.0}
    assert russian["comment"].str.ends_with("\n").all()
    assert (english.height, russian.height) == (ENGLISH, RUSSIAN)


def test_labels_hang_together_as_in_jigsaw(english, russian):
    assert 0.2 < english["toxic"].mean() < 0.33 and 0.28 < russian["toxic"].mean() < 0.4
    toxic = english.filter(toxic=1)
    assert english.filter(toxic=0).select(pl.sum_horizontal(TYPES).sum()).item() == 0
    assert toxic.filter(pl.sum_horizontal(TYPES) == 0).height > 0.05 * toxic.height
    assert toxic.select(pl.col(TYPES).sum().ge(40)).row(0) == (True,) * 5
    severe = toxic.filter(severe_toxic=1)
    assert severe["insult"].mean() > 0.9 and severe["obscene"].mean() > 0.9


def test_the_defects_of_the_real_files_are_there(english):
    texts = english["comment_text"].fill_null("")
    assert (texts.str.strip_chars() == "").any()
    assert (texts.str.len_chars() > 2500).any()
    assert texts.str.contains("<br>").any() and texts.str.contains("&quot;").any() and texts.str.contains("🔥").any()
    assert texts.str.contains("\r\n").any()
    copies = english.filter(texts.str.strip_chars() != "").group_by("comment_text").agg(pl.len(), pl.n_unique("toxic"))
    assert (copies["len"] > 1).any()
    assert (copies["toxic"] > 1).any()


def test_most_messages_are_different(english, russian):
    for texts in (english["comment_text"], russian["comment"]):
        assert pl.Series(clean(text or "").lower() for text in texts).n_unique() > 0.9 * len(texts)


@pytest.mark.parametrize("grammar", [sample_en, sample_ru])
def test_decoys_use_the_words_of_toxic_messages(grammar):
    insults = [slot for slot in grammar.SLOTS["insult"] if "{" not in slot]
    clean_texts = [text for text, labels in islice(sample.rows(grammar, 0.0, seed=1), 3000) if not labels]
    used = [word for word in insults if any(word in text for text in clean_texts)]
    assert len(used) > 0.8 * len(insults)


def test_the_seed_decides_and_more_rows_begin_with_the_same_ones(folder, tmp_path):
    sample.write(tmp_path, ENGLISH + 100, RUSSIAN, label_noise=0.02, seed=42)
    assert (tmp_path / sample.JIGSAW_FILE).read_bytes().startswith((folder / sample.JIGSAW_FILE).read_bytes())
    assert (tmp_path / sample.RUSSIAN_FILE).read_bytes() == (folder / sample.RUSSIAN_FILE).read_bytes()
    sample.write(tmp_path, 500, 500, label_noise=0.02, seed=43)
    assert (tmp_path / sample.RUSSIAN_FILE).read_bytes()[:2000] != (folder / sample.RUSSIAN_FILE).read_bytes()[:2000]


def test_a_mislabelled_message_has_other_labels():
    given = [set(), {"toxic"}, {"toxic", "threat"}, {"toxic", "obscene", "insult"}]
    for labels in given:
        wrong = [sample.mislabelled(labels, Random(seed)) for seed in range(50)]
        assert labels not in wrong
        assert all("toxic" in found or not found for found in wrong)


def test_label_noise_makes_clean_messages_toxic():
    def toxic_share(noise):
        return sum(bool(labels) for _, labels in islice(sample.rows(sample_en, noise, seed=5), 1000)) / 1000

    assert toxic_share(0.4) > toxic_share(0.0) + 0.1
