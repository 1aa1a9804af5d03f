"""Validation by Great Expectations' own suites."""

import json
import shutil

import polars as pl
import pytest
from raw_data import SMALL, from_folder, rewrite
from signing import tag

from tasks import config as configuration
from tasks import files
from tasks import run as runs
from tasks.config import Source
from tasks.data import feedback, prepare, sample, sources, validate
from tasks.errors import StepFailed, UsageError


def test_a_good_sample_passes_both_stages(raw):
    config, run, _ = raw
    found = validate.run(config, run, "raw")
    assert found["passed"] and found["warnings"] == 0
    assert found["expectations"][0]["observed"] == "all of them"  # its columns
    assert {verdict["suite"] for verdict in found["expectations"]} == {"jigsaw", "russian"}
    prepare.run(config, run)
    found = validate.run(config, run, "prepared")
    assert found["passed"] and found["warnings"] == 0
    assert files.read_json(run.folder / "validation_prepared.json") == json.loads(json.dumps(found))


BROKEN = [
    (lambda rows: rows.drop("threat"), "has the columns that are read, found missing threat; allowed"),
    (lambda rows: rows.drop("comment_text"), "has the columns that are read, found missing comment_text"),
    (lambda rows: rows.head(100), "at least 500 rows, found 100; allowed: at least 500"),
    (lambda rows: rows.clear(), "at least 500 rows, found 0"),
    (lambda rows: rows.with_columns(insult=pl.lit("2")), "insult is 0 or 1, found 500 of 500 rows"),
    (lambda rows: rows.with_columns(toxic=pl.lit(None)), "whether it is toxic, found 500 of 500 rows"),
    (lambda rows: rows.with_columns(toxic=pl.lit("1")), "share of toxic .* found 1; allowed: between 0.005 and 0.6"),
    (lambda rows: rows.with_columns(threat=pl.lit("0")), "threat occurs at all, found 0"),
    (lambda rows: rows.with_columns(comment_text=pl.lit("same")), "most messages occur once, found 0.998"),
    (lambda rows: rows.with_columns(comment_text=pl.lit(" ")), "nearly every row has a message, found 500 of 500"),
    (lambda rows: rows.with_columns(comment_text="привет " + rows["id"]), "their language's letters, found 500 of 500"),
]


@pytest.mark.parametrize("change, message", BROKEN)
def test_broken_raw_data_stops_and_says_where(raw, change, message):
    config, run, folder = raw
    rewrite(folder / sample.JIGSAW_FILE, change)
    with pytest.raises(StepFailed, match=f"{sample.JIGSAW_FILE}: expected that .*{message}.*service is untouched"):
        validate.run(config, run, "raw")
    assert "Stopped" in (run.folder / "validation.html").read_text()


def test_an_id_that_occurs_twice_is_a_warning_that_does_not_stop(raw):
    config, run, folder = raw
    rewrite(
        folder / sample.JIGSAW_FILE, lambda rows: rows.with_columns(id=rows["id"].shift(1, fill_value=rows["id"][0]))
    )
    found = validate.run(config, run, "raw")
    assert found["passed"] and found["warnings"] == 1
    (failed,) = validate.failed(found["expectations"], "warning")
    assert (failed["column"], failed["severity"], len(failed["rows"])) == ("id", "warning", 1)


def test_what_is_for_information_is_reported_with_its_rows_and_nothing_else(raw):
    config, run, folder = raw
    rewrite(folder / sample.RUSSIAN_FILE, lambda rows: pl.concat([rows, rows.tail(2)]))
    found = validate.run(config, run, "raw")
    informed = validate.failed(found["expectations"], "info")
    assert found["passed"] and found["warnings"] == 0
    (copies,) = [v for v in informed if (v["file"], v["column"]) == (sample.RUSSIAN_FILE, "copy")]
    assert len(copies["rows"]) == validate.MAX_ROWS
    assert int(copies["observed"].split(" of 502 rows")[0]) > 20


