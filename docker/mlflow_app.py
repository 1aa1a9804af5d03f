"""The stack's MLflow server: MLflow's basic auth, and before it a list of what each user may ask for.

MLflow's own rights are wide: EDIT on the registered model, without which nobody sets `approved`, is also the right to
make versions and to move `champion`, and whoever has a login may make experiments and list the users. So each request
of anybody but an admin has to be on a list here; what is not is refused, and so is what a later MLflow adds. What the
reviewer writes is done here, so that MLflow itself lets the reviewer read alone.

`mlflow server --app-name=toxic` starts it: MLflow finds it by toxic_mlflow-1.dist-info beside this file, whose folder
has to be on PYTHONPATH.
"""

import base64
import binascii
import json
import os
import re

from anyio.to_thread import run_sync
from fastapi import FastAPI
from graphql import GraphQLError, OperationDefinitionNode, OperationType, parse
from login_limit import Devices, LoginLimit, too_many
from mlflow.entities.model_registry import ModelVersionTag
from mlflow.exceptions import MlflowException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response

from tasks import config

# `*` is one part of a path, `**` all that follows. Without a slash in front it is under /api/2.0/ and its sisters.
OPEN = """
GET /health
GET /static-files/**
"""
READ = """
GET /
GET /version
GET /get-artifact
GET /model-versions/get-artifact
GET mlflow/server-info
GET mlflow/users/current
GET mlflow/users/current/permissions
GET mlflow/experiments/get
GET mlflow/experiments/get-by-name
GET mlflow/experiments/search
POST mlflow/experiments/search
POST mlflow/experiments/search-datasets
GET mlflow/runs/get
POST mlflow/runs/search
GET mlflow/metrics/get-history
GET mlflow/metrics/get-history-bulk
GET mlflow/metrics/get-history-bulk-interval
GET mlflow/artifacts/list
GET mlflow-artifacts/artifacts
GET mlflow-artifacts/artifacts/**
GET mlflow/logged-models/*
POST mlflow/logged-models/search
GET mlflow/logged-models/*/artifacts/directories
GET mlflow/logged-models/*/artifacts/files
GET mlflow/registered-models/get
GET mlflow/registered-models/search
GET mlflow/registered-models/alias
GET mlflow/registered-models/get-latest-versions
POST mlflow/registered-models/get-latest-versions
GET mlflow/model-versions/get
GET mlflow/model-versions/search
GET mlflow/model-versions/get-download-uri
"""
# What the steps call (tasks/promotion/, tasks/training/), and what their messages tell a person to do by their login.
STEPS = """
POST mlflow/experiments/create
POST mlflow/experiments/restore
POST mlflow/experiments/update
POST mlflow/runs/create
POST mlflow/runs/update
POST mlflow/runs/restore
POST mlflow/runs/log-batch
POST mlflow/runs/log-parameter
POST mlflow/runs/outputs
PUT mlflow-artifacts/artifacts/**
POST mlflow/logged-models
PATCH mlflow/logged-models/*
PATCH mlflow/logged-models/*/tags
POST mlflow/registered-models/create
POST mlflow/registered-models/set-tag
DELETE mlflow/registered-models/delete-tag
POST mlflow/registered-models/alias
DELETE mlflow/registered-models/alias
POST mlflow/model-versions/create
PATCH mlflow/model-versions/update
POST mlflow/model-versions/set-tag
DELETE mlflow/model-versions/delete-tag
"""
GRAPHQL = "POST /graphql"
DELETE_VERSION = "DELETE mlflow/model-versions/delete"
# The versions that steps delete are no models: a ticket of the lease, and a number that another model has.
DELETED_BY_STEPS = ("lease:///", "number:///")
BODY_BYTES = 65536  # of a request whose body is looked at


class Answered(Exception):
    """The answer to a request that goes no further."""

    def __init__(self, answer: Response):
        self.answer = answer


