"""What each user may do at the stack's MLflow server: the real server, with users as the stack makes them."""

import base64
import gzip
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import signing

from tasks import config as configuration
from tasks.promotion import register, registry
from tasks.run import find

ROOT = Path(__file__).parents[2]
MODEL, LEASE = "toxic_classificator", "toxic_classificator-lease"
USERS = ("admin", "steps", "reviewer", "others")
SECRETS = ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_REVIEWER_PASSWORD")
APPROVED = {"name": MODEL, "alias": "approved"}


# What runs at each start of the stack, and again after an earlier release has given the reviewer more.
UPGRADE = """
import os, pathlib, sys
import mlflow_init
configuration = pathlib.Path(os.environ["MLFLOW_AUTH_CONFIG_PATH"])
mlflow_init.main(configuration)
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
store = SqlAlchemyStore()
store.init_db(sys.argv[1])
store.grant_user_permission("reviewer", "registered_model", sys.argv[2], "EDIT")
mlflow_init.main(configuration)
"""


def password(user: str) -> str:
    return f"{user}-has-a-long-password"


@pytest.fixture(scope="module")
def server(empty_store, own_mlflow_server, tmp_path_factory):
    """With rights as the releases before gave them to the reviewer, and more; and an account that an admin has made."""
    folder = tmp_path_factory.mktemp("roles")
    store = f"sqlite:///{shutil.copy(empty_store, folder)}"
    environment = {
        **{name: password(user) for name, user in zip(SECRETS, USERS)},
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key of the tests",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "docker"), os.environ.get("PYTHONPATH", "")]),
    }
    server = own_mlflow_server(folder, store, "--app-name=toxic", **environment)
    environment = {**os.environ, **environment, "MLFLOW_BACKEND_STORE_URI": store}
    subprocess.run([sys.executable, "-c", UPGRADE, store, MODEL], cwd=ROOT, env=environment, check=True)
    try:
        server.start()
        for user in ("others", "guessed"):
            account = {"username": user, "password": password(user)}
            assert ask(server, "admin", "POST", "mlflow/users/create", account) == 200
        for kind, name in (("registered_model", LEASE), ("registered_model_version", "*"), ("experiment", "*")):
            right = {"username": "reviewer", "resource_type": kind, "resource_id": name, "permission": "MANAGE"}
            assert ask(server, "admin", "POST", "/api/3.0/mlflow/users/permissions/grant", right) == 200
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def version(server, tmp_path_factory) -> int:
    """A version, made as the steps make one: with a run, figures, artifacts and tags."""
    import mlflow

    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "thresholds.json").write_text("{}")
    with as_steps(server, folder) as config:
        run = find(config.workspace, "a-run")
        registry.ensure_model(config)
        mlflow_run = registry.training_run(config, run)
        registry.log_to_run(config, mlflow_run, {"f1": 0.9}, [folder / "checkpoint" / "thresholds.json"], "plots")
        with mlflow.start_run(run_id=mlflow_run):
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(ROOT / "tasks" / "promotion" / "pyfunc.py"),
                artifacts={"checkpoint": (folder / "checkpoint").as_uri()},
                signature=register.signature(),
                pip_requirements=["mlflow"],
            )
            mlflow.log_metrics({"f1": 0.9}, model_id=logged.model_id)
            tags = {"run_id": run.id, "fingerprint": "abc", "verdict": "promoted"}
            made = int(mlflow.register_model(logged.model_uri, MODEL, tags=tags).version)
        registry.set_alias(config, "champion", made)
    return made


class as_steps(pytest.MonkeyPatch):
    """The environment of a step's container."""

    def __init__(self, server, workspace: Path):
        super().__init__()
        self.server, self.workspace = server, workspace

    def __enter__(self):
        self.setenv("TOXIC_WORKSPACE", str(self.workspace))
        self.setenv("MLFLOW_TRACKING_USERNAME", "steps")
        self.setenv("MLFLOW_TRACKING_PASSWORD", password("steps"))
        for name in ("TOXIC_RUN_ID", "TOXIC_OVERRIDES"):
            self.delenv(name, raising=False)
        return configuration.load(["profile=demo", f"mlflow.tracking_uri={self.server.uri}"])

    def __exit__(self, *_):
        self.undo()


