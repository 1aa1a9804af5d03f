"""From a list of steps to Airflow tasks: parameters, environments, both runners."""

import json
import os
import re
import subprocess
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import requests
from airflow.providers.docker.exceptions import DockerContainerFailedException, DockerContainerFailedSkipException
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException, AirflowTaskTimeout
from airflow.sdk.execution_time.task_runner import _run_execute_callable
from conftest import ROOT

from dags import orphans, steps
from docker.errors import APIError, NotFound

HOSTILE = [
    "/data/my files, new",
    '/it\'s/"quoted"',
    "back\\slash\\",
    "a\\'b",
    "${oc.env:HOME}",
    "\\${x}",
    "[1,2]",
    "{a: 1}",
    "null",
    "1e3",
    "x data.max_samples=1",
    "$(touch /tmp/owned); `id` && $HOME",
    "{{ macros }}",
    "две\nстроки\\\n",
    " = ",
]

READ = """
import json, sys
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
read = []
for text in json.load(sys.stdin):
    override = OverridesParser.create().parse_override(text)
    config = OmegaConf.create({"value": override.value(), "other": "${value}"})
    read.append([override.key_or_group, OmegaConf.to_container(config, resolve=True)["other"]])
json.dump(read, sys.stdout)
"""


def test_hydra_reads_every_string_as_it_was_typed():
    typed = json.dumps([steps.override("data.folder", text) for text in HOSTILE])
    python = ROOT / ".venv/tasks/bin/python"
    done = subprocess.run([python, "-c", READ], input=typed, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["data.folder", text] for text in HOSTILE]


def test_parameters_become_overrides_and_empty_ones_none():
    empty = {"profile": "gpu", "force": False, "max_samples": None, "epochs": None, "promotion": "config"}
    assert steps.overrides_of({**empty, "data_folder": None}) == ["profile=gpu"]
    assert steps.overrides_of(
        {
            "profile": "demo",
            "force": True,
            "max_samples": 500,
            "epochs": 2,
            "promotion": "review",
            "data_folder": "/it's here",
        }
    ) == [
        "profile=demo",
        "data=folder",
        "data.folder='/it\\'s here'",
        "force=true",
        "promotion.mode='review'",
        "data.max_samples=500",
        "training.num_train_epochs=2",
    ]
    assert steps.overrides_of({"profile": "gpu", "version": 3, "reason": "x"}) == ["profile=gpu", "release.version=3"]


def test_other_limits_come_with_their_reason_or_not_at_all():
    params = {"profile": "gpu", "limits": ["gate.types.min = .68", "", "champion.binds=false"]}
    assert steps.overrides_of({**params, "reason": " it's agreed "}) == [
        *("profile=gpu", "gate.types.min=.68", "gate.champion.binds=false"),
        "gate.override_reason='it\\'s agreed'",
    ]
    assert steps.overrides_of({**params, "limits": [" "], "reason": None}) == ["profile=gpu"]
    for reason in (None, "  "):
        with pytest.raises(AirflowFailException, match="gate.types.min=.68, .* need a reason, .*parameter `reason`"):
            steps.overrides_of({**params, "reason": reason})


def test_an_unknown_limit_is_named_beside_the_reason_that_is_missing():
    params = {"profile": "gpu", "limits": ["typs.min=0.68", "nothing.alike=1"], "max_sample": 3}
    with pytest.raises(AirflowFailException) as error:
        steps.overrides_of(params)
    for part in (
        "unknown parameter max_sample: known are",
        "gate.typs.min is no limit of the gate; gate.types.min?",
        "gate.nothing.alike is no limit of the gate: configs/gate has them",
        "need a reason",
    ):
        assert part in str(error.value)


