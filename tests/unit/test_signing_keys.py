"""The keys with which versions are signed: where they come from, and what is said where they are missing."""

import json
import multiprocessing
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tasks import files
from tasks.errors import UsageError
from tasks.promotion import signatures

SAID = signatures.statement("gate", "toxic", 3, {"gate": "passed"})


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in (signatures.PRIVATE, signatures.PUBLIC):
        monkeypatch.delenv(name, raising=False)


def a_key() -> tuple[str, str]:
    """(private, public), as the environment holds them."""
    key = Ed25519PrivateKey.generate()
    letters = key.private_bytes_raw(), key.public_key().public_bytes_raw()
    return tuple(signatures.in_letters(raw) for raw in letters)


def test_a_workspace_gets_one_key_that_its_owner_alone_reads(tmp_path):
    written = signatures.signature(tmp_path, SAID)
    assert (tmp_path / "signing" / "private_key").stat().st_mode & 0o777 == 0o600
    assert signatures.why_wrong(tmp_path, SAID, written) is None
    assert signatures.signature(tmp_path, SAID) == written  # of the same key: Ed25519 has no chance in it
    (tmp_path / "signing" / "private_key").unlink()  # who only reads has the public key
    assert signatures.why_wrong(tmp_path, SAID, written) is None
    with pytest.raises(UsageError, match="the private key is missing: set TOXIC_SIGNING_KEY"):
        signatures.signature(tmp_path, SAID)


@pytest.mark.parametrize(
    "other",
    [
        signatures.statement("gate", "toxic", 4, {"gate": "passed"}),
        signatures.statement("gate", "another", 3, {"gate": "passed"}),
        signatures.statement("decide", "toxic", 3, {"gate": "passed"}),
        signatures.statement("gate", "toxic", 3, {"gate": "failed"}),
        signatures.statement("gate", "toxic", 3, {"gate": "passed", "gate_missed": ""}),
    ],
)
def test_a_signature_is_of_one_kind_of_facts_about_one_version(tmp_path, other):
    assert "another version's" in signatures.why_wrong(tmp_path, other, signatures.signature(tmp_path, SAID))


@pytest.mark.parametrize("written", ["", "no", "{id}.", "{id}.äöü", "{id}.AAAA", "{id}", "\n.x"])
def test_what_is_no_signature_is_wrong_and_no_error(tmp_path, written):
    by = signatures.key_id(signatures.signing_key(tmp_path).public_key())
    assert signatures.why_wrong(tmp_path, SAID, written.format(id=by))


def test_the_environments_key_comes_before_the_workspaces(tmp_path, monkeypatch):
    workspaces = signatures.signature(tmp_path, SAID)
    private, public = a_key()
    monkeypatch.setenv(signatures.PRIVATE, f"{private}=")
    written = signatures.signature(tmp_path, SAID)
    assert signatures.why_wrong(tmp_path, SAID, written) is None
    assert "another key" in signatures.why_wrong(tmp_path, SAID, workspaces)
    assert (tmp_path / "signing" / "public_key").read_text() == f"{public}\n"  # for who reads here
    # Elsewhere, with the public key alone; without it nothing can be told.
    monkeypatch.delenv(signatures.PRIVATE)
    elsewhere = tmp_path / "elsewhere"
    assert "no key here to check it with (set TOXIC_VERIFY_KEY" in signatures.why_wrong(elsewhere, SAID, written)
    monkeypatch.setenv(signatures.PUBLIC, public)
    assert signatures.why_wrong(elsewhere, SAID, written) is None
    with pytest.raises(UsageError, match="TOXIC_VERIFY_KEY says that versions are signed, but the private key is"):
        signatures.signature(elsewhere, SAID)
    assert not (elsewhere / "signing" / "private_key").exists()


