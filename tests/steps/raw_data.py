"""Raw files for the data steps: a small configuration, and ways to bring and change files."""

import resource
from contextlib import contextmanager

from signing import signed

from tasks import config as configuration
from tasks.data import sources
from tasks.promotion import registry

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
    change(sources.read(path).drop(sources.ROW)).write_csv(path)


def dvc_file(store, version):
    return store / "files" / "md5" / version[:2] / version[2:]


def registered(overrides, result, **tags):
    """A version in the registry that a run with this result of `download` has made."""
    config = configuration.load(overrides)
    registry.ensure_model(config)
    known = {"run_id": result["run_id"], "fingerprint": result["fingerprint"], **tags}
    name = config.mlflow.registered_model
    return signed(config, registry.client(config).create_model_version(name, "file:///x", tags=known).version)


@contextmanager
def files_of_at_most(size):
    """The kernel refuses to let a file grow further, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