def test_the_overrides_are_ones_that_the_configuration_takes():
    params = {"profile": "demo", "force": True, "max_samples": 5000, "epochs": 2, "promotion": "never"}
    limits = {"limits": ["types.min=.68"], "reason": "few, says Ada: it's ${HOME}"}
    typed = json.dumps(steps.overrides_of({**params, **limits, "data_folder": "/data, new"}))
    read = (
        "import json, sys; from tasks.config import load; c = load(json.load(sys.stdin)); "
        "print(json.dumps([c.force, c.data.max_samples, c.training.num_train_epochs, c.promotion.mode, c.data.folder, "
        "c.gate.overrides, c.gate.override_reason]))"
    )
    python = ROOT / ".venv/tasks/bin/python"
    done = subprocess.run([python, "-c", read], input=typed, capture_output=True, text=True, check=True, cwd=ROOT)
    changed = [{"key": "gate.types.min", "from": 0.7, "to": 0.68}]
    assert json.loads(done.stdout) == [True, 5000, 2, "never", "/data, new", changed, "few, says Ada: it's ${HOME}"]


def test_a_misspelt_parameter_is_refused():
    with pytest.raises(AirflowFailException, match="unknown parameter max_sample: known are"):
        steps.overrides_of({"profile": "demo", "max_sample": 10})


def test_the_run_folder_is_named_by_dag_and_run():
    assert steps.run_slug("toxicity_weekly", "manual__2026-11-24T03:00:00+00:00") == (
        "weekly-manual__2026-11-24T03-00-00-00-00"
    )
    assert re.fullmatch("release-..-..-x-y-[0-9a-f]{8}", steps.run_slug("toxicity_release", "../../x y"))


def test_no_two_runs_share_a_folder():
    ids = ["a:b", "a+b", "a-b", "x" * 250, "x" * 251, "manual__2026-11-24T03:00:00+00:00"]
    ids += [f"manual__2026-11-24T03:00:00+00:00_{end}" for end in ("é", "è", "-", "x" * 200, "x" * 201)]
    ids += ["manual__2026-11-24T03-00-00-00-00", "manual__2026-11-24T03-00-00+00:00"]
    named = [steps.run_slug("toxicity_weekly", one) for one in ids]
    hashed = [one.removeprefix("weekly-") for one in named if re.search("-[0-9a-f]{8}$", one)]
    named += [steps.run_slug("toxicity_weekly", one) for one in hashed]  # typed by somebody who has seen a folder
    assert len(set(named)) == len(named) and all(len(one) <= 200 for one in named)


def test_a_result_is_the_json_of_the_last_line_or_nothing():
    assert steps.result_of('{"version": 3}') == {"version": 3}
    assert steps.result_of("some library's last words") is None
    assert steps.result_of(None) is None


