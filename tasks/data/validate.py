"""Checks data against the Great Expectations suites in expectations/*.json, which a person can read and edit."""

import json
import logging
import math
from pathlib import Path

from tasks import files
from tasks import run as runs
from tasks.config import Config
from tasks.data import drift, measures, validation_page
from tasks.errors import StepFailed, UsageError
from tasks.promotion import registry
from tasks.run import Run

log = logging.getLogger(__name__)

SUITES = Path(__file__).resolve().parents[2] / "expectations"
MAX_ROWS = 20  # ids of failing rows that the verdict names


def run(config: Config, run: Run, stage: str) -> dict:
    """Holds the raw files (`stage` "raw") or the three splits ("prepared") against their suites.

    Returns {"passed": bool, "warnings": number of failed ones, "expectations": [verdict of each, see `judged`],
    "drift": [distance of each figure from the champion's, see `drift.compared`], "champion_run": its run or None,
    "profiles": {file: what later data is compared with}}. That is also written to the run's validation_<stage>.json,
    and shown on its page validation.html, before anything is raised.

    Raises:
        StepFailed: a `critical` expectation fails; the message names it, what was found, and rows that fail.
    """
    last, champion = last_time(config, run, stage), champions_run(config, run, stage)
    verdicts, profiles, distances = [], {}, []
    for suite, file, origin, measured in frames(config, stage):
        profile = drift.profile(measured) | {"origin": origin}
        least = least_rows(last, file, origin, config.validation.min_share_of_last_rows)
        asked = parameters(config, len(measured)) | {"least_rows_since_last_time": least}
        verdicts += judged(suite, file, measured, asked)
        profiles[file] = profile
        before = champion and profiles_of(champion, stage).get(file)
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
    for verdict in failed(verdicts, "warning"):
        log.warning("%s", in_words(verdict))
    if not result["passed"]:
        raise StepFailed(last_words(failed(verdicts, "critical"), page))
    return result


def frames(config: Config, stage: str):
    """Yields (suite, file, its origin, its measures in pandas) of every raw file, or of the splits together."""
    data = config.workspace / "data"
    if stage == "prepared":
        paths = [data / "processed" / f"{split}.parquet" for split in measures.SPLITS]
        yield "prepared", "data/processed", "prepare", measures.prepared(paths, wanted("prepared"))
        return
    for source in config.data.sources:
        suite = source.schema_
        frame = measures.raw(source, data / "raw" / source.file, wanted(suite))
        yield suite, source.file, f"{source.kind} {source.name}", frame


def last_time(config: Config, run: Run, stage: str) -> Run | None:
    """The newest other run in which this stage ended well, or None."""
    others = (other for other in runs.opened(config.workspace) if other.id != run.id)
    return next((other for other in others if profiles_of(other, stage)), None)


def champions_run(config: Config, run: Run, stage: str) -> Run | None:
    """The run that the champion comes from, or None where there is none, or it left no profile of its data."""
    if last_time(config, run, stage) is None:
        return None
    try:
        champion = registry.alias(config, "champion")
        champions = champion and runs.find(config.workspace, registry.tags(config, champion).get("run_id", "-"))
    except StepFailed as error:
        log.warning("how far the data has moved from the champion's is not known: %s", error)
        return None
    return champions if champions and champions.id != run.id and profiles_of(champions, stage) else None


def profiles_of(run: Run, stage: str) -> dict:
    return run.result(f"validate_{stage}").get("profiles", {}) if run.has(f"validate_{stage}") else {}


def least_rows(last: Run | None, file: str, origin: str, share: float) -> int:
    """So many rows a file must have not to have lost too many since last time; 0 if it had another origin then."""
    stage = "prepared" if file == "data/processed" else "raw"
    before = profiles_of(last, stage).get(file) if last else None
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


def verdict(suite: str, file: str, result: dict, ids) -> dict:
    configuration = result["expectation_config"]
    hidden = ("batch_id", "condition_parser", "column", "column_A", "exact_match")
    kwargs = configuration["kwargs"]
    numbers = [row["row"] for row in result["result"].get("partial_unexpected_index_list") or []]
    return {
        "suite": suite,
        "file": file,
        "expectation": configuration["type"],
        "description": configuration.get("description") or "",
        "column": kwargs.get("column") or kwargs.get("column_A"),
        "severity": configuration["severity"],
        "success": result["success"],
        "observed": observed(result),
        "expected": {key: value for key, value in kwargs.items() if key not in hidden},
        "rows": list(dict.fromkeys(number if ids is None or ids.isna()[number] else ids[number] for number in numbers)),
        "note": configuration.get("notes") or "",
    }


