"""Notices to people: a step failed, the gate's verdict, a review waits, a version went into service.

TOXIC_NOTICES names the Airflow connections that carry them, separated by commas; without any, a notice is a line of
the task's log. The connection's type says how: `smtp` (recipients in its extra `to`), `slackwebhook` or `http` (a POST
of JSON). A notice that can't be delivered is logged as a warning and changes nothing else.
"""

import html
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from airflow.sdk import BaseNotifier, Connection, Context

from dags import registry
from dags.steps import run_folder, run_url

log = logging.getLogger(__name__)

TIMEOUT_S = 10


@dataclass(frozen=True)
class Message:
    """What people read: one line, a few more, and where to go on."""

    event: str
    subject: str
    text: str
    url: str


class Notice(BaseNotifier):
    """A callback of a task that tells people of an event; each kind says its message."""

    def message(self, context: Context) -> Message:
        raise NotImplementedError

    def notify(self, context: Context) -> None:
        try:
            message = self.message(context)
            log.info("%s: %s %s", message.subject, message.text, message.url)
            connections = [name.strip() for name in os.environ.get("TOXIC_NOTICES", "").split(",") if name.strip()]
        except Exception as error:
            log.warning("no notice could be written: %s: %s", type(error).__name__, error)
            return
        for connection in connections:
            try:
                deliver(connection, message)
            except Exception as error:
                log.warning("the notice could not be delivered by %s: %s: %s", connection, type(error).__name__, error)


class Failure(Notice):
    def message(self, context: Context) -> Message:
        ti, why = context["ti"], str(context.get("exception") or "see its log")
        return Message("failure", f"{ti.dag_id}: {ti.task_id} failed", why, url_of(context, f"/tasks/{ti.task_id}"))


class GateVerdict(Notice):
    def message(self, context: Context) -> Message:
        gate = result_of_step(folder_of(context), "gate")
        missed = [check["sentence"] for check in gate["checks"] if check["binds"] and check["passed"] is False]
        warned = [check["sentence"] for check in gate["checks"] if not check["binds"] and check["passed"] is False]
        verdict = "passed the gate" if gate["passed"] else "did not pass the gate"
        text = "; ".join([*missed, *(f"warning: {sentence}" for sentence in warned)]) or "no check was missed"
        return Message("gate", f"version {gate['version']} {verdict}", text, registry.version_page(gate["version"]))


class AwaitsReview(Notice):
    def message(self, context: Context) -> Message:
        task, version = context["task"], result_of_step(folder_of(context), "gate")["version"]
        hours = f"{task.response_timeout.total_seconds() / 3600:g}"
        text = f"It passed the gate. Without an answer within {hours} hours it is rejected."
        url = url_of(context, f"/tasks/{task.task_id}/required_actions")
        return Message("review", f"version {version} waits for your review", text, url)


class Swapped(Notice):
    def message(self, context: Context) -> Message:
        swap = result_of_step(folder_of(context), "swap")
        before = swap.get("previous_version")
        text = f"It replaces version {before}." if before else "Nothing was in service before."
        return Message("swap", f"version {swap['served_version']} is in service", text, url_of(context))


def deliver(connection_id: str, message: Message) -> None:
    """Sends a message by the notifier of Airflow's provider for the connection's type.

    Raises:
        ValueError: there is no notifier for that type, or it lacks a recipient; and whatever the notifier raises.
    """
    connection = Connection.get(connection_id)
    # The notifiers' `notify` and not the call: that would take what a person typed for a template.
    if connection.conn_type == "smtp":
        from airflow.providers.smtp.notifications.smtp import SmtpNotifier

        to = connection.extra_dejson.get("to")
        if not to:
            raise ValueError('the connection\'s extra lacks {"to": "who@example.org"}')
        text, url = html.escape(message.text), html.escape(message.url)
        page = f'<p>{text}</p><p><a href="{url}">{url}</a></p>'
        subject = " ".join(message.subject.split())
        SmtpNotifier(smtp_conn_id=connection_id, to=to, subject=subject, html_content=page).notify({})
    elif connection.conn_type == "slackwebhook":
        from airflow.providers.slack.notifications.slack_webhook import SlackWebhookNotifier

        # What people typed must not call a whole channel (<!channel>) or hide where a link leads (<http://x|y>).
        text = html.escape(f"*{message.subject}*\n{message.text}\n{message.url}", quote=False)
        SlackWebhookNotifier(slack_webhook_conn_id=connection_id, text=text, timeout=TIMEOUT_S).notify({})
    elif connection.conn_type == "http":
        from airflow.providers.http.notifications.http import HttpNotifier

        HttpNotifier(http_conn_id=connection_id, json=asdict(message), extra_options={"timeout": TIMEOUT_S}).notify({})
    else:
        raise ValueError(f"its type {connection.conn_type} is not one of smtp, slackwebhook, http")


def outcome(folder: Path) -> str | None:
    """In a sentence, what a run that ended well came to; None if its folder does not say."""
    swap = result_of_step(folder, "swap")
    if swap:
        return f"Version {swap['served_version']} is in service."
    results = [result_of_step(folder, step) for step in ("decide", "gate", "download")]
    return next((result["reason"] for result in results if result and result["status"] == "skipped"), None)


def result_of_step(folder: Path, step: str) -> dict | None:
    file = folder / f"{step}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def folder_of(context: Context) -> Path:
    return run_folder(context["ti"].dag_id, context["ti"].run_id)


def url_of(context: Context, page: str = "") -> str:
    return run_url(context["ti"].dag_id, context["ti"].run_id) + page