def test_a_change_of_the_key_leaves_what_the_old_one_signed_where_it_is_named(tmp_path, monkeypatch):
    (old, old_public), (new, _) = a_key(), a_key()
    monkeypatch.setenv(signatures.PRIVATE, old)
    before = signatures.signature(tmp_path, SAID)
    monkeypatch.setenv(signatures.PRIVATE, new)
    assert "another key" in signatures.why_wrong(tmp_path, SAID, before)
    monkeypatch.setenv(signatures.PUBLIC, f"{a_key()[1]}, {old_public}")
    for written in (before, signatures.signature(tmp_path, SAID)):
        assert signatures.why_wrong(tmp_path, SAID, written) is None


@pytest.mark.parametrize("text", ["short", "ключ", "A" * 47, "=" * 43])
@pytest.mark.parametrize("name", [signatures.PRIVATE, signatures.PUBLIC])
def test_what_is_no_key_is_said_without_showing_it(tmp_path, monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match=f"^{name} holds no key: 32 bytes") as error:
        signatures.verify_keys(tmp_path)
    assert text not in str(error.value)


def public_key_of(workspace, start, found) -> None:
    generate = Ed25519PrivateKey.generate
    # Slow, so that each would make a key of its own where nobody waits for the first.
    Ed25519PrivateKey.generate = staticmethod(lambda: time.sleep(0.2) or generate())
    start.wait()
    found.put(signatures.key_id(signatures.signing_key(workspace).public_key()))


def test_processes_that_race_for_the_first_key_get_the_same(tmp_path):
    fork = multiprocessing.get_context("fork")
    start, found = fork.Barrier(6), fork.Queue()
    processes = [fork.Process(target=public_key_of, args=(tmp_path, start, found)) for _ in range(6)]
    for process in processes:
        process.start()
    ids = {found.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert ids == set(signatures.verify_keys(tmp_path))
    assert {file.name for file in (tmp_path / "signing").iterdir()} == {"private_key", "public_key", "lock"}


def test_a_folders_hash_tells_files_apart_by_name_and_content(tmp_path):
    def hash_of(**contents):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in contents.items():
            files.write_text(place / name, text)
        return signatures.tree_sha256(place)

    folders = [{"a": "xb\0y"}, {"a": "x", "b": "y"}, {"a": "y", "b": "x"}, {"b": "x"}, {"a": "x", "b": ""}]
    assert len({hash_of(**contents) for contents in folders}) == len(folders)


@pytest.fixture
def checkpoint(tmp_path):
    """(workspace, a signed folder)"""
    place = tmp_path / "checkpoint"
    files.write_text(place / "adapter" / "weights", "1")
    files.write_json(place / "training.json", {"run_id": "a"})
    signatures.sign_folder(tmp_path, place, "toxic")
    return tmp_path, place


def no_longer_json(place):
    (place / signatures.IN_FOLDER).write_text("{")


def of_other_files(place):
    said = json.loads((place / signatures.IN_FOLDER).read_text())
    (place / "adapter" / "weights").write_text("2")
    files.write_json(
        place / signatures.IN_FOLDER, said | {"files_sha256": signatures.tree_sha256(place, (signatures.IN_FOLDER,))}
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda place: (place / "adapter" / "weights").write_text("2"), "its files are not those that were signed"),
        (lambda place: (place / "adapter" / "more").write_text(""), "its files are not those that were signed"),
        (lambda place: (place / "training.json").unlink(), "its files are not those that were signed"),
        (lambda place: (place / signatures.IN_FOLDER).unlink(), "has no signature.json that could be read"),
        (no_longer_json, "has no signature.json that could be read"),
        (of_other_files, "it is not of what stands there now"),
    ],
)
def test_a_changed_checkpoint_is_not_loaded(checkpoint, change, said):
    workspace, place = checkpoint
    signatures.require_folder(workspace, place)
    change(place)
    with pytest.raises(signatures.Unsigned, match=said):
        signatures.require_folder(workspace, place)
