"""What counts failed logins, for Airflow and MLflow alike; on the servers: test_mlflow_roles.py, test_logins.py."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "docker"))
from login_limit import ENTRIES, FAILURES, SECONDS, Devices, LoginLimit  # noqa: E402


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limit(clock):
    return LoginLimit(clock)


def test_failures_end_the_tries_of_a_minute(limit, clock):
    key = ("ann", "10.0.0.1")
    for _ in range(FAILURES):
        assert limit.wait(key) == 0
        limit.count(key)
    assert 0 < limit.wait(key) <= SECONDS + 1
    assert limit.wait(("ann", "10.0.0.2")) == limit.wait(("bob", "10.0.0.1")) == 0
    clock.now += SECONDS
    assert limit.wait(key) == 0
    limit.count(key)
    assert limit.wait(key) == 0, "the failures of the minute before are over"


def test_the_table_has_an_end_and_keeps_whom_somebody_guesses_at(limit, clock):
    for _ in range(FAILURES):
        limit.count(("guessed", "10.0.0.1"))
    for number in range(ENTRIES + 100):
        limit.count((f"name {number}", "10.0.0.1"))
    assert len(limit.failed) == ENTRIES and limit.wait(("guessed", "10.0.0.1"))
    clock.now += SECONDS
    limit.count(("another", "10.0.0.1"))
    assert len(limit.failed) == 1, "what is over makes room"


def test_a_device_is_known_by_a_cookie_for_its_user_and_its_server_alone():
    devices = Devices("a secret")
    cookie = devices.cookie("Ann ", secure=True).split(";")[0]
    assert "; Secure" in devices.cookie("ann", secure=True) and "Secure" not in devices.cookie("ann", secure=False)
    assert devices.key("ann", "here", f"session=x; {cookie}")[0] == "device"
    assert devices.key("ann", "here", cookie) != devices.key("ann", "here", devices.cookie("ann", False).split(";")[0])
    for other in ("", "x", cookie[:-1], cookie.replace("=", "=x"), cookie.split("=")[0] + "=é.é", cookie.upper()):
        assert devices.key("ANN", "here", other) == ("ann", "here")
    assert devices.key("bob", "here", cookie) == ("bob", "here")
    assert Devices("another secret").key("ann", "here", cookie) == ("ann", "here")
