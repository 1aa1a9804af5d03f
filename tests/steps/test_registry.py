"""The registry on a real MLflow server: who serves, who served before, who decided, and who may change it."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from signing import signed

import commands
from tasks import config as configuration
from tasks.errors import Skip, StepFailed, UsageError
from tasks.promotion import decide, limits, registry, report
from tasks.run import find

ROOT = Path(__file__).parents[2]


@pytest.fixture
def overrides(mlflow_server, tmp_path, monkeypatch):
    """A registered model that only this test knows, on a server that all share."""
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path))
    for name in ("TOXIC_REVIEW", "TOXIC_RUN_ID", "TOXIC_OVERRIDES"):
        monkeypatch.delenv(name, raising=False)
    name = f"toxic-{uuid.uuid4().hex[:8]}"
    return [
        "profile=demo",
        f"mlflow.tracking_uri={mlflow_server.uri}",
        f"mlflow.registered_model={name}",
        f"mlflow.experiment={name}",
    ]


@pytest.fixture
def config(overrides):
    config = configuration.load(overrides)
    registry.ensure_model(config)
    return config


def version(config, **tags) -> int:
    name = config.mlflow.registered_model
    return signed(config, registry.client(config).create_model_version(name, "test:///nowhere", tags=tags).version)


# The lease ------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from tasks import config as configuration
from tasks.errors import StepFailed
from tasks.promotion import registry
registry.LEASE_SECONDS = float(sys.argv[3])
config = configuration.load(sys.argv[4:])
registry.hold(config)  # imported and connected
print("ready", flush=True)
sys.stdin.readline()
try:
    with registry.lease(config, sys.argv[1], sys.argv[2]):
        print("holds", flush=True)
        sys.stdin.readline()
except StepFailed as error:
    print(f"refused: {error}", flush=True)
"""


@pytest.fixture
def holder(overrides, config):
    """A function that starts a process which takes the lease when it is told to, and gives it back when told again."""
    started = []

    def start(name, run_id="", seconds=1800):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, name, run_id, str(seconds), *overrides],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def tell(process) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def heard(process) -> str:
    return process.stdout.readline().strip()


def test_of_two_runs_at_once_exactly_one_may_change_what_serves(config, holder):
    runs = [holder("swap of run weekly-1", "weekly-1"), holder("swap of run release-2", "release-2")]
    assert [heard(process) for process in runs] == ["ready", "ready"]
    for process in runs:
        tell(process)
    said = {heard(process): process for process in runs}
    winner = said.pop("holds")
    ((refused, _),) = said.items()
    name = "weekly-1" if winner is runs[0] else "release-2"
    assert refused.startswith(f"refused: swap of run {name} is changing what serves, since ")
    assert f" UTC: try again after it; it is process {winner.pid} here" in refused
    with pytest.raises(StepFailed, match=f"swap of run {name} is changing what serves"):
        with registry.lease(config, "rollback by bo"):
            pass
    tell(winner)  # it is done
    winner.wait()
    with registry.lease(config, "rollback by bo"):
        pass


def test_the_lease_of_a_killed_process_is_taken_over_at_once(config, holder):
    killed = holder("swap of run weekly-1", "weekly-1")
    assert heard(killed) == "ready"
    tell(killed)
    assert heard(killed) == "holds"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    with registry.lease(config, "rollback by bo"):
        with pytest.raises(StepFailed, match="rollback by bo is changing what serves"):
            with registry.lease(config, "rollback by bo"):  # the same person in another window
                pass


