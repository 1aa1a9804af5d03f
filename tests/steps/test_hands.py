"""What hands do in the registry: they remove, move and rename what the steps rely on. On a real MLflow store.

The live repository is real too, without a server on it: what serves is known by its files.
"""

import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from signing import signed, tag
from test_promotion import evaluated

import commands
from tasks import config as configuration
from tasks import files
from tasks.data import download, restore, versions
from tasks.errors import Skip, StepFailed, UsageError
from tasks.promotion import decide, gate, in_service, limits, register, registry
from tasks.promotion.refusals import Refused
from tasks.run import find
from tasks.serving import exchange, repository, rollback, swap
from tasks.training import checkpoint, evaluate

SERVED_AT = "2026-11-0{}T03:00:00.000+00:00"


def version(config, **tags) -> int:
    """A version that passed the gate, of run `run-N`."""
    name, number = config.mlflow.registered_model, len(registry.versions(config)) + 1
    known = {"run_id": f"run-{number}", "gate": "passed", "checkpoint_sha256": f"checkpoint-{number}"}
    tags = {**known, **limits.tags_of(config.gate), "profile": "demo", **tags}
    return signed(config, registry.client(config).create_model_version(name, "file:///nowhere", tags=tags).version)


def serve(config, number: int, engine: str, **facts) -> None:
    """Has the live repository serve a version with this engine, as a swap leaves it."""
    live = repository.live(config)
    repository.create(config, live)
    for part in repository.PARTS:
        repository.folder(live, part, number).mkdir(parents=True, exist_ok=True)
    known = {"version": number, "sha256": engine, "engine": "onnx", **facts}
    files.write_json(repository.folder(live, repository.CLASSIFIER, number) / "engine.json", known)
    repository.write(live, repository.text_config(config, number))


@pytest.fixture
def second(config):
    """Version 2 serves, as version 1 did before; version 3 is registered and never served."""
    for number in (1, 2):
        sha256 = f"{number}engine-of-this"
        version(config, served_at=SERVED_AT.format(number), engine_sha256=sha256, served_sha256=sha256)
        serve(config, number, sha256, checkpoint_sha256=f"checkpoint-{number}", run_id=f"run-{number}")
    version(config)
    registry.set_alias(config, "champion", 2)
    registry.set_alias(config, "previous", 1)
    return config


def aliases(config) -> dict:
    return {name: registry.alias(config, name) for name in ("champion", "previous")}


def released(config, number):
    return config.model_copy(update={"release": config.release.model_copy(update={"version": number})})


# Aliases --------------------------------------------------------------------------------------------------------------


def test_what_serves_and_is_called_champion_is_no_reason_for_a_word(second):
    serving = in_service.find(second)
    assert (serving.number, serving.version, serving.champion, serving.warning) == (2, 2, 2, None)
    assert str(serving) == "version 2 (engine 2engine-of-t)"
    assert in_service.repair(second) == serving and aliases(second) == {"champion": 2, "previous": 1}


# champion and previous as a hand leaves them, and what is said of it.
MOVED = [
    (None, 1, "has lost the alias champion, which a hand has removed: `python commands.py swap --repair`"),
    (3, 1, "the registry calls version 3 champion, to which a hand has moved the alias: .*toxicity_release for it"),
    (1, 1, "the registry calls version 1 champion"),
    (2, None, None),
    (2, 3, None),
    (None, None, "has lost the alias champion"),
]


def test_aliases_that_a_hand_has_moved_are_set_again_by_what_serves(second):
    for champion, previous, said in MOVED:
        for name, number in {"champion": champion, "previous": previous}.items():
            registry.delete_alias(second, name)
            if number:
                registry.set_alias(second, name, number)
        serving = in_service.find(second)
        if said is None:
            assert serving.warning is None
        else:
            assert serving.warning.startswith("version 2 (engine 2engine-of-t) serves, ")
            assert re.search(said, serving.warning)
            assert not re.search("stop|remove (it|that)", serving.warning)  # what serves is never to be taken away
        assert in_service.champion(second) == 2
        in_service.repair(second)
        assert aliases(second) == {"champion": 2, "previous": 1}


def test_decisions_are_about_what_serves_whatever_the_alias_says(second):
    registry.set_alias(second, "champion", 3)
    in_service.require_champion(second, 3, 2)  # compared with what serves
    with pytest.raises(StepFailed, match="fell while version 1 was champion; now it is version 2"):
        in_service.require_champion(second, 3, 1)
    release = find(second.workspace, "release-3")
    decided = decide.run(released(second, 3), release, decision="approve", reviewer="ann", reason="better")
    assert decided["champion"] == 2
    # What the alias calls champion, but never served, can be rejected like any other.
    with pytest.raises(Skip, match="version 3 was rejected by ann"):
        decide.run(released(second, 3), release, decision="reject", reviewer="ann")


