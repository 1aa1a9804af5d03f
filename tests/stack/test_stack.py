"""The production stack as its people meet it, in the order of the file: start, retrain, refuse, break, lose."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from asking import CLIENTS, Clients
from conftest import MLFLOW_URL, ROOT, SHORT, WEEKLY, answers, figure, kill_main_process, wait_for

pytestmark = pytest.mark.timeout(1800)

STEPS = {
    *("download", "validate_raw", "prepare", "validate_prepared", "train", "evaluate", "register", "gate", "report"),
    *("decide", "export_onnx", "build_engine", "stage", "swap"),
}


# Starting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_compose_takes_both_profiles_from_any_folder(profile, tmp_path):
    for file in ("Makefile", "docker-compose.yaml"):
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("TOXIC_", "COMPOSE_", "MAKE"))}

    def config():
        command = ["docker", "compose", "config"]
        return subprocess.run(command, cwd=tmp_path / "docker", env=bare, capture_output=True, text=True)

    unset = config()
    assert unset.returncode and "make secrets PROFILE=cpu writes it into .env" in unset.stderr
    subprocess.run(["make", "secrets", f"PROFILE={profile}"], cwd=tmp_path, env=bare, check=True)
    subprocess.run(["make", "secrets", f"PROFILE={profile}"], cwd=tmp_path, env=bare, check=True)
    assert (tmp_path / ".env").read_text().splitlines().count(f"TOXIC_SECRETS={tmp_path}/secrets") == 1
    done = config()
    assert (done.returncode, done.stderr) == (0, "")
    assert f"TOXIC_SECRETS: {tmp_path}/secrets\n" in done.stdout


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_service_has_its_limits_and_no_rights(stack, profile):
    as_shipped = {"COMPOSE_PROFILES": f"{profile},tools", "POSTGRES_IMAGE": "", "HAPROXY_IMAGE": ""}
    config = json.loads(stack.compose("config", "--format=json", **as_shipped).stdout)
    assert f"triton-{profile}" in config["services"]
    for name, service in config["services"].items():
        assert int(service["mem_limit"]) > 0 and service["cpus"] > 0, name
        assert service["memswap_limit"] == service["mem_limit"] and service["pids_limit"] == 2048, name
        assert service["restart"] == ("no" if name in ("init", "commands") else "unless-stopped"), name
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}, name
        assert "healthcheck" in service or service["restart"] == "no", name
        assert service["image"] in stack.images or ":" in service["image"], "another stack's, or the newest there is"


def test_an_image_says_which_code_it_holds_and_airflows_has_no_machine_learning(stack):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for image in stack.images:
        labels = json.loads(inspect(stack, image, "{{json .Config.Labels}}"))
        assert labels["org.opencontainers.image.revision"] == commit and labels["org.opencontainers.image.version"]
    heavy = "import importlib.util as u; print([m for m in ('torch', 'mlflow', 'onnxruntime') if u.find_spec(m)])"
    said = stack.run("docker", "run", "--rm", f"{stack.name}-airflow", "python", "-c", heavy).stdout
    assert said.strip() == "[]"


def test_no_image_has_what_becomes_another_user_or_installs_packages(stack):
    program = "find / -xdev -type f -perm /6000; command -v pip pip3 uv || true"
    for image in stack.images:
        assert stack.run("docker", "run", "--rm", image, "sh", "-c", program).stdout == "", image


def test_a_start_ends_red_and_names_what_is_not_as_it_should_be(stack):
    """`make up` asks docker/check.sh, before and after."""

    def complaint(part: str, **settings: str) -> str:
        found = stack.run("docker/check.sh", part, check=False, **settings)
        return found.stderr if found.returncode else ""

    assert complaint("settings") == "" == complaint("running")
    assert 'COMPOSE_PROFILES is "gpus" and has to be cpu or gpu' in complaint("settings", COMPOSE_PROFILES="gpus")
    assert 'TOXIC_PROFILE is "prod"' in complaint("settings", TOXIC_PROFILE="prod")
    dag = Path(stack.environment["TOXIC_TEST_DAG"])
    whole = dag.read_text()
    try:
        dag.write_text(f"import no_such_module\n{whole}")
        stack.compose("restart", "airflow-dag-processor")
        assert "Airflow can not read a DAG: impatient.py" in complaint("running")
    finally:
        dag.write_text(whole)
        stack.compose("restart", "airflow-dag-processor")
    assert complaint("running") == ""
    stack.wait_healthy()


def test_a_missing_secret_stops_the_start_with_its_name(stack):
    secret = stack.secrets / "POSTGRES_PASSWORD"
    secret.rename(stack.folder / "taken-away")
    try:
        done = stack.compose("run", "--rm", "--no-deps", "-T", "init", "true", check=False)
    finally:
        (stack.folder / "taken-away").rename(secret)
    assert done.returncode != 0 and "POSTGRES_PASSWORD" in done.stderr


def test_an_empty_secret_stops_the_start_with_its_name(stack, tmp_path):
    empty = tmp_path / "MLFLOW_TRACKING_PASSWORD"
    empty.write_text("")
    mount = f"{empty}:/run/secrets/{empty.name}:ro"
    done = stack.run("docker", "run", "--rm", "--volume", mount, f"{stack.name}-trainer", "true", check=False)
    assert done.returncode == 2 and "MLFLOW_TRACKING_PASSWORD is empty" in done.stderr


def test_no_service_writes_a_core(stack):
    """It would hold people's messages and passwords."""
    for service in stack.health():
        limits = json.loads(inspect(stack, stack.container(service), "{{json .HostConfig.Ulimits}}"))
        assert {"Name": "core", "Hard": 0, "Soft": 0} in limits, service