def test_failing_rows_are_named_by_their_id_or_number(raw):
    config, run, folder = raw
    ids = sources.read(folder / sample.JIGSAW_FILE)["id"]
    broken = pl.int_range(pl.len()).is_in([7, 9])
    for name in (sample.JIGSAW_FILE, sample.RUSSIAN_FILE):
        toxic = pl.when(broken).then(pl.lit("yes")).otherwise("toxic").alias("toxic")
        rewrite(folder / name, lambda rows: rows.with_columns(toxic))
    with pytest.raises(StepFailed, match=f"2 of 500 rows .0.40%., such as 'yes' .rows {ids[7]}, {ids[9]}."):
        validate.run(config, run, "raw")
    kept = files.read_json(run.folder / "validation_raw.json")
    failed = [v for v in validate.failed(kept["expectations"], "critical") if v["expectation"].endswith("be_in_set")]
    assert not kept["passed"]
    assert [(v["suite"], v["rows"]) for v in failed] == [("jigsaw", [ids[7], ids[9]]), ("russian", [8, 10])]


def test_at_most_twenty_rows_are_named(raw):
    config, run, folder = raw
    rewrite(folder / sample.JIGSAW_FILE, lambda rows: rows.with_columns(threat=pl.lit("-1")))
    with pytest.raises(StepFailed):
        validate.run(config, run, "raw")
    kept = files.read_json(run.folder / "validation_raw.json")["expectations"]
    (failed,) = [v for v in kept if v["column"] == "threat" and v["expectation"].endswith("be_in_set")]
    assert failed["observed"] == "500 of 500 rows (100.00%), such as '-1.0'" and len(failed["rows"]) == 20


def test_a_message_in_two_splits_stops_whatever_its_case(raw):
    config, run, _ = raw
    prepare.run(config, run)
    processed = config.workspace / "data" / "processed"
    train, test = (pl.read_parquet(processed / f"{split}.parquet") for split in ("train", "test"))
    leaked = test.head(1).with_columns(pl.col("text").str.to_uppercase(), id=pl.lit("leaked"))
    pl.concat([train, leaked]).write_parquet(processed / "train.parquet")
    with pytest.raises(StepFailed, match=f"no message is in two splits.*rows leaked, {test['id'][0]}"):
        validate.run(config, run, "prepared")


def test_a_missing_file_says_which_step_brings_it(raw):
    config, run, folder = raw
    with pytest.raises(UsageError, match="train.parquet does not exist: run `python commands.py prepare`"):
        validate.run(config, run, "prepared")
    (folder / sample.RUSSIAN_FILE).unlink()
    with pytest.raises(UsageError, match="labeled.csv does not exist: run `python commands.py download`"):
        validate.run(config, run, "raw")


def test_a_file_that_is_not_utf8_is_named(raw):
    config, run, folder = raw
    text = (folder / sample.RUSSIAN_FILE).read_text(encoding="utf-8")
    (folder / sample.RUSSIAN_FILE).write_bytes(text.encode("cp1251", errors="replace"))
    with pytest.raises(StepFailed, match="labeled.csv is not a CSV file in UTF-8"):
        validate.run(config, run, "raw")


def finished(config, run_id):
    """A run whose raw data has been validated, as `commands.py` leaves it."""
    run = runs.find(config.workspace, run_id)
    runs.record(run, config, [])
    run.save("validate_raw", validate.run(config, run, "raw"))
    return run


def test_a_source_that_lost_a_fifth_of_its_rows_stops_unless_told_otherwise(raw):
    config, run, folder = raw
    rewrite(
        folder / sample.RUSSIAN_FILE, lambda rows: pl.concat([rows, rows.with_columns(comment="и " + rows["comment"])])
    )
    finished(config, "last-week")
    rewrite(folder / sample.RUSSIAN_FILE, lambda rows: rows.head(799))
    with pytest.raises(StepFailed, match="labeled.csv: expected that .* found 799; allowed: at least 800.*for one run"):
        validate.run(config, run, "raw")
    meant = configuration.load([*SMALL, "validation.min_share_of_last_rows=0"])
    assert validate.run(meant, run, "raw")["passed"]


