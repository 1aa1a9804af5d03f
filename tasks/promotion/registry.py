"""The model registry, which is the single truth of what serves: versions, their tags, and four aliases.

`challenger` passed the gate; `approved` is a reviewer's wish; `champion` is in service now and `previous` is what it
replaced. Only swap and rollback write the last two, under a lease.
"""

import functools
import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import psutil

from tasks.config import Config
from tasks.errors import StepFailed, Unsuitable
from tasks.promotion import signatures
from tasks.promotion.refusals import MISSING, Refused, address, experiment_deleted, in_words, no_version
from tasks.run import Run

log = logging.getLogger(__name__)

LEASE_SECONDS = 1800


class Client:
    """An MlflowClient whose every call says what to do when the server is away: see `answering`."""

    def __init__(self, config: Config):
        from mlflow import MlflowClient

        with answering(config):  # it refuses some kinds of address
            self._config, self._mlflow = config, MlflowClient(config.mlflow.tracking_uri)

    def __getattr__(self, name: str):
        call = getattr(self._mlflow, name)

        @functools.wraps(call)
        def answered(*args, **kwargs):
            with answering(self._config):
                return call(*args, **kwargs)

        return answered


def client(config: Config) -> Client:
    """A client of the configured server; MLflow's own functions go to that server from here on, too."""
    from mlflow import environment_variables as settings
    from mlflow import set_tracking_uri

    set_tracking_uri(config.mlflow.tracking_uri)
    # MLflow tries a request again by itself: without a connection, after a time-out, after 429 and 5xx.
    settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(config.mlflow.attempts - 1)
    settings.MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR.set(config.mlflow.backoff_s)
    settings.MLFLOW_HTTP_REQUEST_TIMEOUT.set(config.mlflow.timeout_s)
    return Client(config)


@contextmanager
def answering(config: Config):
    """Around calls of MLflow: what it raises becomes one sentence with the way out.

    Raises:
        StepFailed: the server still does not answer after all tries, or fails.
        Refused: it says no, and would say so again.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise in_words(config, error) from None


def now() -> str:
    """This moment as tags hold it; in the order of the letters."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def training_run(config: Config, run: Run) -> str:
    """Id of the MLflow run that belongs to this run; the same one when a step is repeated."""
    mlflow, experiment = client(config), require_experiment(config)
    # A server knows where it keeps artifacts; a plain database file would put them into the current folder.
    store = config.workspace / "mlflow" / "artifacts"
    here = None if config.mlflow.tracking_uri.startswith("http") else store.as_uri()
    experiment_id = (
        experiment.experiment_id
        if experiment
        else mlflow.create_experiment(config.mlflow.experiment, artifact_location=here)
    )
    known = mlflow.search_runs([experiment_id], f"tags.run_id = '{run.id}'", max_results=1)
    if known:
        return known[0].info.run_id
    created = mlflow.create_run(experiment_id, run_name=run.id, tags={"run_id": run.id})
    for section in ("model", "training", "data"):
        values = getattr(config, section).model_dump(mode="json", by_alias=True)
        for key, value in values.items():
            mlflow.log_param(created.info.run_id, f"{section}.{key}", str(value)[:500])
    return created.info.run_id


def require_experiment(config: Config):
    """The experiment that trainings are logged to, or None where the first training makes it.

    Raises:
        Refused: it is deleted. It keeps its name, so that no other could be made, and takes nothing any more.
    """
    found = client(config).get_experiment_by_name(config.mlflow.experiment)
    if found and found.lifecycle_stage == "deleted":
        raise experiment_deleted(config, found.experiment_id, found.name)
    if found is None and (renamed := experiment_before(config)):
        log.warning(
            "MLflow has no experiment %s, so this run makes one: the runs before are in %s (experiment %s), as it was "
            "renamed; to go on there, set mlflow.experiment=%s, or before a new one is made run "
            "`mlflow experiments rename --experiment-id %s --new-name %s`",
            *(config.mlflow.experiment, renamed.name, renamed.experiment_id),
            *(renamed.name, renamed.experiment_id, config.mlflow.experiment),
        )
    return found