def test_everything_is_healthy(stack):
    health = stack.health()
    assert set(health.values()) == {"healthy"}, health
    assert {"postgres", "mlflow", "triton-cpu", "airflow-scheduler", "gateway", "docker-proxy"} <= set(health)


def test_a_change_of_code_builds_no_environment_anew(stack, tmp_path):
    changed = tmp_path / "changed"
    subprocess.run(["git", "clone", "--quiet", ROOT, changed], check=True)
    for file in ("tasks/step.py", "dags/steps.py"):
        with (changed / file).open("a") as code:
            code.write(f"# changed at {time.time()}\n")  # an engine may have built the last change
    project = ("--project-directory", str(changed), "--file", str(changed / "docker-compose.yaml"))
    another = f"{stack.name}-changed"  # the stack keeps its images
    started = time.monotonic()
    said = stack.compose(*project, "--progress=plain", "build", TOXIC_STACK=another).stdout
    figure("stack_build_after_a_change_of_code", time.monotonic() - started)
    stack.run("docker", "rmi", *(image.replace(stack.name, another) for image in stack.images))
    layers = dict(re.findall(r"^#(\d+) \[[^]]*\d+/\d+\] ((?:RUN|COPY) .*)$", said, re.MULTILINE))
    kept = set(re.findall(r"^#(\d+) CACHED$", said, re.MULTILINE))
    assert {layer for number, layer in layers.items() if number not in kept} == {"COPY dags dags", "COPY tasks tasks"}


def test_ports_are_published_on_loopback_alone(stack):
    for service in stack.health():
        ports = json.loads(inspect(stack, stack.container(service), "{{json .NetworkSettings.Ports}}"))
        for published in filter(None, ports.values()):
            assert {port["HostIp"] for port in published} == {"127.0.0.1"}, (service, ports)


def test_nothing_runs_as_root_but_the_proxy_of_the_engines_socket(stack):
    users = {}
    for service in stack.health():
        status = stack.compose("exec", "-T", service, "cat", "/proc/1/status", "/proc/self/status").stdout
        users[service] = {int(uid) for uid in re.findall(r"^Uid:\t(\d+)", status, re.MULTILINE)}
    assert {service for service, uids in users.items() if 0 in uids} == {"docker-proxy"}, users


# A retraining ---------------------------------------------------------------------------------------------------------


def test_a_run_through_rest_succeeds_with_every_step_in_its_own_container(stack, served):
    assert served["state"] == "success", served["tasks"]
    assert {task for task, (state, _) in served["tasks"].items() if state == "success"} == {*STEPS, "review"}
    assert set(served["containers"].values()) == STEPS and len(served["containers"]) == len(STEPS)
    images = {step: found["Config"]["Image"] for step, found in served["inspected"].items()}
    assert {step for step, image in images.items() if image == f"{stack.name}-triton"} == {"build_engine", "stage"}
    assert stack.steps() == {}


def test_the_text_endpoint_answers_with_the_new_version(stack, served):
    answer = stack.ask()
    assert answer["toxic"] is True and answer["version"] == 1
    assert stack.ask("Thank you for your help, Harriet.")["toxic"] is False


def test_the_log_of_a_step_can_be_read_while_it_runs(served):
    assert served["live"]


def test_a_steps_result_is_that_of_the_run_folder(stack, served):
    folder = stack.workspace / "runs" / "weekly-first"
    with stack.airflow("viewer") as airflow:
        for step in ("train", "stage", "swap"):
            path = f"{WEEKLY}/dagRuns/first/taskInstances/{step}/xcomEntries/return_value"
            value = airflow.get(path).raise_for_status().json()["value"]
            value = json.loads(value) if isinstance(value, str) else value
            assert value == json.loads((folder / f"{step}.json").read_text())


