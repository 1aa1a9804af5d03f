"""Notices: real runs by Airflow, a real mail server and a real web server on loopback."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Message
from conftest import free_port, run_to_the_end

from dags import notices

PARAMS = {"profile": "demo"}


@pytest.fixture
def mails():
    """What a mail server on loopback receives, and its port."""
    received = []

    class Keep(Message):
        def handle_message(self, message):
            received.append(message)

    controller = Controller(Keep(), hostname="127.0.0.1", port=free_port())
    controller.start()
    yield SimpleNamespace(received=received, port=controller.port)
    controller.stop()


@pytest.fixture
def posts():
    """What a web server on loopback receives, and its port."""
    received = []

    class Keep(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, json.loads(body)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Keep)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(received=received, port=server.server_port)
    server.shutdown()
    server.server_close()


@pytest.fixture
def configured(monkeypatch):
    """A function that defines Airflow connections by id, and names them for the notices."""

    def configure(**connections):
        for name, connection in connections.items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(connection))
        monkeypatch.setenv("TOXIC_NOTICES", ", ".join(connections))

    return configure


def mail(port, **extra):
    extra = {"disable_ssl": True, "disable_tls": True, "from_email": "airflow@example.org", "retry_limit": 0, **extra}
    return {"conn_type": "smtp", "host": "127.0.0.1", "port": port, "extra": extra}


def run(dag, meanwhile=lambda: None, **conf):
    return run_to_the_end(dag, meanwhile, **PARAMS, **conf).state


def test_a_run_tells_of_the_gate_and_the_swap_by_mail_slack_and_web(weekly, steps, configured, mails, posts):
    web = {"conn_type": "http", "host": f"http://127.0.0.1:{posts.port}/hook"}
    slack = {"conn_type": "slackwebhook", "host": f"http://127.0.0.1:{posts.port}", "password": "/T0/B0/x"}
    configured(people=mail(mails.port, to="ada@example.org, bob@example.org"), room=slack, web=web)
    assert run(weekly) == "success"
    assert [message["Subject"] for message in mails.received] == [
        "version 7 passed the gate",
        "version 7 is in service",
    ]
    assert mails.received[0]["X-RcptTo"] == "ada@example.org, bob@example.org"
    assert "warning: Calibration error 0.13 should be &lt;= 0.1" in text_of(mails.received[0])
    told = [body for path, body in posts.received if path == "/hook"]
    assert [notice["event"] for notice in told] == ["gate", "swap"]
    assert told[1]["text"] == "It replaces version 6."
    assert told[1]["url"].startswith("http://airflow.example:8088/dags/toxicity_weekly/runs/")
    assert [body["text"].splitlines()[0] for path, body in posts.received if path == "/T0/B0/x"] == [
        "*version 7 passed the gate*",
        "*version 7 is in service*",
    ]


def test_slack_gets_what_people_typed_as_plain_text(configured, posts):
    configured(room={"conn_type": "slackwebhook", "host": f"http://127.0.0.1:{posts.port}", "password": "/T0/B0/x"})
    typed = "<!channel> <http://x|it's & fine>"
    notices.deliver("room", notices.Message("failure", typed, typed, "http://y/?a=1&b=2"))
    ((_, body),) = posts.received
    plain = "&lt;!channel&gt; &lt;http://x|it's &amp; fine&gt;"
    assert body["text"] == f"*{plain}*\n{plain}\nhttp://y/?a=1&amp;b=2"


def text_of(message) -> str:
    (part,) = message.get_payload()
    return part.get_payload(decode=True).decode()


def test_a_missed_gate_and_a_failed_step_are_told_of(weekly, steps, configured, posts):
    configured(web={"conn_type": "http", "host": f"http://127.0.0.1:{posts.port}"})
    steps(exit={"gate": 99})
    assert run(weekly) == "success"
    steps(exit={"prepare": 2})
    assert run(weekly) == "failed"
    missed, failed = (body for _, body in posts.received)
    assert (missed["event"], missed["subject"]) == ("gate", "version 7 did not pass the gate")
    assert missed["text"].startswith("F1 types 0.64 should be >= 0.7; warning: Calibration")
    assert (failed["event"], failed["subject"]) == ("failure", "toxicity_weekly: prepare failed")
    assert failed["text"] == "prepare says why"
    assert failed["url"].endswith("/tasks/prepare")


def test_a_waiting_review_is_told_of_also_when_it_cannot_be(weekly, steps, configured, posts):
    from test_runs import answer

    nowhere = {"conn_type": "http", "host": f"http://127.0.0.1:{free_port()}"}
    configured(nowhere=nowhere, web={"conn_type": "http", "host": f"http://127.0.0.1:{posts.port}"})
    steps(mode="review", review_hours=36)
    assert run(weekly, meanwhile=lambda: answer("Approve", None, [])) == "success"
    (review,) = (body for _, body in posts.received if body["event"] == "review")
    assert review["subject"] == "version 7 waits for your review"
    assert "within 36 hours" in review["text"]
    assert review["url"].endswith("/tasks/review/required_actions")


@pytest.mark.parametrize(
    ("connection", "why"),
    [
        (None, "AirflowNotFoundException"),
        ({"conn_type": "ftp", "host": "x"}, "its type ftp is not one of smtp, slackwebhook, http"),
        (mail(1), "the connection's extra lacks"),
        (mail(free_port(), to="ada@example.org"), "ConnectionRefusedError"),
    ],
)
def test_what_cannot_be_delivered_is_a_line_in_the_log(configured, monkeypatch, caplog, connection, why):
    configured(**({"people": connection} if connection else {}))
    if connection is None:
        monkeypatch.setenv("TOXIC_NOTICES", "people")

    class Event(notices.Notice):
        def message(self, context):
            return notices.Message("swap", "version 7 is in service", "text", "http://x")

    with caplog.at_level(logging.INFO):
        Event()({"dag": None})
    assert "version 7 is in service: text http://x" in caplog.text
    assert "the notice could not be delivered by people" in caplog.text
    assert why in caplog.text


def test_without_a_connection_a_notice_is_a_line_in_the_log(caplog):
    class Event(notices.Notice):
        def message(self, context):
            return notices.Message("swap", "version 7 is in service", "{{ not a template }}", "http://x")

    with caplog.at_level(logging.INFO):
        Event()({"dag": None})
    assert "version 7 is in service: {{ not a template }} http://x" in caplog.text
    assert "delivered" not in caplog.text