def test_an_alias_on_what_never_served_is_said_also_where_nothing_serves(config):
    version(config)
    registry.set_alias(config, "champion", 1)
    assert "but nothing serves, and it never did: remove the alias" in in_service.find(config).warning


def test_an_engine_that_was_built_again_since_leaves_the_version_known(second):
    tag(second, 2, engine_sha256="of-a-later-build")
    assert in_service.champion(second) == 2
    registry.untag(second, 2, "served_sha256")
    signed(second, 2)
    assert in_service.champion(second) == 2  # by its checkpoint
    serve(second, 2, "2engine-of-this")  # as engines of before they held their origin
    assert in_service.champion(second) == 2  # by the registry's own record that it served


# Versions and models that are gone ------------------------------------------------------------------------------------


def test_a_version_that_serves_and_was_deleted_is_named_and_a_person_decides(second, mlflow):
    mlflow.delete_model_version(second.mlflow.registered_model, "2")  # which takes its alias along
    serving = in_service.find(second)
    assert (serving.number, serving.version, serving.run_id) == (2, None, "run-2")
    assert "serves, but toxic_classificator in the registry has no version 2: it was deleted there" in serving.warning
    assert limits.for_a_person(second, registry.tags(second, 3)) == [serving.warning]
    assert in_service.repair(second).warning == serving.warning
    with pytest.raises(StepFailed, match="toxicity_release for version 1"):  # whose files are none
        rollback.choose(second, serving)
    change = swap.going_back(second, None, 1, "ann", "too strict", 2)
    assert change["tags"].keys() == {1} and change["hold"] == "version 2 was rolled back by ann: too strict"
    assert swap.going_forward(second, None, 3)["aliases"]["previous"] == 1  # a rollback would go there


def test_what_a_hand_deletes_in_the_middle_of_a_swap_does_not_keep_it_from_its_end(second, mlflow):
    mlflow.delete_model_version(second.mlflow.registered_model, "1")
    exchange.set_aliases(second, {"previous": 1, "champion": 3})
    assert aliases(second) == {"champion": 3, "previous": None}


def test_a_renamed_model_is_found_by_its_engine(second, mlflow):
    mlflow.rename_registered_model(second.mlflow.registered_model, "toxic_old")
    serving = in_service.find(second)
    assert serving.elsewhere == ("toxic_old", 2)
    assert serving.warning.endswith(
        "which the registry has as version 2 of toxic_old, not of toxic_classificator: rename toxic_old back in "
        "MLflow, or set mlflow.registered_model=toxic_old"
    )


@pytest.fixture
def anew(config):
    """A registry that was made anew: its version 1 is another model than the version 1 that serves."""
    version(config, engine_sha256="of-the-new-one")
    serve(config, 1, "0ld-engine-hash", checkpoint_sha256="of-the-old-one", model_version="m.dir", data_version="d.dir")
    return config


def test_equal_numbers_are_not_the_same_model(anew):
    serving = in_service.find(anew)
    assert serving.version is None
    assert "version 1 of toxic_classificator in the registry is another model (engine of-the-new-o)" in serving.warning
    registry.set_alias(anew, "champion", 1)  # a hand's
    assert in_service.champion(anew) is None
    approval = {"decision": "approve", "reviewer": "ann", "reason": "so that it is right"}
    with pytest.raises(
        UsageError, match="version 1 .engine 0ld-engine-h. serves, and is another model .*register"
    ) as e:
        decide.run(released(anew, 1), find(anew.workspace, "release-1"), **approval)
    assert "what serves goes on" in str(e.value) and "remove" not in str(e.value) and "stop" not in str(e.value)
    with pytest.raises(UsageError, match="under one number a server can't have both"):
        swap.require_wanted(anew, 1, {**approval, "champion": None, "at": registry.now()})


def test_a_new_registrys_versions_get_numbers_of_their_own(anew):
    tags = registry.tags(anew, 1) | {"model_version": "abc"}
    tag(anew, 1, model_version="abc")
    assert register.registered(anew, tags) is None  # it could never be put into service
    registry.pass_over_numbers(anew, 3)
    assert version(anew, model_version="abc", run_id="run-1") == 4
    assert register.registered(anew, tags) == 4
    registry.pass_over_numbers(anew, 3)
    assert version(anew) == 5  # no number is passed over without need


