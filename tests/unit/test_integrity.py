"""What a version's parts hold against their record before they load."""

import json

import pytest

from tasks import integrity


@pytest.fixture
def part(tmp_path):
    """A part of version 7 as it was installed: one file, and the record of its hash."""
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "labels.txt").write_text("toxic\n", encoding="utf-8")
    record = {"labels.txt": integrity.sha256(folder / "labels.txt")}
    (folder / integrity.RECORD).write_text(json.dumps(record), encoding="utf-8")
    return folder


def test_a_part_as_it_was_installed_is_unchanged(part):
    assert integrity.changed(part) is None


def test_another_content_and_a_lost_file_are_named_with_both_hashes(part):
    before = integrity.sha256(part / "labels.txt")[:12]
    (part / "labels.txt").write_text("harmless\n", encoding="utf-8")
    now = integrity.sha256(part / "labels.txt")[:12]
    assert f"labels.txt has SHA-256 {now}, installed was {before}" in integrity.changed(part)
    (part / "labels.txt").unlink()
    assert f"labels.txt has SHA-256 nothing, installed was {before}" in integrity.changed(part)


@pytest.mark.parametrize("record", [b"{", b"\xff", b"[]", b"null"], ids=["no JSON", "no UTF-8", "a list", "null"])
def test_a_record_that_says_nothing_is_damage_with_a_way_out(part, record):
    (part / integrity.RECORD).write_bytes(record)
    said = integrity.changed(part)
    assert f"what {part / integrity.RECORD} lists can't be read" in said
    assert "trigger toxicity_release for version 7" in said


def test_a_missing_record_is_damage_too(part):
    (part / integrity.RECORD).unlink()
    assert "hashes.json is missing" in integrity.changed(part)
