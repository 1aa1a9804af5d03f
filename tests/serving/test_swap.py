import json
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
from serving_parts import (
    add_fault,
    answer,
    changed,
    damage_model,
    decided,
    empty_engine,
    overrides,
    own_files,
    put_in_service,
    ready,
    run_of,
)
from signing import tag
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from tasks import files
from tasks.errors import StepFailed, UsageError
from tasks.labels import LABELS
from tasks.promotion import registry
from tasks.serving import build_engine, client, exchange, live_servers, repository, rollback, swap


class Clients:
    """Threads that ask the live server without a pause: two over gRPC, two over HTTP."""

    def __init__(self, live):
        self.live, self.stop = live, threading.Event()
        self.answers, self.failures = [], []
        self.threads = [threading.Thread(target=ask) for ask in (self.over_grpc, self.over_http) for _ in range(2)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def over_grpc(self):
        with InferenceServerClient(self.live.config.serving.url) as server:
            self.until_stopped(lambda: client.ask(server, ["you are an idiot"])[0])

    def over_http(self):
        body = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["you are an idiot"]}]}

        def ask():
            response = self.live.http("POST", "/v2/models/toxic_text/infer", json=body)
            return json.loads(response.raise_for_status().json()["outputs"][0]["data"][0])

        self.until_stopped(ask)

    def until_stopped(self, ask):
        while not self.stop.is_set():
            try:
                self.answers.append(ask())
            except Exception as error:
                self.failures.append(error)


def test_the_first_swap_and_the_next_under_load(config, live, promote, bring):
    with pytest.raises(InferenceServerException):
        answer(config)  # nothing is in service yet

    first = promote(1)
    assert (first["served_version"], first["previous_version"]) == (1, None)
    old = answer(config)
    assert old["version"] == 1

    with Clients(live) as clients:
        second = promote(2)
        after = len(clients.answers)
        while len(clients.answers) < after + 50:
            time.sleep(0.01)
    assert (second["served_version"], second["previous_version"]) == (2, 1)
    assert clients.failures == []
    assert clients.answers[0]["version"] == 1
    assert {a["version"] for a in clients.answers[after + len(clients.threads) :]} == {2}
    # The two versions read ids differently: an answer that mixed their parts would be neither's.
    new = answer(config)
    assert new["scores"] != old["scores"]
    for found in clients.answers:
        expected = old if found["version"] == 1 else new
        assert found["scores"] == pytest.approx(expected["scores"], abs=1e-3)

    assert [ready(config, part) for part in repository.PARTS] == [[2], [2], [2]]
    assert registry.alias(config, "champion") == 2 and registry.alias(config, "previous") == 1
    tags = registry.tags(config, 2)
    built = run_of(config.workspace, 2).result("build_engine")
    assert (tags["verdict"], tags["engine"], tags["engine_sha256"]) == ("promoted", "onnx", built["sha256"])
    assert not exchange.journal_file(config).exists()

    assert not any(config.workspace.glob("models/e*/*"))  # what the two runs have built is of no use any more

    # Once more: nothing to do, but for what a kill has left.
    for _ in range(2):
        assert swap.run(config, run_of(config.workspace, 2)) == {"served_version": 2, "previous_version": 1}
        assert not any(config.workspace.glob("models/e*/*"))
        bring(2)

    # A server that was killed serves the champion again, on whatever path it is asked.
    live.kill()
    live.start("/v2/models/toxic_text/ready")
    assert answer(config)["version"] == 2 and ready(config) == [2]


def break_warm_up(folder):
    add_fault(
        folder / "model.py",
        "def broken(self, buckets):\n    raise MemoryError\n\n\nTritonPythonModel.warm_up = broken\n",
    )


def break_tokenizer(folder):
    file = repository.folder(folder.parents[1], repository.TOKENIZER, int(folder.name)) / "model.py"
    add_fault(file, "def broken(self, requests):\n    raise RuntimeError\n\n\nTritonPythonModel.execute = broken\n")


def change_golden(folder):
    golden = files.read_json(folder / "golden.json")
    for message in golden:
        message["answer"]["labels"] = [] if message["answer"]["labels"] else ["threat"]
    files.write_json(folder / "golden.json", golden)


