"""Loopback never meets a proxy; what lies outside goes through the one that the environment names.

Every client reads http_proxy, https_proxy, all_proxy and no_proxy in its own way: httpx makes a client for all_proxy
before it looks at no_proxy, gRPC asks http_proxy for a server on loopback too, and none of Python's knows `socks://`,
which desktops set. So the environment is put in order once, where a command or a service starts, and our own clients of
loopback leave it alone.

Standard library only, and any Python 3: it is used before anything is installed, too.
"""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

from tasks.errors import UsageError, without_credentials

LOOPBACK = ("127.0.0.1", "localhost", "::1", "127.0.0.0/8")  # the last one is for clients that read ranges
VARIABLES = tuple(spelt for name in ("http_proxy", "https_proxy", "all_proxy") for spelt in (name, name.upper()))
SCHEMES = ("http", "https", "socks5", "socks5h")  # httpx speaks no other


def is_loopback(address: str) -> bool:
    """Whether a URL, a host or host:port means this machine."""
    host = host_of(address)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    return found.is_loopback or found.is_unspecified  # 0.0.0.0 is where a server listens, and leads back here


def host_of(address: str) -> str:
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname
    except ValueError:  # brackets that do not match
        host = None
    return (host or address).rstrip(".").lower()


def in_order(given: Mapping[str, str]) -> dict[str, str]:
    """The variables to change in an environment so that every client goes past the proxies to loopback, and to all that
    was named before, and through them to everything else.

    Raises:
        UsageError: a proxy is named in a way that no client here can use; the message says what to set or unset.
    """
    named = [host.strip() for name in ("no_proxy", "NO_PROXY") for host in given.get(name, "").split(",")]
    # httpx fails on an IPv6 address in brackets.
    plain = [host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host for host in named if host]
    value = ",".join(dict.fromkeys([*plain, *LOOPBACK]))
    return {"no_proxy": value, "NO_PROXY": value} | {
        name: usable(name, given[name].strip()) for name in VARIABLES if given.get(name, "").strip()
    }


def usable(name: str, value: str) -> str:
    """The address of a proxy as every client takes it. Raises UsageError where there is no such form."""
    scheme, _, rest = value.rpartition("://")
    if scheme.lower() == "socks":  # GNOME's and KDE's word for it
        value = f"socks5h://{rest}"
    elif scheme and scheme.lower() not in SCHEMES:
        raise UsageError(
            f"{name}={shown(value)}: nothing here speaks {scheme}:// to a proxy; name it as "
            f"{', '.join(f'{known}://' for known in SCHEMES)}, or unset {name}"
        )
    try:
        parts = urlsplit(value if scheme else f"http://{value}")
        whole = bool(parts.hostname) and parts.port != 0 and not any(c.isspace() for c in value)
    except ValueError:  # a port that is no number
        whole = False
    if not whole:
        raise UsageError(
            f"{name}={shown(value)} is not the address of a proxy, like http://proxy.example:3128: "
            f"correct it, or unset {name}"
        )
    return value


def prepare() -> None:
    """Puts this process's environment in order, and so that of all it starts. Raises UsageError like `in_order`."""
    os.environ.update(in_order(os.environ))


def for_outside() -> dict[str, str]:
    """The environment for a program that has nobody to talk to on this machine: loopback is left out of no_proxy."""
    named = [host for host in os.environ.get("no_proxy", "").split(",") if host not in LOOPBACK]
    return {**os.environ, "no_proxy": ",".join(named), "NO_PROXY": ",".join(named)}


def in_the_way(address: str) -> str:
    """For the end of a sentence about an address that does not answer: which proxy is asked for it; empty if none."""
    host = host_of(address)
    known = urllib.request.getproxies_environment()
    scheme = address.partition("://")[0].lower() if "://" in address else ""
    asked = {"http": ("http", "all"), "https": ("https", "all"), "": ("https", "http")}.get(scheme, ())  # "": gRPC
    kind = next((kind for kind in asked if known.get(kind)), None)
    if kind is None or is_loopback(address) or urllib.request.proxy_bypass_environment(host, known):
        return ""
    return f", asked for through the proxy {kind}_proxy={shown(known[kind])} (no_proxy={host} would go past it)"


def shown(proxy: str) -> str:
    """The address of a proxy without the password that it may hold."""
    return without_credentials(proxy if "://" in proxy else f"http://{proxy}")
