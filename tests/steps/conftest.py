import pytest


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty workspace for steps that run in this process or below it, by hand and not in the DAG."""
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("TOXIC_RUN_ID", "TOXIC_OVERRIDES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
