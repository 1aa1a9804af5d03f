"""Checks data against the Great Expectations suites in expectations/*.json, which a person can read and edit."""

import json
import logging
import math
from pathlib import Path

from tasks import files
from tasks import run as runs
from tasks.config import Config
from tasks.data import drift, measures, validation_page
from tasks.data.splits import SPLITS
from tasks.data.verdicts import MAX_ROWS, failed, in_words, last_words, verdict
from tasks.errors import StepFailed, UsageError
from tasks.promotion import in_service
from tasks.promotion.refusals import Refused
from tasks.run import Run

log = logging.getLogger(__name__)

SUITES = Path(__file__).resolve().parents[2] / "expectations"


def run(config: Config, run: Run, stage: str) -> dict:
    """Holds the raw files (`stage` "raw") or the three splits ("prepared") against their suites.

    Returns {"passed": bool, "warnings": number of failed ones, "expectations": [verdict of each, see `judged`],
    "drift": [distance of each figure from the champion's, see `drift.compared`], "champion_run": its run or None,
    "profiles": {file: what later data is compared with}}. That is also written to the run's validation_<stage>.json,
    and shown on its page validation.html, before anything is raised.

    Raises:
        StepFailed: a `critical` expectation fails; the message names it, what was found, and rows that fail.
    """
    last = last_time(config, run, stage)
    champion = champions_run(config, run, stage) if last else None
    since_last, since_champion = profiles_of(last, stage), profiles_of(champion, stage)
    verdicts, profiles, distances = [], {}, []
    for suite, file, origin, measured in frames(config, stage):
        profile = drift.profile(measured) | {"origin": origin}
        least = least_rows(since_last.get(file), origin, config.validation.min_share_of_last_rows)
        asked = parameters(config, len(measured)) | {"least_rows_since_last_time": least}
        verdicts += judged(suite, file, measured, asked)
        profiles[file] = profile
        before = since_champion.get(file)
        if before and before["origin"] == origin:
            distances += drift.compared(file, profile, before)
    if distances:
        verdicts += judged_drift(stage, distances, parameters(config, len(distances)))
    result = {
        "passed": not failed(verdicts, "critical"),
        "warnings": len(failed(verdicts, "warning")),
        "expectations": verdicts,
        "drift": distances,
        "champion_run": champion and champion.id,
        "profiles": profiles,
    }
    if stage == "raw":
        (run.folder / "validation_prepared.json").unlink(missing_ok=True)  # that of other data
    files.write_json(run.folder / f"validation_{stage}.json", result)
    page = validation_page.write(config, run)
    for warning in failed(verdicts, "warning"):
        log.warning("%s", in_words(warning))
    if not result["passed"]:
        raise StepFailed(last_words(failed(verdicts, "critical"), page))
    return result


def frames(config: Config, stage: str):
    """Yields (suite, file, its origin, its measures in pandas) of every raw file, or of the splits together."""
    if stage == "prepared":
        paths = [config.workspace / "data" / "processed" / f"{split}.parquet" for split in SPLITS]
        yield "prepared", "data/processed", "prepare", measures.prepared(paths, wanted("prepared"))
        return
    for source in config.data.sources:
        suite = source.schema_
        frame = measures.raw(source, config, wanted(suite))
        yield suite, source.file, f"{source.kind} {source.name}", frame


def last_time(config: Config, run: Run, stage: str) -> Run | None:
    """The newest other run in which this stage ended well, or None."""
    others = (other for other in runs.opened(config.workspace) if other.id != run.id)
    return next((other for other in others if profiles_of(other, stage)), None)


def champions_run(config: Config, run: Run, stage: str) -> Run | None:
    """The run that what serves comes from, or None where nothing does, or it left no profile of its data."""
    try:
        champions = in_service.run_of(config, in_service.find(config))
    except (StepFailed, Refused) as error:
        log.warning("how far the data has moved from the champion's is not known: %s", error)
        return None
    return champions if champions and champions.id != run.id and profiles_of(champions, stage) else None


def profiles_of(run: Run | None, stage: str) -> dict:
    return run.result(f"validate_{stage}").get("profiles", {}) if run and run.has(f"validate_{stage}") else {}


