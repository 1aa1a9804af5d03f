"""The page of a validation: whole, offline, and right about one and many."""

from html.parser import HTMLParser

import pytest

from tasks import config, files
from tasks.data import validation_page
from tasks.run import find

VOID = {"meta", "link", "br", "rect", "line"}


class Page(HTMLParser):
    """Checks that tags close and that nothing is loaded; keeps the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.words, self.unscrolled = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [attributes[name] for name in ("src", "href") if attributes.get(name, "data:,") != "data:,"]
        if tag == "table":
            self.unscrolled += self.open[-1] != ("div", "scroll")
        if tag not in VOID:
            self.open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def verdict(**values):
    good = {
        "suite": "jigsaw",
        "file": "a.csv",
        "expectation": "expect_column_values_to_be_in_set",
        "description": "toxic is 0 or 1",
        "column": "toxic",
        "severity": "warning",
        "success": True,
        "observed": 0.25,
        "expected": {"min_value": 0.1, "max_value": 0.2},
        "rows": [],
        "note": "Ask <who> labelled it.",
    }
    return good | values


@pytest.fixture
def write(tmp_path):
    def write(*verdicts, drift=()):
        run = find(tmp_path, "a-run")
        result = {"passed": True, "warnings": 0, "expectations": list(verdicts), "drift": list(drift)}
        result |= {"champion_run": "before" if drift else None, "profiles": {"a.csv": {"rows": 159571}}}
        files.write_json(run.folder / "validation_raw.json", result)
        return Page(validation_page.write(config.load(), run).read_text(encoding="utf-8"))

    return write


def test_the_page_is_whole_and_loads_nothing(write):
    moved = {"subject": "a.csv: toxic", "file": "a.csv", "kind": "label", "distance": 0.2, "before": 0.1, "now": 0.3}
    page = write(verdict(), verdict(success=False, rows=["x", 7]), drift=[moved | {"rows": 5000}])
    assert page.open == [] and page.loads == [] and page.unscrolled == 0
    assert "Ask <who> labelled it." in page.text and "x, 7" in page.text
    assert "10.00 % 30.00 % 0.200" in page.text and "Against run before" in page.text


@pytest.mark.parametrize(
    "severities, verdict_in_words",
    [
        ([], "Passed, without a warning."),
        (["info"], "Passed, without a warning."),
        (["warning"], "Passed with 1 warning. The run goes on; look at it"),
        (["warning", "warning"], "Passed with 2 warnings. The run goes on; look at them"),
        (["critical"], "Stopped: 1 critical check failed, 0 warnings."),
        (["critical", "warning", "critical"], "Stopped: 2 critical checks failed, 1 warning."),
    ],
)
def test_the_verdict_comes_first_and_counts_right(write, severities, verdict_in_words):
    page = write(verdict(), *(verdict(success=False, severity=severity) for severity in severities))
    assert verdict_in_words in page.text.split("What failed")[0]
    assert "(159,571 rows)" in page.text


def test_large_numbers_are_whole(write):
    page = write(verdict(success=False, observed=1_402_194, expected={"min_value": 1_521_756}))
    assert "found 1,402,194 allowed at least 1,521,756" in page.text


def test_what_stops_stands_above_what_warns(write):
    page = write(
        verdict(success=False, file="warns.csv"), verdict(success=False, severity="critical", file="stops.csv")
    )
    assert page.text.index("Critical: stops.csv") < page.text.index("Warning: warns.csv")