class Roles:
    """An ASGI application around MLflow's, which authenticates as MLflow does, and then goes by the lists."""

    def __init__(self, app, auth, model: str, secret: str, secure: bool):
        self.app, self.auth, self.secure = app, auth, secure
        self.failures, self.devices = LoginLimit(), Devices(secret)
        self.open, self.read, self.steps = on(OPEN), on(READ), on(READ + STEPS)
        self.graphql, self.delete_version = on(GRAPHQL), on(DELETE_VERSION)
        version = {"name": re.escape(model), "version": "[0-9]{1,9}"}
        alias, tag = {"name": re.escape(model), "alias": "approved"}, {**version, "key": "approved_(by|why)"}
        self.reviewer = [
            (on("POST mlflow/registered-models/alias"), {**alias, **version}, set_alias),
            (on("DELETE mlflow/registered-models/alias"), alias, delete_alias),
            (on("DELETE mlflow/registered-models/alias"), {**alias, **version}, delete_alias),  # as MLflow's pages do
            (on("POST mlflow/model-versions/set-tag"), {**tag, "value": "(?s:.*)"}, set_tag),
            (on("DELETE mlflow/model-versions/delete-tag"), tag, delete_tag),
        ]
        self.may = {
            "reviewer": "read, set and delete the alias approved of the registered model "
            f"{model}, and the tags approved_by and approved_why of its versions",
            "steps": "read, and write what the steps of a retraining write; delete no model, and no version of one",
        }

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        asked = f"{scope['method']} {scope['path']}"
        try:
            if not self.open(asked):
                user, scope, send = await self.logged_in(scope, send)
                if not user.is_admin:
                    scope, receive = await self.allowed(user.username, asked, scope, receive)
        except Answered as done:
            return await done.answer(scope, receive, send)
        await self.app(scope, receive, send)

    # Logins -----------------------------------------------------------------------------------------------------------

    async def logged_in(self, scope, send):
        """The user, and a request whose header says to whoever reads it, and however, that it is this one."""
        headers = Headers(scope=scope)
        name, password = credentials(headers)
        key = self.devices.key(name, scope["client"][0] if scope["client"] else "", headers.get("cookie", ""))
        async with self.failures.one_at_a_time(key):
            if wait := self.failures.wait(key):
                raise Answered(error(429, "REQUEST_LIMIT_EXCEEDED", too_many(wait), {"Retry-After": str(wait)}))
            user = await run_sync(self.auth._authenticate_cached, name, password)
            if user is None:
                self.failures.count(key)
                raise Answered(not_logged_in())
        # MLflow would take another login from the second of these headers on some paths.
        kept = [(key, value) for key, value in scope["headers"] if key not in (b"authorization", OTHER_LOGIN)]
        login = base64.b64encode(f"{name}:{password}".encode())
        scope = {**scope, "headers": [*kept, (b"authorization", b"Basic " + login)]}
        if scope["path"] == "/" and key[0] != "device":
            send = with_cookie(send, self.devices.cookie(name, self.secure))
        return user, scope, send

    # Rights -----------------------------------------------------------------------------------------------------------

    async def allowed(self, user: str, asked: str, scope, receive):
        """The request as MLflow may handle it: where its body was looked at, made anew of what was seen there."""
        if self.graphql(asked):
            body = await json_body(scope, receive)
            if not only_reads(body.get("query")):
                raise self.refusal(user, "a GraphQL operation other than a query")
            return made_anew(scope, receive, body)
        if (self.steps if user == "steps" else self.read)(asked):
            return scope, receive
        if user == "steps" and self.delete_version(asked):
            body = await json_body(scope, receive)
            if not await run_sync(is_no_model, body):
                raise self.refusal(user, f"{asked} of a model")
            return made_anew(scope, receive, body)
        if user == "reviewer" and (rules := [rule for rule in self.reviewer if rule[0](asked)]):
            body = await json_body(scope, receive)
            for _, fields, write in rules:
                if has_exactly(body, fields):
                    raise Answered(await run_sync(written, write, body))
            raise self.refusal(user, f"{asked} with {json.dumps(body)}")
        raise self.refusal(user, asked)

    def refusal(self, user: str, what: str) -> Answered:
        words = f"{user} may {self.may.get(user, 'read')}; not {what[:500]}: an admin of MLflow may"
        return Answered(error(403, "PERMISSION_DENIED", words))


OTHER_LOGIN = b"x-mlflow-authorization"


def on(lines: str):
    """Whether a request, `METHOD path`, is on a list. Any other spelling of a path is not: MLflow needs none."""
    either = []
    for line in lines.split("\n"):
        method, _, path = line.partition(" ")
        path = path if path.startswith("/") else f"/API/{path}"
        parts = re.escape(f"{method} {path}").replace(r"\*\*", ".+").replace(r"\*", "[^/]+")
        either += [parts.replace("/API/", r"/(?:ajax-)?api/[23]\.0/")] if line else []
    return re.compile("|".join(either), re.DOTALL).fullmatch


def credentials(headers: Headers) -> tuple[str, str]:
    """User name and password of a request's one header; raises Answered."""
    try:
        (login,) = headers.getlist("authorization")
        scheme, encoded = login.split()
        name, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (ValueError, binascii.Error):
        raise Answered(not_logged_in()) from None
    if scheme.lower() != "basic" or not colon:
        raise Answered(not_logged_in())
    return name, password


def not_logged_in() -> Response:
    words = "MLflow wants a login: docs/roles.md says which there are"
    return PlainTextResponse(words, 401, {"WWW-Authenticate": 'Basic realm="mlflow"'})


