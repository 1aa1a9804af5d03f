"""Preparation for real, from raw files to splits and their card."""

from pathlib import Path

import polars as pl
import pytest
from raw_data import SMALL, rewrite

from tasks import config as configuration
from tasks.data import card, prepare, sources
from tasks.errors import StepFailed, UsageError
from tasks.run import find
from tasks.text import clean


def test_prepare_accounts_for_every_row_and_is_repeatable(raw):
    config, run, _ = raw
    found = prepare.run(config, run)
    splits = {split: pl.read_parquet(config.workspace / f"data/processed/{split}.parquet") for split in prepare.SPLITS}
    assert {split: found[split] for split in splits} == {split: frame.height for split, frame in splits.items()}
    assert sum(found[split] for split in splits) + sum(found["dropped"].values()) == 1000
    assert min(found["dropped"][reason] for reason in ("empty", "duplicate", "conflicting")) > 0
    train = splits["train"]
    assert found["labels"]["train"]["en"]["obscene"] == train["obscene"].sum()
    assert found["labels"]["train"]["ru"]["rows"] == train.filter(language="ru").height
    assert train.filter(language="ru").select(pl.col("insult").is_null().all()).item()
    assert train.filter(language="en").select(pl.col("insult").is_not_null().all()).item()
    assert prepare.run(config, run)["data_version"] == found["data_version"]


def test_the_card_says_what_was_left_out_and_shows_it(raw):
    config, run, folder = raw
    config.data.max_samples = 600
    found = prepare.run(config, run)
    page = card.read(run)
    assert {drop["reason"]: drop["rows"] for drop in page["dropped"]} == found["dropped"]
    assert page["splits"] == found["labels"]
    assert sum(source["rows"] for source in page["sources"]) == 1000
    assert sum(source["kept"] for source in page["sources"]) == sum(found[split] for split in prepare.SPLITS)
    texts = sources.read(folder / "jigsaw-toxic-comment-train.csv")["comment_text"]
    shown = {drop["reason"]: drop["examples"] for drop in page["dropped"]}
    assert all(shown[reason] for reason, count in found["dropped"].items() if count)
    for example in shown["over_max_samples"]:
        file, row = example["id"].split(":")
        if file == "jigsaw-toxic-comment-train.csv":
            assert clean(texts[int(row) - 1]).startswith(example["text"].rstrip("…"))
    assert [source["languages"] for source in page["sources"]] == [["en"], ["ru"]]
    by_message = {}
    for example in shown["conflicting"]:
        by_message.setdefault(example["text"].lower(), set()).add(example["toxic"])
    assert {0, 1} in by_message.values()
    html = Path(found["card"]).read_text(encoding="utf-8")
    assert "conflicting" in html and 'src="' not in html and "http" not in html
    assert (config.workspace / "data" / "processed" / "card.json").is_file()


def test_raw_rows_that_come_in_another_order_make_the_same_splits(raw):
    config, run, folder = raw
    before = prepare.run(config, run)
    for name in ("jigsaw-toxic-comment-train.csv", "labeled.csv"):
        rewrite(folder / name, lambda rows: rows.reverse())
    after = prepare.run(config, run)
    assert [after[key] for key in ("train", "val", "test", "labels")] == [
        before[key] for key in ("train", "val", "test", "labels")
    ]


def test_prepare_stops_when_too_little_is_left(raw):
    config, run, _ = raw
    config.data.min_rows = 1000
    with pytest.raises(StepFailed, match=r"messages are left of 1000 raw rows .* data.min_rows asks for 1000"):
        prepare.run(config, run)
    assert not (config.workspace / "data" / "processed").exists()


def test_prepare_without_a_download_names_the_command(workspace):
    with pytest.raises(UsageError, match="run `python commands.py download` first"):
        prepare.run(configuration.load(SMALL), find(workspace, "a-run"))
