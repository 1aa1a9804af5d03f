"""Logins, sessions and roles of the stack's Airflow: a real API server with the FAB auth manager."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from itertools import product

import httpx
import jwt
import pytest
import yaml
from conftest import ROOT, free_port

USERS = ("admin", "operator", "reviewer", "viewer")
WEEKLY, RELEASE = "/api/v2/dags/toxicity_weekly", "/api/v2/dags/toxicity_release"
OURS = ("AIRFLOW__API_AUTH__JWT", "AIRFLOW__FAB__", "AIRFLOW__CORE__AUTH_MANAGER")
# What `init` does in the stack, but for PostgreSQL's part and the GPU's pool.
INIT = """
import sys
sys.path.insert(0, "docker")
import airflow_init
from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder
from airflow.utils.db import initdb
initdb()
with get_application_builder() as builder:
    airflow_init.create_users(builder.sm)
"""


def password(user: str) -> str:
    return f"{user}-has-a-password"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of an API server with the settings, the plugin and the users of the stack; on SQLite."""
    home, port = tmp_path_factory.mktemp("airflow"), free_port()
    (home / "plugins").mkdir()
    for module in ("airflow_logins.py", "login_limit.py"):
        (home / "plugins" / module).symlink_to(ROOT / "docker" / module)
    stack = yaml.safe_load((ROOT / "docker-compose.yaml").read_text(encoding="utf-8"))["x-airflow"]["environment"]
    environment = {
        **os.environ,
        **{name: str(value) for name, value in stack.items() if name.startswith(OURS)},
        **{f"AIRFLOW_{user.upper()}_PASSWORD": password(user) for user in USERS},
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        "AIRFLOW__API__SECRET_KEY": "a key of the tests",
        "AIRFLOW__API_AUTH__JWT_SECRET": "another key of the tests " * 3,
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(home / "plugins"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
    }
    subprocess.run([sys.executable, "-c", INIT], cwd=ROOT, env=environment, check=True, capture_output=True)
    command = [sys.executable, "-m", "airflow", "api-server", "--host=127.0.0.1", f"--port={port}"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{port}/api/v2/monitor/health"):
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def ask(server: str, method: str, path: str, **more) -> httpx.Response:
    return httpx.request(method, server + path, trust_env=False, timeout=60, **more)


def token(server: str, user: str, secret: str | None = None, **more) -> httpx.Response:
    return ask(server, "POST", "/auth/token", json={"username": user, "password": secret or password(user)}, **more)


def at_the_page(server: str, user: str, secret: str | None = None, cookies=None) -> tuple[httpx.Response, dict]:
    """The answer to a login at Airflow's page, and the cookies that a browser has after it."""
    with httpx.Client(base_url=server, trust_env=False, timeout=60, cookies=cookies) as browser:
        csrf = re.search(r'name="csrf_token"[^>]*value="([^"]+)"', browser.get("/auth/login/").text)[1]
        form = {"username": user, "password": secret or password(user), "csrf_token": csrf}
        return browser.post("/auth/login/", data=form), dict(browser.cookies)


# docs/roles.md, line by line ------------------------------------------------------------------------------------------

RUN, TASK = "dagRuns/x", "dagRuns/x/taskInstances/train"
# What stands for each line; there is no DAG in the database, so that what is allowed ends with 404.
LINES = {
    "look at DAGs, runs, logs, results and pools": [
        ("GET", "/api/v2/dags"),
        ("GET", f"{WEEKLY}/dagRuns"),
        ("GET", f"{WEEKLY}/{TASK}/logs/1"),
        ("GET", f"{WEEKLY}/{RUN}/taskInstances/gate/xcomEntries"),
        ("GET", "/api/v2/dags/~/dagRuns/~/hitlDetails"),
        ("GET", "/api/v2/importErrors"),
        ("GET", "/api/v2/pools"),
    ],
    "trigger `toxicity_weekly`": [("POST", f"{WEEKLY}/dagRuns", {"logical_date": None})],
    "pause `toxicity_weekly`": [("PATCH", WEEKLY, {"is_paused": True})],
    "clear, mark and note runs and tasks of `toxicity_weekly`": [
        ("PATCH", f"{WEEKLY}/{RUN}", {"state": "failed"}),
        ("PATCH", f"{WEEKLY}/{RUN}", {"note": "x"}),
        ("PATCH", f"{WEEKLY}/{TASK}", {"new_state": "failed"}),
        ("POST", f"{WEEKLY}/clearTaskInstances", {"dag_run_id": "x"}),
        ("POST", f"{WEEKLY}/{RUN}/clear", {}),
    ],
    "answer a review": [
        ("PATCH", f"{WEEKLY}/dagRuns/x/taskInstances/review/-1/hitlDetails", {"chosen_options": ["Approve"]})
    ],
    "trigger and pause `toxicity_release`": [
        ("POST", f"{RELEASE}/dagRuns", {"logical_date": None}),
        ("PATCH", RELEASE, {"is_paused": True}),
    ],
    "clear and mark runs of `toxicity_release`": [
        ("PATCH", f"{RELEASE}/{RUN}", {"state": "failed"}),
        ("POST", f"{RELEASE}/clearTaskInstances", {"dag_run_id": "x"}),
    ],
    "delete runs and DAGs": [("DELETE", f"{WEEKLY}/{RUN}"), ("DELETE", WEEKLY), ("DELETE", f"{RELEASE}/{RUN}")],
    "connections, variables, pools, assets: read or change": [
        ("GET", "/api/v2/connections"),
        ("POST", "/api/v2/connections", {}),
        ("GET", "/api/v2/variables"),
        ("POST", "/api/v2/variables", {}),
        ("DELETE", "/api/v2/pools/x"),
        ("POST", "/api/v2/assets/1/materialize", {}),
    ],
    "the audit log, plugins and providers": [
        ("GET", "/api/v2/eventLogs"),
        ("GET", "/api/v2/plugins"),
        ("GET", "/api/v2/providers"),
    ],
    "list and change users and roles": [
        ("GET", "/auth/fab/v1/users"),
        ("POST", "/auth/fab/v1/users", {}),
        ("GET", "/auth/fab/v1/roles"),
    ],
}


def written() -> dict[str, dict[str, str]]:
    """Line: who may, in docs/roles.md."""
    text = (ROOT / "docs" / "roles.md").read_text(encoding="utf-8")
    tables = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
        for table in text.split("\n\n")
    ]
    (table,) = [table for table in tables if table and table[0][1:] == list(USERS)]
    return {row[0]: dict(zip(USERS, row[1:])) for row in table[2:]}


@pytest.fixture(scope="module")
def bearers(server):
    return {user: {"Authorization": f"Bearer {token(server, user).json()['access_token']}"} for user in USERS}


def test_docs_and_tests_have_the_same_lines():
    assert written().keys() == LINES.keys()


@pytest.mark.parametrize("line, user", product(LINES, USERS))
def test_a_user_may_do_what_the_docs_say_and_no_more(server, bearers, line, user):
    for method, path, *body in LINES[line]:
        found = ask(server, method, path, json=body[0] if body else None, headers=bearers[user])
        if written()[line][user] == "yes":
            assert found.status_code not in (401, 403, 429), (method, path, found.text)
        else:
            assert found.status_code == 403, (method, path, found.status_code, found.text)


# Sessions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way_out", ["/auth/logout", "/auth/logout/", "/api/v2/auth/logout"])
def test_what_a_browser_had_before_its_logout_opens_nothing_after_it(server, way_out):
    _, cookies = at_the_page(server, "viewer")
    assert opened(server, cookies) == [200, True, 200]
    _, others = at_the_page(server, "viewer")
    assert ask(server, "GET", way_out, cookies=cookies).status_code in (302, 307)
    assert opened(server, {"_token": cookies["_token"]}) == [403, False, 302]
    assert opened(server, {"session": cookies["session"]}) == [401, False, 302]
    assert opened(server, others) == [200, True, 200], "another login of the same user goes on"


def opened(server, cookies) -> list:
    """What the API answers, whether the login page gives out another token, what a page of FAB's answers."""
    page = ask(server, "GET", "/auth/login/", cookies=cookies)
    return [
        ask(server, "GET", "/api/v2/dags", cookies=cookies).status_code,
        any(cookie.startswith("_token=ey") for cookie in page.headers.get_list("set-cookie")),
        ask(server, "GET", "/auth/users/userinfo/", cookies=cookies).status_code,
    ]


def test_a_token_is_revoked_by_a_logout_with_it(server):
    given = token(server, "viewer").json()["access_token"]
    bearer = {"Authorization": f"Bearer {given}"}
    assert ask(server, "GET", "/api/v2/dags", headers=bearer).status_code == 200
    assert ask(server, "GET", "/auth/logout", headers=bearer).status_code == 307
    assert ask(server, "GET", "/api/v2/dags", headers=bearer).status_code == 403


def test_a_token_lives_an_hour_and_a_session_a_working_day(server):
    found, cookies = at_the_page(server, "viewer")
    for given in (cookies["_token"], token(server, "viewer").json()["access_token"]):
        claims = jwt.decode(given, options={"verify_signature": False})
        assert claims["exp"] - claims["iat"] == 3600
    (session,) = [cookie for cookie in found.headers.get_list("set-cookie") if cookie.startswith("session=")]
    expires = re.search(r"Expires=([^;]+)", session)[1]
    assert 11.9 < (parsedate_to_datetime(expires).timestamp() - time.time()) / 3600 <= 12
    assert "HttpOnly" in session and "SameSite=Lax" in session


def test_cookies_are_secure_where_people_come_by_https(monkeypatch):
    sys.path.append(str(ROOT / "docker"))
    from airflow_logins import Logins

    async def app(scope, receive, send):
        headers = [(b"set-cookie", b"_token=x; HttpOnly"), (b"Set-Cookie", b"session=y; Secure"), (b"x", b"y")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    def sent(url: str) -> list:
        monkeypatch.setenv("AIRFLOW__API__BASE_URL", url)
        monkeypatch.setenv("AIRFLOW__API__SECRET_KEY", "a key of the tests")
        found = []

        async def send(message):
            found.extend(value for _, value in message["headers"])

        asyncio.run(Logins(app)({"type": "http", "method": "GET", "path": "/", "headers": []}, None, send))
        return found

    assert sent("https://airflow.example.org") == [b"_token=x; HttpOnly; Secure", b"session=y; Secure", b"y"]
    assert sent("http://127.0.0.1:8088") == [b"_token=x; HttpOnly", b"session=y; Secure", b"y"]


# Guessing passwords ---------------------------------------------------------------------------------------------------


def test_who_guesses_a_password_is_slowed_down_and_nobody_else(server):
    _, cookies = at_the_page(server, "operator")
    device = {name: value for name, value in cookies.items() if name.startswith("toxic_device")}
    assert len(device) == 1
    with ThreadPoolExecutor(8) as many:
        found = list(many.map(lambda number: token(server, "operator", f"guess {number}").status_code, range(14)))
    assert (found.count(401), found.count(429)) == (10, 4)
    for user in ("operator", "OPERATOR", " operator"):  # FAB knows them as one
        found = token(server, user, password("operator"))
        assert found.status_code == 429 and 0 < int(found.headers["retry-after"]) <= 61
    assert "10 logins of this user have failed within a minute" in found.json()["detail"]
    assert ask(server, "POST", "/auth/token/cli", json=login("operator")).status_code == 429
    assert at_the_page(server, "operator")[0].status_code == 429
    found, _ = at_the_page(server, "operator", cookies=device)
    assert found.status_code == 302 and "_token" in found.cookies, "the person at a device that has been here"
    assert token(server, "operator", "guess 15", cookies=device).status_code == 401, "the device is not the password"
    assert token(server, "viewer").status_code == 201 and at_the_page(server, "viewer")[0].status_code == 302
    assert ask(server, "GET", "/api/v2/dags", cookies=cookies).status_code == 200


def login(user: str) -> dict[str, str]:
    return {"username": user, "password": password(user)}


def test_wrong_passwords_at_the_page_count_and_right_ones_do_not(server):
    assert {token(server, "reviewer").status_code for _ in range(11)} == {201}
    assert {token(server, "reviewer", "guess").status_code for _ in range(8)} == {401}
    found = [at_the_page(server, "reviewer", secret)[0].status_code for secret in ("guess", None, "guess", None)]
    assert found == [302, 302, 302, 429]


def test_there_is_no_other_door_to_the_passwords(server):
    form, page = login("viewer"), "/auth/login/"
    page_text = ask(server, "GET", page)
    csrf = re.search(r'name="csrf_token"[^>]*value="([^"]+)"', page_text.text)[1]
    more = {"cookies": dict(page_text.cookies)}
    twice = f"username=x&username=viewer&password={form['password']}&csrf_token={csrf}"
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    with httpx.Client(base_url=server, trust_env=False, cookies=more["cookies"], timeout=60) as browser:
        for found in (
            browser.post("/auth/api/v1/security/login", json={**form, "provider": "db"}),
            browser.post("/auth//api/v1/security/login", json={**form, "provider": "db"}),
            browser.post("/auth/%61pi/v1/security/login", json={**form, "provider": "db"}),
            browser.post(page, json={**form, "csrf_token": csrf}),
            browser.post(page, files={name: (None, value) for name, value in {**form, "csrf_token": csrf}.items()}),
            browser.post(page, content=twice, headers=kind),
            browser.post("/auth//login/", data={**form, "csrf_token": csrf}),
            browser.post("/auth/login", data={**form, "csrf_token": csrf}),
            browser.post("/auth/token", json={**form, "username": ["viewer"]}),
            browser.post("/auth/token", content="{" * 100_000),
            browser.post("//auth/token", json=form),
            browser.get("/auth/fab/v1/users", auth=("admin", password("admin"))),
        ):
            assert found.status_code in (307, 308, 400, 401, 403, 404, 405), (found.request, found.text[:300])
            assert "_token" not in found.cookies and "access_token" not in found.text
