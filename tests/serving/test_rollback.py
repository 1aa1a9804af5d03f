"""Back to the version before, in a real Triton and on a real MLflow server, also when that goes away half-way."""

import uuid

import pytest
from serving_parts import VERSIONS, answer, decided, overrides, ready, remove, run_of
from signing import signed

from tasks import config as configuration
from tasks import run as runs
from tasks.errors import StepFailed
from tasks.promotion import hold, registry
from tasks.serving import exchange, live_servers, repository, rollback, swap

# Which database the registry has makes no difference to these; tests/steps/test_registry.py tries it on both.
on_sqlite = pytest.mark.parametrize("mlflow_server", ["sqlite"], indirect=True)


@pytest.fixture
def config(config, mlflow_server):
    """On a server that all tests share, a registered model that only this test knows, with the versions as they are."""
    name = f"toxic-{uuid.uuid4().hex[:8]}"
    changed = {"tracking_uri": mlflow_server.uri, "registered_model": name, "attempts": 2, "backoff_s": 0}
    config = config.model_copy(update={"mlflow": config.mlflow.model_copy(update=changed)})
    registry.ensure_model(config)
    for number in VERSIONS:
        run = run_of(config.workspace, number)
        built = run.result("build_engine")["sha256"]
        tags = {"run_id": run.id, "gate": "passed", "engine": "onnx", "engine_sha256": built}
        created = registry.client(config).create_model_version(name, "test:///nowhere", tags=tags)
        assert signed(config, created.version) == number
    return config


def roll_back(config, who="ann", why="too strict") -> dict:
    return rollback.run(overrides(config), who, why, "configs", "config")


def aliases(config) -> dict:
    return {name: registry.alias(config, name) for name in ("champion", "previous")}


def in_service(config) -> int:
    """The version that answers, which alone is loaded, and that a server which starts now would serve."""
    version = answer(config)["version"]
    assert ready(config) == [version] == [repository.served(repository.live(config))]
    return version


def test_a_rollback_of_a_rollback_goes_further_back_until_nothing_is_left(config, live, promote):
    with pytest.raises(StepFailed, match="no version is in service, so there is nothing to roll back"):
        roll_back(config)
    for number in VERSIONS:
        promote(number)
    assert aliases(config) == {"champion": 3, "previous": 2}
    tags = registry.tags(config, 2)
    assert tags["verdict"] == "promoted" and tags["replaced_by"] == "3" and tags["replaced_at"] > tags["served_at"]

    registry.set_alias(config, "approved", 3)
    undone = roll_back(config)
    assert registry.alias(config, "approved") is None  # or a release would bring the bad version back
    assert (undone["served_version"], undone["rolled_back_version"]) == (2, 3)
    assert in_service(config) == 2
    assert aliases(config) == {"champion": 2, "previous": 1}
    tags = registry.tags(config, 3)
    assert (tags["rolled_back_by"], tags["rolled_back_because"]) == ("ann", "too strict")
    assert registry.hold(config) == "version 3 was rolled back by ann: too strict"

    assert roll_back(config, "bo", "misses threats")["served_version"] == 1
    assert in_service(config) == 1
    assert aliases(config) == {"champion": 1, "previous": None}
    assert registry.hold(config) == "version 2 was rolled back by bo: misses threats"

    left = "no version served before 1 that is not tagged as rolled back: trigger toxicity_release"
    with pytest.raises(StepFailed, match=left):
        roll_back(config)
    assert in_service(config) == 1 and aliases(config) == {"champion": 1, "previous": None}
    assert "rolled_back_at" not in registry.tags(config, 1)

    hold.run(overrides(config), True, "cy", "the labels are mended", "configs", "config")
    assert registry.hold(config) is None

    # A person releases what was rolled back: it is good again, and what was bad beside it is not.
    promote(3, release=True)
    assert in_service(config) == 3 and aliases(config) == {"champion": 3, "previous": 1}
    assert registry.hold(config) is None
    assert roll_back(config)["served_version"] == 1


