"""The pages in headless Chromium: light and dark, on a phone and a wide screen, by mouse and by keyboard, on paper."""

import os
import re
import socket
import subprocess
import sys
import time
from datetime import datetime

import httpx
import polars as pl
import pytest
from axe_playwright_python.sync_playwright import Axe
from bag_runs import SHOWN

from tasks import files, step
from tasks.data import card
from tasks.promotion import registry, report

WIDTHS = {"phone": 360, "wide": 1440}
GRAVE = ("serious", "critical")
# The pages with hidden texts, and where on them.
hides_texts = pytest.mark.parametrize("name, place", [("second", "#messages"), ("card", ".examples")])


@pytest.fixture
def open_page(browser, pages):
    """Opens a page by name; `page.asked` are the addresses it requested, `page.said` what it wrote to the console."""
    contexts = []

    def open_page(name, scheme="light", width=WIDTHS["wide"]):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto(pages[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


# Contrast depends on the scheme alone, and what fits on the width alone.
@pytest.mark.parametrize("scheme, width", [("light", WIDTHS["phone"]), ("dark", WIDTHS["wide"])], ids=WIDTHS)
@pytest.mark.parametrize("name", ["first", "second", "unchanged", "card", "validation"])
def test_a_page_is_quiet_offline_fits_its_screen_and_is_accessible(open_page, pages, name, scheme, width):
    page = open_page(name, scheme, width)
    # Everything is looked at, also what is folded at first.
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page).response["violations"]
    grave = {v["id"]: [node["html"][:200] for node in v["nodes"][:3]] for v in found if v["impact"] in GRAVE}
    assert grave == {}
    assert page.said == []
    assert page.asked == [pages[name].as_uri()]


def test_dark_is_dark(open_page):
    background = "getComputedStyle(document.body).backgroundColor"
    assert open_page("second", "light").evaluate(background) == "rgb(255, 255, 255)"
    assert open_page("second", "dark").evaluate(background) == "rgb(15, 23, 32)"


# What the report says -------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_in_words(open_page):
    page = open_page("second")
    verdict = page.locator("main > section").first
    assert page.locator("h1").inner_text() == "toxic_classificator version 2"
    said = verdict.inner_text()
    assert said.startswith("The gate is passed, under changed limits: this version may go into service if a person")
    assert "Version 1, which serves, is of profile gpu, this one of demo." in said
    assert "1 limit of the gate was changed by ada: the new source is <harder>" in said
    assert re.search(
        r"Against the champion, version 1\s+Better\s+F1 toxic \+0\.\d{3} \(\+0\.\d{3} to \+0\.\d{3}\)", said
    )
    assert re.search(r"\d+ fixed, \d+ broken, \d+ with other types only", said)
    assert "Approve exports this version" in said and "swapped in for version 1" in said
    assert "Reject leaves version 1 in service" in said and "72 hours" in said
    limits = page.locator("[aria-label='Changed limits'] tbody tr").all_inner_texts()
    assert [row.split() for row in limits] == [["gate.toxic.min", "0.85", "0.8"]]


def test_a_first_version_that_misses_the_gate_says_what_happens(open_page):
    page = open_page("first")
    said = page.locator("main").inner_text()
    assert "The gate is not passed: this version does not go into service." in said
    assert re.search(r"F1 types 0\.\d{3} is below 0\.700", said) and "gate=failed" in said
    assert "Against the baseline" in said and "Against the champion" not in said
    assert "Nothing to compare with: nothing is in service yet." in said
    assert "Approve" not in said
    verdicts = page.locator("[aria-label='The gate’s checks'] tr", has_text="champion's")
    assert verdicts.count() >= 2 and all("n/a" in text for text in verdicts.all_inner_texts())


def test_a_version_that_answers_alike_on_the_same_data_says_so(open_page):
    page = open_page("unchanged")
    said = page.locator("main").inner_text()
    assert "None: both give the same answer to every test message." in said
    assert page.locator("#messages").count() == 0 and page.locator("#search").count() == 0
    assert "On hold" in said and "version 1 called every greeting toxic" in said


def test_figures_slices_and_data_stand_beside_the_champions(open_page):
    page = open_page("second")
    models = page.locator("[aria-label='Models compared'] thead th").all_inner_texts()
    assert models[-3:] == ["challenger", "champion", "baseline"]
    toxic = page.locator("[aria-label='Models compared'] tbody tr").first.inner_text()
    assert len(re.findall(r"0\.\d{3} \(0\.\d{3} – [01]\.\d{3}\)", toxic)) == 3
    for slices in ("Slices by language", "Slices by type", "Slices by length"):
        assert page.locator(f"[aria-label='{slices}'] tbody tr").count() >= 2
    for picture in page.locator("svg[role=img].square").all():
        assert re.search(r"challenger 0\.\d{3}, champion 0\.\d{3}, baseline", picture.get_attribute("aria-label"))
    split = page.locator("[aria-label='Messages by split and language'] tbody tr").first.inner_text()
    assert re.search(r"train, English\s+[\d,]+ was [\d,]+", split)
    assert page.locator("summary", has_text="distances from the champion’s data").count() == 2
    link = page.locator("dl.lineage a")
    assert link.inner_text() == link.get_attribute("href") == "http://airflow.example/runs/1"


# Messages -------------------------------------------------------------------------------------------------------------


@hides_texts
def test_a_hidden_text_opens_and_closes_by_click_and_by_key(open_page, name, place):
    page = open_page(name)
    text = page.locator(f"{place} button.blurred").first

    def is_hidden():
        assert (text.get_attribute("aria-label") is not None) == (text.get_attribute("aria-expanded") == "false")
        return text.evaluate("(element) => getComputedStyle(element).filter") != "none"

    assert is_hidden()
    text.click()
    assert not is_hidden()
    text.click()
    assert is_hidden()
    text.focus()
    for key, hidden in (("Enter", False), ("Space", True)):
        page.keyboard.press(key)
        assert is_hidden() == hidden
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "blurred"


def test_what_is_toxic_by_label_or_by_an_answer_is_hidden(open_page):
    page = open_page("second")
    for row in page.locator("#messages tbody tr").all():
        cells = row.locator("td").all_inner_texts()
        toxic = any(cell.startswith("toxic") for cell in cells[3:6])
        assert (row.locator("button.blurred").count() == 1) == toxic


def test_the_card_hides_what_it_says_is_hidden(open_page, pages):
    page = open_page("card")
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    dropped = files.read_json(pages["card"].with_name("card.json"))["dropped"]
    examples = [row for drop in dropped for row in drop["examples"]]
    hidden = [item.locator(".text button.blurred").count() == 1 for item in page.locator(".examples li").all()]
    assert hidden == [row["hidden"] for row in examples]
    assert {(row["toxic"], row["hidden"]) for row in examples} >= {(0, False), (1, True)}


@pytest.mark.parametrize("toxic, kept, hidden", [(0, 0, False), (1, 1, True), (0, 1, True), (1, 0, True)])
@pytest.mark.parametrize("reason", ["overruled", "near_duplicate"])
def test_the_card_hides_an_example_that_is_toxic_by_either_label(reason, toxic, kept, hidden):
    hash_ = 2 if reason == "near_duplicate" else 1
    unique = [{"hash": hash_, "source": "b.csv", "row": 7, "toxic": kept, "decided_at": datetime(2026, 5, 4)}]
    row = {"hash": 1, "source": "a.csv", "row": 3, "text": "so it goes", "toxic": toxic}
    row |= {"other": 2, "similarity": 0.8, "split": "test", "other_text": "so it went"}
    frames = [pl.DataFrame(rows, schema_overrides={"hash": pl.UInt64, "other": pl.UInt64}) for rows in ([row], unique)]
    assert [example["hidden"] for example in card.examples(reason, *frames)] == [hidden]


def test_one_button_shows_and_hides_all_texts(open_page):
    page = open_page("second")
    button, hidden = page.locator("#reveal"), page.locator("#messages button.blurred[aria-expanded=false]")
    before = hidden.count()
    assert before > 0
    button.click()
    assert hidden.count() == 0 and button.get_attribute("aria-pressed") == "true"
    button.click()
    assert hidden.count() == before


def test_search_and_filters_leave_what_was_asked_for(open_page):
    page = open_page("second")
    rows, count = page.locator("#messages tbody tr"), page.locator("#count")
    every = rows.count()
    word = max(rows.first.locator("td").first.text_content().split(), key=len)
    page.fill("#search", f"  {word.upper()} ")
    shown = page.locator("#messages tbody tr:visible")
    assert 0 < shown.count() < every and count.inner_text() == f"{shown.count()} of {every} shown"
    assert all(word.lower() in row.text_content().lower() for row in shown.all())
    page.fill("#search", "no message says this")
    assert shown.count() == 0 and count.inner_text() == f"0 of {every} shown"
    page.fill("#search", "")
    for change in ("fixed", "broken"):
        page.select_option("#change", change)
        assert 0 < shown.count() < every
        assert set(shown.evaluate_all("(rows) => rows.map((row) => row.dataset.change)")) == {change}
    page.select_option("#language", "ru")
    assert set(shown.evaluate_all("(rows) => rows.map((row) => row.dataset.language)")) <= {"ru"}
    page.select_option("#change", "")
    page.select_option("#language", "")
    assert shown.count() == every


def test_on_a_phone_rows_are_blocks_whose_cells_name_their_column(open_page):
    page = open_page("second", width=WIDTHS["phone"])
    row = page.locator("#messages tbody tr").first
    assert row.evaluate("(element) => getComputedStyle(element).display") == "block"
    name = "(element) => getComputedStyle(element, '::before').content"
    assert row.locator("td").nth(1).evaluate(name).strip('"') == "change "
    page.fill("#search", "no message says this")
    assert page.locator("#messages tbody tr:visible").count() == 0


def test_more_messages_than_the_page_shows_are_counted_with_the_place_of_all(open_page, pages):
    page, everything = open_page("second"), files.read_json(pages["changes"])
    rows = page.locator("#messages tbody tr")
    shown = rows.evaluate_all("(rows) => rows.map((row) => row.dataset.change)")
    assert {change: shown.count(change) for change in ("broken", "fixed", "types")} == {
        change: min(SHOWN, sum(row["change"] == change for row in everything))
        for change in ("broken", "fixed", "types")
    }
    assert len(shown) < len(everything)
    assert f"{len(shown)} of {len(everything)}; all are in changes.json" in page.locator("main").inner_text()


# Paper ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first", "second", "card", "validation"])
def test_paper_is_white_without_controls(open_page, name):
    page = open_page(name, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for control in ("#search", "#change", "#reveal", "nav"):
        assert not page.locator(control).is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")


@hides_texts
def test_paper_shows_only_what_was_opened(open_page, name, place):
    page = open_page(name)
    texts = page.locator(f"{place} button.blurred")
    texts.nth(1).click()
    page.emulate_media(media="print")
    color = "(element) => getComputedStyle(element).color"
    assert texts.nth(0).evaluate(color) == "rgba(0, 0, 0, 0)"
    assert texts.nth(1).evaluate(color) == texts.nth(1).locator("..").evaluate(color)


# The way to it --------------------------------------------------------------------------------------------------------


def test_the_version_leads_to_the_page(pages):
    run, config, _ = step.open_run("report", [])
    version = registry.version(config, 2)
    assert version.tags["report"] == run.result("report")["url"] == (run.folder / "report.html").as_uri()
    assert version.description.startswith(f"[Review page]({version.tags['report']})")
    assert "Gate **passed**" in version.description
    mlflow_run = run.result("train")["mlflow_run"]
    logged = {artifact.path for artifact in registry.client(config).list_artifacts(mlflow_run)}
    assert {"report.html", "changes.json"} <= logged


@pytest.fixture
def mlflow_server(environment, pages):
    """Address of a real MLflow server on the pages' store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{environment}/mlflow.db"]
    command += ["--artifacts-destination", str(environment / "mlflow" / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (environment / "mlflow.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | quiet, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, (environment / "mlflow.log").read_text()
            try:
                if httpx.get(f"{address}/health", timeout=5).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def test_the_link_opens_the_page_in_mlflow(browser, mlflow_server, monkeypatch):
    monkeypatch.setenv("TOXIC_MLFLOW_URL", mlflow_server)
    found, config = step.execute("report", report.run), step.open_run("report", [])[1]
    assert registry.tags(config, 2)["report"] == found["url"]
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{mlflow_server}/#/models/{config.mlflow.registered_model}/versions/2")
    link = page.get_by_role("link", name="Review page")
    link.wait_for(timeout=60_000)
    page.goto(link.get_attribute("href"))
    shown = page.frame_locator("iframe").locator("h1")
    shown.wait_for(timeout=60_000)
    assert shown.inner_text() == "toxic_classificator version 2"
    page.close()


def test_what_a_person_wrote_about_a_version_stays(pages):
    config = step.open_run("report", [])[1]
    client, name = registry.client(config), config.mlflow.registered_model
    client.update_model_version(name, "2", description="Ada: look at the threats first.")
    step.execute("report", report.run)
    assert registry.version(config, 2).description == "Ada: look at the threats first."
