"""Whom the environment's proxies are asked for, and whom never."""

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import commands
from tasks import proxies
from tasks.errors import UsageError

ROOT = Path(__file__).parents[2]
DEAD = "127.0.0.1:9"  # nobody listens there


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in (*proxies.VARIABLES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8001",
        "http://localhost:8080",
        "localhost",
        "[::1]:8001",
        "http://[::1]",
        "127.9.9.9",
        "0.0.0.0:8000",
        "a.localhost",
    ],
)
def test_loopback_is_known_in_each_of_its_forms(address):
    assert proxies.is_loopback(address)


@pytest.mark.parametrize(
    "address", ["triton:8001", "http://10.0.0.1:8080", "localhost.example.org", "128.0.0.1", "[fe80::1]:1", "[bad:1"]
)
def test_nothing_else_is_loopback(address):
    assert not proxies.is_loopback(address)


def test_what_was_left_out_before_stays_so_in_either_spelling():
    found = proxies.in_order({"no_proxy": "a.example, [::1]", "NO_PROXY": ".b.example,localhost"})
    named = found["no_proxy"].split(",")
    assert found["NO_PROXY"] == found["no_proxy"]
    assert named == ["a.example", "::1", ".b.example", "localhost", "127.0.0.1", "127.0.0.0/8"]
    assert proxies.in_order(found) == found


def test_what_desktops_call_socks_becomes_what_python_knows():
    found = proxies.in_order({"ALL_PROXY": "socks://127.0.0.1:1080", "http_proxy": "proxy.example:3128"})
    assert found["ALL_PROXY"] == "socks5h://127.0.0.1:1080" and found["http_proxy"] == "proxy.example:3128"


@pytest.mark.parametrize(
    "name, value, said",
    [
        (
            "ALL_PROXY",
            "socks4://ann:secret@127.0.0.1:1080",
            r"ALL_PROXY=socks4://\*\*\*@.*speaks socks4://.*or unset ALL_PROXY",
        ),
        ("https_proxy", "ftp://proxy:1", "speaks ftp://"),
        ("http_proxy", "http://proxy:port", "not the address of a proxy"),
        ("HTTP_PROXY", "http://", "not the address of a proxy"),
        ("all_proxy", "ann:secret@proxy:port", r"all_proxy=http://\*\*\*@proxy:port is not"),
    ],
)
def test_a_proxy_that_nobody_can_use_is_refused_without_its_password(name, value, said):
    with pytest.raises(UsageError, match=said) as refused:
        proxies.in_order({name: value})
    assert "secret" not in str(refused.value)


def test_a_command_by_hand_refuses_it_with_2(monkeypatch, capsys):
    monkeypatch.setenv("ALL_PROXY", f"socks4://{DEAD}")
    assert commands.main(["hold", "profile=demo"]) == 2
    assert capsys.readouterr().err.startswith(f"ALL_PROXY=socks4://{DEAD}: nothing here speaks socks4")


ASK = """
import json, os, sys, urllib.request
import httpx, requests
from tasks import proxies
url, dead, found = sys.argv[1], sys.argv[2], {}
for kind in sys.argv[3:]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        os.environ[name] = f"{kind}://{dead}"
    os.environ["no_proxy"], os.environ["NO_PROXY"] = "elsewhere.example", ""
    proxies.prepare()
    found[kind] = [httpx.get(url).text, requests.get(url).text, urllib.request.urlopen(url).read().decode()]
    try:
        requests.get("http://outside.invalid/", timeout=5)
    except requests.exceptions.RequestException as error:
        found[kind].append(str(error))
print(json.dumps(found))
"""


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")

    def log_message(self, *_):
        pass


def test_clients_go_past_the_proxy_to_loopback_and_through_it_elsewhere():
    kinds = ["http", "socks5", "socks5h", "socks"]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [sys.executable, "-c", ASK, f"http://127.0.0.1:{server.server_port}/", DEAD, *kinds]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    for kind, (*here, outside) in json.loads(done.stdout).items():
        assert here == ["here"] * 3, kind
        assert "roxy" in outside or "SOCKS" in outside, kind


def test_an_address_that_does_not_answer_is_said_to_be_asked_for_through_the_proxy(monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://ann:secret@{DEAD}")
    said = f", asked for through the proxy https_proxy=http://***@{DEAD} (no_proxy=triton would go past it)"
    assert proxies.in_the_way("triton:8001") == said  # gRPC asks https_proxy first
    assert proxies.in_the_way("https://triton/") == said
    assert proxies.in_the_way("http://triton/") == proxies.in_the_way("sqlite:////a.db") == ""
    assert proxies.in_the_way("127.0.0.1:8001") == ""
    monkeypatch.setenv("no_proxy", "triton")
    assert proxies.in_the_way("triton:8001") == ""


def test_who_talks_to_the_outside_alone_gets_the_proxies_as_they_were(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://{DEAD}")
    monkeypatch.setenv("no_proxy", "inside.example")
    proxies.prepare()
    found = proxies.for_outside()
    assert found["http_proxy"] == f"http://{DEAD}" and found["no_proxy"] == found["NO_PROXY"] == "inside.example"