@on_sqlite
def test_releasing_the_previous_version_is_a_rollback_too(config, live, promote):
    promote(1)
    registry.set_alias(config, "approved", 3)
    promote(2)
    assert registry.alias(config, "approved") == 3
    registry.set_alias(config, "approved", 1)
    promote(1, release=True)
    assert registry.alias(config, "approved") is None  # the wish is fulfilled
    assert in_service(config) == 1 and aliases(config) == {"champion": 1, "previous": None}
    tags = registry.tags(config, 2)
    assert (tags["rolled_back_by"], tags["rolled_back_because"]) == ("ann", "as agreed")
    assert registry.hold(config) == "version 2 was rolled back by ann: as agreed"


@on_sqlite
def test_a_version_that_is_no_longer_whole_on_disk_is_named_with_the_way_out(config, live, promote):
    promote(1)
    promote(2)
    engine = repository.folder(repository.live(config), repository.CLASSIFIER, 1) / "model.onnx"
    content = engine.read_bytes()
    engine.unlink()  # it is a second name of the file that was built
    engine.write_bytes(content[:-1])
    with pytest.raises(StepFailed, match="has SHA-256 .* trigger toxicity_release for version 1"):
        roll_back(config)
    remove(config, 1)
    with pytest.raises(StepFailed, match="version 1 served before 2, but .* no longer keeps it: trigger toxicity_rel"):
        roll_back(config)
    assert in_service(config) == 2 and aliases(config) == {"champion": 2, "previous": 1}
    assert registry.hold(config) is None


class Killed(BaseException):
    pass


def killed(*arguments):
    raise Killed


@on_sqlite
def test_a_rollback_that_was_killed_is_finished_and_not_followed_by_a_second(config, live, promote, monkeypatch):
    for number in VERSIONS:
        promote(number)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(exchange, "finish", killed)
        roll_back(config)
    assert registry.hold(config)  # first of all: no mode may speak before this is finished
    assert roll_back(config) == {
        "step": "rollback",
        "served_version": 2,
        "rolled_back_version": 3,
        "swap_seconds": None,
    }
    assert in_service(config) == 2 and aliases(config) == {"champion": 2, "previous": 1}
    assert "rolled_back_at" in registry.tags(config, 3) and "rolled_back_at" not in registry.tags(config, 2)
    assert registry.hold(config) == "version 3 was rolled back by ann: too strict"


def killing(server, function, calls=1):
    """The function, before whose `calls`-th call the MLflow server is killed."""
    called = []

    def first(*arguments, **named):
        called.append(arguments)
        if len(called) == calls:
            server.kill()
        return function(*arguments, **named)

    return first


# A connection that the server had kept open is reset, or closed without an answer; a new one is refused.
CAUSE = (
    r"\((\[Errno [0-9]+\] Connection refused|Connection reset by peer|Remote end closed connection without response)\)"
)
WAY_OUT = r"start it \(`make demo` does\) and this step again"
AWAY = f"MLflow at http://127.0.0.1:[0-9]+ does not answer, tried 2 times {CAUSE}: {WAY_OUT}"


@on_sqlite
def test_a_registry_that_is_away_leaves_service_alone(config, live, promote, mlflow_server):
    promote(1)
    promote(2)
    mlflow_server.kill()
    try:
        with pytest.raises(StepFailed, match=AWAY):
            swap.run(config, run_of(config.workspace, 2))
        with pytest.raises(StepFailed, match=AWAY):
            roll_back(config)
        assert in_service(config) == 2 and not exchange.journal_file(config).exists()
    finally:
        mlflow_server.start()
    assert aliases(config) == {"champion": 2, "previous": 1}
    assert roll_back(config)["served_version"] == 1


# What the server does not hear of any more; and the version that serves until the next start.
MOMENTS = {
    "both aliases": ("set_alias", 1, 1),
    "champion": ("set_alias", 2, 1),
    "all tags": ("tag", 1, 2),
    "the second tag": ("tag", 2, 2),
    "the history": ("history", 1, 2),
}


