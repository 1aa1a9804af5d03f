"""The images install files whose hashes are known, of the versions that were tested."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT = {"constraints-images.txt": {"torch"}, "constraints-triton.txt": set()}  # see local/envs.py


def entries(name: str) -> list[tuple[str, str, int]]:
    """Package, version and how many hashes, of each entry of a file of constraints."""
    found = re.split(r"\n(?=\w)", (ROOT / name).read_text())
    named = [(re.match(r"([\w.-]+)==([^\s;]+)", entry), entry) for entry in found]
    return [
        (*match.groups(), len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry))) for match, entry in named if match
    ]


@pytest.mark.parametrize("name", WITHOUT)
def test_every_package_of_an_image_has_its_hashes(name):
    found = entries(name)
    assert {package for package, _, hashes in found if not hashes} == WITHOUT[name] and len(found) > 50
    assert "://" not in (ROOT / name).read_text(), "the address of somebody's own index"


def test_the_images_have_the_versions_that_were_tested():
    tested = {(package, version) for package, version, _ in entries("constraints.txt")}
    known = {package for package, _ in tested}
    hashed = {(package, version) for package, version, _ in entries("constraints-images.txt") if package in known}
    assert len(hashed) > 200 and hashed <= tested


@pytest.mark.parametrize("image", ["airflow", "trainer", "triton-cpu", "triton"])
def test_each_image_installs_by_them(image):
    file = (ROOT / "docker" / f"{image}.Dockerfile").read_text()
    used = set(re.findall(r"--constraint (\S+)", file))
    assert used and used <= WITHOUT.keys() and file.count("uv pip install") == file.count("--constraint ")
