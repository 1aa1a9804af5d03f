"""Who can write to the registry, but has no key: nothing of theirs is believed, loaded or put into service.

On a real MLflow store, and a live repository without a server on it, as in test_hands.py.
"""

import getpass
import json
import re
import shutil

import pytest
from signing import signed
from test_hands import SERVED_AT, aliases, checkpoint_in, released, serve, version
from test_promotion import evaluated

import commands
from tasks import config as configuration
from tasks import files
from tasks.data import restore, versions
from tasks.errors import Skip, StepFailed, UsageError
from tasks.promotion import decide, gate, in_service, limits, registry, sign, signatures, verify
from tasks.run import find
from tasks.serving import build_engine, export_onnx, repository, rollback, stage, swap
from tasks.training import checkpoint, evaluate


@pytest.fixture
def second(config):
    """Version 2 serves, whose checkpoint is at hand, as version 1 did before; both are signed."""
    sha256 = checkpoint.content_hash(checkpoint_in(checkpoint.final(config)))
    for number, of in ((1, "checkpoint-1"), (2, sha256)):
        engine = {"engine_sha256": f"engine-{number}", "served_sha256": f"engine-{number}"}
        version(
            config, served_at=SERVED_AT.format(number), checkpoint_sha256=of, model_sha256=f"files-{number}", **engine
        )
        serve(config, number, f"engine-{number}", **origin(config, number))
    registry.set_alias(config, "champion", 2)
    registry.set_alias(config, "previous", 1)
    return config


def origin(config, number) -> dict:
    tags = registry.tags(config, number)
    return {name: tags[name] for name in in_service.ORIGIN if name in tags}


def made_by_hand(config, tags) -> int:
    """A version of somebody who has no key; its files would be code."""
    name = config.mlflow.registered_model
    return int(registry.client(config).create_model_version(name, "file:///forged", tags=tags).version)


@pytest.fixture
def nothing_fetched(monkeypatch):
    """Fails the test where files of a version are as much as downloaded."""

    def fetched(*arguments, **named):
        pytest.fail(f"downloaded {arguments} {named}")

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fetched)


# A forged version -----------------------------------------------------------------------------------------------------


@pytest.fixture
def forged(second, nothing_fetched):
    """Version 3: a copy of the champion, signatures and all, but with what it wants to be believed of it."""
    tags = {
        **registry.tags(second, 2),
        **{"gate": "passed", "gate_missed": "", "decision": "approve", "decided_by": "ann", "decided_why": "good"},
        **{"released_by": "ann", "released_at": "2999-01-01", "served_at": "2999-01-01", "verdict": "promoted"},
    }
    tags["approved_by"] = "ann"  # that is a reviewer's own word
    number = made_by_hand(second, tags)
    for name in ("champion", "previous", "approved", "challenger"):
        registry.set_alias(second, name, number)
    return second


def through_decide(config, run):
    decide.run(released(config, 3), run, decision="approve", reviewer="ann", reason="it is good")


def through_swap(config, run):
    at = {"at": registry.now(), "champion": 2}
    swap.require_wanted(released(config, 3), 3, {"decision": "approve", "reviewer": "ann", "reason": "x", **at})


FIRST_STEPS = {
    "gate": gate.run,
    "decide": through_decide,
    "export_onnx": lambda config, run: export_onnx.run(released(config, 3), run),
    "build_engine": lambda config, run: build_engine.run(config, run),
    "stage": lambda config, run: stage.run(config, run),
    "swap": through_swap,
    "data": lambda config, run: restore.data_of(config, 3),
    "checkpoint": lambda config, run: checkpoint.of_version(config, 3),
    "verify": lambda config, run: verify.run(["profile=demo"], 3, "configs", "config"),
}


def test_a_forged_version_is_refused_at_the_first_step_that_meets_it(forged):
    run = find(forged.workspace, "release-3")
    run.save("register", {"version": 3})
    run.save("evaluate", evaluated())
    exported = files.write_text(export_onnx.exported(forged, run) / "model.onnx", "x")
    run.save("export_onnx", {"version": 3, "sha256": files.sha256(export_onnx.exported(forged, run)), "of": exported})
    files.write_json(build_engine.folder_of(forged, run) / "engine.json", {"sha256": "e", "engine": "onnx"})
    run.save("build_engine", {"version": 3, "sha256": "e"})
    before = registry.tags(forged, 3)
    said = (
        "^version 3 of toxic_classificator is not to be believed: the signature of what register wrote about it "
        r"\(checkpoint_sha256, …\) is wrong: .* another version's; nothing of it is loaded .*"
        "`python commands.py sign --version=3 --reason=.*delete it in MLflow$"
    )
    for step in FIRST_STEPS.values():
        with pytest.raises(signatures.Unsigned, match=said):
            step(forged, run)
        assert registry.tags(forged, 3) == before


