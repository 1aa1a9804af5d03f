"""Validation by Great Expectations' own suites."""

import shutil

import polars as pl
import pytest
from raw_data import rewrite

from tasks import files
from tasks.data import prepare, sample, sources, validate
from tasks.errors import StepFailed, UsageError


def test_a_good_sample_passes_both_stages(raw):
    config, run, _ = raw
    found = validate.run(config, run, "raw")
    assert found["passed"] and found["warnings"] == 0
    assert {verdict["suite"] for verdict in found["expectations"]} == {"jigsaw", "russian"}
    prepare.run(config, run)
    found = validate.run(config, run, "prepared")
    assert found["passed"] and found["warnings"] == 0
    assert files.read_json(run.folder / "validation_prepared.json") == found


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.drop("threat"), "expect_table_columns_to_match_set"),
        (lambda rows: rows.head(100), "expect_table_row_count_to_be_between found 100, expected is min_value 500"),
        (lambda rows: rows.with_columns(insult=pl.lit("2")), "expect_column_values_to_be_in_set of insult"),
        (lambda rows: rows.with_columns(toxic=pl.lit(None)), "expect_column_values_to_not_be_null of toxic"),
        (lambda rows: rows.with_columns(toxic=pl.lit("1")), "expect_column_mean_to_be_between of toxic found 1.0"),
        (lambda rows: rows.with_columns(comment_text=pl.lit("same")), "proportion_of_unique_values"),
    ],
)
def test_broken_raw_data_stops_and_says_where(raw, change, message):
    config, run, folder = raw
    rewrite(folder / sample.JIGSAW_FILE, change)
    with pytest.raises(StepFailed, match=f"{sample.JIGSAW_FILE}: .*{message}"):
        validate.run(config, run, "raw")


def test_failing_rows_are_named_by_their_id_or_number(raw):
    config, run, folder = raw
    ids = sources.read(folder / sample.JIGSAW_FILE)["id"]
    broken = pl.int_range(pl.len()).is_in([7, 9])
    for name in (sample.JIGSAW_FILE, sample.RUSSIAN_FILE):
        toxic = pl.when(broken).then(pl.lit("yes")).otherwise("toxic").alias("toxic")
        rewrite(folder / name, lambda rows: rows.with_columns(toxic))
    with pytest.raises(StepFailed, match=f"2 of 500 values fail, such as 'yes' .rows {ids[7]}, {ids[9]}."):
        validate.run(config, run, "raw")
    kept = files.read_json(run.folder / "validation_raw.json")
    failed = [v for v in kept["expectations"] if not v["success"] and v["expectation"].endswith("be_in_set")]
    assert not kept["passed"]
    assert [(v["suite"], v["rows"]) for v in failed] == [("jigsaw", [ids[7], ids[9]]), ("russian", [8, 10])]


def test_a_warning_is_counted_and_does_not_stop(raw):
    config, run, folder = raw
    rewrite(
        folder / sample.JIGSAW_FILE, lambda rows: rows.with_columns(id=rows["id"].shift(1, fill_value=rows["id"][0]))
    )
    found = validate.run(config, run, "raw")
    assert found["passed"] and found["warnings"] == 1
    (failed,) = [verdict for verdict in found["expectations"] if not verdict["success"]]
    assert (failed["column"], failed["severity"]) == ("id", "warning")


def test_a_message_in_two_splits_stops(raw):
    config, run, _ = raw
    prepare.run(config, run)
    processed = config.workspace / "data" / "processed"
    train, test = (pl.read_parquet(processed / f"{split}.parquet") for split in ("train", "test"))
    pl.concat([train, test.head(1)]).write_parquet(processed / "train.parquet")
    with pytest.raises(StepFailed, match=f"expect_column_values_to_be_unique of id.*{test['id'][0]}"):
        validate.run(config, run, "prepared")


def test_a_suite_that_was_edited_wrongly_is_named(raw, tmp_path, monkeypatch):
    config, run, _ = raw
    shutil.copytree(validate.SUITES, tmp_path / "suites")
    monkeypatch.setattr(validate, "SUITES", tmp_path / "suites")
    for content in ("{", '{"name": "jigsaw", "meta": {"row_id": "id"}, "expectations": [{"type": "expect_magic"}]}'):
        (tmp_path / "suites" / "jigsaw.json").write_text(content)
        with pytest.raises(UsageError, match="jigsaw.json is not a suite of Great Expectations"):
            validate.run(config, run, "raw")