def test_another_source_of_the_same_file_name_is_not_compared_with_the_last(raw):
    config, run, folder = raw
    finished(config, "last-week")
    of_folder = from_folder(folder, **{"data.min_rows": 500})
    of_folder.data.sources = of_folder.data.sources[:2]  # without feedback
    rewrite(folder / sample.JIGSAW_FILE, lambda rows: rows.head(300))
    with pytest.raises(StepFailed, match="at least 500 rows"):
        validate.run(of_folder, run, "raw")
    kept = files.read_json(run.folder / "validation_raw.json")["expectations"]
    least = [v["expected"]["min_value"] for v in kept if v["expectation"] == "expect_table_row_count_to_be_between"]
    assert least == [500, 0, 500, 0]


@pytest.fixture
def champion(raw):
    """The champion's run, whose data the next run's is compared with; there are 2000 rows of either language."""
    from tasks.promotion import registry

    config, run, folder = raw
    sample.write(folder, 2000, 2000, label_noise=0.02, seed=1)
    champions = finished(config, "champion")
    registry.ensure_model(config)
    registry.client(config).create_model_version(config.mlflow.registered_model, "file:///nowhere")
    tag(config, 1, run_id=champions.id)
    registry.set_alias(config, "champion", 1)
    return raw


def test_the_same_data_has_not_drifted_from_the_champions(champion):
    config, run, _ = champion
    found = validate.run(config, run, "raw")
    assert found["champion_run"] == "champion" and {row["distance"] for row in found["drift"]} == {0.0}
    assert {v["success"] for v in found["expectations"] if v["suite"] == "drift"} == {True}


def test_longer_messages_and_more_toxic_ones_than_the_champions_are_warnings(champion):
    config, run, folder = champion
    rewrite(
        folder / sample.RUSSIAN_FILE,
        lambda rows: rows.with_columns(
            comment=rows["comment"] + " " + rows["comment"],
            toxic=pl.when(pl.int_range(2000) % 5 == 0).then(pl.lit("1.0")).otherwise("toxic"),
        ),
    )
    found = validate.run(config, run, "raw")
    warned = [v["rows"] for v in validate.failed(found["expectations"], "warning") if v["suite"] == "drift"]
    assert found["passed"] and warned == [["labeled.csv: toxic"], ["labeled.csv: length"]]


def test_labels_that_turned_into_others_stop(champion):
    config, run, folder = champion
    turned = pl.when(pl.col("insult") == "0").then(pl.lit("1")).otherwise(pl.lit("0")).alias("insult")
    rewrite(folder / sample.JIGSAW_FILE, lambda rows: rows.with_columns(turned))
    with pytest.raises(StepFailed, match="no label of a raw file has become another.*train.csv: insult"):
        validate.run(config, run, "raw")


def test_a_registry_that_does_not_answer_stops_no_validation(champion, caplog):
    _, run, _ = champion
    config = configuration.load([*SMALL, "mlflow.tracking_uri=http://127.0.0.1:9", "mlflow.attempts=1"])
    found = validate.run(config, run, "raw")
    assert found["passed"] and found["drift"] == []
    assert "how far the data has moved from the champion's is not known: MLflow at http" in caplog.text


def test_an_expectation_of_the_text_that_a_person_adds_sees_the_text(raw, tmp_path, monkeypatch):
    config, run, _ = raw
    added = {
        "type": "expect_column_values_to_not_match_regex",
        "severity": "critical",
        "kwargs": {"column": "comment_text", "regex": "(?i)you"},
    }
    edited(monkeypatch, tmp_path, lambda suite: suite["expectations"].append(added))
    with pytest.raises(StepFailed, match="expect_column_values_to_not_match_regex, found .* such as '.*[Yy]ou"):
        validate.run(config, run, "raw")


