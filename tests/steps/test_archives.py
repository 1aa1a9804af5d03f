"""What comes packed is opened with checks; nothing that fails them leaves a file behind."""

import gzip
import io
import shutil
import stat
import zipfile

import pytest
from raw_data import files_of_at_most

from tasks.config import Unpack
from tasks.data import archives
from tasks.errors import StepFailed

LIMITS = Unpack(max_gib=0.01, max_ratio=100, max_members=10)
CSV = b"comment,toxic\nhello,0.0\n"


def zipped(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def opened(path, limits=LIMITS):
    target = path.parent / "out" / "labeled.csv"
    target.parent.mkdir(exist_ok=True)
    archives.unpack(path, "labeled.csv", target, limits)
    return target.read_bytes()


def refused(path, words, limits=LIMITS):
    with pytest.raises(StepFailed, match=words):
        opened(path, limits)
    assert list((path.parent / "out").iterdir()) == []


def test_plain_gzip_and_zip_are_told_apart_by_content(tmp_path):
    plain, packed = tmp_path / "labeled.csv", tmp_path / "labeled.csv.gz"
    plain.write_bytes(CSV)
    packed.write_bytes(gzip.compress(CSV))
    inside = zipped(tmp_path / "all.zip", **{"deep/labeled.csv": CSV, "other.csv": b""})
    unnamed = shutil.copy(inside, tmp_path / "download")
    for path in (plain, packed, inside, unnamed):
        assert opened(path) == CSV


@pytest.mark.parametrize(
    "member", ["../labeled.csv", "/labeled.csv", "a/../../labeled.csv", "..\\labeled.csv", "C:\\x"]
)
def test_a_member_that_points_out_of_its_folder_is_refused(tmp_path, member):
    refused(zipped(tmp_path / "a.zip", **{member: CSV, "labeled.csv": CSV}), "points out of its folder: ")


def test_a_symbolic_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("labeled.csv")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    refused(tmp_path / "a.zip", "holds a symbolic link: 'labeled.csv'")


def test_too_many_members_are_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", **{f"{number}.csv": b"" for number in range(11)})
    refused(path, "11 files, at most 10 are allowed: unpack.max_members")


@pytest.mark.parametrize("pack", ["gz", "zip"])
def test_a_bomb_is_stopped_by_its_ratio(tmp_path, pack):
    zeros, path = bytes(5 << 20), tmp_path / f"labeled.csv.{pack}"
    path.write_bytes(gzip.compress(zeros)) if pack == "gz" else zipped(path, **{"labeled.csv": zeros})
    refused(path, "more than 100 times its .* bytes, as a zip bomb does")


@pytest.mark.parametrize("pack", ["gz", "zip"])
def test_a_file_larger_than_the_limit_is_stopped(tmp_path, pack):
    much, path = bytes(11 << 20), tmp_path / f"labeled.csv.{pack}"
    path.write_bytes(gzip.compress(much)) if pack == "gz" else zipped(path, **{"labeled.csv": much})
    refused(path, "is larger than 0.01 GiB", Unpack(max_gib=0.01, max_ratio=10**6, max_members=10))


def test_a_bomb_that_lies_about_its_size_is_stopped_all_the_same(tmp_path):
    path = zipped(tmp_path / "a.zip", **{"labeled.csv": bytes(5 << 20)})
    honest = (5 << 20).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(honest, (100).to_bytes(4, "little")))
    with pytest.raises(StepFailed):
        opened(path)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("suffix", ["gz", "zip"])
def test_a_truncated_archive_is_named(tmp_path, suffix):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("labeled.csv", CSV * 100)
    content = gzip.compress(CSV * 100) if suffix == "gz" else whole.getvalue()
    (tmp_path / f"labeled.csv.{suffix}").write_bytes(content[:-30])
    refused(tmp_path / f"labeled.csv.{suffix}", f"labeled.csv.{suffix} is truncated or .*Get the file again")


def test_a_zip_whose_content_does_not_match_its_checksum_is_named(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:  # stored, so that the flipped byte is one of the text
        archive.writestr("labeled.csv", CSV)
    path.write_bytes(path.read_bytes().replace(b"hello", b"jello"))
    refused(path, "a.zip is truncated or damaged: Bad CRC-32")


@pytest.mark.parametrize("suffix", ["gz", "zip"])
def test_what_is_no_archive_is_named_with_how_it_begins(tmp_path, suffix):
    (tmp_path / f"labeled.csv.{suffix}").write_bytes(CSV)
    refused(tmp_path / f"labeled.csv.{suffix}", f"is not a {suffix} file: it begins with b'comment,toxic")


def test_an_archive_without_the_file_says_what_it_has(tmp_path):
    refused(
        zipped(tmp_path / "a.zip", **{"train.csv": CSV}), "0 files named labeled.csv, 1 is expected; it has train.csv"
    )


def test_an_encrypted_archive_is_named(tmp_path):
    path = zipped(tmp_path / "a.zip", **{"labeled.csv": CSV})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    refused(path, "a.zip is encrypted: unpack it with its password")


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>Log in</html>", b"\n <HTML><body>proxy</body></HTML>"])
def test_a_web_page_is_told_from_data(tmp_path, page):
    (tmp_path / "labeled.csv").write_bytes(page)
    refused(tmp_path / "labeled.csv", "labeled.csv is a web page instead of data: .*log in, and get the file again")


@pytest.mark.parametrize("pack", ["gz", "zip"])
def test_a_disk_that_fills_up_while_unpacking_is_named_and_cleaned_up(tmp_path, pack):
    text = bytes(range(256)) * 12000
    path = tmp_path / f"labeled.csv.{pack}"
    path.write_bytes(gzip.compress(text)) if pack == "gz" else zipped(path, **{"labeled.csv": text})
    loose = Unpack(max_gib=1, max_ratio=10**6, max_members=10)
    with files_of_at_most(1_500_000):
        refused(path, "does not fit on the disk: .* GiB free .File too large.*free some space and run again", loose)
    assert len(opened(path, loose)) == len(text)


def test_an_archive_that_needs_more_than_is_free_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    refused(zipped(tmp_path / "a.zip", **{"labeled.csv": CSV}), "takes .* GiB, .* has .* GiB free")
