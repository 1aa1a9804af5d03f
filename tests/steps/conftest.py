import shutil

import pytest
from raw_data import SMALL

from tasks import config as configuration
from tasks.data import sample
from tasks.promotion import registry
from tasks.run import find


@pytest.fixture
def workspace(tmp_path, empty_store, monkeypatch):
    """An empty workspace for steps that run in this process or below it, by hand and not in the DAG."""
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_store, tmp_path)}")
    for name in ("TOXIC_RUN_ID", "TOXIC_OVERRIDES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def config(workspace, monkeypatch):
    """The demo's configuration, with a registry that has the model and no version."""
    monkeypatch.delenv("TOXIC_REVIEW", raising=False)
    config = configuration.load(["profile=demo", "disk.min_free_gib=0"])
    registry.ensure_model(config)
    return config


@pytest.fixture
def mlflow(config):
    return registry.client(config)


@pytest.fixture(scope="session")
def kaggle_files(tmp_path_factory):
    """Both files, as Kaggle names them."""
    folder = tmp_path_factory.mktemp("kaggle")
    sample.write(folder, 500, 500, label_noise=0.02, seed=1)
    return folder


@pytest.fixture
def raw(workspace, kaggle_files):
    """A workspace with raw data in place: (config, run, folder)."""
    folder = workspace / "data" / "raw"
    shutil.copytree(kaggle_files, folder)
    return configuration.load(SMALL), find(workspace, "a-run"), folder