def test_no_step_ran_as_root_or_with_more_than_it_needs(served):
    for step, found in served["inspected"].items():
        assert found["Config"]["User"] == "10001:10001", step
        host = found["HostConfig"]
        assert not host["Privileged"] and host["Memory"] == 4 * 2**30 and host["PidsLimit"] == 4096, step
        assert host["MemorySwap"] == host["Memory"], step
        assert host["Ulimits"] == [{"Name": "core", "Soft": 0, "Hard": 0}], step
        assert host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges:true"], step
        assert host["ReadonlyRootfs"] and host["Tmpfs"] == {"/tmp": "exec"} and host["Init"], step
        mounts = {mount["Destination"] for mount in found["Mounts"]}
        expected = {"/workspace", "/run/secrets/MLFLOW_TRACKING_PASSWORD"}
        expected |= {"/run/secrets/KAGGLE_API_TOKEN"} if step == "download" else set()
        signs = step in ("register", "gate", "decide", "build_engine", "swap")
        expected |= {"/run/secrets/TOXIC_SIGNING_KEY"} if signs else set()
        expected |= {"/run/secrets/HF_TOKEN"} if step in ("train", "evaluate", "export_onnx") else set()
        assert mounts == expected, step


def test_no_secret_is_in_images_containers_logs_or_databases(stack, served):
    secrets = {secret.name: secret.read_text() for secret in stack.secrets.iterdir()}
    assert all(secrets.values()), "an empty one could not be found"
    secrets |= {name: value.split(":")[2].split("@")[0] for name, value in secrets.items() if "://" in value}
    places = {"steps": json.dumps(served["inspected"])}
    for image in stack.images:
        places[image] = stack.run("docker", "history", "--no-trunc", image).stdout + inspect(stack, image, "{{json .}}")
    for service in stack.health():
        places[service] = inspect(stack, stack.container(service), "{{json .}}")
    places["logs"] = stack.compose("logs", "--no-color").stdout
    places["tasks' logs"] = stack.compose("exec", "-T", "airflow-scheduler", "grep", "-rh", "", "/logs").stdout
    for database in ("airflow", "mlflow"):
        dump = ["pg_dump", "--username=postgres", database]
        places[f"the database {database}"] = stack.compose("exec", "-T", "postgres", *dump).stdout
    for folder in ("runs", "logs", "mlflow"):
        places[folder] = stack.compose("exec", "-T", "mlflow", "grep", "-rha", "", f"/workspace/{folder}").stdout
    found = {(secret, place) for place, text in places.items() for secret, value in secrets.items() if value in text}
    assert found == set()
    assert all(len(text) > 100 for text in places.values())  # each place has been read


# What clients and people may do ---------------------------------------------------------------------------------------


def test_clients_can_not_load_or_unload_models(stack, served):
    triton = stack.url("TRITON_HTTP_PORT")
    for path in ("repository/models/toxic_text/unload", "repository/models/toxic_text/load", "repository/index"):
        assert httpx.post(f"{triton}/v2/{path}", json={}).status_code == 403
    for path in ("systemsharedmemory/region/x/register", "logging", "trace/setting"):
        assert httpx.post(f"{triton}/v2/{path}", json={}).status_code == 403
    assert httpx.post(f"{triton}/v2//repository/models/toxic_text/unload", json={}).status_code in (400, 403, 404)
    assert httpx.get(f"{triton}/v2/models/toxic_text/ready").status_code == 200
    assert stack.ask()["version"] == 1


def test_clients_can_not_load_or_unload_models_over_grpc(stack, served):
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    with InferenceServerClient(f"127.0.0.1:{stack.ports['TRITON_GRPC_PORT']}") as client:
        assert client.is_server_live() and client.is_model_ready("toxic_text")
        for refused in (
            lambda: client.unload_model("toxic_text"),
            lambda: client.load_model("toxic_text"),
            lambda: client.register_system_shared_memory("x", "/x", 8),
        ):
            with pytest.raises(InferenceServerException, match="PERMISSION_DENIED"):
                refused()
    assert stack.ask()["version"] == 1


@pytest.mark.parametrize(
    "data", [r'["\ud800"]', "[5]", '["you"', "[null]"], ids=["lone surrogate", "number", "cut", "null"]
)
def test_a_body_that_triton_can_not_read_is_the_clients_error(stack, served, data):
    body = '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": %s}]}' % data
    found = httpx.post(stack.url("TRITON_HTTP_PORT", "/v2/models/toxic_text/infer"), content=body)
    assert found.status_code == 400 and "pars" in found.json()["error"]
    assert stack.ask()["version"] == 1