@on_sqlite
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_registry_that_goes_away_in_a_swap_is_made_good_by_the_next_start(
    config, live, bring, promote, mlflow_server, monkeypatch, moment
):
    call, count, serves = MOMENTS[moment]
    promote(1)
    run = decided(config, bring, 2)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(registry, call, killing(mlflow_server, getattr(registry, call), count))
            said = (
                "version 2 is not put into service, 1 serves as before: " if serves == 1 else "version 2 is in service"
            )
            with pytest.raises(StepFailed, match=f"{said}.*{AWAY}"):
                swap.run(config, run)
        assert answer(config)["version"] == serves
        assert exchange.journal_file(config).exists()
    finally:
        mlflow_server.start()
    promote(2)
    assert in_service(config) == 2 and aliases(config) == {"champion": 2, "previous": 1}
    assert registry.tags(config, 2)["verdict"] == "promoted" and registry.history(config) == [2, 1]
    assert not exchange.journal_file(config).exists()


@on_sqlite
@pytest.mark.parametrize(
    "call, said, serves",
    [("set_hold", "^", 3), ("tag", "version 2 is in service, but .*run the same command again: ", 2)],
)
def test_a_registry_that_goes_away_in_a_rollback_is_made_good_by_the_next(
    config, live, promote, mlflow_server, monkeypatch, call, said, serves
):
    for number in VERSIONS:
        promote(number)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(registry, call, killing(mlflow_server, getattr(registry, call)))
            with pytest.raises(StepFailed, match=f"{said}{AWAY}"):
                roll_back(config)
        assert answer(config)["version"] == serves
    finally:
        mlflow_server.start()
    assert roll_back(config)["served_version"] == 2
    assert in_service(config) == 2 and aliases(config) == {"champion": 2, "previous": 1}
    assert registry.hold(config) == "version 3 was rolled back by ann: too strict"


@on_sqlite
@pytest.mark.parametrize("moment, serves", [("try_out", 1), ("confirm", 1), ("switch", 2)])
def test_a_swap_that_has_lost_its_lease_stops_before_the_commit_and_the_next_tidies_up(
    config, live, promote, monkeypatch, moment, serves
):
    promote(1)
    owner = live_servers if moment == "confirm" else exchange
    before, step = aliases(config), getattr(owner, moment)

    def then_taken_over(*arguments):
        step(*arguments)
        if moment != "confirm" or arguments[-1] == repository.TEXT:
            monkeypatch.setattr("socket.gethostname", lambda: "another")
            with registry.lease(config, "rollback by bo"):
                pass

    with monkeypatch.context() as patched, pytest.raises(registry.LeaseLost, match="swap of run run-2 ended .* look"):
        patched.setattr(registry, "LEASE_SECONDS", -1)
        patched.setattr(owner, moment, then_taken_over)
        promote(2)
    assert repository.served(repository.live(config)) == serves and aliases(config) == before
    with registry.lease(config, "rollback by bo"), live_servers.connect(config) as servers:
        exchange.finish_or_undo(config, servers)
    assert in_service(config) == serves and registry.alias(config, "champion") == serves
    assert promote(2)["served_version"] == 2


@on_sqlite
def test_a_rollback_and_a_hold_take_no_runs_overrides(config, live, promote):
    promote(1)
    promote(2)
    weekly = run_of(config.workspace, "weekly")
    runs.record(weekly, config, ["serving=tensorrt", "mlflow.registered_model=another", "serving.urls=[127.0.0.1:9]"])
    assert runs.newest(config.workspace) == weekly
    by_hand = [o for o in overrides(config) if o != "profile=demo"]
    # What a version is built for now, by default, is not what these are built for: it would not load.
    assert configuration.load(by_hand).serving.engine == "tensorrt" != config.serving.engine
    assert configuration.load(by_hand).serving.max_batch_size != config.serving.max_batch_size

    assert rollback.run(by_hand, "ann", "too strict", "configs", "config")["served_version"] == 1
    assert in_service(config) == 1 and aliases(config) == {"champion": 1, "previous": None}
    for model in (repository.CLASSIFIER, repository.TEXT):
        written = repository.read(repository.config_file(repository.live(config), model))
        assert written.max_batch_size == config.serving.max_batch_size
    held = hold.run(by_hand, False, None, None, "configs", "config")
    assert held["hold"] == "version 2 was rolled back by ann: too strict"
