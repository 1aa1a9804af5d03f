"""The DAGs ask a registry on this machine past any proxy, another one through it."""

import pytest

from dags import registry

DEAD = "127.0.0.1:9"  # nobody listens there


@pytest.fixture(autouse=True)
def proxies(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://{DEAD}")
    monkeypatch.setenv("ALL_PROXY", "socks4://127.0.0.1:9")  # which httpx refuses to make a client for
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"])
def test_loopback_meets_no_proxy(monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(registry.NoAnswer, match="ConnectError") as failed:
        registry.aliases()
    assert "proxy" not in str(failed.value)


def test_elsewhere_the_proxy_is_asked_and_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.invalid:8080")
    with pytest.raises(
        registry.NoAnswer, match="socks4.*through the proxy that http_proxy names .no_proxy=mlflow.invalid"
    ):
        registry.aliases()
    monkeypatch.delenv("ALL_PROXY")
    with pytest.raises(registry.NoAnswer, match="ConnectError|ProxyError"):
        registry.aliases()