def test_the_client_network_leads_to_no_database_no_engine_and_no_triton(stack, served):
    """From a container that has joined the clients' network, as an application would; by name and by address."""
    ports = {"postgres": 5432, "triton-cpu": 8000, "gateway": 8000}
    targets = [("triton", 8000), ("docker-proxy", 2375)]
    for service, port in ports.items():
        networks = json.loads(inspect(stack, stack.container(service), "{{json .NetworkSettings.Networks}}"))
        targets += [(service, port), *((network["IPAddress"], port) for network in networks.values())]
    program = (
        "import json, socket, sys\n"
        "for host, port in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        socket.create_connection((host, port), 2).close()\n"
        "        print(host)\n"
        "    except OSError:\n"
        "        pass\n"
    )
    network = f"{stack.name}-clients"
    command = ["python", "-c", program, json.dumps(targets)]
    reached = stack.run("docker", "run", "--rm", "--network", network, f"{stack.name}-trainer", *command).stdout.split()
    gateway = json.loads(inspect(stack, stack.container("gateway"), "{{json .NetworkSettings.Networks}}"))
    assert reached == ["gateway", gateway[network]["IPAddress"]]


def test_the_engines_proxy_is_in_no_network_and_its_socket_is_the_schedulers_alone(stack):
    networks = json.loads(inspect(stack, stack.container("docker-proxy"), "{{json .NetworkSettings.Networks}}"))
    assert list(networks) == ["none"], "from the host every address of a network can be reached"
    having = set()
    for service in stack.health():
        mounts = json.loads(inspect(stack, stack.container(service), "{{json .Mounts}}"))
        having |= {(service, one["Destination"]) for one in mounts}
    having = {(service, at) for service, at in having if at in ("/run/engine", "/var/run/docker.sock")}
    ours = {("docker-proxy", "/run/engine"), ("airflow-scheduler", "/run/engine")}
    assert having == {*ours, ("docker-proxy", "/var/run/docker.sock")}
    above = Path(stack.run("docker", "info", "--format={{.DockerRootDir}}").stdout.strip())  # of all volumes
    assert not above.stat().st_mode & 0o007, "others than root reach the socket on the host"


def test_without_a_login_airflow_and_mlflow_refuse(stack):
    airflow, mlflow = stack.url("AIRFLOW_PORT"), stack.url("MLFLOW_PORT")
    assert httpx.get(f"{airflow}{WEEKLY}").status_code == 401
    assert httpx.post(f"{airflow}{WEEKLY}/dagRuns", json={"logical_date": None}).status_code == 401
    bad = {"username": "admin", "password": "admin"}
    assert httpx.post(f"{airflow}/auth/token", json=bad).status_code == 401
    for path in ("/", "/api/2.0/mlflow/registered-models/search", "/api/2.0/mlflow-artifacts/artifacts"):
        assert httpx.get(mlflow + path).status_code == 401, path
    ours = ("steps", stack.secret("MLFLOW_TRACKING_PASSWORD"))
    search = f"{mlflow}/api/2.0/mlflow/registered-models/search"
    assert httpx.get(search, auth=ours).status_code == 200
    assert httpx.get(search, auth=ours, headers={"Host": "attacker.example"}).status_code == 403


def test_mlflows_page_may_ask_at_the_address_that_people_reach_it_at_and_no_other_page_may(stack):
    for origin, status in ((MLFLOW_URL, 200), ("https://attacker.example", 403)):
        found = httpx.post(
            stack.url("MLFLOW_PORT", "/ajax-api/2.0/mlflow/experiments/search"),
            auth=("reviewer", stack.secret("MLFLOW_REVIEWER_PASSWORD")),
            headers={"Origin": origin, "Host": MLFLOW_URL.removeprefix("https://")},
            json={"max_results": 1},
        )
        assert found.status_code == status, (origin, found.text)