def test_what_serves_keeps_its_run_and_its_data(second, anew, monkeypatch):
    assert in_service.protected_runs(second) >= {"run-1"}
    registry.delete_alias(second, "champion")
    serve(second, 2, "2engine-of-this", run_id="run-2")
    assert "run-2" in in_service.protected_runs(second)
    kept = []
    monkeypatch.setattr(versions, "prune", lambda config, names: kept.append(names) or 0)
    monkeypatch.setattr(restore, "named_by_registry", lambda config: {})  # wiped
    restore.prune(["profile=demo"], "configs", "config")
    assert set(kept[0]) == {"m.dir", "d.dir"}


# Comparing with what serves -------------------------------------------------------------------------------------------


def test_gate_warns_and_leaves_what_it_could_not_compare_with_to_a_person(anew, caplog):
    number = version(anew)
    serve(anew, 1, "0ld-engine-hash", checkpoint_sha256="of-the-old-one")  # and nobody knows which version DVC has
    run = find(anew.workspace, f"run-{number}")
    run.save("register", {"version": number})
    folder, serving = evaluate.what_serves(anew)
    assert folder is None and "no run folder" in serving["not_compared"] and serving["number"] == 1
    assert serving["not_compared"].startswith("version 1 (engine 0ld-engine-h) serves, but can't be compared with: ")
    run.save("evaluate", evaluated() | {"in_service": serving})
    verdict = gate.run(anew, run)
    assert verdict["passed"] and verdict["in_service"]["warning"] == serving["warning"]
    assert verdict["person"] == [serving["warning"], serving["not_compared"]]
    (check,) = [check for check in verdict["checks"] if check["name"] == "champion_f1_toxic"]
    assert check["passed"] is None and "can't be compared with" in check["sentence"]
    assert serving["warning"] in caplog.text
    with pytest.raises(Skip, match="a person decides, since version 1 .engine 0ld-engine-h. serves"):
        run.save("gate", verdict)
        decide.run(anew, run)


def checkpoint_in(folder):
    files.write_text(folder / "adapter" / "adapter.txt", "weights")
    files.write_json(folder / "thresholds.json", {"toxic": 0.5})
    files.write_json(folder / "training.json", {"run_id": "run-1"})
    files.write_text(folder / "merged" / "config.json", "{}")
    return folder


def test_the_model_of_what_serves_is_found_where_the_registry_has_lost_it(config, monkeypatch):
    """By DVC, whose version its engine names, or its run; by the run's version in the registry before."""
    final = checkpoint_in(checkpoint.final(config))
    sha256, md5 = checkpoint.content_hash(final), versions.version(config, final)
    shutil.rmtree(final)
    serve(config, 1, "0ld-engine-hash", model_version=md5)
    folder, serving = evaluate.what_serves(config)  # the registry is empty
    assert checkpoint.content_hash(folder) == sha256 and serving["not_compared"] is None
    assert serving["warning"] and serving["version"] is None

    run = find(config.workspace, "run-1")
    files.write_json(run.folder / "run.json", {"created_at": "2026-11-01", "overrides": []})
    run.save("register", {"version": 1, "model_version": md5})
    run.save("build_engine", {"version": 1, "sha256": "another-engine"})
    serve(config, 1, "another-engine")  # of before engines held their origin
    folder, serving = evaluate.what_serves(config)
    assert checkpoint.content_hash(folder) == sha256 and serving["run_id"] == "run-1"

    number = version(config, model_version=md5, engine_sha256="another-engine", checkpoint_sha256=sha256)
    registry.set_alias(config, "champion", number)
    folder, serving = evaluate.what_serves(config)  # the version is there, its artifacts are gone
    assert folder.name == "version-1" and checkpoint.content_hash(folder) == sha256
    assert (serving["version"], serving["warning"], serving["not_compared"]) == (1, None, None)


# MLflow's refusals ----------------------------------------------------------------------------------------------------


def call(capfd, *arguments):
    """(exit code, the last line of stderr) of a command, which must not have ended with a traceback."""
    code = commands.main(list(arguments))
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return code, said.strip().splitlines()[-1]


