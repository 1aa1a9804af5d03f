"""Raw files for the data steps: a small configuration, and ways to bring and change files."""

from tasks import config as configuration
from tasks.data import sources

SMALL = [
    "profile=demo",
    "data.sample.english_rows=500",
    "data.sample.russian_rows=500",
    "data.min_rows=500",
    "disk.min_free_gib=0",
]


def from_folder(folder, **values):
    overrides = ["data=folder", f"data.folder={folder}", *(f"{key}={value}" for key, value in values.items())]
    return configuration.load(["profile=demo", *overrides])


def rewrite(path, change):
    """Changes a CSV file: `change` gets and returns a frame of strings."""
    change(sources.read(path)).write_csv(path)


def dvc_file(store, version):
    return store / "files" / "md5" / version[:2] / version[2:]
