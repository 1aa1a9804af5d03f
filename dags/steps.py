"""The steps of a retraining as a list, and how one of them becomes an Airflow task.

Every step is a command, `python commands.py STEP`. TOXIC_RUNNER says where it runs: `process`, beside the Airflow
worker in the tasks' own environment ($TOXIC_PYTHON), or `docker`, in a container of the step's image. Parameters
travel as JSON in the environment; nothing that a person typed meets a shell or a template.
"""

import difflib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from urllib.parse import quote

from airflow.providers.docker.exceptions import DockerContainerFailedException, DockerContainerFailedSkipException
from airflow.providers.docker.operators.docker import DockerOperator
from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import BaseOperator, Context, Param
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from requests import RequestException

from dags import configured, orphans
from docker import APIClient
from docker.errors import DockerException
from docker.types import DeviceRequest, Mount, Ulimit

ROOT = Path(__file__).resolve().parents[1]
SKIP, BAD_USAGE = 99, 2  # exit codes of commands.py

GPU_POOL = "gpu"  # one slot a GPU, so that two steps never share a GPU's memory by accident
WORKSPACE_IN_CONTAINER = "/workspace"
PASSED_TO_CONTAINERS = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "TOXIC_MLFLOW_URL", "TRITON_URL"),
    *("TOXIC_DVC_REMOTE", "OMP_NUM_THREADS"),
)
# Files of $TOXIC_SECRETS on the host that a step's container finds in /run/secrets, where docker/entrypoint.sh makes
# variables of them. In the container's own environment `docker inspect` would show them.
REGISTRY_SECRETS = ("MLFLOW_TRACKING_PASSWORD",)
SIGNING = ("TOXIC_SIGNING_KEY",)  # of the steps that write facts into the registry; the others only check them

OWNER = {"owner": "toxicity"}  # whom the list of DAGs names
RARELY = "Rarely needed"  # the section of the forms that is folded at first

# Parameters of every DAG that judges a version.
PROFILE = Param(
    os.environ.get("TOXIC_PROFILE", "gpu"),
    type="string",
    enum=list(configured.PROFILES),
    values_display={"demo": "demo: a tiny model on a CPU, in minutes", "gpu": "gpu: the real one"},
    title="Profile",
    description="Which model, which data and which limits. For a release: that which the version was trained with.",
    section=RARELY,
)
LIMITS = Param(
    None,
    type=["null", "array"],
    items={"type": "string", "pattern": r"^\s*([a-z_]+(\.[a-z_]+)+\s*=\s*(true|false|-?[0-9]*\.?[0-9]+))?\s*$"},
    title="Other limits of the gate",
    description="For this run alone, one a line: types.min=0.68 or per_type.threat.floor.binds=false; configs/gate has "
    "them all. They need a reason. Both are kept in the registry with your name. Empty: as shipped, F1 toxic at least "
    f"{configured.in_words('gate.toxic.min')}, F1 types at least {configured.in_words('gate.types.min')}.",
    section=RARELY,
)

Review = Callable[[Context], dict]
Version = Callable[[Context], int]


@dataclass(frozen=True)
class Step:
    """One step: its command, what it needs, how long it may take, how often Airflow tries again."""

    name: str
    command: tuple[str, ...]
    does: str  # for the people who click on the task
    timeout: timedelta
    retries: int = 1
    retry_delay: timedelta = timedelta(seconds=10)  # doubled each time
    gpu: bool = False
    image: str = "trainer"  # or triton: what needs the server's own binaries and TensorRT
    secrets: tuple[str, ...] = ()  # beyond the registry's