def test_a_viewer_can_not_trigger_and_an_operator_can_not_approve(stack, served):
    run = {"logical_date": None, "conf": {}}
    review = f"{WEEKLY}/dagRuns/first/taskInstances/review/-1/hitlDetails"
    answer = {"chosen_options": ["Approve"], "params_input": {}}
    with (
        stack.airflow("viewer") as viewer,
        stack.airflow("operator") as operator,
        stack.airflow("reviewer") as reviewer,
    ):
        for user in (viewer, operator, reviewer):
            assert user.get(f"{WEEKLY}/dagRuns").status_code == 200
        assert viewer.post(f"{WEEKLY}/dagRuns", json=run).status_code == 403
        assert viewer.patch(WEEKLY, json={"is_paused": True}).status_code == 403
        assert viewer.patch(review, json=answer).status_code == 403
        assert reviewer.post(f"{WEEKLY}/dagRuns", json=run).status_code == 403
        assert operator.patch(review, json=answer).status_code == 403
        assert operator.post("/api/v2/dags/toxicity_release/dagRuns", json=run).status_code == 403
        assert operator.get("/api/v2/connections").status_code == 403
        assert reviewer.patch(review, json=answer).status_code == 404  # nothing was asked in this run; see `approve`


def test_in_mlflow_a_reviewer_moves_no_champion_and_steps_delete_no_lease(stack, served):
    """What else each may do: tests/steps/test_mlflow_roles.py. That the reviewer may approve, a test below sees."""
    url = stack.url("MLFLOW_PORT", "/api/2.0/mlflow/registered-models")
    alias = {"name": "toxic_classificator", "alias": "champion", "version": "1"}
    reviewer = ("reviewer", stack.secret("MLFLOW_REVIEWER_PASSWORD"))
    assert httpx.post(f"{url}/alias", json=alias, auth=reviewer).status_code == 403
    lease, steps = {"name": "toxic_classificator-lease"}, ("steps", stack.secret("MLFLOW_TRACKING_PASSWORD"))
    assert httpx.request("DELETE", f"{url}/delete", json=lease, auth=steps).status_code == 403


def test_the_engines_proxy_lets_through_what_a_step_needs_and_nothing_else(stack):
    program = (
        "import httpx, json\n"
        "socket = httpx.HTTPTransport(uds='/run/engine/docker.sock')\n"
        "engine = httpx.Client(transport=socket, base_url='http://engine')\n"
        "asked = [('GET', '/_ping'), ('GET', '/v1.41/containers/json'), ('GET', '/v1.41/info'),"
        " ('POST', '/v1.41/containers/abc/exec'), ('POST', '/v1.41/build'), ('POST', '/v1.41/images/create'),"
        " ('GET', '/v1.41/volumes'), ('POST', '/v1.41/volumes/create'), ('GET', '/v1.41/secrets'),"
        " ('PUT', '/v1.41/containers/abc/archive'), ('GET', '/v1.41/containers/../info')]\n"
        "print(json.dumps([engine.request(*one).status_code for one in asked]))"
    )
    found = stack.compose("exec", "-T", "airflow-scheduler", "python", "-c", program).stdout
    assert json.loads(found.splitlines()[-1]) == [200, 200] + [403] * 9


def test_a_killed_triton_comes_back_with_the_version_that_it_served(stack, served):
    """That the next run is good, and swaps in the server that has come back, the tests below see."""
    kill_main_process(stack, "triton-cpu", b"tritonserver")
    wait_for(lambda: answers(stack) == 1, 120)
    stack.wait_healthy()


# A swap under load ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swapped(stack, served):
    """A second, forced run, with clients at work: a step's container is killed on the way, and a person approves."""
    started = time.monotonic()
    with Clients(stack.url("TRITON_HTTP_PORT")) as clients:
        stack.trigger("second", {"profile": "demo", "force": True, "promotion": "review"})
        stack.run("docker", "kill", stack.wait_for_step("prepare"))
        state = stack.finish("second", watch=lambda: approve(stack, "second"))
    figure("stack_second_run_under_load", time.monotonic() - started)
    figure("stack_requests_meanwhile", len(clients.versions), "requests")
    figure("stack_requests_failed", len(clients.failures), "requests")
    return state, clients


def approve(stack, run_id: str) -> None:
    """The reviewer says yes as soon as the run asks; the operator, whose run it is, may not."""
    review = f"{WEEKLY}/dagRuns/{run_id}/taskInstances/review/-1/hitlDetails"
    answer = {"chosen_options": ["Approve"], "params_input": {"reason": "better on threats"}}
    with stack.airflow("reviewer") as reviewer, stack.airflow("operator") as operator:
        asked = reviewer.get(review)
        if asked.status_code == 404 or asked.json()["response_received"]:
            return
        assert operator.patch(review, json=answer).status_code == 403
        stack.run("make", "backup", f"BACKUPS={stack.folder / 'while-a-review-waits'}")
        reviewer.patch(review, json=answer).raise_for_status()


