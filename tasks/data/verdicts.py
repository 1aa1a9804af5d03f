"""What one expectation came to: as plain values, and in a sentence that a person can act on."""

from pathlib import Path

MAX_ROWS = 20  # ids of failing rows that a verdict names


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
    messages = sorted({error["exception_message"] for error in errors if error["exception_message"]})
    return f"could not be measured: {'; '.join(messages)}" if messages else "nothing to measure"


def failed(verdicts: list[dict], severity: str) -> list[dict]:
    return [verdict for verdict in verdicts if not verdict["success"] and verdict["severity"] == severity]


def in_words(verdict: dict) -> str:
    """The verdict in one sentence, with the name that Great Expectations has for it."""
    rows = f" (rows {', '.join(map(str, verdict['rows'][:5]))})" if verdict["rows"] else ""
    limits = limits_in_words(verdict["expected"])
    return " ".join(
        [
            f"{verdict['file']}: expected that {verdict['description'] or verdict['expectation']}, found",
            f"{number(verdict['observed'])}{rows}{f'; allowed: {limits}' if limits else ''}.",
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
        words.append(f"between {number(low)} and {number(high)}")
    elif low is not None or high is not None:
        words.append(f"at least {number(low)}" if high is None else f"at most {number(high)}")
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


def number(value) -> str:
    """A figure as people read it: 159,571; 0.0958; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"


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