def test_the_next_comparison_is_with_what_serves_and_swaps_set_the_aliases_back(forged, caplog):
    folder, serving = evaluate.what_serves(forged)
    assert folder == checkpoint.final(forged) and (serving["version"], serving["not_compared"]) == (2, None)
    assert "the registry calls version 3 champion, to which a hand has moved the alias" in caplog.text
    assert "version 3 is not what steps have signed, so nothing puts it into service" in caplog.text
    run, number = find(forged.workspace, "weekly-4"), version(forged, run_id="weekly-4")
    run.save("register", {"version": number})
    run.save("evaluate", evaluated(champion=(0.9, 0.8), champion_version=2) | {"in_service": serving})
    run.save("gate", gate.run(forged, run))
    found = decide.run(forged, run)
    assert (found["reviewer"], found["champion"], found["person"]) == ("auto", 2, [])
    in_service.repair(forged)
    assert aliases(forged) == {"champion": 2, "previous": 1}
    with pytest.raises(StepFailed, match="1 is missing|hashes.json"):  # version 1 is what it would go to
        rollback.choose(forged, in_service.find(forged))


def test_where_nothing_serves_here_the_last_good_version_is_the_champion(forged, caplog):
    shutil.rmtree(repository.live(forged))
    serving = in_service.warn(forged)
    assert (serving.version, serving.champion) == (2, 3)
    assert "version 3 of toxic_classificator is not to be believed" in caplog.text
    assert "version 2 is taken, the last to serve which is signed" in caplog.text
    assert evaluate.what_serves(forged)[0] == checkpoint.final(forged)
    # None is good: a person decides.
    for number in (1, 2):
        registry.tag(forged, number, served_at="2999-01-02")
    folder, serving = evaluate.what_serves(forged)
    assert (folder, serving["version"]) == (None, None) and "sign --version=3" in serving["not_compared"]
    (why,) = limits.for_a_person(forged, {})
    assert "version 3 of toxic_classificator is not to be believed" in why
    assert swap.going_forward(forged, None, 4)["aliases"]["previous"] is None


def test_a_rollback_that_finds_nothing_does_not_name_the_forged_version(forged):
    for part in repository.PARTS:
        shutil.rmtree(repository.folder(repository.live(forged), part, 1))
    with pytest.raises(StepFailed, match="version 1 served before 2, but .* trigger toxicity_release for version 1$"):
        rollback.choose(forged, in_service.find(forged))


def test_the_same_model_under_another_number_is_taken_from_a_signed_version_alone(second, nothing_fetched, mlflow):
    tags = registry.tags(second, 2)
    mlflow.delete_model_version(second.mlflow.registered_model, "2")
    assert made_by_hand(second, tags) == 3
    assert in_service.find(second).elsewhere is None
    mlflow.rename_registered_model(second.mlflow.registered_model, "toxic_old")
    assert in_service.find(second).elsewhere is None


def test_a_renamed_models_version_is_known_by_the_name_that_it_was_signed_with(second, mlflow):
    mlflow.rename_registered_model(second.mlflow.registered_model, "toxic_old")
    assert in_service.find(second).elsewhere == ("toxic_old", 2)
    assert evaluate.what_serves(second)[0] == checkpoint.final(second)
    renamed = second.model_copy(update={"mlflow": second.mlflow.model_copy(update={"registered_model": "toxic_old"})})
    with pytest.raises(signatures.Unsigned, match="version 2 of toxic_old .*another version's"):
        registry.require_signed(renamed, 2)


def test_a_forged_verdict_does_not_keep_the_next_run_from_training(config, caplog):
    version(config, fingerprint="abc")
    registry.tag(config, 1, verdict="promoted")
    made_by_hand(config, {"fingerprint": "abc", "verdict": "promoted"})
    assert registry.verdict_of(config, "abc") is None
    assert "the verdict promoted does not count: version 2 of toxic_classificator is not to be believed" in caplog.text


# A changed one --------------------------------------------------------------------------------------------------------


def a_copied_signature(config, number):
    other = version(config, gate="failed", gate_missed="f1_toxic")
    registry.tag(config, number, signature_gate=registry.tags(config, other)["signature_gate"])


def all_signatures_removed(config, number):
    registry.untag(config, number, *(f"signature_{kind}" for kind in signatures.KINDS))