def test_a_forced_run_swaps_under_clients_without_a_failed_request(stack, swapped):
    state, clients = swapped
    assert state == "success"
    assert clients.failures == [] and len(clients.versions) > 1000
    assert set(clients.versions) == {1, 2}
    switch = clients.versions.index(2)
    assert 1 not in clients.versions[switch + CLIENTS :], "version 1 answered again after the swap"


def test_what_the_reviewer_said_is_on_record(stack, swapped):
    decided = json.loads((stack.workspace / "runs" / "weekly-second" / "decide.json").read_text())
    assert (decided["decision"], decided["reviewer"]) == ("approve", "reviewer")
    assert decided["reason"] == "better on threats"


def test_an_alias_that_the_reviewer_sets_in_mlflow_starts_a_release(stack, swapped):
    """It is given up before it changes what serves, and clears the wish away all the same."""
    dag, mlflow = "/api/v2/dags/toxicity_release", stack.url("MLFLOW_PORT", "/api/2.0/mlflow")
    auth = ("reviewer", stack.secret("MLFLOW_REVIEWER_PASSWORD"))
    version = {"name": "toxic_classificator", "version": "1"}
    tag, alias = {**version, "key": "approved_by", "value": "ann"}, {**version, "alias": "approved"}
    httpx.post(f"{mlflow}/model-versions/set-tag", json=tag, auth=auth).raise_for_status()
    httpx.post(f"{mlflow}/registered-models/alias", json=alias, auth=auth).raise_for_status()
    stack.wait_for_step("export_onnx", 120)
    (decided,) = stack.workspace.glob("runs/release-*/decide.json")
    assert {"version": 1, "decision": "approve", "reviewer": "ann"}.items() <= json.loads(decided.read_text()).items()
    with stack.airflow("admin") as admin:
        (run,) = admin.get(f"{dag}/dagRuns").raise_for_status().json()["dag_runs"]
        path = f"{dag}/dagRuns/{run['dag_run_id']}"
        admin.patch(f"{path}/taskInstances/export_onnx", json={"new_state": "failed"}).raise_for_status()
        wait_for(lambda: admin.get(path).json()["state"] == "failed", 120)
    model = httpx.get(f"{mlflow}/registered-models/get", params={"name": version["name"]}, auth=auth).json()
    assert "approved" not in {one["alias"] for one in model["registered_model"]["aliases"]}
    wait_for(lambda: not stack.steps(), 60)
    assert stack.ask()["version"] == 2


def test_a_killed_container_of_a_step_is_tried_again(stack, swapped):
    prepare = stack.tasks("second")["prepare"]
    assert (prepare["state"], prepare["try_number"]) == ("success", 2)
    assert "exit code 137: killed" in stack.log("second", "prepare", 1)
    assert stack.steps() == {}


# Breaking things ------------------------------------------------------------------------------------------------------


def test_a_full_workspace_fails_a_run_in_words_and_service_goes_on(stack, swapped):
    """That the next run is good, test_a_killed_scheduler_… sees."""
    filler = stack.workspace / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=1M"], capture_output=True)
    try:
        stack.trigger("disk-full", SHORT)
        wait_for(lambda: stack.tasks("disk-full")["download"]["state"] in ("up_for_retry", "failed"), 180)
        assert re.search(r"No space left|free", stack.log("disk-full", "download"))
        assert stack.ask()["version"] == 2
        with stack.airflow("admin") as admin:  # its retries come minutes later
            admin.patch(f"{WEEKLY}/dagRuns/disk-full", json={"state": "failed"}).raise_for_status()
    finally:
        filler.unlink()


def test_a_step_that_takes_too_long_is_ended_with_its_container(stack):
    dag = "/api/v2/dags/impatient"
    with stack.airflow("admin") as admin:
        admin.patch(dag, json={"is_paused": False}).raise_for_status()
        run = {"dag_run_id": "late", "logical_date": None, "conf": {}}
        admin.post(f"{dag}/dagRuns", json=run).raise_for_status()
        stack.wait_for_step("download")
        wait_for(lambda: admin.get(f"{dag}/dagRuns/late").json()["state"] == "failed", 120)
    assert stack.errors("late", "download", dag=dag)[-1] == "AirflowTaskTimeout"
    assert "NotFound" not in stack.log("late", "download", dag=dag)
    told = stack.workspace / "told-to-end"
    assert told.exists(), "its container was killed"
    told.unlink()
    assert stack.steps() == {}