STEPS = {
    step.name: step
    for step in (
        Step(
            "download",
            ("download",),
            "Brings the raw data into the workspace and gives it a DVC version. **Skips the whole run** when data, "
            "configuration and code are those of a run that already has its verdict; `force` retrains all the same.",
            timeout=timedelta(hours=2),
            retries=3,
            retry_delay=timedelta(minutes=2),
            secrets=("KAGGLE_API_TOKEN",),
        ),
        Step(
            "validate_raw",
            ("validate", "--what=raw"),
            "Holds the raw files against `expectations/`. A failed critical expectation fails the run, and the log "
            "names the rows.",
            timeout=timedelta(minutes=30),
            retries=0,
        ),
        Step(
            "prepare",
            ("prepare",),
            "Cleans, removes duplicates, joins both languages and splits into train, validation and test (Parquet).",
            timeout=timedelta(hours=1),
        ),
        Step(
            "validate_prepared",
            ("validate", "--what=prepared"),
            "Holds the three splits against `expectations/`: no leak between them, every label within its range.",
            timeout=timedelta(minutes=30),
            retries=0,
        ),
        Step(
            "train",
            ("train",),
            "Fine-tunes the 4-bit base model with LoRA, then merges the adapter. Everything after this looks at the "
            "merged model. A retry goes on from the last checkpoint.",
            timeout=timedelta(hours=24),
            gpu=True,
            secrets=("HF_TOKEN",),
        ),
        Step(
            "evaluate",
            ("evaluate",),
            "Chooses thresholds on the validation split; measures the new model, the champion and a TF-IDF baseline "
            "on the same test messages.",
            timeout=timedelta(hours=2),
            gpu=True,
            secrets=("HF_TOKEN",),
        ),
        Step(
            "register",
            ("register",),
            "Makes the model a new version in the MLflow registry, with its metrics and where it came from.",
            timeout=timedelta(minutes=30),
            retries=2,
            secrets=SIGNING,
        ),
        Step(
            "gate",
            ("gate",),
            "Holds the metrics against `configs/gate`. A limit that binds and is missed **skips everything from "
            "`review` on**: the run stays green, the service untouched, and the report says what was missed.",
            timeout=timedelta(minutes=10),
            retries=0,
            secrets=SIGNING,
        ),
        Step(
            "report",
            ("report",),
            "Writes `report.html`, one page that works offline. It runs whether the gate was passed or not.",
            timeout=timedelta(minutes=15),
        ),
        Step(
            "decide",
            ("decide",),
            "Records in the registry who decided what about this version, when and why. A rejection skips the rest.",
            timeout=timedelta(minutes=10),
            secrets=SIGNING,
        ),
        Step(
            "export_onnx",
            ("export_onnx",),
            "Exports the merged model to ONNX and fails if it decides differently from the original.",
            timeout=timedelta(hours=1),
            gpu=True,
            secrets=("HF_TOKEN",),
        ),
        Step(
            "build_engine",
            ("build_engine",),
            "Builds what Triton loads: a TensorRT plan on a GPU, the ONNX file as it is on a CPU.",
            timeout=timedelta(hours=2),
            gpu=True,
            image="triton",
            secrets=SIGNING,
        ),
        Step(
            "stage",
            ("stage",),
            "Starts a second, short-lived Triton, sends it the whole test set as text and holds its answers against "
            "the gate again. The live server is not touched.",
            timeout=timedelta(hours=1),
            gpu=True,
            image="triton",
        ),
        Step(
            "swap",
            ("swap",),
            "Hot-swaps the version into the live server, checks golden messages, moves the aliases `champion` and "
            "`previous`; or leaves everything as it was.",
            timeout=timedelta(minutes=30),
            secrets=SIGNING,
        ),
    )
}


def step_task(name: str, **arguments) -> BaseOperator:
    """The Airflow task of a step, for the runner that TOXIC_RUNNER names (default: process).

    Args:
        name: a key of STEPS; it becomes the task's id.
        arguments: `review=`, a function of the context that returns what the step `decide` records; `version=`, one
            that returns the registry version that the run is about, if it is not the one it trains; else what every
            Airflow operator takes.
    """
    step = STEPS[name]
    operator = {"process": ProcessStep, "docker": DockerStep}[os.environ.get("TOXIC_RUNNER", "process")]
    return operator(
        step=step,
        task_id=name,
        doc_md=step.does,
        execution_timeout=step.timeout,
        retries=step.retries,
        retry_delay=step.retry_delay,
        retry_exponential_backoff=True,
        max_retry_delay=timedelta(minutes=15),
        **arguments,
    )


class ProcessStep(BaseOperator):
    """Runs a step as a child process of the Airflow worker, in the tasks' own Python environment."""

    def __init__(self, *, step: Step, review: Review | None = None, version: Version | None = None, **kwargs):
        super().__init__(**kwargs)
        self.step, self.review, self.version, self.hook = step, review, version, SubprocessHook()

    def execute(self, context: Context):
        python = os.environ.get("TOXIC_PYTHON") or str(ROOT / ".venv/tasks/bin/python")
        result = self.hook.run_command(
            [python, "commands.py", *self.step.command],
            env={**os.environ, **environment(context, self.review, self.version)},
            cwd=str(ROOT),
        )
        if result.exit_code != 0:
            raise failure(result.exit_code, result.output)
        return result_of(result.output)

    def on_kill(self) -> None:
        """Ends the step's whole process group: a retry must not meet what this try left running."""
        self.hook.send_sigterm()
        try:
            self.hook.sub_process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.hook.sub_process.pid, signal.SIGKILL)