def experiment_before(config: Config):
    """The experiment that holds the training of the newest version, or None."""
    mlflow = client(config)
    for version in sorted(versions(config), key=lambda version: -int(version.version)):
        if version.run_id:
            try:
                return mlflow.get_experiment(mlflow.get_run(version.run_id).info.experiment_id)
            except Refused:  # they are gone
                return None
    return None


def log_to_run(config: Config, mlflow_run: str, figures: dict[str, float], files=(), folder: str | None = None) -> None:
    """Adds figures, and files in a folder of its artifacts, to the MLflow run of a training."""
    from mlflow.entities import Metric

    mlflow, at = client(config), int(time.time() * 1000)
    mlflow.log_batch(mlflow_run, metrics=[Metric(key, value, at, 0) for key, value in figures.items()])
    for file in files:
        mlflow.log_artifact(mlflow_run, str(file), folder)


def candidate(config: Config, run: Run) -> int:
    """The registry version that this run is about: the one it registered, or the one it was told to release."""
    return config.release.version or run.result("register")["version"]


def version(config: Config, number: int):
    """The registry's record of one version.

    Raises:
        Refused: there is none of that number.
    """
    name = config.mlflow.registered_model
    try:
        return client(config).get_model_version(name, str(number))
    except Refused as error:
        if error.error_code not in MISSING:
            raise
        raise no_version(config, number, name) from None


def versions(config: Config, where: str | None = None) -> list:
    """The versions of the registered model; with `where` those of any registered model that it fits."""
    return list(client(config).search_model_versions(where or f"name='{config.mlflow.registered_model}'"))


def exists(config: Config, number: int) -> bool:
    """Whether the registry has this version: a person may have deleted it."""
    try:
        version(config, number)
    except Refused as error:
        if error.error_code not in MISSING:
            raise
        return False
    return True


def alias(config: Config, name: str) -> int | None:
    """The version that carries the alias `name`, or None."""
    try:
        return int(client(config).get_model_version_by_alias(config.mlflow.registered_model, name).version)
    except Refused as error:
        if error.error_code in MISSING:
            return None
        raise


def set_alias(config: Config, name: str, number: int) -> None:
    client(config).set_registered_model_alias(config.mlflow.registered_model, name, str(number))


def delete_alias(config: Config, name: str) -> None:
    client(config).delete_registered_model_alias(config.mlflow.registered_model, name)


def tags(config: Config, number: int) -> dict[str, str]:
    return dict(version(config, number).tags)


def tag(config: Config, number: int, **values) -> None:
    mlflow = client(config)
    for key, value in values.items():
        mlflow.set_model_version_tag(config.mlflow.registered_model, str(number), key, str(value))


def untag(config: Config, number: int, *keys: str) -> None:
    """Takes away those of a version's tags that it has."""
    there = tags(config, number)
    for key in [key for key in keys if key in there]:
        client(config).delete_model_version_tag(config.mlflow.registered_model, str(number), key)


def record(config: Config, number: int, **facts) -> None:
    """Gives a version what a step has found about it, in the place of what was there of the same kind, and signs it.

    Of each kind (see signatures.KINDS) the old signature goes first, the new one comes last but for the tag that says
    that all is there: killed in between, a version has no such fact, and the step writes it again.
    """
    for kind, names in signatures.KINDS.items():
        values = {name: str(facts.pop(name)) for name in names if name in facts}
        if not values:
            continue
        head = names[-1]
        signed = signature_tag(config, number, kind, values)
        others = {name: value for name, value in values.items() if name != head}
        withdraw(config, number, kind, keep=set(others))
        tag(config, number, **others, **signed, **{head: values[head]})
    tag(config, number, **facts)


def withdraw(config: Config, number: int, kind: str, keep: set[str] = frozenset()) -> None:
    """Takes away what the registry says of this kind about a version, but for some tags, and its signature."""
    *others, head = signatures.KINDS[kind]
    untag(config, number, head, f"{signatures.PREFIX}{kind}", *(name for name in others if name not in keep))


