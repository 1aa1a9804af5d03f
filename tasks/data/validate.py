"""Checks data against the Great Expectations suites in expectations/*.json, which a person can read and edit."""

import json
import logging
from pathlib import Path

import polars as pl

from tasks import files
from tasks.config import Config
from tasks.data import sources
from tasks.errors import StepFailed, UsageError
from tasks.labels import LABELS
from tasks.run import Run

log = logging.getLogger(__name__)

SUITES = Path(__file__).resolve().parents[2] / "expectations"
SPLITS = ("train", "val", "test")
MAX_ROWS = 20  # ids of failing rows that the verdict names


def run(config: Config, run: Run, stage: str) -> dict:
    """Holds the raw files (`stage` "raw") or the three splits ("prepared") against their suites.

    Returns {"passed": bool, "warnings": number of failed warnings, "expectations": [verdict of each, see `judged`]},
    which is written to the run's validation_<stage>.json before anything is raised.

    Raises:
        StepFailed: a `critical` expectation fails; the message names it, what was found, and rows that fail.
    """
    frames = raw_frames(config) if stage == "raw" else prepared_frames(config)
    parameters = {"max_chars": config.data.max_chars, "min_rows": config.data.min_rows}
    verdicts = [verdict for suite, file, frame in frames for verdict in judged(suite, file, frame, parameters)]
    failed = [verdict for verdict in verdicts if not verdict["success"]]
    critical = [verdict for verdict in failed if verdict["severity"] == "critical"]
    warnings = [verdict for verdict in failed if verdict["severity"] == "warning"]
    result = {"passed": not critical, "warnings": len(warnings), "expectations": verdicts}
    file = run.folder / f"validation_{stage}.json"
    files.write_json(file, result)
    for verdict in warnings:
        log.warning("%s", in_words(verdict))
    if critical:
        raise StepFailed(f"{in_words(critical[0])}; {len(critical)} critical expectations failed, see {file}")
    return result


def raw_frames(config: Config):
    """Yields (suite, file name, pandas frame) of every raw file."""
    import pandas as pd

    for source in config.data.sources:
        path = config.workspace / "data" / "raw" / source.file
        if not path.is_file():
            raise UsageError(f"{path} does not exist: run `python commands.py download` first")
        frame = numbered(sources.read(path))
        for label in frame.columns.intersection(LABELS):
            numbers = pd.to_numeric(frame[label], errors="coerce")
            # What is not a number stays as it is, so that the verdict can show it.
            frame[label] = numbers.astype(object).where(numbers.notna(), frame[label]).infer_objects()
        yield source.schema_, source.file, frame


def prepared_frames(config: Config):
    """Yields the three splits as one frame, the split's name as a column."""
    paths = [config.workspace / "data" / "processed" / f"{split}.parquet" for split in SPLITS]
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path} does not exist: run `python commands.py prepare` first")
    frame = pl.concat([pl.read_parquet(path).with_columns(split=pl.lit(path.stem)) for path in paths])
    yield "prepared", "data/processed", numbered(frame)


def numbered(frame: pl.DataFrame):
    """The frame in pandas, which Great Expectations speaks, with the row's number, from 1, as its index `row`."""
    return frame.with_row_index("row", 1).to_pandas().set_index("row")


def judged(name: str, file: str, frame, parameters: dict) -> list[dict]:
    """The verdict of each expectation of a suite, in the suite's order.

    One is {"suite", "file", "expectation", "column", "severity", "success", "observed", "expected", "rows", "note"};
    `rows` are up to MAX_ROWS ids of failing rows, or their numbers where rows have no id.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)  # it chose INFO on import
    suite, row_id = load(name)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("data").add_dataframe_asset(name)
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    asked = {"result_format": "COMPLETE", "partial_unexpected_count": MAX_ROWS}
    results = batch.validate(suite, result_format=asked, expectation_parameters=parameters).to_json_dict()["results"]
    ids = frame.index.to_series().astype(object)
    if row_id in frame.columns:
        ids = frame[row_id].astype(object).where(frame[row_id].notna(), ids)
    in_order = sorted(results, key=lambda result: result["expectation_config"]["meta"]["place"])
    return [verdict(name, file, result, ids) for result in in_order]


def load(name: str):
    """The suite expectations/<name>.json and the column that identifies a row, or None.

    Raises:
        UsageError: it is not JSON, or not a suite that Great Expectations knows.
    """
    from great_expectations.core import ExpectationSuite

    path = SUITES / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for place, expectation in enumerate(content["expectations"]):
            expectation["meta"] = {"place": place, **expectation.get("meta", {})}
        return ExpectationSuite(name=content["name"], expectations=content["expectations"]), content["meta"]["row_id"]
    except Exception as error:  # whatever its parsers raise, the cause is the file that a person edited
        raise UsageError(f"{path} is not a suite of Great Expectations: {' '.join(str(error).split())[:300]}") from None


def verdict(suite: str, file: str, result: dict, ids) -> dict:
    configuration = result["expectation_config"]
    kwargs = {
        key: value for key, value in configuration["kwargs"].items() if key not in ("batch_id", "condition_parser")
    }
    column = kwargs.pop("column", None) or kwargs.pop("column_A", None)
    failing = result["result"].get("partial_unexpected_index_list") or []
    return {
        "suite": suite,
        "file": file,
        "expectation": configuration["type"],
        "column": column,
        "severity": configuration["severity"],
        "success": result["success"],
        "observed": observed(result),
        "expected": kwargs,
        "rows": [ids.loc[row["row"]] for row in failing],
        "note": configuration["meta"].get("note", ""),
    }


def observed(result: dict):
    """The figure that was measured, or how many values failed and the first of them; else why it could not be."""
    found = result["result"]
    if found.get("observed_value") is not None:
        return found["observed_value"]
    if "partial_missing_list" in found:
        return f"too many: {found['partial_unexpected_list']}, missing: {found['partial_missing_list']}"
    if "unexpected_count" in found:
        first = f", such as {str(found['partial_unexpected_list'][0])[:60]!r}" if found["unexpected_count"] else ""
        return f"{found['unexpected_count']} of {found['element_count']} values fail{first}"
    raised = result["exception_info"]
    errors = [raised] if "exception_message" in raised else raised.values()  # one, or one per metric
    return "; ".join(sorted({error["exception_message"] or "nothing to measure" for error in errors}))


def in_words(verdict: dict) -> str:
    where = f" of {verdict['column']}" if verdict["column"] else ""
    rows = f" (rows {', '.join(map(str, verdict['rows'][:5]))})" if verdict["rows"] else ""
    wanted = ", ".join(f"{key} {value}" for key, value in verdict["expected"].items())
    note = f" ({verdict['note']})" if verdict["note"] else ""
    return (
        f"{verdict['file']}: {verdict['expectation']}{where} found {verdict['observed']}{rows}"
        f"{f', expected is {wanted}' if wanted else ''}{note}"
    )