def error(status: int, code: str, words: str, headers: dict | None = None) -> Response:
    """As MLflow's pages and clients read it."""
    return JSONResponse({"error_code": code, "message": words}, status, headers)


async def json_body(scope, receive) -> dict:
    """The body as an object in which no name stands twice; raises Answered."""
    if "content-encoding" in Headers(scope=scope):
        raise Answered(error(400, "BAD_REQUEST", "the body of this request may have no Content-Encoding"))
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > BODY_BYTES:
            raise Answered(error(413, "BAD_REQUEST", f"the body of this request may have {BODY_BYTES} bytes"))
    try:
        found = json.loads(body.decode(), object_pairs_hook=once_each)
    except (ValueError, RecursionError) as problem:
        raise Answered(error(400, "BAD_REQUEST", f"the body is no JSON object: {str(problem)[:200]}")) from None
    if not isinstance(found, dict):
        raise Answered(error(400, "BAD_REQUEST", "the body is no JSON object"))
    return found


def once_each(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def made_anew(scope, receive, body: dict):
    """The same request with this body and no query: nothing of it can be read in another way than it was here."""
    written = json.dumps(body).encode()
    headers = MutableHeaders(raw=[(key, value) for key, value in scope["headers"] if key != b"transfer-encoding"])
    headers["content-type"], headers["content-length"] = "application/json", str(len(written))
    messages = [{"type": "http.request", "body": written, "more_body": False}]

    async def again():
        return messages.pop() if messages else await receive()

    return {**scope, "headers": headers.raw, "query_string": b""}, again


def has_exactly(body: dict, fields: dict[str, str]) -> bool:
    """Whether a body has these fields and no other, each a string that fits its pattern."""
    return body.keys() == fields.keys() and all(
        isinstance(body[name], str) and re.fullmatch(pattern, body[name]) for name, pattern in fields.items()
    )


def only_reads(query) -> bool:
    """Whether a GraphQL document has queries and fragments alone."""
    try:
        definitions = parse(query, max_tokens=10_000).definitions if isinstance(query, str) else ()
    except (GraphQLError, RecursionError):
        return False
    operations = [one for one in definitions if isinstance(one, OperationDefinitionNode)]
    return bool(operations) and all(one.operation is OperationType.QUERY for one in operations)


# In the registry ------------------------------------------------------------------------------------------------------


def registry():
    from mlflow.server.handlers import _get_model_registry_store

    return _get_model_registry_store()


def is_no_model(body: dict) -> bool:
    """Whether a body names one version, by which no model was registered; raises Answered where there is none."""
    if not has_exactly(body, {"name": "(?s:.+)", "version": "[0-9]{1,9}"}):
        return False
    try:
        return registry().get_model_version(**body).source.startswith(DELETED_BY_STEPS)
    except MlflowException as problem:  # it is not asked for again: it may be there a moment later
        raise Answered(as_mlflow_says(problem)) from None


def written(write, body: dict) -> Response:
    """The answer to what the reviewer writes: done here, since by MLflow's own rights the reviewer may only read."""
    try:
        write(**body)
    except MlflowException as problem:
        return as_mlflow_says(problem)
    return JSONResponse({})


def set_alias(name: str, alias: str, version: str) -> None:
    registry().set_registered_model_alias(name, alias, version)


def delete_alias(name: str, alias: str, version: str = "") -> None:
    registry().delete_registered_model_alias(name, alias)


def set_tag(name: str, version: str, key: str, value: str) -> None:
    registry().set_model_version_tag(name, version, ModelVersionTag(key, value))


def delete_tag(name: str, version: str, key: str) -> None:
    registry().delete_model_version_tag(name, version, key)


def as_mlflow_says(problem: MlflowException) -> Response:
    return error(problem.get_http_status_code(), problem.error_code, problem.message)


def with_cookie(send, cookie: str):
    async def sending(message):
        if message["type"] == "http.response.start" and message["status"] < 400:
            message = {**message, "headers": [*message["headers"], (b"set-cookie", cookie.encode())]}
        await send(message)

    return sending


def create_app() -> FastAPI:
    """What MLflow starts in each worker, by the environment that it has set for it."""
    from mlflow.server import auth, fastapi_security

    secure = os.environ.get("TOXIC_MLFLOW_URL", "").startswith("https://")
    secret, model = os.environ["MLFLOW_FLASK_SERVER_SECRET_KEY"], config.load().mlflow.registered_model
    inner = auth.create_app()
    app = FastAPI(openapi_url=None, lifespan=inner.router.lifespan_context)
    fastapi_security.init_fastapi_security(app)  # hosts and origins, for what is answered here as well
    app.mount("/", Roles(inner, auth, model, secret, secure))
    return app
