"""The suites in expectations/: each is whole, and lets the published sets pass and nothing far from them."""

import numpy as np
import pandas as pd
import pytest

from tasks import config
from tasks.data import validate
from tasks.labels import LABELS

SUITES = sorted(path.stem for path in validate.SUITES.glob("*.json"))
# Of the full sets, as published: 159,571 English and 14,412 Russian rows.
PUBLISHED = {
    "jigsaw": dict(zip(LABELS, (0.0958, 0.0099, 0.053, 0.003, 0.0494, 0.0088))),
    "russian": {"toxic": 0.335},
}


def shares(rows, share):
    """0 and 1, `share` of them 1."""
    return (np.arange(rows) < round(rows * share)).astype("int8")


def table(suite, rows=20_000, **changed):
    """What `measures` makes of a good file of a suite, but for the columns in `changed`."""
    good = {
        "id": [f"{row:08x}" for row in range(rows)],
        "text_chars": np.full(rows, 120),
        "script": pd.Categorical(["cyrillic" if suite == "russian" else "latin"] * rows),
        **{name: np.zeros(rows, bool) for name in ("copy", "conflict", "mojibake", "type_without_toxic")},
        **{label: shares(rows, share) for label, share in PUBLISHED[suite].items()},
    }
    text = {"jigsaw": "comment_text", "russian": "comment"}[suite]
    return pd.DataFrame({**good, text: None, **changed}, index=pd.RangeIndex(1, rows + 1, name="row"))


def failed(suite, frame):
    parameters = validate.parameters(config.load(), len(frame)) | {"least_rows_since_last_time": 0}
    verdicts = validate.judged(suite, f"{suite}.csv", frame, parameters)
    return {(v["severity"], v["column"]) for v in verdicts if not v["success"]}


@pytest.mark.parametrize("name", SUITES)
def test_every_expectation_is_one_and_says_what_how_grave_and_why(name):
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    suite = validate.load(name)
    assert suite["name"] == name and suite["meta"]["note"]
    for expectation in suite["expectations"]:
        ExpectationConfiguration(**expectation).to_domain_obj()
        assert expectation["severity"] in ("critical", "warning", "info")
        assert expectation["description"] and expectation["notes"].endswith((".", "?"))


@pytest.mark.parametrize("suite", PUBLISHED)
def test_the_published_shares_pass(suite):
    assert failed(suite, table(suite)) == set()


@pytest.mark.parametrize("suite, label", [(suite, label) for suite, labels in PUBLISHED.items() for label in labels])
def test_twice_the_published_share_is_a_warning(suite, label):
    twice = shares(20_000, 2 * PUBLISHED[suite][label] if suite == "jigsaw" else 0.5)
    assert failed(suite, table(suite, **{label: twice})) == {("warning", label)}


def test_a_share_that_no_set_has_stops():
    assert ("critical", "toxic") in failed("jigsaw", table("jigsaw", toxic=shares(20_000, 0.7)))
    assert ("critical", "toxic") in failed("russian", table("russian", toxic=shares(20_000, 0.002)))


@pytest.mark.parametrize(
    "measure, bad, severity",
    [
        ("mojibake", True, "warning"),
        ("copy", True, "warning"),
        ("conflict", True, "warning"),
        ("type_without_toxic", True, "warning"),
        ("text_chars", 9000, "warning"),
        ("text_chars", None, "critical"),
        ("script", "cyrillic", "critical"),
    ],
)
def test_a_fifth_of_bad_rows_fails_its_own_measure_and_no_other(measure, bad, severity):
    good = table("jigsaw")
    column = good[measure].astype(object)
    column[:4000] = bad
    found = failed("jigsaw", good.assign(**{measure: column}))
    assert (severity, measure) in found and {name for _, name in found} == {measure}


def test_feedback_without_a_row_passes():
    columns = ["where", "text", "toxic", "decided_at", "problem", "set_aside", "text_chars", *LABELS[1:]]
    assert failed("feedback", pd.DataFrame({name: [] for name in columns})) == set()
