"""Logins and logouts of the stack's Airflow: a plugin of its API server, in front of the FAB auth manager.

- FAB's own limit counts every login from an address, which here is everybody's; this one counts the failures of a user
  (login_limit.py), at the login page and where tokens are given out.
- A logout ends what it should: FAB's route of Airflow 3 only tells the browser to forget its cookies, and a copy of
  them would go on opening Airflow (docs/roles.md has the report to FAB). Here the token is revoked, the session ended.
- Behind a proxy that ends TLS, cookies are marked Secure too.
"""

import json
from urllib.parse import parse_qs

from airflow.configuration import conf
from airflow.plugins_manager import AirflowPlugin
from anyio.to_thread import run_sync
from login_limit import Devices, LoginLimit, too_many
from starlette.requests import Request
from starlette.responses import JSONResponse

LOGINS = {"/auth/login", "/auth/token", "/auth/token/cli"}
LOGOUTS = {"/auth/logout", "/api/v2/auth/logout"}
# Flask-AppBuilder's own tokens: another door to the same passwords, which nobody here needs.
CLOSED = "/auth/api/"
BODY_BYTES = 65536


class Logins:
    """An ASGI middleware around the whole API server."""

    def __init__(self, app):
        self.app, self.failures = app, LoginLimit()
        self.devices = Devices(conf.get_mandatory_value("api", "secret_key"))
        self.secure = conf.get("api", "base_url", fallback="").startswith("https://")

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        send = marked_secure(send) if self.secure else send
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        if path.startswith(CLOSED) or path.startswith("/auth/") and "//" in path:  # for Flask, two slashes are one
            return await JSONResponse({"detail": "closed: tokens are given out at /auth/token"}, 403)(
                scope, receive, send
            )
        if path in LOGOUTS:
            await run_sync(log_out, Request(scope))
        if path in LOGINS and scope["method"] == "POST":
            return await self.log_in(scope, receive, send)
        await self.app(scope, receive, send)

    async def log_in(self, scope, receive, send):
        request = Request(scope, receive)
        body = await body_of(request)
        name = None if body is None else user_name(request, body, is_page="token" not in scope["path"])
        if name is None:
            return await JSONResponse({"detail": "a login has one user name, in JSON or a form"}, 400)(
                scope, receive, send
            )
        key = self.devices.key(name, scope["client"][0] if scope["client"] else "", request.headers.get("cookie", ""))
        async with self.failures.one_at_a_time(key):
            if wait := self.failures.wait(key):
                answer = JSONResponse({"detail": too_many(wait)}, 429, {"Retry-After": str(wait)})
                return await answer(scope, receive, send)
            messages = [{"type": "http.request", "body": body, "more_body": False}]

            async def again():
                return messages.pop() if messages else await receive()

            async def seen(message):
                if message["type"] == "http.response.start":
                    if is_failure(message):
                        self.failures.count(key)
                    elif key[0] != "device" and is_login_of_a_page(message):
                        cookie = self.devices.cookie(name, self.secure)
                        message = {**message, "headers": [*message["headers"], (b"set-cookie", cookie.encode())]}
                await send(message)

            await self.app(scope, again, seen)


async def body_of(request: Request) -> bytes | None:
    """The body; None where it is longer than a login's."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            return None
    return body


def user_name(request: Request, body: bytes, is_page: bool) -> str | None:
    """Whom a login is for, read as Flask will read it for the page, and FastAPI for a token; None where it could be
    another: Flask takes the login from JSON or from the parts of a body as well."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if not is_page:
            name = json.loads(body)["username"]
        elif kind == "application/x-www-form-urlencoded":
            (name,) = parse_qs(body.decode(), keep_blank_values=True).get("username", [""])
        else:
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def is_failure(message) -> bool:
    """Whether this is the answer to a wrong password: the login page leads back to itself, without a token."""
    return message["status"] == 401 or message["status"] == 302 and not is_login_of_a_page(message)


def is_login_of_a_page(message) -> bool:
    set_cookies = [value for key, value in message["headers"] if key.lower() == b"set-cookie"]
    return message["status"] == 302 and any(cookie.startswith(b"_token=ey") for cookie in set_cookies)


def log_out(request: Request) -> None:
    """Ends what a request's cookies and token open, for every copy of them."""
    from airflow import settings
    from airflow.api_fastapi.app import get_auth_manager  # every process of Airflow loads a plugin, tasks too

    manager = get_auth_manager()
    bearer = request.headers.get("authorization", "").partition(" ")[2]
    for token in {bearer, request.cookies.get("_token", "")} - {""}:
        manager.revoke_token(token)
    # Flask-AppBuilder's page, which Airflow 3 does not lead to any more, takes the user out of the session's row.
    with manager.flask_app.test_client(use_cookies=False) as client:
        client.get("/logout/", headers={"Cookie": request.headers.get("cookie", "")})
    settings.Session.remove()  # of this thread


def marked_secure(send):
    async def sending(message):
        if message["type"] == "http.response.start":
            headers = [
                (
                    key,
                    value + b"; Secure" if key.lower() == b"set-cookie" and b"; secure" not in value.lower() else value,
                )
                for key, value in message["headers"]
            ]
            message = {**message, "headers": headers}
        await send(message)

    return sending


class ToxicLogins(AirflowPlugin):
    name = "toxic_logins"
    fastapi_root_middlewares = [{"middleware": Logins, "args": [], "kwargs": {}, "name": "logins and logouts"}]