def sign(config: Config, number: int, *kinds: str) -> None:
    """Signs what the registry says of a version now: only for who knows that it is right."""
    found = version(config, number)
    for kind in kinds:
        tag(config, number, **signature_tag(config, number, kind, signatures.facts(found, kind)))


def signature_tag(config: Config, number: int, kind: str, values: dict[str, str]) -> dict[str, str]:
    """The tag that signs facts of a kind about a version."""
    said = signatures.statement(kind, config.mlflow.registered_model, number, values)
    return {f"{signatures.PREFIX}{kind}": signatures.signature(config.workspace, said)}


def require_signed(config: Config, number: int, *needed: str, but: tuple[str, ...] = (), names: tuple[str, ...] = ()):
    """The registry's record of a version, if steps wrote all that it says: see signatures.problem.

    Raises:
        Unsigned: they did not; the message names the version, which of its facts, and the way out.
    """
    found = version(config, number)
    if wrong := signatures.problem(config.workspace, found, needed, but, names):
        raise signatures.Unsigned(wrong)
    return found


def ensure_model(config: Config, name: str | None = None) -> None:
    """Creates the registered model where there is none yet; a hold is kept as its tag."""
    try:
        client(config).create_registered_model(name or config.mlflow.registered_model)
    except Refused as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def history(config: Config) -> list[int]:
    """Versions that are or were in service and are not known to be bad, the one that served last first.

    A rollback tags a version as bad; a person who releases it all the same makes it good again.
    """
    return in_order_of_service(versions(config))


def in_order_of_service(found: list) -> list[int]:
    """Of the registry's versions those of `history`."""
    good = [v for v in found if v.tags.get("served_at", "") > v.tags.get("rolled_back_at", "")]
    return [int(v.version) for v in sorted(good, key=lambda v: v.tags["served_at"], reverse=True)]


def require_not_rolled_back(config: Config, version: int, since: str) -> None:
    """Raises StepFailed where a version was rolled back after `since`: what spoke for it before counts no longer."""
    found = tags(config, version)
    if found.get("rolled_back_at", "") > since:
        raise StepFailed(
            f"version {version} was rolled back by {found['rolled_back_by']} at {found['rolled_back_at']} "
            f"({found['rolled_back_because']}): trigger toxicity_release for it if it shall serve all the same"
        )


