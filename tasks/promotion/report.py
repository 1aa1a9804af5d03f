"""Write report.html: one self-contained page from which a reviewer can decide. It loads nothing from anywhere."""

import logging
import math
import os
import re
from pathlib import Path

import polars as pl

from tasks import files, page
from tasks.config import Config
from tasks.errors import without_credentials
from tasks.labels import TYPES
from tasks.promotion import compare, in_service, registry, signatures
from tasks.promotion.gate import LANGUAGE_NAMES, mark
from tasks.run import Run

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html.j2")
SHOWN = 100  # changed messages of each kind, and failed checks, on the page; the files beside it have all
SHOWN_CHARS = 400
FEW = 10  # positives, below which an interval says little
LINK = "[Review page]("  # how the description of a version begins that is this step's


def run(config: Config, run: Run) -> dict:
    """Renders what the earlier steps found, and logs the page to the MLflow run, to which the version then links.

    Writes report.html and changes.json, every message whose answer changes, into the run folder.
    Returns {"report": path, "url": where a browser opens it, "changed": n, "broken": n, "fixed": n, "types": n}.
    """
    evaluated, mlflow_run = run.result("evaluate"), run.result("train")["mlflow_run"]
    against = "champion" if evaluated["champion"] else "baseline"
    predictions = pl.read_parquet(run.folder / "predictions.parquet", glob=False)
    changes = compare.changed(predictions, against)
    counts = {kind: sum(row["change"] == kind for row in changes) for kind in ("broken", "fixed", "types")}
    serving = in_service.warn(config)
    target, all_changes = run.folder / "report.html", run.folder / "changes.json"
    files.write_json(all_changes, changes)
    values = {
        **found_before(config, run),
        **compared(config, predictions, evaluated, against),
        "against": against,
        "changed": [row for kind in counts for row in [c for c in changes if c["change"] == kind][:SHOWN]],
        "counts": counts,
        "data": compare.data(config, run, evaluated),
        "champion": (evaluated.get("in_service") or {}).get("number", evaluated["champion_version"]),
        "service_warning": serving and serving.warning,
        "url": page_url(config, mlflow_run, target),
    }
    files.write_text(target, page.render(TEMPLATE, FILTERS, **values))
    registry.log_to_run(config, mlflow_run, {}, [target, all_changes])
    link(config, values)
    log.info("the report is at %s", target)
    return {"report": str(target), "url": values["url"], "changed": len(changes)} | counts


def found_before(config: Config, run: Run) -> dict:
    """What earlier steps found, and the configuration, as the template names them."""
    verdict, behaviour = run.result("gate"), files.read_json(run.folder / "behaviour.json")
    plots = config.workspace / "plots" / run.id
    return {
        "run_id": run.id,
        "name": config.mlflow.registered_model,
        "mode": config.promotion.mode,
        "hours": config.promotion.review_hours,
        "verdict": verdict,
        "missed": [check for check in verdict["checks"] if mark(check) == "failed"],
        "warnings": [check for check in verdict["checks"] if mark(check) == "warning"],
        "evaluated": run.result("evaluate"),
        "errors": files.read_json(run.folder / "errors.json"),
        "capabilities": capabilities(behaviour),
        "failed_cases": behaviour["challenger"]["failed"],
        "validations": {title: validated(config, run.result(step)) for title, step in VALIDATIONS.items()},
        "lineage": lineage(registry.tags(config, verdict["version"])),
        "types": TYPES,
        "languages": LANGUAGE_NAMES,
        "shown": SHOWN,
        "precision_recall": precision_recall(files.read_json(plots / "precision_recall.json")["curves"]),
        "reliability": reliability(files.read_json(plots / "reliability.json")),
        "confusion": files.read_json(plots / "confusion.json"),
    }


VALIDATIONS = {"Raw files": "validate_raw", "Prepared splits": "validate_prepared"}


def validated(config: Config, result: dict) -> dict:
    """A validation's result, whose distances from the champion's data know their limit."""
    limits = config.validation.drift.model_dump()
    rows = [row | {"limit": limits[row["kind"]]} for row in result["drift"]]
    return {**result, "drift": [row | {"within": row["distance"] <= row["limit"]} for row in rows]}


def compared(config: Config, predictions: pl.DataFrame, evaluated: dict, against: str) -> dict:
    slices = compare.slices(config, predictions, evaluated)
    return {
        "models": [name for name in compare.MODELS if evaluated[name]],
        "figures": compare.figures(evaluated),
        "slices": slices,
        # Slice by slice against what serves now; of the baseline the two F1 will do where there is a champion.
        "differences": {
            other: compare.differences(evaluated, slices if other == against else [], other)
            for other in evaluated["gain"]
        },
    }


def capabilities(behaviour: dict[str, dict]) -> dict[tuple[str, str, str], dict[str, dict]]:
    """Behavioural pass rates as the page shows them: {(kind, capability, language): {model: {cases, pass_rate}}}."""
    found = {}
    for model in compare.MODELS:
        for row in behaviour.get(model, {}).get("capabilities", []):
            found.setdefault((row["kind"], row["capability"], row["language"]), {})[model] = row
    return found