class DockerStep(DockerOperator):
    """Runs a step in a container of its image, with the workspace volume, and a GPU if the step needs one.

    The container gets its secrets as files, says by labels whose it is (dags/orphans.py), and its log is the task's
    log while it runs. The result is read from the run folder, which Airflow sees in the same volume.
    """

    def __init__(self, *, step: Step, review: Review | None = None, version: Version | None = None, **kwargs):
        images = {
            "trainer": os.environ.get("TOXIC_TRAINER_IMAGE", "toxic-trainer"),
            "triton": os.environ.get("TOXIC_TRITON_IMAGE", "toxic-triton"),
        }
        self.workspace_volume = os.environ.get("TOXIC_WORKSPACE_VOLUME", "toxic-workspace")
        super().__init__(
            image=images[step.image],
            command=["python", "commands.py", *step.command],
            environment={
                "TOXIC_WORKSPACE": WORKSPACE_IN_CONTAINER,
                "HOME": "/tmp",  # see `cli`
                "HF_HOME": f"{WORKSPACE_IN_CONTAINER}/models/cache/huggingface",  # later steps need the base model too
                **{name: os.environ[name] for name in PASSED_TO_CONTAINERS if name in os.environ},
            },
            mounts=[
                Mount(target=WORKSPACE_IN_CONTAINER, source=self.workspace_volume, type="volume"),
                *secret_mounts((*REGISTRY_SECRETS, *step.secrets)),
            ],
            network_mode=os.environ.get("TOXIC_DOCKER_NETWORK"),
            mem_limit=os.environ.get("TOXIC_STEP_MEMORY"),
            ulimits=[Ulimit(name="core", soft=0, hard=0)],  # a core would hold people's messages and secrets
            cpus=0.5,  # Docker's weight, not a limit: where cores are short, what serves has twice as much
            log_opts_max_size="10m",
            log_opts_max_file="3",
            auto_remove="never",  # `end_container` does: "force" is SIGKILL, after which there is no checkpoint
            mount_tmp_dir=False,
            skip_on_exit_code=SKIP,
            # Triton's processes and PyTorch's loaders pass tensors through /dev/shm, which has 64 MiB otherwise.
            **({"pool": GPU_POOL, "shm_size": 2**30} if step.gpu else {}),
            **kwargs,
        )
        self.step, self.review, self.version = step, review, version

    @cached_property
    def cli(self) -> APIClient:
        """The engine's client. Its containers have no rights of root and can gain none, and write to nothing but the
        workspace and /tmp; the operator has no parameters for that.

        /tmp is memory, and counts as the step's. Compilers, PyTorch's for one, load what they have written there.
        """
        client = super().cli
        client.create_host_config = partial(
            client.create_host_config,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            pids_limit=4096,
            memswap_limit=os.environ.get("TOXIC_STEP_MEMORY"),  # with swap: none beyond its memory
            read_only=True,
            tmpfs={"/tmp": "exec"},
            init=True,  # else the step is process 1, which no SIGTERM ends before Python has come to handle it
        )
        return client

    def execute(self, context: Context):
        dag_run = context["dag_run"]
        # Here and not in the constructor: `environment` is a template, and what a person typed must not become one.
        self.environment = {**self.environment, **environment(context, self.review, self.version)}
        self.labels = {
            orphans.STACK: self.workspace_volume,
            orphans.OWNER: orphans.owner_label(),
            "toxic.step": self.step.name,
            "toxic.run": self.environment["TOXIC_RUN_ID"],
        }
        orphans.end_orphans(self.cli, self.workspace_volume)
        try:
            if self.step.gpu and gpus():
                with a_gpu() as gpu:
                    self.device_requests = [DeviceRequest(device_ids=[gpu], capabilities=[["gpu"]])]
                    self.run_container(context)
            else:
                self.run_container(context)
        except (DockerContainerFailedException, DockerContainerFailedSkipException) as error:
            if isinstance(error, DockerContainerFailedSkipException):
                exit_code = SKIP
            else:  # the provider gives the code only in its message
                exit_code = int(re.search(r"'StatusCode': (\d+)", str(error)).group(1))
            raise failure(exit_code, error.logs[-1] if error.logs else "") from error
        return result_of((run_folder(dag_run.dag_id, dag_run.run_id) / f"{self.step.name}.json").read_text("utf-8"))

    def run_container(self, context: Context) -> None:
        """The operator's own work. However that ends, also when its time is up, the container is ended and removed."""
        try:
            super().execute(context)
        finally:
            self.end_container()

    def on_kill(self) -> None:
        """Tells the step to end; `execute` waits for that, and then removes the container.

        After a SIGTERM Airflow gives a task 5 seconds, then kills it. The engine goes on ending the container, which
        `orphans.end_orphans` removes.
        """
        if self.container is not None:
            self.log.info("ending the container of %s", self.step.name)
        self.end_container(remove=False)

    def end_container(self, remove: bool = True) -> None:
        """What goes wrong here is only logged: the task's last word is how its step ended."""
        if self.container is None:  # there was none, or it is removed
            return
        try:
            orphans.end(self.cli, self.container["Id"], remove)
        except (DockerException, RequestException) as error:
            self.log.warning("the next step has to remove the container of %s: %s", self.step.name, error)
            return
        if remove:
            self.container = None