@pytest.fixture
def docker(monkeypatch):
    """A function that makes the task of a step for the docker runner."""
    monkeypatch.setenv("TOXIC_RUNNER", "docker")
    monkeypatch.setenv("TOXIC_TRAINER_IMAGE", "trainer:1")
    monkeypatch.setenv("TOXIC_TRITON_IMAGE", "triton:1")
    monkeypatch.setenv("TOXIC_WORKSPACE_VOLUME", "the-workspace")
    monkeypatch.setenv("TOXIC_DOCKER_NETWORK", "the-network")
    monkeypatch.setenv("TOXIC_SECRETS", "/srv/secrets")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:8080")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "steps")
    for name in ("KAGGLE_API_TOKEN", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    return steps.step_task


@pytest.mark.parametrize("name", steps.STEPS)
def test_a_container_runs_the_steps_command_on_the_workspace(docker, name):
    task, step = docker(name), steps.STEPS[name]
    assert task.command == ["python", "commands.py", *step.command]
    assert task.image == ("triton:1" if name in ("build_engine", "stage") else "trainer:1")
    mount = task.mounts[0]
    assert (mount["Target"], mount["Source"], mount["Type"]) == ("/workspace", "the-workspace", "volume")
    assert task.environment["TOXIC_WORKSPACE"] == "/workspace"
    assert task.environment["MLFLOW_TRACKING_URI"] == "http://mlflow:8080"
    assert (task.environment["HOME"], task.environment["HF_HOME"]) == ("/tmp", "/workspace/models/cache/huggingface")
    assert (task.network_mode, task.auto_remove, task.mount_tmp_dir) == ("the-network", "never", False)
    assert (task.skip_on_exit_code, task.container_name, task.retrieve_output) == ([99], None, False)


@pytest.mark.parametrize("name", steps.STEPS)
def test_what_needs_the_gpu_waits_in_its_pool(docker, name):
    task = docker(name)
    if name in ("train", "evaluate", "export_onnx", "build_engine", "stage"):
        assert (task.pool, task.shm_size) == ("gpu", 2**30)
    else:
        assert (task.pool, task.shm_size) == ("default_pool", None)


def test_two_steps_never_get_the_same_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TOXIC_GPUS", "0, 1")
    with steps.a_gpu() as first, steps.a_gpu() as second:
        assert {first, second} == {"0", "1"}
    with steps.a_gpu() as again:
        assert again == "0"


def test_secrets_are_files_of_the_step_that_needs_them(docker):
    task = docker("download")
    assert "secret" not in json.dumps(task.environment) and task._private_environment == {}
    files = {mount["Target"]: (mount["Source"], mount["Type"], mount["ReadOnly"]) for mount in task.mounts[1:]}
    assert files == {
        f"/run/secrets/{name}": (f"/srv/secrets/{name}", "bind", True)
        for name in ("MLFLOW_TRACKING_PASSWORD", "KAGGLE_API_TOKEN")
    }
    for step, more in (("stage", []), ("gate", ["/run/secrets/TOXIC_SIGNING_KEY"])):
        targets = [mount["Target"] for mount in docker(step).mounts[1:]]
        assert targets == ["/run/secrets/MLFLOW_TRACKING_PASSWORD", *more]


class DagRun:
    dag_id, run_id, triggering_user_name = "toxicity_weekly", "x", None


CONTEXT = {"dag_run": DagRun, "params": {"profile": "gpu"}}


@pytest.fixture
def engine(monkeypatch):
    """The daemon is the one thing that is stood in for here; tests/stack has a real one."""
    monkeypatch.setattr(steps.orphans, "end_orphans", lambda engine, workspace: [])
    monkeypatch.setattr(steps.DockerStep, "cli", None)
    return partial(monkeypatch.setattr, "airflow.providers.docker.operators.docker.DockerOperator.execute")


def test_a_container_says_whose_it_is_and_gets_a_gpu(docker, engine, monkeypatch, workspace):
    monkeypatch.setenv("TOXIC_GPUS", "3")
    folder = workspace / "runs" / "weekly-x"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text('{"steps": 7}')
    seen = {}
    engine(lambda self, context: seen.update(labels=self.labels, devices=self.device_requests))
    assert docker("train").execute(CONTEXT) == {"steps": 7}
    (request,) = seen["devices"]
    assert (request["DeviceIDs"], request["Capabilities"]) == (["3"], [["gpu"]])
    owner = seen["labels"].pop("toxic.owner")
    assert seen["labels"] == {"toxic.workspace": "the-workspace", "toxic.step": "train", "toxic.run": "weekly-x"}
    assert orphans.is_alive(owner)


def test_a_process_that_is_gone_or_another_owns_nothing():
    host, pid, start = orphans.owner_label().split()
    child = subprocess.Popen(["sleep", "60"])
    owner = f"{host} {child.pid} {orphans.started(child.pid)}"
    assert orphans.is_alive(owner)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert not orphans.is_alive(owner)
    child.wait()
    assert not orphans.is_alive(owner)
    assert not orphans.is_alive(f"{host} {pid} {int(start) - 1}")
    assert not orphans.is_alive(f"another-host {pid} {start}")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (DockerContainerFailedSkipException("…", logs=["why"]), AirflowSkipException),
        (
            DockerContainerFailedException("Docker container failed: {'StatusCode': 2}", logs=["why"]),
            AirflowFailException,
        ),
        (DockerContainerFailedException("Docker container failed: {'StatusCode': 1}", logs=["why"]), AirflowException),
    ],
)
def test_a_container_that_failed_says_why(docker, engine, raised, expected):
    def fail(self, context):
        assert self.environment["TOXIC_RUN_ID"] == "weekly-x"
        raise raised

    engine(fail)
    with pytest.raises(AirflowException, match="^why$") as caught:
        docker("prepare").execute(CONTEXT)
    assert type(caught.value) is expected