def signed_by_another_key(config, number):
    key = config.workspace / "signing" / "private_key"
    ours = key.read_text()
    files.write_text(key, signatures.in_letters(b"7" * 32))
    signed(config, number)
    files.write_text(key, ours)


def made_again_from_elsewhere(config, number):
    mlflow, name = registry.client(config), config.mlflow.registered_model
    copies = {int(found.version): found.tags for found in registry.versions(config)}
    for other in copies:
        mlflow.delete_model_version(name, str(other))
    mlflow.delete_registered_model(name)
    mlflow.create_registered_model(name)
    for other in sorted(copies):
        assert made_by_hand(config, copies[other]) == other


def tagged(**tags):
    return lambda config, number: registry.tag(config, number, **tags)


def untagged(*names):
    return lambda config, number: registry.untag(config, number, *names)


# What a hand does to a version, and the step whose facts it touches.
CHANGES = {
    "a tag changed": (tagged(checkpoint_sha256="another"), "register"),
    "the base changed": (tagged(base_sha256="another"), "register"),
    "the limits softened": (tagged(gate_limits="{}"), "gate"),
    "a tag added": (tagged(gate_overrides="[]"), "gate"),
    "a tag removed": (untagged("gate_limits"), "gate"),
    "a signature copied": (a_copied_signature, "gate"),
    "a signature removed": (untagged("signature_gate"), "gate"),
    "all signatures removed": (all_signatures_removed, "register"),
    "a decision added": (tagged(decision="approve"), "decide"),
    "a release added": (tagged(released_at="2026"), "release"),
    "another engine": (tagged(engine_sha256="another"), "build_engine"),
    "served later": (tagged(served_at="2999"), "swap"),
    "rolled back": (tagged(rolled_back_at="2999"), "rollback"),
    "settled": (tagged(verdict="rejected"), "verdict"),
    "vouched for": (tagged(signed_at="2026"), "sign"),
    "signed by another key": (signed_by_another_key, "register"),
    "made again, of other files": (made_again_from_elsewhere, "register"),
}


def test_a_version_that_a_hand_has_changed_is_refused_and_the_fact_is_named(config, nothing_fetched):
    approval = {"decision": "approve", "reviewer": "ann", "reason": "it is good"}
    for by_hand, kind in CHANGES.values():
        number = version(config, engine_sha256="an-engine", served_sha256="an-engine", served_at=SERVED_AT.format(1))
        registry.require_signed(config, number)
        by_hand(config, number)
        said = f"^version {number} of toxic_classificator is not to be .*: (the signature of )?what {kind} wr"
        with pytest.raises(signatures.Unsigned, match=said):
            decide.run(released(config, number), find(config.workspace, "release"), **approval)


@pytest.mark.parametrize("change", ["the limits softened", "all signatures removed", "served later"])
def test_a_champion_that_a_hand_has_changed_is_compared_with_by_its_engine_and_a_person_decides(
    second, nothing_fetched, caplog, change
):
    CHANGES[change][0](second, 2)
    folder, serving = evaluate.what_serves(second)
    assert folder == checkpoint.final(second) and (serving["version"], serving["not_compared"]) == (2, None)
    assert "version 2 (engine engine-2) goes on serving: version 2 of toxic_classificator is not to be" in caplog.text
    run, number = find(second.workspace, "weekly-3"), version(second, run_id="weekly-3")
    run.save("register", {"version": number})
    run.save("evaluate", evaluated(champion=(0.9, 0.8), champion_version=2) | {"in_service": serving})
    run.save("gate", gate.run(second, run))
    with pytest.raises(Skip, match="version 3 waits: a person decides, since version 2 of toxic_classificator is not"):
        decide.run(second, run)


def test_a_rollback_passes_over_what_is_not_signed(second, caplog):
    version(second, served_at=SERVED_AT.format(3), engine_sha256="engine-3")
    serve(second, 3, "engine-3")
    for number in (1, 2, 3):
        for part in repository.PARTS:
            files.write_json(repository.folder(repository.live(second), part, number) / "hashes.json", {})
        files.write_json(repository.folder(repository.live(second), repository.CLASSIFIER, number) / "golden.json", [])
    serving = in_service.find(second)
    assert rollback.choose(second, serving) == 2
    registry.tag(second, 2, served_sha256="another")
    assert rollback.choose(second, serving) == 1
    assert "version 2 of toxic_classificator is not to be believed: the signature of what swap wrote" in caplog.text
    registry.untag(second, 1, "signature_register")
    with pytest.raises(signatures.Unsigned, match="version 2 of toxic_classificator is not to be believed"):
        rollback.choose(second, serving)


