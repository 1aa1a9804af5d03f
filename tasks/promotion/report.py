"""Write report.html: one self-contained page from which a reviewer can decide. It loads nothing from anywhere."""

import base64
import logging
from pathlib import Path

import polars as pl

from tasks import files, page
from tasks.config import Config
from tasks.labels import LABELS, TYPES, answer
from tasks.promotion import registry
from tasks.promotion.gate import mark
from tasks.run import Run

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html.j2")
SHOWN = 200  # rows of a table on the page; all changed messages are in predictions.parquet


def run(config: Config, run: Run) -> dict:
    """Renders what the earlier steps found, writes the page into the run folder and logs it to the MLflow run."""
    verdict, evaluated = run.result("gate"), run.result("evaluate")
    filters = {
        "mark": mark,
        "words": words,
        "figure": lambda value: "–" if value is None else f"{value:.3f}".replace("-", "−"),
        "signed": lambda value: f"{value:+.3f}".replace("-", "−"),
        "percent": lambda value: f"{100 * value:.1f}".removesuffix(".0") + "\u00a0%",
    }
    against = "champion" if evaluated["champion"] else "baseline"
    predictions = pl.read_parquet(run.folder / "predictions.parquet")
    changes = changed(predictions, against)
    html = page.render(
        TEMPLATE,
        filters,
        run_id=run.id,
        verdict=verdict,
        evaluated=evaluated,
        warnings=[check for check in verdict["checks"] if mark(check) == "warning"],
        missed=[check for check in verdict["checks"] if mark(check) == "failed"],
        models=[name for name in ("challenger", "champion", "baseline") if evaluated[name]],
        types=TYPES,
        against=against,
        changed=changes,
        shown=SHOWN,
        errors=files.read_json(run.folder / "errors.json"),
        capabilities=by_language(evaluated["behaviour"]["capabilities"]),
        failed=files.read_json(run.folder / "behaviour.json")["challenger"]["failed"],
        plots=pictures(config.workspace / "plots" / run.id),
        prepared=run.result("prepare"),
        validation=[run.result(step) for step in ("validate_raw", "validate_prepared")],
        lineage=registry.tags(config, verdict["version"]),
        mode=config.promotion.mode,
        name=config.mlflow.registered_model,
    )
    target = run.folder / "report.html"
    files.write_text(target, html)
    registry.log_to_run(config, run.result("train")["mlflow_run"], {}, [target])
    log.info("the report is at %s", target)
    return {"report": str(target), "changed": len(changes)}


def changed(predictions: pl.DataFrame, against: str) -> list[dict]:
    """Messages whose answer differs between the challenger and the other model: first those whose `toxic`
    does, the most clear-cut first.

    Each as {text, language, truth, before, after, better, score}; `better` is None where the truth agrees with neither
    or both of the two in `toxic`.
    """
    after = predictions.select([f"decision_{label}" for label in LABELS]).to_numpy()
    before = predictions.select([f"{against}_decision_{label}" for label in LABELS]).to_numpy()
    rows = []
    for k, row in enumerate(predictions.iter_rows(named=True)):
        was, now = answer(before[k]), answer(after[k])
        if was == now:
            continue
        right_before, right_after = was["toxic"] == bool(row["toxic"]), now["toxic"] == bool(row["toxic"])
        rows.append(
            {
                "text": row["text"],
                "language": row["language"],
                "truth": words(answer([row[label] or 0 for label in LABELS])),
                "before": words(was),
                "after": words(now),
                "better": None if right_before == right_after else right_after,
                "blur": bool(row["toxic"] or was["toxic"] or now["toxic"]),
                "score": row["probability_toxic"],
            }
        )
    return sorted(rows, key=lambda row: (row["better"] is None, -abs(row["score"] - 0.5)))


def by_language(capabilities: list[dict]) -> dict[tuple[str, str], dict[str, dict]]:
    """Behavioural pass rates as the page shows them: {(kind, capability): {language: {cases, pass_rate}}}."""
    found = {}
    for row in capabilities:
        found.setdefault((row["kind"], row["capability"]), {})[row["language"]] = row
    return found


def words(found: dict) -> str:
    return ", ".join(["toxic", *found["labels"]]) if found["toxic"] else "clean"


def pictures(folder: Path) -> dict[str, str]:
    """The plots as data URLs, by name."""
    return {
        file.stem: "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        for file in sorted(folder.glob("*.png"))
    }