def least_rows(before: dict | None, origin: str, share: float) -> int:
    """So many rows a file must have not to have lost too many since last time; 0 if it had another origin then."""
    return math.ceil(share * before["rows"]) if before and before["origin"] == origin else 0


def parameters(config: Config, rows: int) -> dict[str, float]:
    """What suites may name by {"$PARAMETER": name}: every band of the configuration, each end by itself.

    That of a split is wider by three standard errors of `rows` messages that are divided by chance.
    """
    wanted, data = config.validation, config.data
    bands = {"toxic_share": wanted.toxic_share}
    bands |= {f"{suite}_{label}": band for suite, labels in wanted.shares.items() for label, band in labels.items()}
    splits = {"train": data.split.train, "val": data.split.val, "test": 1 - data.split.train - data.split.val}
    for name, part in splits.items():
        slack = wanted.split_tolerance + 3 * math.sqrt(part * (1 - part) / max(rows, 1))
        bands[f"{name}_split"] = (part - slack, part + slack)
    return {
        "min_rows": data.min_rows,
        "max_chars": data.max_chars,
        **{f"{name}_{end}": value for name, band in bands.items() for end, value in zip(("min", "max"), band)},
        **{f"drift_{name}_max": limit for name, limit in wanted.drift.model_dump().items()},
    }


def judged(name: str, file: str, frame, parameters: dict) -> list[dict]:
    """The verdict of each expectation of a suite, in the suite's order; of a file without rows, those of the table.

    One is {"suite", "file", "expectation", "description", "column", "severity", "success", "observed", "expected",
    "rows", "note"}; `rows` are up to MAX_ROWS ids of failing rows, or their numbers where rows have no id.

    Raises:
        UsageError: the suite is not one, or names a parameter that there is not.
    """
    import great_expectations as gx
    from great_expectations.core import ExpectationSuite
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from great_expectations.exceptions import GreatExpectationsError
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)  # it chose INFO on import
    content = load(name)
    asked = [e for e in content["expectations"] if len(frame) or e["type"].startswith("expect_table_")]
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("data").add_dataframe_asset(name)
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    form = {"result_format": "SUMMARY", "partial_unexpected_count": MAX_ROWS}
    try:
        # One by one: a suite would leave out, with no more than a line in the log, what it cannot make sense of.
        expectations = [ExpectationConfiguration(**expectation).to_domain_obj() for expectation in asked]
        suite = ExpectationSuite(name=name, expectations=expectations)
        found = batch.validate(suite, result_format=form, expectation_parameters=parameters)
    except (GreatExpectationsError, ValueError, TypeError) as error:
        raise UsageError(f"{SUITES / name}.json: {' '.join(str(error).split())[:300]}") from None
    results = sorted(found.to_json_dict()["results"], key=lambda result: result["expectation_config"]["meta"]["place"])
    row_id = content["meta"]["row_id"]
    ids = frame[row_id] if row_id in frame.columns else None
    return [verdict(name, file, result, ids) for result in results]


def judged_drift(stage: str, distances: list[dict], parameters: dict) -> list[dict]:
    """The verdicts of expectations/drift.json, whose rows are the figures that were compared."""
    import pandas as pd

    frame = pd.DataFrame(distances).assign(stage=stage)
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="row")
    return judged("drift", f"{stage} data against the champion's", frame, parameters)


def load(name: str) -> dict:
    """The suite expectations/<name>.json; each expectation knows its place.

    Raises:
        UsageError: it is not JSON, or not a suite.
    """
    path = SUITES / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for place, expectation in enumerate(content["expectations"]):
            expectation["meta"] = {**expectation.get("meta", {}), "place": place}
            expectation["kwargs"], expectation["type"], expectation["severity"]
        content["name"], content["meta"]["row_id"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path} is not a suite of Great Expectations: {type(error).__name__} {' '.join(str(error).split())[:300]}"
        ) from None
    return content


def wanted(name: str) -> set[str]:
    """The columns that a suite looks into."""
    content = load(name)
    keys = ("column", "column_A", "column_B", "column_list", "column_set")
    found = {content["meta"]["row_id"]}
    for expectation in content["expectations"]:
        if not expectation["type"].startswith("expect_table_"):
            for value in (expectation["kwargs"].get(key, []) for key in keys):
                found |= {value} if isinstance(value, str) else set(value)
    return found - {None}