def precision_recall(curves: dict[str, dict]) -> dict:
    """The curves of `plots.precision_recall_data` as the page draws them, each marked where the model decides."""
    drawn = {}
    for name, curve in curves.items():
        at = curve["decides_at"]
        words = f"{name} at its threshold: recall {at['recall']:.3f}, precision {at['precision']:.3f}"
        drawn[name] = {
            "points": list(zip(curve["recall"], curve["precision"])),
            "marks": [[at["recall"], at["precision"], 4, words]],
        }
    return {"words": ", ".join(f"{name} {curve['pr_auc']:.3f}" for name, curve in curves.items()), "curves": drawn}


def reliability(models: dict[str, dict]) -> dict:
    """`metrics.calibration` of each model as the page draws it, with a mark for each bin, the larger the more
    messages it holds."""
    drawn = {}
    for name, of in models.items():
        bins = list(zip(of["confidence"], of["share"], of["count"]))
        words = "{}: {} predicted {:.2f} on average, {:.2f} of them are toxic"
        most = max(of["count"])
        marks = [
            [x, y, round(1.5 + 3.5 * (count / most) ** 0.25, 2), words.format(name, things(count, "message"), x, y)]
            for x, y, count in bins
        ]
        drawn[name] = {"points": [bin_[:2] for bin_ in bins], "marks": marks}
    return {"words": ", ".join(f"{name} {of['ece']:.3f}" for name, of in models.items()), "curves": drawn}


# What a reviewer looks for first; other tags follow in the order of their names.
FIRST = ("run_id", "dag_run_url", "git_commit", "data_version", "base_model", "base_sha256", "model_version")
ELSEWHERE = ("report", "gate_overrides", "gate_limits")  # is this page; are tables on it


def lineage(tags: dict[str, str]) -> dict[str, str]:
    others = {name for name in tags if not name.startswith(signatures.PREFIX)} - {*FIRST, *ELSEWHERE}
    names = [name for name in FIRST if name in tags] + sorted(others)
    return {name: tags[name] for name in names}


# The way to the page --------------------------------------------------------------------------------------------------


def page_url(config: Config, mlflow_run: str, target: Path) -> str:
    """Where a browser opens the page: as an artifact in MLflow, or the file itself where no server is configured.

    TOXIC_MLFLOW_URL is MLflow's address for people: in a network of containers the server has another one. A password
    in the address is not for all who read the link: the browser asks for theirs.
    """
    server = os.environ.get("TOXIC_MLFLOW_URL") or config.mlflow.tracking_uri
    if not server.startswith("http"):
        return target.as_uri()
    experiment = registry.client(config).get_run(mlflow_run).info.experiment_id
    server = without_credentials(server.rstrip("/")).replace("://***@", "://")
    return f"{server}/#/experiments/{experiment}/runs/{mlflow_run}/artifacts/{target.name}"


def link(config: Config, values: dict) -> None:
    """Names the page in the version's tag `report` and in its description, unless a person has written one."""
    version = values["verdict"]["version"]
    registry.tag(config, version, report=values["url"])
    written = registry.version(config, version).description
    if not written or written.startswith(LINK):
        client, name = registry.client(config), config.mlflow.registered_model
        client.update_model_version(name, str(version), description=f"{LINK}{values['url']})\n\n{summary(values)}")


def summary(values: dict) -> str:
    """The verdict in a few lines of Markdown."""
    ours, counts = values["evaluated"]["challenger"], values["counts"]
    lines = [f"Gate **{'passed' if values['verdict']['passed'] else 'failed'}**."]
    lines += [f"{check['sentence']}." for check in values["missed"]]
    lines += [f"F1 toxic {figure(ours['f1_toxic'])}, F1 types {figure(ours['f1_types'])}."]
    for other, found in values["differences"].items():
        for kind in ("better", "worse"):
            if found[kind]:
                gains = ", ".join(f"{row['words']} {signed(row['gain'])}" for row in found[kind])
                lines.append(f"{kind.capitalize()} than the {other}: {gains}.")
    lines.append(f"Against the {values['against']} {counts['fixed']} answers are fixed and {counts['broken']} broken.")
    return "\n".join(f"- {line}" for line in lines)


# Figures in words -----------------------------------------------------------------------------------------------------


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + "\u00a0%"


def typeset(sentence: str) -> str:
    """A sentence of the gate as the figures beside it are written: with minus signs, and with no break before %."""
    return re.sub(r"(?<!\S)-(?=\d)", "−", sentence).replace(" %", "\u00a0%")


def number(count: int) -> str:
    return f"{count:,}"


def things(count: int, thing: str) -> str:
    """`1 message`, `2 messages`."""
    return f"{number(count)} {thing}{'' if count == 1 else 's'}"


def words(found: dict) -> str:
    return ", ".join(["toxic", *found["labels"]]) if found["toxic"] else "clean"


def cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def axis(rows: list[dict]) -> float:
    """Where the scale of a chart begins, 0 to 0.9 in tenths, so that the intervals are on it; that of a slice of a few
    messages, which may reach to 0, is cut off there rather than press the others together."""
    rows = [row for row in rows if row.get("positives", FEW) >= FEW] or rows
    lows = [(of["interval"] or [of["value"]])[0] for row in rows for of in row["models"].values()]
    return min(math.floor(10 * min(lows, default=0)) / 10, 0.9)


FILTERS = {of.__name__: of for of in (mark, figure, signed, percent, typeset, number, things, words, cut, axis)}