def edited(monkeypatch, tmp_path, change):
    shutil.copytree(validate.SUITES, tmp_path / "suites")
    monkeypatch.setattr(validate, "SUITES", tmp_path / "suites")
    suite = files.read_json(tmp_path / "suites" / "jigsaw.json")
    change(suite)
    files.write_json(tmp_path / "suites" / "jigsaw.json", suite)


WRONG_SUITES = [
    (lambda suite: suite.pop("expectations"), "not a suite"),
    (lambda suite: suite["expectations"][0].update(type="expect_magic"), "expect_magic"),
    (lambda suite: suite["expectations"][1].update(kwargs={"min_value": {"$PARAMETER": "nothing"}}), "nothing"),
    (lambda suite: suite["expectations"][1].update(kwargs={"least": 5}), "least"),
    (lambda suite: suite["expectations"][1].update(severity="deadly"), "deadly|severity"),
]


@pytest.mark.parametrize("change, message", WRONG_SUITES)
def test_a_suite_that_was_edited_wrongly_is_named(raw, tmp_path, monkeypatch, change, message):
    config, run, _ = raw
    edited(monkeypatch, tmp_path, change)
    with pytest.raises(UsageError, match=f"jigsaw.json.*({message})"):
        validate.run(config, run, "raw")


def test_a_suite_that_is_not_json_is_named(raw, tmp_path, monkeypatch):
    config, run, _ = raw
    edited(monkeypatch, tmp_path, lambda suite: None)
    (tmp_path / "suites" / "jigsaw.json").write_text("{")
    with pytest.raises(UsageError, match="jigsaw.json is not a suite of Great Expectations: JSONDecodeError"):
        validate.run(config, run, "raw")


def further(folder, **source):
    """A configuration with one more source, which has been downloaded as more.csv."""
    more = {"kind": "folder", "name": str(folder), "file": "more.csv", "schema": "messages", "language": "en"} | source
    config = configuration.load(SMALL)
    sources_with_more = [*config.data.sources, Source.model_validate(more)]
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": sources_with_more})})


MAPPED = {"columns": {"text": "comment_text", "toxic": "target", "insult": "rude"}, "threshold": 0.5}


def shares_of_raters(**changed):
    rows = {
        "id": [f"r{row}" for row in range(400)],
        "comment_text": [f"message {row}" for row in range(400)],
        "target": [row % 10 / 10 for row in range(400)],
        "rude": [0.0] * 399 + [0.9],
    }
    return pl.DataFrame({**rows, **changed})


def test_a_mapped_set_is_judged_by_our_names_and_its_threshold(raw):
    _, run, folder = raw
    shares_of_raters().write_csv(folder / "more.csv")
    found = validate.run(further(folder, **MAPPED), run, "raw")
    assert found["passed"] and found["warnings"] == 0
    assert found["profiles"]["more.csv"]["labels"]["toxic"] == [200, 400]
    assert found["profiles"]["more.csv"]["labels"]["insult"] == [1, 400]
    assert found["profiles"]["more.csv"]["labels"]["threat"] == [0, 0]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"target": [2.0] + [row % 10 / 10 for row in range(399)]}, "toxic is 0 or 1, found 1 of 400 rows .*rows r0"),
        ({"target": [None] + [row % 10 / 10 for row in range(399)]}, "toxic, found 1 of 400 rows .*rows r0"),
    ],
)
def test_a_mapped_set_with_a_label_that_is_none_stops(raw, changed, message):
    _, run, folder = raw
    shares_of_raters(**changed).write_csv(folder / "more.csv")
    with pytest.raises(StepFailed, match=f"more.csv: .*{message}"):
        validate.run(further(folder, **MAPPED), run, "raw")


def test_a_mapped_set_without_a_mapped_column_stops(raw):
    _, run, folder = raw
    shares_of_raters().drop("target").write_csv(folder / "more.csv")
    with pytest.raises(StepFailed, match="more.csv: .* columns .* found missing toxic"):
        validate.run(further(folder, **MAPPED), run, "raw")