def test_data_of_a_version_is_what_was_signed_whatever_its_run_says(config, mlflow):
    run = registry.training_run(config, find(config.workspace, "run-1"))
    for name in ("raw", "processed"):
        files.write_text(config.workspace / f"{name}.dvc", versions.pointer(name, "0" * 32 + ".dir"))
        mlflow.log_artifact(run, str(config.workspace / f"{name}.dvc"), "dvc")
    tags = {"run_id": "run-1", "raw_version": "1" * 32 + ".dir", "data_version": "2" * 32 + ".dir"}
    made = mlflow.create_model_version(config.mlflow.registered_model, "file:///nowhere", run, tags=tags)
    signed(config, made.version)
    assert restore.data_of(config, 1) == {"raw": "1" * 32 + ".dir", "processed": "2" * 32 + ".dir"}


# Steps that are killed ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_at(monkeypatch, at: int):
    """Ends the process before its `at`-th write of a tag or its removal."""
    from mlflow import MlflowClient

    writes = []

    def counted(function):
        def write(*arguments):
            writes.append(arguments)
            if len(writes) == at:
                raise Killed
            return function(*arguments)

        return write

    for name in ("set_model_version_tag", "delete_model_version_tag"):
        monkeypatch.setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    return writes


def test_a_gate_that_is_killed_anywhere_leaves_no_verdict_that_counts_and_ends_well_when_repeated(config, monkeypatch):
    run = find(config.workspace, "run-1")
    run.save("register", {"version": version(config, gate="failed", gate_missed="f1_toxic", verdict="gate_failed")})
    run.save("evaluate", evaluated())
    release = released(config, 1)
    for at in range(1, 100):
        with monkeypatch.context() as patched:
            writes = killed_at(patched, at)
            try:
                gate.run(config, run)
            except Killed:
                if "gate" in registry.tags(config, 1):  # the old one, or the new one as a whole
                    registry.require_signed(config, 1)
                else:
                    with pytest.raises(UsageError, match="has not passed the gate"):
                        decide.run(release, run, decision="approve", reviewer="ann")
                continue
        break
    assert len(writes) < at and at > 4
    assert registry.require_signed(config, 1, "gate").tags["gate"] == "passed"
    assert not {"verdict", "gate_missed"} & registry.tags(config, 1).keys()


# From before ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def before(config, nothing_fetched):
    """A workspace of before versions were signed: version 2 serves as version 1 did, both are installed."""
    sha256 = checkpoint.content_hash(checkpoint_in(checkpoint.final(config)))
    facts = {"gate": "passed", "profile": "demo", **limits.tags_of(config.gate), "decision": "approve"}
    for number, of in ((1, "checkpoint-1"), (2, sha256)):
        engine = {"engine_sha256": f"engine-{number}", "served_sha256": f"engine-{number}"}
        served = {"served_at": SERVED_AT.format(number), "run_id": f"run-{number}", "checkpoint_sha256": of}
        made_by_hand(config, {**facts, **engine, **served})
        serve(config, number, f"engine-{number}", **origin(config, number))
    registry.set_alias(config, "champion", 2)
    registry.set_alias(config, "previous", 1)
    return config


def test_the_first_run_after_the_upgrade_is_compared_with_what_serves_and_follows_it(before, caplog):
    folder, serving = evaluate.what_serves(before)
    assert folder == checkpoint.final(before) and (serving["version"], serving["not_compared"]) == (2, None)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("version 2 (engine engine-2) goes on serving: ") and "sign --version=2 --reason" in said
    run, number = find(before.workspace, "weekly-3"), version(before, run_id="weekly-3")
    run.save("register", {"version": number})
    run.save("evaluate", evaluated(champion=(0.9, 0.8), champion_version=2) | {"in_service": serving})
    run.save("gate", gate.run(before, run))
    found = decide.run(before, run)
    assert (found["decision"], found["reviewer"], found["champion"]) == ("approve", "auto", 2)
    in_service.repair(before)
    assert aliases(before) == {"champion": 2, "previous": 1}
    assert swap.going_forward(before, 2, number)["aliases"]["previous"] == 2


def test_where_the_checkpoint_of_a_champion_from_before_is_only_in_dvc_it_comes_from_there(before):
    final = checkpoint.final(before)
    md5 = versions.version(before, final)
    serve(before, 2, "engine-2", **origin(before, 2), model_version=md5)
    shutil.rmtree(final)
    folder, serving = evaluate.what_serves(before)
    assert checkpoint.content_hash(folder) == registry.tags(before, 2)["checkpoint_sha256"]
    assert serving["not_compared"] is None