def named(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"


def hold(config: Config) -> str | None:
    """Why automatic promotion is on hold since a rollback, or None."""
    return _model_tags(config).get("hold") or None


def set_hold(config: Config, reason: str) -> None:
    """Until a person clears it, `auto` waits for a review. It is the tag `hold` of the registered model."""
    client(config).set_registered_model_tag(config.mlflow.registered_model, "hold", reason)


def clear_hold(config: Config, who: str, why: str) -> str | None:
    """Ends the hold and notes who did so and why; returns what it was for, or None where there was none."""
    mlflow, name, held = client(config), config.mlflow.registered_model, hold(config)
    if held is not None:
        for key, value in {"was": held, "cleared_by": who, "cleared_because": why, "cleared_at": now()}.items():
            mlflow.set_registered_model_tag(name, f"hold_{key}", value)
        mlflow.delete_registered_model_tag(name, "hold")
    return held


class Changed(Unsuitable):
    """The files of a version in MLflow are not those that were registered."""


@contextmanager
def fetched(config: Config, uri: str):
    """Yields a folder with the files of a logged model, as data: nothing of them is loaded or run.

    Raises:
        Refused, OSError: MLflow has lost them.
    """
    from mlflow.artifacts import download_artifacts

    client(config)
    with tempfile.TemporaryDirectory() as place:
        with answering(config):
            found = Path(download_artifacts(artifact_uri=uri, dst_path=place))
        if not any(found.iterdir()):
            raise Refused(f"MLflow at {address(config)} has no files of {uri} any more", "RESOURCE_DOES_NOT_EXIST")
        yield found


def files_sha256(place: Path) -> str:
    return signatures.tree_sha256(place, ("registered_model_meta",))  # MLflow's own note of where it has it from


@contextmanager
def files_of(config: Config, found):
    """Yields a folder with the files of a version whose record (see `require_signed`) is signed.

    Raises:
        Changed: they are not those that the record names.
    """
    wanted = found.tags.get("model_sha256")
    if wanted is None:
        raise Changed(
            f"nothing signed says which files version {found.version} of {found.name} has: MLflow had lost them when "
            "it was signed"
        )
    with fetched(config, f"models:/{found.name}/{found.version}") as place:
        if (sha256 := files_sha256(place)) != wanted:
            raise Changed(
                f"the files of version {found.version} of {found.name} in MLflow are not those that were registered "
                f"(SHA-256 {sha256[:12]}, registered was {wanted[:12]}): nothing of them is loaded"
            )
        yield place


def fetch(config: Config, found, folder) -> None:
    """Copies the checkpoint (adapter/, thresholds.json, training.json) of a version whose record is signed into
    `folder`. Raises Changed: see `files_of`."""
    with files_of(config, found) as place:
        shutil.copytree(place / "artifacts" / "checkpoint", folder, dirs_exist_ok=True)


def verdict_of(config: Config, fingerprint: str) -> dict | None:
    """The final verdict that this fingerprint of data, config and code already has, as {run_id, version, verdict}.

    One that no step has signed does not count: it would keep next week's run from training.
    """
    found = client(config).search_model_versions(
        f"name='{config.mlflow.registered_model}' and tag.fingerprint='{fingerprint}'"
    )
    judged = []
    for version in [v for v in found if v.tags.get("verdict")]:
        if wrong := signatures.problem(config.workspace, version):
            log.warning("the verdict %s does not count: %s", version.tags["verdict"], wrong)
        else:
            judged.append(version)
    if not judged:
        return None
    last = max(judged, key=lambda v: int(v.version))
    return {"run_id": last.tags.get("run_id", "unknown"), "version": int(last.version), "verdict": last.tags["verdict"]}


def aliased(config: Config) -> set[int]:
    """The versions that carry an alias."""
    return {alias(config, name) for name in ("challenger", "approved", "champion", "previous")} - {None}


def pass_over_numbers(config: Config, highest: int) -> None:
    """Has the next version get a number above `highest`: a new registry counts from 1 again, while what another has
    put into service goes on serving under its number. Deleted versions keep theirs, so that each is taken once."""
    name = config.mlflow.registered_model
    if highest <= max((int(version.version) for version in versions(config)), default=0):
        return
    taken = 0
    while taken < highest:
        words = "Its number is another model's in the live repository."
        taken = int(client(config).create_model_version(name, "number:///taken", description=words).version)
        client(config).delete_model_version(name, str(taken))


# The lease ------------------------------------------------------------------------------------------------------------

_ended: set[str] = set()  # tokens of leases of this process that it could not give back


class LeaseLost(StepFailed):
    """Another has taken over, and finishes or undoes what this one has begun: there is nothing to tidy up."""


@contextmanager
def lease(config: Config, holder: str, run_id: str | None = None):
    """Only one process at a time may change what serves: both DAGs and the command line take this lease first.

    Everybody who wants it draws a ticket: a version of the registered model `…-lease`, since version numbers are the
    one thing that a registry gives out one after another. The lowest ticket holds the lease, the others are given back.
    A ticket of this machine counts as long as its process lives, and no longer. One of another machine counts until
    its time is over, or a later try of the same run draws one here.

    Yields a function that raises LeaseLost where the lease has gone to another machine meanwhile: to be called before
    what cannot be taken back.

    Args:
        holder: who wants it, in words for the others.
        run_id: the run whose step wants it; None for a person.

    Raises:
        StepFailed: somebody else holds it; the message says who, since when, and when to try again.
    """
    name = f"{config.mlflow.registered_model}-lease"
    ensure_model(config, name)
    ticket = _draw(config, name, holder, run_id)
    try:
        _clear_the_way(config, name, ticket)
        still_mine = functools.partial(_require_lowest, config, name, ticket)
        still_mine()
        yield still_mine
    finally:
        try:
            _give_back(config, name, ticket.version)
        except (StepFailed, Refused) as error:  # it must not hide how the swap went
            _ended.add(ticket.tags["token"])
            log.warning("the lease of %s stays until its time is over, or the next start here: %s", holder, error)


def _draw(config: Config, name: str, holder: str, run_id: str | None):
    started = time.time()
    mine = {
        "holder": holder,
        "run_id": run_id or "",
        "token": uuid.uuid4().hex,
        "host": _machine(),
        "pid": str(os.getpid()),
        "process_started": _process_started(os.getpid()),
        "started": str(started),
        "expires": str(started + LEASE_SECONDS),
    }
    words = f"{holder} may change what serves, {_clock(mine['started'])} to {_clock(mine['expires'])} at the latest."
    return client(config).create_model_version(name, f"lease:///{mine['token']}", tags=mine, description=words)


def _tickets(config: Config, name: str) -> list:
    return sorted(client(config).search_model_versions(f"name='{name}'"), key=lambda ticket: int(ticket.version))


def _clear_the_way(config: Config, name: str, mine) -> None:
    """Removes the tickets before mine that count no longer; raises StepFailed at the first that does."""
    for ticket in _tickets(config, name):
        if int(ticket.version) >= int(mine.version):
            return
        if not _counts_no_longer(ticket.tags, mine.tags):
            held = ticket.tags
            here = f": try again after it; it is process {held['pid']} here, and holds the lease as long as it lives"
            there = f" and until {_clock(held['expires'])} at the latest: try again after it"
            raise StepFailed(
                f"{held['holder']} is changing what serves, since {_clock(held['started'])}"
                + (here if held["host"] == mine.tags["host"] else there)
            )
        log.warning("the lease of %s counts no longer", ticket.tags["holder"])
        _give_back(config, name, ticket.version)


def _require_lowest(config: Config, name: str, mine) -> None:
    lowest = next(iter(_tickets(config, name)), None)
    if lowest is None or lowest.version != mine.version:
        raise LeaseLost(
            f"the lease of {mine.tags['holder']} ended at {_clock(mine.tags['expires'])} and was taken over"
            + (f" by {lowest.tags['holder']}" if lowest else "")
            + ": look what serves now, and start this again if it is still wanted; the next swap or rollback undoes or "
            "finishes what is half done"
        )


def _counts_no_longer(held: dict[str, str], mine: dict[str, str]) -> bool:
    if held["token"] in {mine["token"], *_ended}:
        return True
    if held["host"] == mine["host"]:
        return _process_started(int(held["pid"])) != held["process_started"]
    return float(held["expires"]) < time.time() or held["run_id"] == mine["run_id"] != ""


def _machine() -> str:
    """Where a process id means the same process: containers on their host's network share its name, but no ids."""
    ids = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(ids) if psutil.LINUX else ''}".strip()


def _process_started(pid: int) -> str | None:
    """When a process started, in terms that a change of the clock leaves alone; None where it has ended."""
    try:
        if not psutil.LINUX:
            return str(psutil.Process(pid).create_time())
        # Behind the program's name, which may hold anything: the state, and as field 22 the ticks since the boot.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in "ZX":  # killed, and its parent has not noticed
        return None
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {fields[19]}"


def _give_back(config: Config, name: str, ticket: str) -> None:
    try:
        client(config).delete_model_version(name, ticket)
    except Refused as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another has cleared it away
            raise


def _clock(seconds: str) -> str:
    return datetime.fromtimestamp(float(seconds), timezone.utc).strftime("%H:%M:%S UTC")


def _model_tags(config: Config) -> dict[str, str]:
    try:
        return dict(client(config).get_registered_model(config.mlflow.registered_model).tags)
    except Refused as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