def test_a_step_that_a_person_marks_as_failed_is_ended_with_its_container(stack, swapped, tmp_path):
    stack.trigger("given-up", SHORT)
    step = stack.wait_for_step("train")
    refused = stack.run("make", "backup", f"BACKUPS={tmp_path}", check=False)
    assert refused.returncode and "a step is running (train): back up when its run is over" in refused.stderr
    assert list(tmp_path.iterdir()) == [] and stack.health()["airflow-scheduler"] == "healthy"
    with stack.airflow("operator") as operator:
        task = f"{WEEKLY}/dagRuns/given-up/taskInstances/train"
        operator.patch(task, json={"new_state": "failed"}).raise_for_status()
    wait_for(lambda: step not in stack.steps(), 120)
    assert "ending the container of train" in stack.log("given-up", "train")
    assert stack.finish("given-up") == "failed" and stack.steps() == {}
    assert not (stack.workspace / "runs" / "weekly-given-up" / "train.json").exists(), "it was let go on to its end"
    assert stack.ask()["version"] == 2


def test_a_forged_version_is_not_released_and_is_champion_for_no_run(stack, swapped):
    """Whoever has the steps' login can write any tag. That the next run is good and held against the true champion,
    test_a_killed_scheduler_… sees."""
    mlflow, model = stack.url("MLFLOW_PORT", "/api/2.0/mlflow"), "toxic_classificator"
    dag = "/api/v2/dags/toxicity_release"
    viewer = stack.airflow("viewer")

    def releases() -> dict[str, str]:
        found = viewer.get(f"{dag}/dagRuns").raise_for_status().json()["dag_runs"]
        return {run["dag_run_id"]: run["state"] for run in found}

    before = releases()
    with httpx.Client(auth=("steps", stack.secret("MLFLOW_TRACKING_PASSWORD"))) as steps:
        get = {"name": model, "version": "2"}
        true = steps.get(f"{mlflow}/model-versions/get", params=get).raise_for_status().json()["model_version"]
        copied = [tag for tag in true["tags"] if tag["key"] != "served_at"]
        body = {"name": model, "source": true["source"], "run_id": true["run_id"], "tags": copied}
        body["model_id"] = true["source"].removeprefix("models:/")
        made = steps.post(f"{mlflow}/model-versions/create", json=body).raise_for_status().json()["model_version"]
        for alias in ("champion", "approved"):
            named = {"name": model, "alias": alias, "version": made["version"]}
            steps.post(f"{mlflow}/registered-models/alias", json=named).raise_for_status()
    wait_for(lambda: "failed" in {state for run, state in releases().items() if run not in before}, 180)
    (release,) = releases().keys() - before.keys()
    assert f"version {made['version']}" in (log := stack.log(release, "decide", dag=dag)) and "sign" in log
    assert stack.ask()["version"] == 2


def test_a_killed_scheduler_leaves_no_orphan_and_its_run_ends_well(stack, swapped):
    stack.trigger("scheduler-killed", SHORT)
    orphan = stack.wait_for_step("train")
    kill_main_process(stack, "airflow-scheduler", b"airflow scheduler")
    assert stack.ask()["version"] == 2
    assert orphan in stack.steps(), "a container outlives the worker that has started it"
    stack.wait_healthy()
    wait_for(lambda: orphan not in stack.steps(), 60)
    assert "ending the orphaned container of train" in stack.compose("logs", "airflow-scheduler").stdout
    assert stack.finish("scheduler-killed") == "success"
    assert stack.steps() == {}
    judged = json.loads((stack.workspace / "runs" / "weekly-scheduler-killed" / "gate.json").read_text())
    assert judged["champion"] == 2, "it was held against what is only called champion"


def test_the_registry_names_the_true_champion_again(stack, swapped):
    repaired = json.loads(stack.command("swap", "--repair").stdout.splitlines()[-1])
    assert repaired["aliases"]["champion"] == 2
    assert stack.command("verify", "--version=2").returncode == 0
    forged = stack.command("verify", "--version=3", check=False)
    assert forged.returncode == 2 and "version 3" in forged.stderr


# Losing everything ----------------------------------------------------------------------------------------------------


