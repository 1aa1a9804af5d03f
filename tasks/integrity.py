"""Whether the files beside this one are still those that were installed.

Standard library only: a version's tokenizer and labels carry a copy, and refuse to load with files of another version.
"""

import hashlib
import json
from pathlib import Path

RECORD = "hashes.json"  # {file name: SHA-256}


def changed(folder: Path) -> str | None:
    """What differs from the folder's hashes.json, with both hashes and the way out; None where nothing does."""
    record = folder / RECORD
    if not record.exists():
        return f"{record} is missing, so nobody knows what was installed: {way_out(folder)}"
    try:
        hashes = json.loads(record.read_text(encoding="utf-8"))
        found = {name: sha256(folder / name) for name, _ in hashes.items()}
    except (OSError, ValueError, AttributeError) as error:  # no JSON, no UTF-8, or no object
        return f"what {record} lists can't be read ({error}): {way_out(folder)}"
    for name, expected in hashes.items():
        if found[name] != expected:
            return f"{folder / name} has SHA-256 {found[name][:12]}, installed was {expected[:12]}: {way_out(folder)}"
    return None


def way_out(folder: Path) -> str:
    return f"trigger toxicity_release for version {folder.name}, which installs it anew"


def sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return "nothing"