def secret_mounts(names: tuple[str, ...]) -> list[Mount]:
    folder = os.environ.get("TOXIC_SECRETS")
    return [
        Mount(target=f"/run/secrets/{name}", source=f"{folder}/{name}", type="bind", read_only=True)
        for name in names
        if folder
    ]


def gpus() -> list[str]:
    """The GPUs that steps may use, by the numbers that nvidia-smi gives them: $TOXIC_GPUS, "0,1"."""
    return [gpu.strip() for gpu in os.environ.get("TOXIC_GPUS", "").split(",") if gpu.strip()]


@contextmanager
def a_gpu() -> Iterator[str]:
    """A GPU that no other step of this host has until the block ends; a process that dies gives it back."""
    while True:  # the pool lets no more steps in than there are GPUs, so that this waits only for one that is ending
        for gpu in gpus():
            with open(Path(tempfile.gettempdir(), f"toxic-gpu-{gpu}.lock"), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield gpu
                return
        time.sleep(1)


def failure(exit_code: int, last_words: str) -> AirflowException:
    """The exception for a step that ended with `exit_code`; its last line says why, unless it was killed."""
    kind = {SKIP: AirflowSkipException, BAD_USAGE: AirflowFailException}.get(exit_code, AirflowException)
    if exit_code > 128 or exit_code < 0:
        how = "told to end" if exit_code in (128 + signal.SIGTERM, -signal.SIGTERM) else "killed, most often for memory"
        return kind(f"exit code {exit_code}: {how}; its last line: {last_words or 'none'}")
    return kind(last_words or f"exit code {exit_code}")


def result_of(last_line: str | None) -> dict | None:
    """The step's result, for the XCom that people see. Steps read each other's results from the run folder.

    A process's stdout and stderr come mixed, so a library's last words may stand where the result should: then there
    is no XCom, which is no reason to fail a step that has done its work.
    """
    try:
        return json.loads(last_line or "")
    except json.JSONDecodeError:
        return None


def environment(context: Context, review: Review | None = None, version: Version | None = None) -> dict[str, str]:
    """What a step learns from its DAG run, as environment variables."""
    dag_run, params = context["dag_run"], dict(context["params"])
    if version is not None:
        params["version"] = version(context)
    variables = {
        "TOXIC_RUN_ID": run_slug(dag_run.dag_id, dag_run.run_id),
        "TOXIC_OVERRIDES": json.dumps(overrides_of(params)),
        "TOXIC_DAG_RUN_URL": run_url(dag_run.dag_id, dag_run.run_id),
        "TOXIC_TRIGGERED_BY": dag_run.triggering_user_name or "",
    }
    if review is not None:
        variables["TOXIC_REVIEW"] = json.dumps(review(context))
    return variables


def run_slug(dag_id: str, run_id: str) -> str:
    """The name of the DAG run's folder under workspace/runs.

    >>> run_slug("toxicity_weekly", "scheduled__2026-11-23T03:00:00+00:00")
    'weekly-scheduled__2026-11-23T03-00-00-00-00'
    >>> run_slug("toxicity_weekly", "a:b"), run_slug("toxicity_weekly", "a+b"), run_slug("toxicity_weekly", "a-b")
    ('weekly-a-b-eb5b3573', 'weekly-a-b-13ffa3c1', 'weekly-a-b')
    """
    whole = f"{dag_id.removeprefix('toxicity_')}-{run_id}"
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", whole)
    # An id that loses something, or that somebody typed like the name of another one, is told apart by its hash.
    plainly_named = _AIRFLOWS_OWN_ID.fullmatch(run_id) or whole == plain and not _LIKE_A_SLUG.search(run_id)
    if plainly_named and len(plain) <= 200:
        return plain
    return f"{plain[:191]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


_AIRFLOWS_OWN_ID = re.compile(r"[a-z_]+__\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00(_\w+)?", re.ASCII)
_LIKE_A_SLUG = re.compile(r"__\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d|-[0-9a-f]{8}$")


def run_url(dag_id: str, run_id: str) -> str:
    """The page of a DAG run in the Airflow UI."""
    base_url = conf.get("api", "base_url", fallback="").rstrip("/")
    return f"{base_url}/dags/{quote(dag_id)}/runs/{quote(run_id, safe='')}"


def run_folder(dag_id: str, run_id: str) -> Path:
    workspace = os.environ.get("TOXIC_WORKSPACE") or ROOT / "workspace"
    return Path(workspace) / "runs" / run_slug(dag_id, run_id)


def overrides_of(params: dict) -> list[str]:
    """The DAG run's parameters as Hydra overrides; a parameter left empty leaves the configuration as it is.

    Raises:
        AirflowFailException: with all that is wrong: a parameter that no DAG has, which is most likely misspelt; a
            limit that the gate does not have; limits without a reason.
    """
    known = {"profile", "force", "max_samples", "epochs", "promotion", "data_folder", "version", "limits", "reason"}
    problems = []
    if unknown := sorted(set(params) - known):
        problems.append(f"unknown parameter {', '.join(unknown)}: known are {', '.join(sorted(known))}")
    limits = other_limits(params, problems)
    if problems:
        raise AirflowFailException("; ".join(problems))
    overrides = [f"profile={params['profile']}"]
    if params.get("data_folder") is not None:
        overrides += ["data=folder", override("data.folder", params["data_folder"])]
    if params.get("force"):
        overrides += [override("force", True)]
    if params.get("promotion", "config") != "config":
        overrides += [override("promotion.mode", params["promotion"])]
    for name, key in {
        "max_samples": "data.max_samples",
        "epochs": "training.num_train_epochs",
        "version": "release.version",
    }.items():
        if params.get(name) is not None:
            overrides += [override(key, int(params[name]))]
    return overrides + limits


def other_limits(params: dict, problems: list[str]) -> list[str]:
    """The overrides for the limits that a person has typed, with the reason that they need; what is wrong with them is
    added to the problems."""
    typed = [line.partition("=") for line in params.get("limits") or [] if line.strip()]
    limits = {f"gate.{key.strip().removeprefix('gate.')}": value.strip() for key, _, value in typed}
    for key in limits:
        if key not in configured.limits():
            meant = difflib.get_close_matches(key, configured.limits(), n=1)
            problems.append(f"{key} is no limit of the gate{f'; {meant[0]}?' if meant else ': configs/gate has them'}")
    found = [f"{key}={value}" for key, value in limits.items()]
    reason = (params.get("reason") or "").strip()
    if found and not reason:
        problems.append(
            f"{', '.join(found)}: limits other than the shipped ones need a reason, kept in the registry with your "
            "name; trigger again with the parameter `reason`, or leave `limits` empty"
        )
    return [*found, override("gate.override_reason", reason)] if found else []


def override(key: str, value: bool | int | str) -> str:
    r"""One Hydra override that means exactly `value`: no list, no interpolation, no second override.

    >>> override("data.folder", "it's, ${HOME}")
    "data.folder='it\\'s, \\${HOME}'"
    """
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    # Hydra reads a backslash as an escape only before a quote, OmegaConf only before an interpolation.
    escaped = re.sub(r"(\\*)('|\$\{|\Z)", lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], value)
    return f"{key}='{escaped}'"