def test_a_backup_brings_back_both_the_databases_and_the_workspace(stack, swapped, tmp_path):
    labels = (f"toxic.workspace={stack.name}-workspace", "toxic.owner=gone 1 1", "toxic.step=train")
    stack.run("docker", "create", *(f"--label={label}" for label in labels), f"{stack.name}-trainer", "true")
    backup = stack.run("make", "backup", f"BACKUPS={tmp_path}").stdout.splitlines()[-1]
    assert stack.steps() == {}, "what a killed task has left is in the way of no backup"
    before = {run["dag_run_id"] for run in stack.airflow("viewer").get(f"{WEEKLY}/dagRuns").json()["dag_runs"]}
    for file, problem in (("airflow.dump", "no whole dump"), ("workspace.tar", "no whole archive")):
        broken = shutil.copytree(backup, tmp_path / "broken")
        os.truncate(broken / file, (broken / file).stat().st_size // 2)
        refused = stack.run("make", "restore", f"BACKUP={broken}", check=False)
        assert refused.returncode and f"{broken / file} is {problem}: name another backup" in refused.stderr
        assert stack.ask()["version"] == 2
        shutil.rmtree(broken)
    stack.wait_healthy()
    stack.compose("down", "--timeout=20")
    stack.run("docker", "volume", "rm", f"{stack.name}_postgres")
    for lost in stack.workspace.iterdir():
        subprocess.run(["rm", "-rf", lost], check=True)
    started = time.monotonic()
    stack.run("make", "restore", f"BACKUP={backup}")
    figure("stack_restore", time.monotonic() - started)
    stack.wait_healthy()
    after = {run["dag_run_id"] for run in stack.airflow("viewer").get(f"{WEEKLY}/dagRuns").json()["dag_runs"]}
    assert {"first", "second"} <= before == after
    assert stack.ask()["version"] == 2
    url = stack.url("MLFLOW_PORT", "/api/2.0/mlflow/registered-models/alias")
    auth = ("steps", stack.secret("MLFLOW_TRACKING_PASSWORD"))
    champion = httpx.get(url, params={"name": "toxic_classificator", "alias": "champion"}, auth=auth).json()
    assert champion["model_version"]["version"] == "2"


def test_a_killed_postgres_comes_back_and_the_run_ends_well(stack, swapped):
    """It is the first run after the restore, too."""
    stack.trigger("postgres-killed", SHORT)
    stack.wait_for_step("validate_raw")
    kill_main_process(stack, "postgres", b"postgres")
    assert stack.ask()["version"] == 2
    state = stack.finish("postgres-killed")
    stack.wait_healthy()
    if state == "failed":  # a task that could not say how it ended: red, with a reason, and a next run is good
        failed = [name for name, task in stack.tasks("postgres-killed").items() if task["state"] == "failed"]
        assert len(failed) == 1 and reasons(stack, "postgres-killed", failed[0])
        stack.trigger("after-postgres", SHORT)
        assert stack.finish("after-postgres") == "success"
    assert stack.steps() == {}


def test_new_secrets_hold_after_the_next_start(stack, swapped):
    old = stack.secret("AIRFLOW_VIEWER_PASSWORD"), stack.secret("MLFLOW_BACKEND_STORE_URI")
    more = ("roles", "add-perms", "Operator", "--resource", "Connections", "--action", "can_read")
    stack.compose("exec", "-T", "airflow-scheduler", "with-secrets", "airflow", *more)
    assert stack.airflow("operator").get("/api/v2/connections").status_code == 200
    stack.run("make", "secrets", "NAMES=AIRFLOW_VIEWER_PASSWORD MLFLOW_BACKEND_STORE_URI MLFLOW_TRACKING_PASSWORD")
    stack.compose("up", "--detach", "--wait", "--no-build", "--force-recreate")
    assert old != (stack.secret("AIRFLOW_VIEWER_PASSWORD"), stack.secret("MLFLOW_BACKEND_STORE_URI"))
    login = {"username": "viewer", "password": old[0]}
    assert httpx.post(stack.url("AIRFLOW_PORT", "/auth/token"), json=login).status_code == 401
    assert stack.airflow("viewer").get(WEEKLY).status_code == 200
    assert stack.airflow("operator").get("/api/v2/connections").status_code == 403, "it keeps what it should not have"
    assert stack.ask()["version"] == 2


def test_a_rollback_by_hand_is_one_command_and_so_is_the_end_of_its_hold(stack, swapped):
    stack.command("rollback", "--reason=tried in a test")
    assert stack.ask()["version"] == 1
    assert "version 2 was rolled back" in stack.command("hold").stdout
    stack.command("hold", "--clear", "--reason=tried in a test")


def reasons(stack, run_id: str, task: str) -> list[str]:
    """Why a task failed: the errors in its last log, and what the scheduler noted of one that could not say it."""
    which = {"dag_id": "toxicity_weekly", "run_id": run_id, "task_id": task}
    with stack.airflow("admin") as admin:
        noted = admin.get("/api/v2/eventLogs", params=which).raise_for_status().json()["event_logs"]
    lost = [event["event"] for event in noted if event["event"] in ("heartbeat timeout", "state mismatch")]
    return stack.errors(run_id, task, stack.tasks(run_id)[task]["try_number"]) + lost


def inspect(stack, what: str, form: str) -> str:
    return stack.run("docker", "inspect", "--format", form, what).stdout