def test_a_living_process_holds_the_lease_beyond_its_time_and_a_zombie_does_not(config, holder):
    slow = holder("swap of run weekly-1", "weekly-1", seconds=-1)
    assert heard(slow) == "ready"
    tell(slow)
    assert heard(slow) == "holds"
    os.kill(slow.pid, signal.SIGSTOP)  # a laptop that sleeps, a debugger
    with pytest.raises(StepFailed, match=f"swap of run weekly-1 is changing .* it is process {slow.pid} here"):
        with registry.lease(config, "rollback by bo"):
            pass
    os.kill(slow.pid, signal.SIGKILL)
    os.waitid(os.P_PID, slow.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
    with registry.lease(config, "rollback by bo"):
        pass


def test_a_process_is_known_by_its_start_and_not_by_its_number(config, monkeypatch):
    started = registry._process_started(os.getpid())
    assert started == registry._process_started(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert registry._process_started(child.pid) not in (None, started)
    child.communicate(b"\n")
    assert registry._process_started(child.pid) is None
    lease = f"{config.mlflow.registered_model}-lease"
    registry.ensure_model(config, lease)
    with monkeypatch.context() as patched:  # a process of before the last boot had the number that is this one's now
        patched.setattr(registry, "_process_started", lambda pid: f"another-boot {started.split()[-1]}")
        registry._draw(config, lease, "swap of run weekly-1", "weekly-1")
    with registry.lease(config, "rollback by bo"):
        pass


def test_who_has_lost_the_lease_is_told_before_the_commit(config, monkeypatch):
    with monkeypatch.context() as elsewhere:  # it stood still until its time was over
        elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
        elsewhere.setattr(registry, "LEASE_SECONDS", -1)
        lost = registry.lease(config, "swap of run weekly-1", "weekly-1")
        check = lost.__enter__()
        check()  # nobody has taken it over yet
    with registry.lease(config, "rollback by bo") as still_mine:
        with pytest.raises(
            registry.LeaseLost, match="of swap of run weekly-1 ended at .* taken over by rollback by bo"
        ):
            check()
        still_mine()
    with pytest.raises(registry.LeaseLost, match="taken over: look what serves now, and start this again"):
        check()
    lost.__exit__(None, None, None)


def test_a_lease_of_another_machine_lasts_until_its_time_is_over(config, monkeypatch):
    def from_elsewhere(seconds):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
            elsewhere.setattr(registry, "LEASE_SECONDS", seconds)
            registry._draw(config, f"{config.mlflow.registered_model}-lease", "swap of run weekly-1", "weekly-1")

    registry.ensure_model(config, f"{config.mlflow.registered_model}-lease")
    from_elsewhere(3)
    with pytest.raises(StepFailed, match="weekly-1 is changing what serves, since .* and until .* UTC at the latest"):
        with registry.lease(config, "rollback by bo"):
            pass
    time.sleep(3)
    with registry.lease(config, "rollback by bo"):
        pass
    from_elsewhere(1800)
    # A container that was killed is another machine to the one that Airflow starts in its place.
    with registry.lease(config, "swap of run weekly-1", "weekly-1"):
        pass
    with registry.lease(config, "rollback by bo"):
        pass


# What served, and the hold --------------------------------------------------------------------------------------------


def test_the_history_is_of_versions_that_served_and_are_not_bad(config):
    early, late = "2026-11-02T03:00:00.000+00:00", "2026-11-09T03:00:00.000+00:00"
    version(config)  # never served
    version(config, served_at=late)
    version(config, served_at=early)
    version(config, served_at=early, rolled_back_at=late)
    version(config, served_at="2026-11-10T03:00:00.000+00:00", rolled_back_at=late)  # released again all the same
    assert registry.history(config) == [5, 2, 3]


def test_the_link_to_the_page_holds_no_password(overrides, mlflow_server, monkeypatch, tmp_path):
    monkeypatch.delenv("TOXIC_MLFLOW_URL", raising=False)
    address = mlflow_server.uri.replace("://", "://ann:S3cret@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    config = configuration.load([o for o in overrides if not o.startswith("mlflow.tracking_uri=")])
    assert config.mlflow.tracking_uri == address
    mlflow_run = registry.training_run(config, find(tmp_path, "weekly-1"))
    url = report.page_url(config, mlflow_run, tmp_path / "report.html")
    assert url.startswith(f"{mlflow_server.uri}/#/experiments/") and url.endswith("/artifacts/report.html")


def call(capsys, *arguments):
    """(exit code, the result, the last line of stderr) of a command."""
    code = commands.main(list(arguments))
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return code, json.loads(lines[-1]) if lines else None, said.err.strip().splitlines()[-1:]


def test_a_person_clears_the_hold_and_the_registry_says_who_and_why(config, overrides, capsys):
    assert call(capsys, "hold", *overrides)[1]["hold"] is None
    registry.set_hold(config, "version 3 was rolled back by ann: too strict")
    assert call(capsys, "hold", *overrides)[1]["hold"] == "version 3 was rolled back by ann: too strict"
    code, result, _ = call(capsys, "hold", "--clear", "--reviewer=bo", "--reason=labels are mended", *overrides)
    assert (code, result["hold"], result["cleared"]) == (0, None, "version 3 was rolled back by ann: too strict")
    assert registry.hold(config) is None
    tags = registry.client(config).get_registered_model(config.mlflow.registered_model).tags
    assert (tags["hold_was"], tags["hold_cleared_by"], tags["hold_cleared_because"]) == (
        "version 3 was rolled back by ann: too strict",
        "bo",
        "labels are mended",
    )
    assert tags["hold_cleared_at"][:4].isdigit()
    assert call(capsys, "hold", *overrides, "--clear")[1]["cleared"] is None


# Decisions ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(config):
    """A run whose version 1 passed the gate when nothing served."""
    made = find(config.workspace, "weekly-1")
    number = version(config, run_id=made.id, fingerprint="abc", gate="passed", **limits.tags_of(config.gate))
    made.save("register", {"version": number})
    made.save("gate", {"champion": None})
    return made


def released(config, number):
    return config.model_copy(update={"release": config.release.model_copy(update={"version": number})})


@pytest.mark.parametrize("reason, verdict", [("misses threats", "rejected"), ("timed_out", "timed_out")])
def test_what_was_rejected_is_settled_and_can_still_be_released(config, run, monkeypatch, reason, verdict):
    monkeypatch.setenv("TOXIC_REVIEW", json.dumps({"decision": "reject", "reviewer": "ann", "reason": reason}))
    with pytest.raises(Skip, match=f"version 1 was rejected by ann: {reason}"):
        decide.run(config, run)
    # What next Monday's `download` asks; see also test_download.py.
    assert registry.verdict_of(config, "abc") == {"run_id": "weekly-1", "version": 1, "verdict": verdict}
    monkeypatch.delenv("TOXIC_REVIEW")
    for auto in (config, released(config, 1)):
        with pytest.raises(Skip, match=f"waits: a person decides about a version that is {verdict}"):
            decide.run(auto, run)

    monkeypatch.setenv("TOXIC_REVIEW", json.dumps({"decision": "approve", "reviewer": "bo", "reason": "on purpose"}))
    release = find(config.workspace, "release-1")
    assert decide.run(released(config, 1), release)["decision"] == "approve"
    tags = registry.tags(config, 1)
    assert (tags["released_by"], tags["released_why"]) == ("bo", "on purpose")
    assert (tags["decision"], tags["decided_by"], tags["decided_why"]) == ("reject", "ann", reason)
    assert tags["verdict"] == verdict  # until it serves


@pytest.mark.parametrize("reason", [" два\nряда \t", "🙂 \u202e ' \" \\ \u2028", "x" * 5000])
def test_what_a_person_has_typed_is_signed_as_the_database_keeps_it(config, run, reason):
    decide.run(config, run, decision="approve", reviewer="ann", reason=reason)
    assert registry.require_signed(config, 1, "decide").tags["decided_why"] == reason


def test_approval_counts_for_the_champion_that_the_version_was_compared_with(config, run):
    other = version(config, **limits.tags_of(config.gate))
    registry.set_alias(config, "champion", other)
    with pytest.raises(
        StepFailed, match="on version 1 fell while no version was champion; now it is version 2: .*toxicity_release"
    ):
        decide.run(config, run)
    assert "decision" not in registry.tags(config, 1)
    release = find(config.workspace, "release-1")
    assert decide.run(released(config, 1), release, decision="approve")["champion"] == other


def test_a_version_that_is_not_there_is_said_so(config):
    with pytest.raises(UsageError, match="no version 99 of "):
        registry.version(config, 99)
