"""Addresses of servers as people give them: what is wrong with one is said before anything is sent there."""

import re

GRPC = "a gRPC address is HOST:PORT, 127.0.0.1:8001 say"


def grpc(text: str) -> str:
    """The address, if it is one that a gRPC client takes.

    Raises:
        ValueError: it says what is wrong, and how it would be right.
    """
    scheme, separator, rest = text.rpartition("://")
    host, _, port = rest.rpartition(":")
    if separator:
        bare = rest.rpartition("@")[2].split("/")[0]  # a password in it is not repeated
        if not re.search(r":[0-9]+$", bare):
            bare = f"{bare}:8001"
        if bare.endswith(":8000"):
            bare = f"{bare.removesuffix('8000')}8001, as 8000 is Triton's HTTP port"
        raise ValueError(f"{GRPC}, without {scheme}://; {bare}?")
    if "/" in text or re.search(r"[\s,@?#]", text):
        raise ValueError(f"{GRPC}, and nothing else: no path, user or space")
    if not host or rest.count(":") > 1 and not re.fullmatch(r"\[[0-9a-fA-F:.%\w]+\]", host):
        more = ", an IPv6 address in brackets, [::1]:8001" if rest.count(":") > 1 else ""
        raise ValueError(f"{GRPC}: {'a host' if port and rest.startswith(':') else 'a port'} is missing{more}")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"{GRPC}: {port or 'nothing'} is no port, from 1 to 65535")
    return text