@pytest.mark.parametrize("step", ["download", "train"])
def test_a_deleted_experiment_is_said_before_anything_is_spent(config, mlflow, capfd, monkeypatch, step):
    monkeypatch.chdir(configuration.SHIPPED.parent)
    registry.training_run(config, find(config.workspace, "weekly-1"))
    experiment = mlflow.get_experiment_by_name(config.mlflow.experiment).experiment_id
    mlflow.delete_experiment(experiment)
    code, said = call(capfd, step, "profile=demo", "disk.min_free_gib=0")
    assert code == 2  # which Airflow does not try again
    assert said.startswith("the experiment toxic_classificator (experiment 1) is deleted in MLflow at ")
    assert f"run `mlflow experiments restore --experiment-id {experiment}` with MLFLOW_TRACKING_URI=sqlite:" in said
    assert not (config.workspace / "data" / "raw").exists() and not (config.workspace / "models").exists()


def test_a_deleted_run_is_named_with_the_command_that_restores_it(config, mlflow):
    made = registry.training_run(config, find(config.workspace, "weekly-1"))
    mlflow.delete_run(made)
    with pytest.raises(Refused, match=f"run {made} is deleted .*`mlflow runs restore --run-id {made}`"):
        registry.log_to_run(config, made, {"f1_toxic": 0.9})
    mlflow.restore_run(made)
    mlflow.delete_experiment("1")  # and all its runs with it
    with pytest.raises(Refused, match="`mlflow experiments restore --experiment-id 1`"):
        registry.log_to_run(config, made, {"f1_toxic": 0.9})


MISSING = [
    (lambda mlflow: mlflow.log_metric("0" * 32, "f1", 1), "has no run 0000.*`python commands.py train`"),
    (lambda mlflow: mlflow.set_model_version_tag("toxic_classificator", "9", "a", "b"), "has no version 9 of toxic"),
    (lambda mlflow: mlflow.set_registered_model_tag("gone", "a", "b"), "no registered model gone: .*renamed"),
    (lambda mlflow: mlflow.create_model_version("gone", "file:///x"), "no registered model gone"),
    (lambda mlflow: mlflow.create_experiment("Default"), r"refuses it \(RESOURCE_ALREADY_EXISTS\): Experiment"),
]


def test_what_is_not_there_ends_in_one_sentence(config, mlflow):
    for ask, said in MISSING:
        with pytest.raises(Refused, match=said) as refused:
            ask(mlflow)
        assert "\n" not in str(refused.value)


def test_a_renamed_experiment_is_named_when_a_new_one_is_made(config, mlflow, caplog):
    made = registry.training_run(config, find(config.workspace, "weekly-1"))
    mlflow.create_model_version(config.mlflow.registered_model, "file:///nowhere", run_id=made)
    mlflow.rename_experiment("1", "toxic_2025")
    assert registry.training_run(config, find(config.workspace, "weekly-2")) != made
    assert "the runs before are in toxic_2025 (experiment 1), as it was renamed" in caplog.text
    assert "mlflow experiments rename --experiment-id 1 --new-name toxic_classificator" in caplog.text


@pytest.mark.parametrize(
    "status, body, said",
    [
        (
            401,
            "You are not authenticated.",
            "does not accept a request without a login (401): set MLFLOW_TRACKING_USER",
        ),
        (403, "Permission denied", "does not allow it to a request without a login (403, Permission denied): an admin"),
    ],
)
def test_a_server_that_allows_nothing_is_not_called_away(config, capfd, monkeypatch, status, body, said):
    """With the answers of MLflow's own login, `--app-name=basic-auth`."""
    monkeypatch.chdir(configuration.SHIPPED.parent)
    asked = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        code, last = call(capfd, "hold", "profile=demo", f"mlflow.tracking_uri={address}")
        server.shutdown()
    assert code == 2 and len(asked) == 1
    assert said in last and last.startswith(f"MLflow at {address} ")


def test_an_address_that_mlflow_does_not_take_is_said_in_words(config, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    away = config.model_copy(
        update={"mlflow": config.mlflow.model_copy(update={"tracking_uri": f"file://{tmp_path}/mlruns"})}
    )
    with pytest.raises(Refused, match="refuses it .*mlflow migrate-filestore"):
        registry.hold(away)


def test_a_tag_that_a_hand_has_written_over_leaves_the_decision_to_a_person(second):
    tag(second, 2, gate_limits="none of your business")
    (why,) = limits.for_a_person(second, registry.tags(second, 3))
    assert why == "nobody knows by which limits version 2, which serves, was judged"


def test_downloads_go_on_but_say_what_the_registry_has_wrong(second, caplog):
    registry.delete_alias(second, "champion")
    with pytest.raises(UsageError, match="each file needs a name of its own"):
        twice = second.model_copy(
            update={"data": second.data.model_copy(update={"sources": [*second.data.sources] * 2})}
        )
        download.run(twice, find(second.workspace, "weekly-4"))
    assert "has lost the alias champion" in caplog.text
