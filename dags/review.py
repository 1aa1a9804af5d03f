"""The review: a person says yes or no to a version that passed the gate, or the configuration says it for them."""

import json
import re
from datetime import timedelta
from pathlib import Path

import yaml
from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Context, Param

from dags import registry
from dags.notices import AwaitsReview
from dags.steps import run_folder

APPROVE, REJECT = "Approve", "Reject"
TIMED_OUT = "timed_out"  # the reason by which `decide` knows that nobody has spoken
FIGURES = {"f1_toxic": "F1 toxic", "f1_types": "F1 types"}
LANGUAGES = {"en": "English", "ru": "Russian"}


def review_task() -> "ReviewOperator":
    return ReviewOperator(
        task_id="review",
        doc_md="Waits for a person under `promotion: review`, up to `promotion.review_hours`; no answer is a no. Under "
        "`auto` and `never` it answers at once. A hold in the registry, set by a rollback, makes `auto` wait too; so "
        "do softer limits, another profile or another base model than the champion's.",
        subject="Put the new toxicity model into service?",
        options=[APPROVE, REJECT],
        defaults=REJECT,
        params={
            "reason": Param(
                None,
                type=["null", "string"],
                title="Reason",
                description="Why, in a sentence. It is kept in the registry with your name.",
            )
        },
        notifiers=AwaitsReview(),
        retries=2,  # asks again
        retry_delay=timedelta(seconds=30),
    )


class ReviewOperator(HITLOperator):
    """Asks in the Airflow UI under `promotion.mode=review`; answers by itself under `auto` and `never`.

    A hold in the registry, which a rollback sets, makes `auto` ask too, and so does what the gate found that a person
    must decide (`person` in gate.json). Its XCom is the decision that the step
    `decide` records: `{"decision": "approve" | "reject", "reviewer": str, "reason": str}`, with `"by_mode": True` where
    no person was asked: a person may be called "auto", too.
    """

    def execute(self, context: Context):
        dag_run = context["dag_run"]
        folder = run_folder(dag_run.dag_id, dag_run.run_id)
        gate, promotion = read_json(folder / "gate.json"), read_config(folder)["promotion"]
        mode = promotion["mode"]
        if mode == "never":
            return by_mode("reject", "promotion.mode is never: the version stays in the registry")
        if mode == "auto" and not gate["hold"] and not gate["person"]:
            return by_mode("approve", "promotion.mode is auto and the gate was passed")
        self.subject = f"Put version {gate['version']} of the toxicity model into service?"
        self.body = body(folder)
        self.response_timeout = timedelta(hours=promotion["review_hours"])
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict) -> dict:
        answer = super().execute_complete(context, event)
        if event.get("timedout"):
            return decision("reject", "nobody", TIMED_OUT)
        chosen = "approve" if answer["chosen_options"] == [APPROVE] else "reject"
        user = answer["responded_by_user"] or {}
        return decision(chosen, user.get("name") or "unknown", answer["params_input"].get("reason") or "")


def decision(verdict: str, reviewer: str, reason: str) -> dict:
    return {"decision": verdict, "reviewer": reviewer, "reason": reason}


def by_mode(verdict: str, reason: str) -> dict:
    return {**decision(verdict, "auto", reason), "by_mode": True}


def answer_of_review(context: Context) -> dict:
    """What the task `review` of this DAG run decided."""
    return context["ti"].xcom_pull(task_ids="review")


def body(folder: Path) -> str:
    """What a reviewer needs, as Markdown, from the results in the run folder."""
    gate, evaluate, train = (read_json(folder / f"{step}.json") for step in ("gate", "evaluate", "train"))
    version, hours, serves = gate["version"], read_config(folder)["promotion"]["review_hours"], gate.get("in_service")
    champion = serves["number"] if serves else gate["champion"]
    wrong = serves["warning"] if serves and serves["warning"] not in gate["person"] else None
    warnings = [check["sentence"] for check in gate["checks"] if check["passed"] is False]  # what binds was passed
    lines = [
        f"Version **{version}** passed the gate"
        + (f", with {len(warnings)} warnings. " if len(warnings) > 1 else ", with a warning. " if warnings else ". ")
        + (f"Version **{champion}** is in service now." if champion else "Nothing is in service yet."),
        f"[The report]({registry.report_page(train['mlflow_run'])}) · [Version {version} in MLflow]"
        f"({registry.version_page(version)})",
        *(
            [f"**Limits were changed** by {typed(gate['overridden_by'])}: {typed(gate['overridden_why'])}"]
            if gate.get("overrides")
            else []
        ),
        *([f"**The registry is wrong about what serves**: {typed(wrong)}."] if wrong else []),
        *([f"**Held**: {typed(gate['hold'])}. Automatic promotion waits for a person."] if gate["hold"] else []),
        *(f"**A person decides**: {typed(why)}." for why in gate["person"]),
        *(["**Warnings**\n\n" + "\n".join(f"- {sentence}" for sentence in warnings)] if warnings else []),
        table(["On the same test messages", "New", "Champion", "Baseline"], comparison(evaluate)),
        table(
            ["What the new one gains, with 95 % interval", "Over the champion", "Over the baseline"], gains(evaluate)
        ),
        table(["Check", "Measured", "Required", "Verdict"], [check_row(check) for check in gate["checks"]]),
        f"**{APPROVE}** exports the model, proves it in a second Triton server, then swaps it into the live one; a "
        f"failure on the way leaves {f'version {champion}' if champion else 'the server'} as it is. **{REJECT}**, or "
        f"no answer within {hours:g} hours, leaves the version in the registry; `toxicity_release` can still put it "
        "into service.",
        f"The report is also in the workspace: `{folder / 'report.html'}`",
    ]
    return "\n\n".join(lines)


def typed(text: str) -> str:
    r"""What a person typed, as one line of Markdown that means just these characters.

    >>> typed("see [here](http://x),\n**Warnings**")
    'see \\[here\\](http://x), \\*\\*Warnings\\*\\*'
    """
    return re.sub(r"[\\`*_\[\]<>|~&]", r"\\\g<0>", " ".join(text.split()))


def check_row(check: dict) -> list[str]:
    verdict = {True: "passed", False: "missed, only a warning", None: "does not apply"}[check["passed"]]
    required = "–" if check["limit"] is None else f"{check['comparison']} {number(check['limit'])}"
    return [check["title"], number(check["value"]), required, verdict]


def comparison(evaluate: dict) -> list[list[str]]:
    """Rows of each F1 by model, overall, by language and in the behavioural checks."""
    models = [evaluate["challenger"], evaluate["champion"], evaluate["baseline"]]
    names = {**FIGURES, "f1_types_macro": "F1 types, macro", "behaviour": "Behavioural checks passed"}
    rows = [[title, *(number(model and model[name]) for model in models)] for name, title in names.items()]
    for language in evaluate["challenger"]["languages"]:
        figures = [model and model["languages"][language]["f1_toxic"] for model in models]
        rows.insert(-1, [f"F1 toxic, {LANGUAGES[language]}", *map(number, figures)])
    return rows


def gains(evaluate: dict) -> list[list[str]]:
    others = [evaluate["gain"].get("champion"), evaluate["gain"]["baseline"]]
    return [[title, *(signed(other and other[name]) for other in others)] for name, title in FIGURES.items()]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def signed(gain: dict | None) -> str:
    return "–" if gain is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(gain["gain"], *gain["interval"])


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def read_config(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