def change_toxic(folder):
    golden = files.read_json(folder / "golden.json")
    for message in golden:
        message["answer"]["toxic"] = not message["answer"]["toxic"]
    files.write_json(folder / "golden.json", golden)


def harmed(harm):
    """An `install` after which the installed files are not what was staged."""

    def install_and_harm(config, run, engine, version):
        install(config, run, engine, version)
        harm(own_files(config, version))

    install = swap.install
    return install_and_harm


def test_a_broken_version_leaves_the_old_one_in_service(config, live, promote, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(StepFailed, match="none serves as before"):
        patched.setattr(swap, "install", harmed(change_golden))
        promote(1)
    assert ready(config) == [] and not live.answers("/v2/models/toxic_text/ready")
    assert repository.installed(repository.live(config)) == []
    assert registry.alias(config, "champion") is None and not exchange.journal_file(config).exists()

    promote(1)
    before = answer(config)
    for harm, complaint in (
        (damage_model, "load failed.*SHA-256"),
        (break_warm_up, "load failed.*MemoryError"),
        (break_tokenizer, "RuntimeError"),
        (change_golden, "in stage it was"),
        (change_toxic, "in stage it was"),
    ):
        with monkeypatch.context() as patched, Clients(live) as clients:
            patched.setattr(swap, "install", harmed(harm))
            with pytest.raises(
                StepFailed, match=f"version 2 is not put into service, 1 serves as before: .*{complaint}"
            ):
                promote(2)
        assert clients.failures == [] and {a["version"] for a in clients.answers} == {1}
        assert answer(config) == before and ready(config) == [1]
        assert registry.alias(config, "champion") == 1 and registry.alias(config, "previous") is None
        assert "verdict" not in registry.tags(config, 2)
        assert repository.served(repository.live(config)) == 1 and not exchange.journal_file(config).exists()
        assert repository.installed(repository.live(config)) == [1]  # an engine has gigabytes
    assert promote(2)["served_version"] == 2  # the same version, unharmed


def smaller_batches(folder):
    files.write_json(folder / "engine.json", {**files.read_json(folder / "engine.json"), "max_batch_size": 8})


def test_versions_with_other_batch_sizes_take_each_others_place(config, live, promote, monkeypatch):
    """Parts that take less than the ensemble in service would have the server let go of it."""
    promote(1)

    def batch_size():
        with InferenceServerClient(config.serving.url) as server:
            return server.get_model_config(repository.TEXT).config.max_batch_size

    before = batch_size()
    with monkeypatch.context() as patched, Clients(live) as clients:
        patched.setattr(swap, "install", harmed(smaller_batches))
        promote(2)
        assert batch_size() == 8 and ready(config) == [2]
        patched.setattr(swap, "install", harmed(change_golden))
        with pytest.raises(StepFailed, match="2 serves as before"):
            promote(3)
        assert batch_size() == 8 and ready(config) == [2]
        patched.undo()
        promote(3)
    assert batch_size() == before and ready(config) == [3] and clients.failures == []


PLAN = {"engine": "tensorrt", "tensorrt_package": "tensorrt", "gpu": "NVIDIA L4", "compute_capability": "SM89"}


def say_of_engine(folder, **facts):
    """Has a version's engine.json say that it was built otherwise: a plan is what no server here could load."""
    engine = files.read_json(folder / "engine.json")
    files.write_json(folder / "engine.json", {**engine, **facts})


def content(config) -> dict:
    """Of all files in the live repository."""
    return {file: file.read_bytes() for file in repository.live(config).rglob("*") if file.is_file()}


def test_engines_that_no_server_has_both_of_are_refused_before_anything_is_touched(config, live, promote, bring):
    promote(1)
    promote(2)

    def refused(version, complaint, **facts):
        run, before = decided(config, bring, version), content(config)
        say_of_engine(build_engine.folder_of(config, run), **facts)
        with pytest.raises(StepFailed, match=f"version {version} is not put into .* what serves goes on: {complaint}"):
            swap.run(config, run)
        assert answer(config)["version"] == 2 and not exchange.journal_file(config).exists()
        assert content(config) == before

    for version in (1, 3):  # the files of 1 are the way back
        refused(version, "it was built with engine=tensorrt, .* engine=onnx: .*alike", engine="tensorrt")
    say_of_engine(own_files(config, 2), **PLAN, tensorrt="10.13.3.9")
    refused(
        3,
        f"it was built with TensorRT 10.9.0.34 for NVIDIA L4 .SM89., but {config.serving.url} serves version 2, built "
        "with TensorRT 10.13.3.9 .*toxicity_release for version 3",
        **PLAN,
        tensorrt="10.9.0.34",
    )


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("harm, complaint", [(damage_model, "SHA-256"), (change_golden, "in stage it was")])
def test_a_version_that_comes_again_and_fails_leaves_the_way_back_as_it_was(
    config, live, bring, monkeypatch, keep, harm, complaint
):
    """What was built of it anew had the place of what was proven, and did not load, or did."""
    both = changed(config, keep_previous_loaded=keep)
    put_in_service(both, bring, 1)
    before = answer(config)
    put_in_service(both, bring, 2)
    way_back = content(config)
    with monkeypatch.context() as patched, pytest.raises(StepFailed, match=f"2 serves as before: .*{complaint}"):
        patched.setattr(swap, "install", harmed(harm))
        put_in_service(both, bring, 1)
    assert answer(config)["version"] == 2 and ready(config) == ([1, 2] if keep else [2])
    assert content(config) == way_back and not any(exchange.aside(config).glob("*/*"))
    assert rollback.run(overrides(both), "ann", "too strict", "configs", "config")["served_version"] == 1
    assert answer(config) == before


@pytest.mark.parametrize("harm", [damage_model, empty_engine, shutil.rmtree])
def test_a_version_in_service_that_could_not_be_loaded_again_is_neither_swapped_nor_rolled_back(
    config, live, promote, harm
):
    """It answers from memory, and nothing could bring it back there: a swap would risk what serves."""

    def roll_back():
        return rollback.run(overrides(config), "ann", "too strict", "configs", "config")

    promote(1)
    promote(2)
    harm(own_files(config, 2))
    refused = "is not put into service, what serves goes on: .* answers from memory as version 2, which it could not "
    for move in (lambda: promote(3), lambda: promote(1, release=True), roll_back):
        with Clients(live) as clients, pytest.raises(StepFailed, match=f"{refused}.*toxicity_release for version 2"):
            move()
        assert clients.failures == [] and ready(config) == [2]
        assert not exchange.journal_file(config).exists() and registry.hold(config) is None
    assert promote(2)["served_version"] == 2
    assert promote(3)["served_version"] == 3

    # The other way out that the message names.
    harm(own_files(config, 3))
    with pytest.raises(StepFailed, match="or start the server again, which then serves nothing until this command"):
        roll_back()
    live.kill()
    live.start()
    assert ready(config) == [] and roll_back()["served_version"] == 2 and answer(config)["version"] == 2


@pytest.mark.parametrize("where", ["try_out", "switch"])
@pytest.mark.parametrize("lost", [False, True])
def test_a_killed_swap_does_not_stand_in_the_way_of_mending_what_served(
    config, live, promote, monkeypatch, where, lost
):
    promote(1)
    before = answer(config)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(exchange, where, killed)
        patched.setattr(exchange, "undo", lambda *arguments: None)
        promote(2)
    damage_model(own_files(config, 1))
    if lost:  # as it is after an upgrade of the server, which does not take the old engine
        live.kill()
        live.start()
        assert ready(config) == []
    assert promote(1)["served_version"] == 1
    assert answer(config) == before and ready(config) == [1] and not exchange.journal_file(config).exists()
    assert promote(2)["served_version"] == 2


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("harm", [damage_model, empty_engine])
def test_nor_does_one_that_was_killed_after_its_commit(config, live, promote, monkeypatch, lost, harm):
    promote(1)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(exchange, "finish", killed)
        promote(2)
    new = answer(config)
    harm(own_files(config, 2))
    if lost:
        live.kill()
        live.start()
    assert promote(2)["served_version"] == 2
    assert answer(config) == new and ready(config) == [2] and not exchange.journal_file(config).exists()
    assert registry.alias(config, "champion") == 2 and registry.tags(config, 2)["verdict"] == "promoted"
    assert rollback.run(overrides(config), "ann", "too strict", "configs", "config")["served_version"] == 1


def test_a_damaged_version_in_service_is_installed_anew_without_a_dropped_request(config, live, promote):
    promote(1)
    before = answer(config)
    damage_model(own_files(config, 1))
    with Clients(live) as clients:
        assert promote(1) == {"served_version": 1, "previous_version": None}
    assert clients.failures == [] and clients.answers and ready(config) == [1]
    repository.verify(repository.live(config), 1)

    # A server that has started on the damaged files serves none of them until they are new.
    damage_model(own_files(config, 1))
    live.kill()
    live.start()
    assert "version 1 is not served" in live.log.read_text() and not live.answers("/v2/models/toxic_text/ready")
    promote(1)
    for _ in range(2):
        assert answer(config) == before and ready(config) == [1]
        live.kill()
        live.start("/v2/models/toxic_text/ready")


def marked(amount):
    """Has a classifier's code be that of another commit: its logits, off by `amount`, show which one runs."""

    def mark(folder):
        add_fault(
            folder / "model.py",
            "def marked(self, args):\n"
            "    initialize(self, args)\n"
            "    self.session = Marked(self.session)\n\n\n"
            "class Marked:\n"
            "    def __init__(self, session):\n"
            "        self.session = session\n\n"
            "    def run(self, *arguments):\n"
            "        logits, *others = self.session.run(*arguments)\n"
            f"        return logits + {amount}, *others\n\n\n"
            "initialize, TritonPythonModel.initialize = TritonPythonModel.initialize, marked\n",
        )

    return mark


def test_files_that_were_installed_anew_are_what_serves_also_at_the_second_try(config, live, promote, monkeypatch):
    promote(1)
    before = answer(config)
    # What the first try was about to do when it was killed, and what tells the new files from those before.
    for at_first, amount in (("serve_again", 0.01), ("install", 0.02)):
        damage_model(own_files(config, 1))
        with monkeypatch.context() as patched, Clients(live) as clients:
            patched.setattr(swap, "install", harmed(marked(amount)))
            with monkeypatch.context() as interrupted, pytest.raises(Killed):
                interrupted.setattr(swap, at_first, killed)
                promote(1)
            assert answer(config) == before and exchange.renewal_file(config).exists()
            promote(1)
        now = answer(config)
        assert clients.failures == [] and not exchange.renewal_file(config).exists() and ready(config) == [1]
        assert now["scores"] != before["scores"] and now["labels"] == before["labels"]
        before = now


@pytest.mark.parametrize("part, file", [("toxic_labels", "hashes.json"), ("toxic_classificator", "engine.json")])
def test_a_record_that_can_not_be_read_is_damage_like_any_other(config, live, promote, part, file):
    promote(1)
    live.kill()
    damaged = repository.folder(repository.live(config), part, 1) / file
    damaged.unlink()  # it may be a link to the engine's
    damaged.write_text("{")
    live.start()
    assert f"{file} can't be read" in live.log.read_text().replace(f"what {damaged} lists", file)
    promote(1)
    assert answer(config)["version"] == 1 and ready(config) == [1]


def test_a_damaged_version_that_nothing_was_built_for_names_the_way_out(config, live, promote):
    promote(1)
    damage_model(own_files(config, 1))
    with pytest.raises(UsageError, match="is not what run .* has built: run `python commands.py build_engine` first"):
        swap.run(config, run_of(config.workspace, 1))
    assert answer(config)["version"] == 1 and repository.served(repository.live(config)) == 1


def test_a_version_in_service_that_fits_the_server_no_more_is_installed_anew(config, live, promote):
    """As after an upgrade of the Triton image, which brings another TensorRT."""
    promote(1)
    before = answer(config)
    say_of_engine(own_files(config, 1), **PLAN, tensorrt="10.9.0.34")
    live.kill()
    repository.write(repository.live(config), repository.text_config(config, None))  # it would not have loaded
    live.start()
    repository.write(repository.live(config), repository.text_config(config, 1))
    promote(1)
    assert answer(config) == before and ready(config) == [1]
    classifier = repository.folder(repository.live(config), repository.CLASSIFIER, 1)
    assert files.read_json(classifier / "engine.json")["engine"] == "onnx"


def test_an_alias_that_a_hand_has_moved_or_removed_is_set_again_by_what_serves(config, live, promote):
    promote(1)
    promote(2)
    registry.set_alias(config, "champion", 3)
    registry.delete_alias(config, "previous")
    with pytest.raises(StepFailed, match="fell while version 3 was champion; now it is version 2"):
        promote(3)  # it was decided about another than what serves
    assert (registry.alias(config, "champion"), registry.alias(config, "previous")) == (2, 1)

    registry.delete_alias(config, "champion")
    assert promote(2, release=True) == {"served_version": 2, "previous_version": 1}  # the same engine
    assert registry.alias(config, "champion") == 2 and answer(config)["version"] == 2

    registry.delete_alias(config, "champion")
    repaired = swap.repair(overrides(config), "configs", "config")
    assert (repaired["served_version"], repaired["aliases"]) == (2, {"champion": 2, "previous": 1})
    assert "has lost the alias champion" in repaired["was"]
    assert swap.repair(overrides(config), "configs", "config")["was"] is None

    # Deleted while it serves: a rollback goes to the version before all the same.
    registry.client(config).delete_model_version(config.mlflow.registered_model, "2")
    with pytest.raises(StepFailed, match="has no version 2: it was deleted there"):
        swap.repair(overrides(config), "configs", "config")
    gone = rollback.run(overrides(config), "ann", "too strict", "configs", "config")
    assert (gone["served_version"], gone["rolled_back_version"]) == (1, 2) and answer(config)["version"] == 1
    assert registry.hold(config) == "version 2 was rolled back by ann: too strict"

    # All that served before 1 is gone now, and 1 has lost its alias.
    registry.delete_alias(config, "champion")
    left = "version 1 .engine [0-9a-f]{12}. serves and had lost its alias champion .* is set again; no version served"
    with pytest.raises(StepFailed, match=left):
        rollback.run(overrides(config), "ann", "too strict", "configs", "config")
    assert registry.alias(config, "champion") == 1


def test_another_registrys_version_of_the_same_number_is_not_mixed_up_with_this_ones(config, live, promote):
    promote(1)
    before, name = answer(config), config.mlflow.registered_model
    mlflow = registry.client(config)
    for number in ("1", "2", "3"):
        mlflow.delete_model_version(name, number)
    mlflow.delete_registered_model(name)
    registry.ensure_model(config)
    mlflow.create_model_version(name, "file:///nowhere", tags={"checkpoint_sha256": "another's", "gate": "passed"})
    with pytest.raises(
        UsageError, match="version 1 .engine .* serves, and is another model than version 1 of this reg"
    ):
        promote(1)
    assert answer(config) == before and registry.alias(config, "champion") is None


def test_an_answer_may_differ_by_the_tolerance_of_its_scores_and_nothing_else():
    scores = dict.fromkeys(LABELS, 0.3) | {"toxic": 0.9}
    message = {"answer": {"toxic": True, "labels": [], "scores": scores, "version": 1}}

    def expected(tolerance, **other):
        return live_servers.as_expected({**message["answer"], **other}, message, 1, tolerance)

    moved = {**scores, "threat": 0.33}
    assert expected(0.05, scores=moved) and not expected(0.02, scores=moved)
    assert not expected(0.05, toxic=False) and not expected(0.05, labels=["threat"]) and not expected(0.05, version=2)
    message["near_threshold"] = True
    assert expected(0.05, toxic=False) and not expected(0.02, toxic=False, scores=moved)


def test_who_has_lost_the_lease_undoes_nothing(config, live, promote, monkeypatch):
    promote(1)

    @contextmanager
    def lease_that_goes(*arguments):
        def still_mine():
            raise registry.LeaseLost("another has it")

        yield still_mine

    def fails(*arguments):
        raise StepFailed("it does not load")

    monkeypatch.setattr(registry, "lease", lease_that_goes)
    monkeypatch.setattr(exchange, "load_beside", fails)
    with pytest.raises(registry.LeaseLost):
        promote(2)
    assert exchange.journal_file(config).exists()


def test_a_server_that_has_lost_the_version_in_service_gets_it_back(config, live, promote):
    promote(1)
    with InferenceServerClient(config.serving.url) as server:
        server.unload_model(repository.TEXT, unload_dependents=True)
    while live.answers("/v2/models/toxic_text/ready"):
        time.sleep(0.1)
    assert promote(1)["served_version"] == 1
    assert answer(config)["version"] == 1 and ready(config) == [1]


def test_a_registry_that_fails_after_the_switch_brings_the_old_version_back(config, live, promote, monkeypatch):
    promote(1)
    before, set_aliases, calls = answer(config), exchange.set_aliases, []

    def fails_once(*arguments):
        calls.append(answer(config)["version"])
        if len(calls) == 1:
            raise ConnectionError("the registry is away")
        set_aliases(*arguments)

    monkeypatch.setattr(exchange, "set_aliases", fails_once)
    with Clients(live) as clients, pytest.raises(StepFailed, match="1 serves as before: the registry is away"):
        promote(2)
    assert clients.failures == [] and calls == [2, 1]
    assert answer(config) == before and ready(config) == [1]
    assert registry.alias(config, "champion") == 1 and not exchange.journal_file(config).exists()
    live.kill()
    live.start("/v2/models/toxic_text/ready")
    assert answer(config) == before


class Killed(BaseException):
    pass


def test_a_killed_swap_is_finished_or_undone_by_the_next(config, live, promote, monkeypatch):
    promote(1)
    # What it was about to do when it was killed, and the version that must serve after the next start.
    for where, lands_on in (("load_beside", 1), ("try_out", 1), ("switch", 1), ("set_aliases", 2), ("finish", 2)):
        with monkeypatch.context() as patched:
            patched.setattr(exchange, where, killed)
            patched.setattr(exchange, "undo", lambda *arguments: None)
            with pytest.raises(Killed):
                promote(2)
        assert exchange.journal_file(config).exists()
        if where == "switch":  # what nobody has proved yet must not keep a server from starting
            assert ready(config) == [1, 2]
            live.kill()
            live.start("/v2/models/toxic_text/ready")
            assert ready(config) == [1]
        with registry.lease(config, "test") as still_mine, live_servers.connect(config) as servers:
            exchange.finish_or_undo(config, servers)
            assert answer(config)["version"] == lands_on and ready(config) == [lands_on]
            assert registry.alias(config, "champion") == lands_on
            assert repository.served(repository.live(config)) == lands_on and not exchange.journal_file(config).exists()
            if lands_on == 2:
                exchange.replace(config, servers, still_mine, 1, {"champion": 1}, {})


def killed(*arguments):
    raise Killed


def test_a_rollback_between_decision_and_swap_counts(config, live, bring):
    run = decided(config, bring, 1)
    by_a_person = run.result("decide")
    run.save("decide", {**by_a_person, "by_mode": True})
    registry.set_hold(config, "version 0 was rolled back by ada: insults passed")
    with pytest.raises(StepFailed, match="on hold .*insults passed.*toxicity_release for version 1, or clear"):
        swap.run(config, run)
    run.save("decide", by_a_person)  # a person's word stands, but for the version that was rolled back since
    tag(config, 1, rolled_back_at="2999-01-01", rolled_back_by="ada", rolled_back_because="insults passed")
    with pytest.raises(StepFailed, match="version 1 was rolled back by ada"):
        swap.run(config, run)
    assert repository.served(repository.live(config)) is None


@pytest.mark.parametrize(
    "decision, reason", [("reject", "calls every greeting toxic"), (None, "promotion.mode=review")]
)
def test_what_nobody_has_approved_is_not_swapped_though_it_was_staged(config, live, bring, decision, reason):
    """In the DAG that takes somebody who marks `decide` as done and clears what follows."""
    run = decided(config, bring, 1)
    run.save("decide", {**run.result("decide"), "decision": decision, "reason": reason})
    with pytest.raises(UsageError, match=f"version 1 was not approved .ann: {reason}.: trigger toxicity_release"):
        swap.run(config, run)
    assert repository.served(repository.live(config)) is None and registry.alias(config, "champion") is None


def test_only_what_was_staged_for_this_champion_is_swapped(config, live, bring):
    run = decided(config, bring, 1)
    registry.set_alias(config, "champion", 2)
    with pytest.raises(StepFailed, match="fell while no version was champion; now it is version 2"):
        swap.run(config, run)
    registry.delete_alias(config, "champion")
    run.save("stage", {**run.result("stage"), "sha256": "another"})
    with pytest.raises(StepFailed, match="not what was staged"):
        swap.run(config, run)
    assert repository.served(repository.live(config)) is None


def test_without_a_live_server_the_address_and_the_way_out_are_named(config, bring):
    run = bring(1)
    with pytest.raises(StepFailed, match=f"{config.serving.url} does not answer.*start_triton_server"):
        swap.run(config, run)
