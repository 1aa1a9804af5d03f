"""Write validation.html: what the suites found in a run's data, on one page that loads nothing from anywhere."""

from pathlib import Path

from tasks import files, page
from tasks.config import Config
from tasks.data.verdicts import failed, limits_in_words, number
from tasks.run import Run

TEMPLATE = Path(__file__).with_name("validation.html.j2")
STAGES = {"raw": "Raw files", "prepared": "Prepared splits"}


def write(config: Config, run: Run) -> Path:
    """Renders what has been validated so far in this run, and returns the page's path."""
    stages = {
        title: files.read_json(run.folder / f"validation_{stage}.json")
        for stage, title in STAGES.items()
        if (run.folder / f"validation_{stage}.json").exists()
    }
    verdicts = [verdict for result in stages.values() for verdict in result["expectations"]]
    distances = [row for result in stages.values() for row in result["drift"]]
    html = page.render(
        TEMPLATE,
        {"limits": limits_in_words, "number": number, "things": things},
        run_id=run.id,
        stages=stages,
        **{severity: failed(verdicts, severity) for severity in ("critical", "warning", "info")},
        distances=distances,
        limits={kind: getattr(config.validation.drift, kind) for kind in ("label", "mix", "length")},
        champion_run=next((result["champion_run"] for result in stages.values() if result["champion_run"]), None),
        prepared=run.result("prepare") if run.has("prepare") else None,
    )
    target = run.folder / "validation.html"
    files.write_text(target, html)
    return target


def things(count: int, thing: str) -> str:
    """`1 warning`, `2 warnings`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