def moderators(folder, *rows):
    """What `download` makes of an export with these rows."""
    config = further(folder, kind="feedback", name=str(folder / "exports"), schema="feedback", max_bad_rows=100)
    (folder / "exports").mkdir()
    if rows:
        header = "text,toxic,insult,language,decided_at"
        (folder / "exports" / "may.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    feedback.gather(config.data.sources[-1], folder / "more.csv", config.unpack)
    return config


def good_labels(number):
    return [f"message {row},{row % 2},,en,2026-05-{row % 28 + 1:02}" for row in range(number)]


def test_moderators_labels_pass_and_those_set_aside_are_reported(raw):
    _, run, folder = raw
    found = validate.run(moderators(folder, *good_labels(40), "odd,perhaps,,,2026-05-01"), run, "raw")
    assert found["passed"] and found["warnings"] == 0
    informed = [v for v in validate.failed(found["expectations"], "info") if v["suite"] == "feedback"]
    assert [(v["column"], v["rows"]) for v in informed] == [("set_aside", ["may.csv row 41"])]


def test_a_row_that_is_set_aside_contradicts_nobody(raw):
    _, run, folder = raw
    copies = [f"message {row},perhaps,,en,2026-05-01" for row in range(2)]
    found = validate.run(moderators(folder, *good_labels(60), *copies), run, "raw")
    assert "conflict" not in [
        v["column"] for v in found["expectations"] if v["file"] == "more.csv" and not v["success"]
    ]


def test_a_date_or_label_that_download_takes_in_another_form_passes(raw):
    _, run, folder = raw
    days = ["2026-W20-5", "20260515T140500Z", "20260515", "46157", "15.05.2026 9:05", "2026/05/15", "\u00a02026-05-15"]
    odd = [f"odd message {k},{'ЛОЖЬ' if k % 2 else 'TRUE'},+0 ,EN,{day}" for k, day in enumerate(days)]
    found = validate.run(moderators(folder, *good_labels(40), ",,,,", *odd), run, "raw")
    assert found["passed"] and not [v for v in found["expectations"] if v["file"] == "more.csv" and not v["success"]]
    assert found["profiles"]["more.csv"]["labels"]["toxic"] == [24, 47]


def test_a_label_that_prepare_refuses_does_not_pass_and_one_with_a_space_does(raw):
    config, run, folder = raw
    nearly = pl.when(pl.int_range(500) == 7).then(pl.lit("1.00000001")).otherwise(pl.col("toxic") + " ").alias("toxic")
    rewrite(folder / sample.RUSSIAN_FILE, lambda rows: rows.with_columns(nearly))
    with pytest.raises(StepFailed, match="toxic is 0 or 1, found 1 of 500 rows .*such as '1.00000001' .rows 8."):
        validate.run(config, run, "raw")
    with pytest.raises(StepFailed, match="labeled.csv row 8: toxic is '1.00000001'"):
        prepare.run(config, run)


def test_no_feedback_yet_is_no_problem(raw):
    _, run, folder = raw
    found = validate.run(moderators(folder), run, "raw")
    assert found["passed"] and found["warnings"] == 0 and found["profiles"]["more.csv"]["rows"] == 0


def test_many_bad_one_sided_or_contradicting_labels_are_warnings(raw):
    _, run, folder = raw
    both_ways = [f"Thanks {row}!,{label},,en,2026-05-0{label + 1}" for row in range(9) for label in (0, 1)]
    one_sided = [f"message {row},1,,en,2017-05-01" for row in range(300)]
    found = validate.run(moderators(folder, *both_ways, *one_sided, *["odd,perhaps,,,2026-05-01"] * 30), run, "raw")
    warned = [v["column"] for v in validate.failed(found["expectations"], "warning") if v["suite"] == "feedback"]
    assert found["passed"] and warned == ["set_aside", "age_days", "conflict", "toxic"]