def answer(server, user, method: str, path: str, body=None, headers=(), secret=None) -> tuple[int, str, dict]:
    """Status, body and headers; the path goes as it is written, under /api/2.0 where it does not begin with a slash."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    path = path if path.startswith("/") else f"/api/2.0/{path}"
    sent = body if isinstance(body, (bytes, str, type(None))) else json.dumps(body)
    login = base64.b64encode(f"{user}:{secret or password(user)}".encode()).decode()
    given = {"Authorization": f"Basic {login}", "Content-Type": "application/json", **dict(headers)}
    connection.request(method, path, sent, given)
    found = connection.getresponse()
    text = found.read().decode(errors="replace")
    connection.close()
    return found.status, text, dict(found.getheaders())


def ask(server, user, method: str, path: str, body=None, headers=()) -> int:
    return answer(server, user, method, path, body, headers)[0]


def aliases(server) -> dict[str, str]:
    found = answer(server, "admin", "GET", f"mlflow/registered-models/get?name={MODEL}")[1]
    return {one["alias"]: one["version"] for one in json.loads(found)["registered_model"].get("aliases", [])}


# docs/roles.md, line by line ------------------------------------------------------------------------------------------

RUN, EXPERIMENT = {"run_id": "{run}"}, {"experiment_id": "{experiment}"}
TAG = {"name": MODEL, "version": "{version}", "value": "x"}
# What stands for each line: where an admin asks, none of it changes anything that another line needs.
LINES = {
    "read versions, runs, figures and artifacts": [
        ("GET", "/"),
        ("GET", f"mlflow/registered-models/get?name={MODEL}"),
        ("GET", f"mlflow/model-versions/get?name={MODEL}&version={{version}}"),
        ("POST", "mlflow/runs/search", {"experiment_ids": ["1"]}),
        ("POST", "/graphql", {"query": 'query Q { mlflowGetExperiment(input: {experimentId: "1"}) { __typename } }'}),
    ],
    "set and delete the alias `approved`": [
        ("POST", "mlflow/registered-models/alias", {**APPROVED, "version": "{version}"}),
        ("DELETE", "mlflow/registered-models/alias", APPROVED),
    ],
    "set and delete the tags `approved_by` and `approved_why`": [
        (method, f"mlflow/model-versions/{what}", {**dict(list(TAG.items())[:count]), "key": key})
        for key in ("approved_by", "approved_why")
        for method, what, count in (("POST", "set-tag", 3), ("DELETE", "delete-tag", 2))
    ],
    "set and delete other aliases and tags of versions": [
        ("POST", "mlflow/registered-models/alias", {"name": MODEL, "alias": "other", "version": "{version}"}),
        ("DELETE", "mlflow/registered-models/alias", {"name": MODEL, "alias": "other"}),
        ("POST", "mlflow/registered-models/alias", {"name": LEASE, "alias": "approved", "version": "1"}),
        ("POST", "mlflow/model-versions/set-tag", {**TAG, "key": "other"}),
        ("DELETE", "mlflow/model-versions/delete-tag", {"name": MODEL, "version": "{version}", "key": "other"}),
    ],
    "make versions, runs and experiments, log figures and artifacts": [
        ("POST", "mlflow/model-versions/create", {"name": MODEL, "source": "number:///x"}),
        ("PATCH", "mlflow/model-versions/update", {"name": MODEL, "version": "{version}", "description": "x"}),
        ("POST", "mlflow/registered-models/create", {"name": MODEL}),
        ("POST", "mlflow/experiments/create", {}),
        ("POST", "mlflow/runs/create", EXPERIMENT),
        ("POST", "mlflow/runs/update", RUN),
        ("POST", "mlflow/runs/log-parameter", {**RUN, "key": "a", "value": "b"}),
        ("POST", "mlflow/runs/log-batch", RUN),
        ("POST", "mlflow/logged-models", EXPERIMENT),
        ("PUT", "mlflow-artifacts/artifacts/1/odd/x.txt", "x"),
    ],
    "rename an experiment, restore experiments and runs": [
        ("POST", "mlflow/experiments/update", {**EXPERIMENT, "new_name": MODEL}),
        ("POST", "mlflow/experiments/restore", EXPERIMENT),
        ("POST", "mlflow/runs/restore", RUN),
    ],
    "set and delete tags of the registered model (the hold)": [
        ("POST", "mlflow/registered-models/set-tag", {"name": MODEL, "key": "hold", "value": "x"}),
        ("DELETE", "mlflow/registered-models/delete-tag", {"name": MODEL, "key": "hold"}),
    ],
    "delete a ticket of the lease": [
        ("DELETE", "mlflow/model-versions/delete", {"name": LEASE, "version": "{ticket}"})
    ],
    "delete a version of the model": [
        ("DELETE", "mlflow/model-versions/delete", {"name": MODEL, "version": "{another}"}),
    ],
    "delete or rename the registered model or the lease": [
        (method, f"mlflow/registered-models/{what}", {"name": f"{name}{{odd}}", "new_name": "x"})
        for name in (MODEL, LEASE)
        for method, what in (("DELETE", "delete"), ("POST", "rename"), ("PATCH", "update"))
    ],
    "delete experiments, runs and logged models": [
        ("POST", "mlflow/experiments/delete", {"experiment_id": "404"}),
        ("POST", "mlflow/runs/delete", {"run_id": "404"}),
        ("DELETE", "mlflow/logged-models/m-404"),
        ("DELETE", "mlflow-artifacts/artifacts/1/404"),
        ("POST", "mlflow/runs/delete-tag", {**RUN, "key": "run_id"}),
    ],
    "list and change users, their rights and passwords": [
        ("GET", "mlflow/users/list"),
        ("GET", "mlflow/users/get?username=steps"),
        ("POST", "mlflow/users/create", {}),
        ("PATCH", "mlflow/users/update-password", {"username": "404", "password": "another-long-password"}),
        ("PATCH", "mlflow/users/update-admin", {"username": "404", "is_admin": True}),
        ("DELETE", "mlflow/users/delete", {"username": "404"}),
        ("GET", "/signup"),
        ("GET", "/api/3.0/mlflow/roles/list"),
        ("POST", "/api/3.0/mlflow/roles/create", {}),
        ("POST", "/api/3.0/mlflow/users/permissions/grant", {}),
        ("GET", "/api/3.0/mlflow/users/permissions/list?username=steps"),
    ],
    "prompts, scorers, traces, webhooks, the AI gateway, jobs": [
        ("POST", "mlflow/webhooks", {}),
        ("GET", "mlflow/webhooks"),
        ("GET", "/api/3.0/mlflow/gateway/secrets/list"),
        ("POST", "/api/3.0/mlflow/gateway/secrets/create", {}),
        ("POST", "/api/3.0/mlflow/gateway/endpoints/create", {}),
        ("POST", "/gateway/mlflow/v1/chat/completions", {"model": "404"}),
        ("POST", "/gateway/404/mlflow/invocations", {}),
        ("GET", "/ajax-api/2.0/mlflow/gateway-proxy"),
        ("POST", "/ajax-api/3.0/jobs/search", {}),
        ("GET", "/ajax-api/3.0/mlflow/assistant/config"),
        ("POST", "/ajax-api/3.0/mlflow/scorer/invoke", {}),
        ("POST", "/api/3.0/mlflow/scorers/register", {}),
        ("POST", "/api/3.0/mlflow/traces", {}),
        ("POST", "/v1/traces", b"", {"X-Mlflow-Experiment-Id": "404"}),
        ("POST", "/ajax-api/2.0/mlflow/runs/create-promptlab-run", {}),
        ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid=404&path=x", "x"),
        ("GET", "/api/3.0/mlflow/mcp-servers"),
        ("POST", "/api/3.0/mlflow/mcp-servers", {}),
        ("GET", "/api/3.0/mlflow/prompt-optimization/jobs/search"),
        ("POST", "/api/3.0/mlflow/label-schemas/create", {}),
        ("POST", "/api/3.0/mlflow/review-queues/create", {}),
    ],
    "whatever a later MLflow adds": [
        ("GET", "/api/2.0/mlflow/models-of-tomorrow"),
        ("GET", "/api/4.0/mlflow/registered-models/get"),
        ("POST", "/tomorrow", {}),
    ],
}


def written() -> dict[str, dict[str, str]]:
    """Line: who may, in docs/roles.md."""
    text = (ROOT / "docs" / "roles.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    (head,) = [row for row in rows if row[1:] == list(USERS)]
    return {row[0]: dict(zip(USERS, row[1:])) for row in rows[rows.index(head) + 2 :] if len(row) == len(head)}


def test_docs_and_tests_have_the_same_lines():
    assert written().keys() == LINES.keys()


@pytest.mark.parametrize("line, user", product(LINES, USERS))
def test_a_user_may_do_what_the_docs_say_and_no_more(server, version, line, user):
    with as_steps(server, server.folder) as config:
        client, run = registry.client(config), registry.training_run(config, find(config.workspace, "a-run"))
        values = {"version": str(version), "run": run, "experiment": registry.require_experiment(config).experiment_id}
        if "delete a" in line:
            values["another"] = client.create_model_version(MODEL, "test:///another").version
            values["ticket"] = client.create_model_version(LEASE, "lease:///odd").version
    values["odd"] = "-404" if user == "admin" else ""  # an admin may delete the model
    for method, path, *more in LINES[line]:
        body, headers = (*more, *(None, ())[len(more) :])
        status, text, _ = answer(server, user, method, fill(path, values), fill(body, values), headers)
        if written()[line][user] == "yes":
            assert status not in (401, 403, 429), (method, path, text)
        else:
            assert status == 403, (method, path, status, text)
            assert f"{user} may read" in text and "an admin of MLflow may" in text


def fill(value, values: dict[str, str]):
    if isinstance(value, dict):
        return {name: fill(one, values) for name, one in value.items()}
    return (
        re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), value) if isinstance(value, str) else value
    )


# Ways round the list --------------------------------------------------------------------------------------------------

ALIAS = "/api/2.0/mlflow/registered-models/alias"
LIST_OF_USERS = "/api/2.0/mlflow/users/list"


@pytest.mark.parametrize(
    "path",
    [
        f"/{LIST_OF_USERS}",
        f"{LIST_OF_USERS}/",
        f"{LIST_OF_USERS}?x=/api/2.0/mlflow/experiments/search",
        f"{LIST_OF_USERS};/health",
        "/api/2.0//mlflow/users/list",
        "/API/2.0/mlflow/users/list",
        "/api/2.0/mlflow/users/LIST",
        "/api/2.0/mlflow/users/%6Cist",
        "/api/2.0/mlflow/users%2Flist",
        "/api/2.0/mlflow/experiments/../users/list",
        "/api/2.0/mlflow/experiments/%2e%2e/users/list",
        "/api/2.0/mlflow/./users/list",
        "/static-files/../api/2.0/mlflow/users/list",
        "/static-files/%2e%2e/api/2.0/mlflow/users/list",
        "/health/../api/2.0/mlflow/users/list",
        "http://127.0.0.1/api/2.0/mlflow/users/list",
    ],
)
def test_no_other_spelling_of_a_path_leads_round_the_list(server, version, path):
    status, text, _ = answer(server, "reviewer", "GET", path)
    assert status in (400, 403, 404) and "is_admin" not in text


@pytest.mark.parametrize(
    "body, more",
    [
        (f'{{"name": "{MODEL}", "version": "1", "alias": "approved", "alias": "champion"}}', {}),
        (f'{{"name": "{MODEL}", "version": "1", "alias": "champion", "alias": "approved"}}', {}),
        (json.dumps(json.dumps({**APPROVED, "alias": "champion", "version": "1"})), {}),
        (json.dumps([{**APPROVED, "version": "1"}]), {}),
        ({**APPROVED, "version": "1", "alias": ["approved", "champion"]}, {}),
        ({**APPROVED, "version": "1", "alias": "approved\n"}, {}),
        ({**APPROVED, "version": "1", "alias": "Approved"}, {}),
        ({**APPROVED, "version": "1", "Alias": "champion"}, {}),
        (f"name={MODEL}&version=1&alias=champion", {"Content-Type": "application/x-www-form-urlencoded"}),
        (gzip.compress(json.dumps({**APPROVED, "version": "1"}).encode()), {"Content-Encoding": "gzip"}),
        (
            json.dumps({**APPROVED, "version": "1"}).encode("utf-16"),
            {"Content-Type": "application/json; charset=utf-16"},
        ),
        (json.dumps({**APPROVED, "version": "1", "x": "y" * 70_000}), {}),
        ('{"a":' * 30_000, {}),
        ("", {}),
    ],
    ids=range(14),
)
def test_a_body_that_can_be_read_in_two_ways_is_refused(server, version, body, more):
    before = aliases(server)
    status, text, _ = answer(server, "reviewer", "POST", ALIAS, body, more)
    assert status in (400, 403, 413), text
    assert aliases(server) == before


@pytest.mark.parametrize(
    "path, more",
    [
        (f"{ALIAS}?alias=champion&name={LEASE}", {}),
        (ALIAS, {"Content-Type": "application/x-www-form-urlencoded"}),
        (ALIAS, {"X-HTTP-Method-Override": "DELETE"}),
        (ALIAS, {"X-MLflow-Authorization": "Basic " + base64.b64encode(b"admin:x").decode()}),
    ],
)
def test_what_a_request_says_beside_its_body_changes_nothing(server, version, path, more):
    assert ask(server, "admin", "DELETE", ALIAS, APPROVED) in (200, 404)
    assert ask(server, "reviewer", "POST", path, {**APPROVED, "version": str(version)}, more) == 200
    assert aliases(server).items() >= {"approved": str(version), "champion": str(version)}.items()


def test_without_a_login_nothing_opens(server):
    logins = ("", "Basic", "Basic !!", "Bearer x", "Basic cmV2aWV3ZXI=", "Basic cmV2aWV3ZXI6eA==", "Basic /w==")
    for path in (
        "/",
        LIST_OF_USERS,
        "/api/2.0/mlflow-artifacts/artifacts",
        "/tomorrow",
        "/v1/traces",
        "/ajax-api/3.0/jobs/1",
    ):
        for login in logins:
            found, _, headers = answer(server, "nobody", "GET", path, headers={"Authorization": login})
            assert found == 401 and headers["www-authenticate"] == 'Basic realm="mlflow"', (path, login)


def test_two_logins_in_one_request_are_none(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.putrequest("GET", LIST_OF_USERS)
    for user in ("reviewer", "admin"):
        login = base64.b64encode(f"{user}:{password(user)}".encode()).decode()
        connection.putheader("Authorization", f"Basic {login}")
    connection.endheaders()
    assert connection.getresponse().status == 401


def test_another_sites_page_can_not_approve_with_a_reviewers_browser(server, version):
    assert ask(server, "admin", "DELETE", ALIAS, APPROVED) in (200, 404)
    for headers in ({"Origin": "https://attacker.example"}, {"Host": "attacker.example"}):
        for kind in ("application/json", "text/plain"):
            found = answer(
                server, "reviewer", "POST", ALIAS, {**APPROVED, "version": "1"}, {**headers, "Content-Type": kind}
            )
            assert found[0] == 403 and "approved" not in aliases(server)


@pytest.mark.parametrize(
    "query", ['mutation M { testMutation(inputString: "x") { output } }', "query Q { a } mutation M { b }"]
)
def test_graphql_is_for_reading(server, version, query):
    assert ask(server, "reviewer", "POST", "/graphql", {"query": query, "operationName": "Q"}) == 403
    assert ask(server, "reviewer", "GET", "/graphql", {"query": "query Q { __typename }"}) == 403


# What people and steps need -------------------------------------------------------------------------------------------

# What Chromium asked for when the pages of the registry, of a version, of the experiment and of a run were opened; it
# asks the AI gateway and the assistant as well, and does without.
PAGES = [
    ("GET", "/static-files/manifest.json"),
    ("GET", "/ajax-api/3.0/mlflow/server-info"),
    ("GET", "/ajax-api/2.0/mlflow/users/current"),
    ("GET", "/ajax-api/2.0/mlflow/experiments/search?max_results=5"),
    ("GET", "/ajax-api/2.0/mlflow/registered-models/search"),
    ("GET", f"/ajax-api/2.0/mlflow/registered-models/get?name={MODEL}"),
    ("GET", f"/ajax-api/2.0/mlflow/model-versions/search?filter=name%3D%27{MODEL}%27"),
    ("GET", f"/ajax-api/2.0/mlflow/model-versions/get?name={MODEL}&version={{version}}"),
    ("GET", f"/model-versions/get-artifact?path=MLmodel&name={MODEL}&version={{version}}"),
    ("GET", "/ajax-api/2.0/mlflow/logged-models/{model}"),
    ("POST", "/ajax-api/2.0/mlflow/logged-models/search", {"experiment_ids": ["1"]}),
    ("GET", "/ajax-api/2.0/mlflow/runs/get?run_id={run}"),
    ("POST", "/ajax-api/2.0/mlflow/runs/search", {"experiment_ids": ["1"]}),
    ("POST", "/ajax-api/2.0/mlflow/experiments/search-datasets", {"experiment_ids": ["1"]}),
    ("GET", "/ajax-api/2.0/mlflow/artifacts/list?run_uuid={run}"),
    ("GET", "/get-artifact?path=plots%2Fthresholds.json&run_uuid={run}"),
    ("GET", "/ajax-api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key=f1"),
    (
        "POST",
        "/graphql",
        {"query": "query GetRun($data: MlflowGetRunInput!) { mlflowGetRun(input: $data) { __typename } }"},
    ),
]


@pytest.mark.parametrize("user", ["reviewer", "others"])
def test_the_pages_work(server, version, user):
    found = answer(server, user, "GET", f"mlflow/model-versions/get?name={MODEL}&version={version}")[1]
    found = json.loads(found)["model_version"]
    values = {"version": str(version), "run": found["run_id"], "model": found["source"].removeprefix("models:/")}
    for method, path, *body in PAGES:
        if body and "$data" in str(body):
            body[0]["variables"] = {"data": {"runId": found["run_id"]}}
        status, text, _ = answer(server, user, method, fill(path, values), *body)
        assert status == 200 and '"errors":[' not in text, (path, text)


def test_a_reviewer_approves_as_the_pages_do_and_as_a_client_does(server, version, monkeypatch):
    from mlflow import MlflowClient

    pages = "/ajax-api/2.0/mlflow/registered-models/alias"
    assert ask(server, "reviewer", "POST", pages, {**APPROVED, "version": str(version)}) == 200
    assert ask(server, "reviewer", "DELETE", pages, {**APPROVED, "version": str(version)}) == 200
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reviewer")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password("reviewer"))
    client = MlflowClient(server.uri)
    client.set_model_version_tag(MODEL, str(version), "approved_why", "it knows «clown»")
    client.set_registered_model_alias(MODEL, "approved", str(version))
    assert client.get_model_version_by_alias(MODEL, "approved").tags["approved_why"] == "it knows «clown»"
    client.delete_registered_model_alias(MODEL, "approved")
    client.delete_model_version_tag(MODEL, str(version), "approved_why")
    with pytest.raises(
        Exception, match="reviewer may read, set and delete the alias approved .* an admin of MLflow may"
    ):
        client.set_registered_model_alias(MODEL, "champion", str(version))


def test_mlflow_itself_lets_the_reviewer_read_alone_also_after_an_upgrade(server):
    which = f"username=reviewer&resource_type=registered_model&resource_id={MODEL}"
    found = answer(server, "admin", "GET", f"/api/3.0/mlflow/users/permissions/get?{which}")[1]
    assert json.loads(found)["permission"] == "READ", found


def test_the_steps_can_do_what_they_do(server, version, tmp_path):
    with as_steps(server, tmp_path) as config:
        registry.tag(config, version, profile="gpu")
        registry.untag(config, version, "profile")
        registry.set_alias(config, "previous", version)
        assert {version} == registry.aliased(config)
        registry.delete_alias(config, "previous")
        for ticket in registry._tickets(config, LEASE):  # of those who could not delete it
            registry.client(config).delete_model_version(LEASE, ticket.version)
        registry.set_hold(config, "it calls every greeting toxic")
        assert registry.clear_hold(config, "ann", "tried by hand")
        with registry.lease(config, "a test") as still_mine:
            still_mine()
            with pytest.raises(registry.StepFailed, match="a test is changing what serves"):
                with registry.lease(config, "another"):
                    pass
        assert registry._tickets(config, LEASE) == []
        newest = max(int(one.version) for one in registry.versions(config))
        registry.pass_over_numbers(config, newest + 2)
        assert max(int(one.version) for one in registry.versions(config)) == newest
        uri = f"models:/{MODEL}/{version}"
        with registry.fetched(config, uri) as model:
            signing.tag(config, version, model_sha256=registry.files_sha256(model))
        assert registry.verdict_of(config, "abc")["version"] == version
        registry.fetch(config, registry.require_signed(config, version), tmp_path / "checkpoint")
        assert registry.experiment_before(config).name == config.mlflow.experiment
        with pytest.raises(registry.Refused, match="steps may read, .* delete no model"):
            registry.client(config).delete_model_version(MODEL, str(version))
        assert registry.exists(config, version)


# Guessing passwords ---------------------------------------------------------------------------------------------------


def test_who_guesses_a_password_is_slowed_down_and_nobody_else(server, version):
    def login(secret: str, user="guessed", cookie=""):
        return answer(server, user, "GET", "/", headers={"Cookie": cookie}, secret=secret)

    _, _, headers = login(password("guessed"))
    device = headers["set-cookie"].partition(";")[0]
    assert "HttpOnly" in headers["set-cookie"] and "SameSite=Lax" in headers["set-cookie"]
    with ThreadPoolExecutor(20) as many:
        found = list(many.map(lambda number: login(f"guess {number}")[0], range(40)))
    assert (found.count(401), found.count(429)) == (10, 30)
    status, text, headers = login(password("guessed"))
    assert status == 429 and 0 < int(headers["retry-after"]) <= 60 and "try again in" in text
    assert login(password("guessed"), cookie=device)[0] == 200, "the person at a device that has been here"
    assert login("guess 41", cookie=device)[0] == 401, "the device is not the password"
    assert login(password("guessed"), cookie=device.replace("=", "=x"))[0] == 429
    assert login(password("others"), "others", device)[0] == 200 and login(password("steps"), "steps")[0] == 200
    assert ask(server, "reviewer", "GET", "/health") == 200