def test_what_is_from_before_is_not_released_until_a_person_has_signed_it(before, monkeypatch, capfd):
    monkeypatch.chdir(configuration.SHIPPED.parent)
    approve = {"decision": "approve", "reviewer": "ann", "reason": "as it was"}
    release = find(before.workspace, "release-1")
    for step in (
        lambda: decide.run(released(before, 1), release, **approve),
        lambda: rollback.choose(before, in_service.find(before)),
    ):
        with pytest.raises(
            signatures.Unsigned, match=r"version 1 .*\(checkpoint_sha256, …\) is not signed; .*sign --ve"
        ):
            step()
    assert commands.main(["sign", "profile=demo", "--version=1"]) == 2
    assert 'sign wants --reason="…"' in capfd.readouterr().err
    monkeypatch.undo()  # its files may be read now, if there are any
    monkeypatch.chdir(configuration.SHIPPED.parent)
    said = ["--reason=it has served since June", "--reviewer=ada", f"workspace={before.workspace}"]
    said.append(f"mlflow.tracking_uri={before.mlflow.tracking_uri}")
    assert commands.main(["sign", "profile=demo", "--version=1", *said]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["signed"] == ["register", "gate", "decide", "build_engine", "swap"]
    assert result["facts"]["checkpoint_sha256"] == "checkpoint-1" and result["facts"]["signed_by"] == "ada"
    tags = registry.require_signed(before, 1, "sign").tags
    assert (tags["signed_by"], tags["signed_because"]) == ("ada", "it has served since June")
    assert tags["signed_at"][:4].isdigit()
    assert decide.run(released(before, 1), release, **approve)["decision"] == "approve"
    # Once is enough, and what has been signed since is not touched.
    again = sign.run(["profile=demo", *said[2:]], 1, False, None, "again", "configs", "config")
    assert again["signed"] == [] and registry.tags(before, 1)["signed_because"] == "it has served since June"
    # Its files were nowhere: nothing of them counts, should they come back.
    with pytest.raises(registry.Changed, match="nothing signed says which files version 1"):
        with registry.files_of(before, registry.version(before, 1)):
            pass


def test_a_wrong_signature_is_signed_over_only_by_who_says_so(second, monkeypatch):
    before = registry.tags(second, 2)
    registry.tag(second, 2, gate_limits="{}")

    def by_hand(anew):
        return sign.run(["profile=demo"], 2, anew, None, "the key was changed", "configs", "config")

    with pytest.raises(signatures.Unsigned, match="what gate wrote .*Find out who changed it: .*add --anew") as error:
        by_hand(anew=False)
    assert "register" not in str(error.value).partition("Find out")[0]
    assert registry.tags(second, 2) == {**before, "gate_limits": "{}"}
    found = by_hand(anew=True)
    assert found["signed"] == ["gate"] and found["facts"]["gate_limits"] == "{}"
    tags = registry.require_signed(second, 2).tags
    assert tags["signed_by"] == getpass.getuser() and tags["signature_register"] == before["signature_register"]


def test_files_that_are_not_those_that_the_tags_name_are_not_signed(config, tmp_path):
    model = tmp_path / "model"
    checkpoint_in(model / "artifacts" / "checkpoint")
    name, (of, other) = config.mlflow.registered_model, ("checkpoint_sha256", "model_sha256")
    sha256 = checkpoint.content_hash(model / "artifacts" / "checkpoint")
    for tags, said in (({of: "another"}, of), ({of: sha256, other: "another"}, other), ({of: sha256}, None)):
        number = int(registry.client(config).create_model_version(name, model.as_uri(), tags=tags).version)
        if said:
            with pytest.raises(StepFailed, match=f"version {number} of {name} is not signed: .* the {said} "):
                sign.run(["profile=demo"], number, True, "ada", "it has served", "configs", "config")
            assert not any(tag.startswith("sign") for tag in registry.tags(config, number))
    sign.run(["profile=demo"], number, False, "ada", "it has served", "configs", "config")
    found = verify.run(["profile=demo"], number, "configs", "config")
    assert (found["signed"], found["signed_by"], found["checkpoint"]) == (["register", "sign"], "ada", sha256)
    # Its code is among the files: what is changed of it is seen before anybody runs it.
    files.write_text(model / "code" / "tasks" / "more.py", "print('hello')")
    with pytest.raises(registry.Changed, match=re.escape(f"the files of version {number} of {name} in MLflow are not")):
        verify.run(["profile=demo"], number, "configs", "config")