def observed(result: dict):
    """The figure that was measured, or how many values failed and the first of them; else why it could not be."""
    found = result["result"]
    # Of column names, or of a column's distinct values:
    lists = {how: found[f"partial_{how}_list"] for how in ("missing", "unexpected") if f"partial_{how}_list" in found}
    mismatched = found.get("details", {}).get("mismatched", lists if "missing" in lists else {})
    if mismatched:
        if not result["expectation_config"]["kwargs"].get("exact_match", True):  # further columns are welcome
            mismatched = {how: names for how, names in mismatched.items() if how == "missing"}
        words = [f"{how} {', '.join(map(str, names))}" for how, names in sorted(mismatched.items()) if names]
        return "; ".join(words) or "all of them"
    if found.get("observed_value") is not None:
        value = found["observed_value"]
        return float(f"{value:.4g}") if isinstance(value, float) else value
    if "unexpected_count" in found:
        count, of = found["unexpected_count"], found["element_count"]
        values = [value for value in found["partial_unexpected_list"] if value not in (None, True, False)]
        first = f", such as {str(values[0])[:60]!r}" if values else ""
        return f"{count:,} of {of:,} rows{f' ({count / of:.2%})' if count else ''}{first}"
    raised = result["exception_info"]
    errors = [raised] if "exception_message" in raised else raised.values()  # one, or one per metric
    return "; ".join(sorted({error["exception_message"] or "nothing to measure" for error in errors}))


def failed(verdicts: list[dict], severity: str) -> list[dict]:
    return [verdict for verdict in verdicts if not verdict["success"] and verdict["severity"] == severity]


def in_words(verdict: dict) -> str:
    """The verdict in one sentence, with the name that Great Expectations has for it."""
    rows = f" (rows {', '.join(map(str, verdict['rows'][:5]))})" if verdict["rows"] else ""
    limits = limits_in_words(verdict["expected"])
    return " ".join(
        [
            f"{verdict['file']}: expected that {verdict['description'] or verdict['expectation']}, found",
            f"{verdict['observed']}{rows}{f'; allowed: {limits}' if limits else ''}.",
            *([verdict["note"]] if verdict["note"] else []),
            f"[{verdict['expectation']}{f' of {column}' if (column := verdict['column']) else ''}]",
        ]
    )


def limits_in_words(expected: dict) -> str:
    """What is expected, for people: `between 0.07 and 0.13`, `0, 1`, `in at least 98 % of the rows`."""
    rest = dict(expected)
    low, high = rest.pop("min_value", None), rest.pop("max_value", None)
    words = []
    if low is not None and high is not None:
        words.append(f"between {low:g} and {high:g}")
    elif low is not None or high is not None:
        words.append(f"at least {low:g}" if high is None else f"at most {high:g}")
    for key in ("value_set", "column_set", "type_list"):
        values = rest.pop(key, [])
        words += [", ".join(map(str, values))] if values != [False] else []  # of a measure that is yes or no
    mostly, where = rest.pop("mostly", None), rest.pop("row_condition", None)
    words += [f"{key} {value}" for key, value in rest.items()]
    if mostly is not None:
        words.append(f"in at least {mostly:.4g} of the rows" if mostly < 1 else "")
    if where:
        words.append(f"where {where['pass_through_filter'] if isinstance(where, dict) else where}")
    return ", ".join(filter(None, words))


def last_words(critical: list[dict], page: Path) -> str:
    more = (
        f" {len(critical) - 1} more critical expectation{'s' * (len(critical) > 2)} failed."
        if len(critical) > 1
        else ""
    )
    return (
        f"{in_words(critical[0])}{more} Nothing is trained and service is untouched. All of it, with rows: {page}; "
        f"where the data is right, edit expectations/{critical[0]['suite']}.json or configs/validation"
    )
