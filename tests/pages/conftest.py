"""Pages of two real runs on generated data, and a real Chromium to open them in."""

import os
import shutil
from pathlib import Path

import pytest
from bag_runs import CHANGED_LIMITS, SHOWN, SMALL, judged, retrained
from playwright.sync_api import sync_playwright
from signing import tag

from tasks import step
from tasks.promotion import registry, report

FOUND = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
CHROMIUM = next((path for path in FOUND if path), None)


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM:
        why = "no chromium on PATH: apt-get install chromium"
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    with sync_playwright() as playwright:
        # Chromium's own sandbox can not be had by root, as whom containers run.
        started = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False)
        yield started
        started.close()


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """A workspace of the pages' own, for steps by hand."""
    workspace = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOXIC_WORKSPACE", str(workspace))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace}/mlflow.db")
        for name in ("TOXIC_RUN_ID", "TOXIC_OVERRIDES", "TOXIC_MLFLOW_URL"):
            patch.delenv(name, raising=False)
        yield workspace


@pytest.fixture(scope="session")
def pages(environment):
    """The pages, by name: the first version of all, which misses the gate; the second, on other data, held against the
    first, as if that were of another profile, under changed limits; that one again, held against itself; and the second
    run's pages about its data."""
    first = retrained([*SMALL, "seed=1"], share=0.02)
    config = step.open_run("report", [])[1]
    tag(config, 1, profile="gpu")
    registry.set_alias(config, "champion", 1)
    retrained([*SMALL, "seed=2", "promotion.mode=review"], share=0.9)
    run = step.open_run("report", [])[0]
    run.save("gate", run.result("gate") | CHANGED_LIMITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SHOWN", SHOWN)
        second = step.execute("report", report.run)
    found = {"first": Path(first["report"])}
    found |= {"card": run.folder / "card.html", "validation": run.folder / "validation.html"}
    # What the last one below writes anew.
    found["second"] = Path(shutil.copy(second["report"], environment / "second.html"))
    found["changes"] = Path(shutil.copy(run.folder / "changes.json", environment))
    registry.set_alias(config, "champion", 2)
    registry.set_hold(config, "version 1 called every greeting toxic")
    found["unchanged"] = Path(judged()["report"])
    return found