def test_a_container_that_was_killed_says_so(docker, engine):
    def kill(self, context):
        raise DockerContainerFailedException("Docker container failed: {'StatusCode': 137}", logs=["step 40 of 160"])

    engine(kill)
    with pytest.raises(AirflowException, match="^exit code 137: killed, most often for memory; .*: step 40 of 160$"):
        docker("train").execute(CONTEXT)


class Engine:
    """Stands for the daemon's client: one container, how it ends, and what was asked in order to end it."""

    def __init__(self, exit_code=0, meanwhile=lambda: None, trouble=None):
        self.exit_code, self.meanwhile, self.trouble, self.asked = exit_code, meanwhile, trouble, []

    def images(self, name):
        return [name]

    def create_host_config(self, **settings):
        return settings

    def create_container(self, **settings):
        return {"Id": "0123"}

    def attach(self, container, **settings):
        yield b"a line\n"
        self.meanwhile()
        yield b"why\n"

    def start(self, container):
        pass

    def wait(self, container):
        assert "remove" not in self.asked
        return {"StatusCode": self.exit_code}

    def stop(self, container, timeout):
        self.asked.append("stop")
        if self.trouble:
            raise self.trouble

    def remove_container(self, container, force):
        self.asked.append("remove")


@pytest.fixture
def run(docker, workspace, monkeypatch):
    """A function that runs the step `train` on an engine, and returns the error it ends with, or None."""
    folder = workspace / "runs" / "weekly-x"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text("{}")
    monkeypatch.setattr(steps.orphans, "end_orphans", lambda engine, workspace: [])
    task = docker("train")

    def run(engine, within_s=60.0):
        monkeypatch.setattr(steps.DockerStep, "cli", engine)
        task.execution_timeout = timedelta(seconds=within_s)
        try:
            assert _run_execute_callable(CONTEXT, task.execute, task) == {}
        except BaseException as error:
            return error

    run.task = task
    return run


@pytest.mark.parametrize(
    ("exit_code", "kind"),
    [(0, type(None)), (1, AirflowException), (2, AirflowFailException), (99, AirflowSkipException)],
)
def test_a_container_that_has_ended_is_removed(run, exit_code, kind):
    engine = Engine(exit_code)
    error = run(engine)
    assert type(error) is kind and str(error) in ("why", "None")
    assert engine.asked == ["stop", "remove"]


TROUBLES = [
    NotFound("no such container"),
    APIError("removal is already in progress", response=SimpleNamespace(status_code=409)),
    requests.ConnectionError("no engine"),
]


@pytest.mark.parametrize("trouble", [None, *TROUBLES])
def test_a_step_that_takes_too_long_is_told_to_end_and_that_it_did_is_the_last_word(run, trouble):
    engine = Engine(meanwhile=lambda: time.sleep(60), trouble=trouble)
    error = run(engine, within_s=0.2)
    assert type(error) is AirflowTaskTimeout and error.__context__ is None
    if trouble is None:
        assert engine.asked == ["stop", "remove"]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_an_end_that_can_not_be_brought_about_hides_neither_result_nor_reason(run, trouble):
    assert run(Engine(trouble=trouble)) is None
    assert str(run(Engine(exit_code=1, trouble=trouble))) == "why"


def test_a_step_that_is_told_to_end_says_its_last_line(run):
    """Airflow calls `on_kill` at a SIGTERM, in the middle of `execute`: the container must outlive that."""
    engine = Engine(exit_code=143, meanwhile=run.task.on_kill)
    assert str(run(engine)) == "exit code 143: told to end; its last line: why"
    assert engine.asked == ["stop", "stop", "remove"]
    run.task.on_kill()  # too late, or before there is a container
    assert engine.asked == ["stop", "stop", "remove"]


def test_both_runners_take_the_same_steps(monkeypatch):
    for runner in ("process", "docker"):
        monkeypatch.setenv("TOXIC_RUNNER", runner)
        for name, step in steps.STEPS.items():
            task = steps.step_task(name)
            assert (task.task_id, task.retries, task.execution_timeout) == (name, step.retries, step.timeout)
