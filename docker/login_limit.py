"""A limit on failed logins, for Airflow (airflow_logins.py) and for MLflow (mlflow_app.py).

All clients of the stack come from one address, a reverse proxy's or the Docker gateway's, so an address alone tells
nobody apart. Failures are counted for a user name at an address; and on a device that has logged in as that user
before, for the device, which a signed cookie names. So guesses at a password keep that user's first login from a new
device waiting as long as they go on, and nobody else: no other user, and nobody who has been here before.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from weakref import WeakValueDictionary

log = logging.getLogger(__name__)

FAILURES = 10  # a person who mistypes has enough of them; a guesser has 14,400 a day, against passwords of 120 bits
SECONDS = 60
ENTRIES = 10_000  # 2 MiB


class LoginLimit:
    """Failed logins of the last minute, by key; one for each process of a server.

    A success takes nothing off: else a guesser would be free as long as the true user works.
    """

    def __init__(self, clock=time.monotonic):
        self.clock = clock
        self.failed: dict[tuple, list] = {}  # key: [failures, since when]
        self.locks = WeakValueDictionary()

    def one_at_a_time(self, key: tuple) -> asyncio.Lock:
        """Held while a password is looked at, so that many requests at once are no more tries."""
        return self.locks.setdefault(key, asyncio.Lock())

    def wait(self, key: tuple) -> int:
        """Seconds until a login with this key is looked at again; 0: now."""
        failures, since = self.failed.get(key, (0, 0.0))
        left = since + SECONDS - self.clock()
        return int(left) + 1 if failures >= FAILURES and left > 0 else 0

    def count(self, key: tuple) -> None:
        """Counts a failure. Where there is no room, the key with the fewest goes: not the one that is guessed at."""
        now = self.clock()
        if key not in self.failed and len(self.failed) >= ENTRIES:
            self.failed = {old: entry for old, entry in self.failed.items() if entry[1] + SECONDS > now}
            if len(self.failed) >= ENTRIES:
                del self.failed[min(self.failed, key=lambda old: self.failed[old][0])]
        entry = self.failed.setdefault(key, [0, now])
        if entry[1] + SECONDS <= now:
            entry[:] = [0, now]
        entry[0] += 1
        if entry[0] == FAILURES:
            log.warning("%d failed logins of %.100r from %.100r within a minute", FAILURES, *key)


class Devices:
    """Cookies that name a device at which a user has logged in: `<nonce>.<signature over user and nonce>`.

    Their name is a signature as well: a browser keeps one for each user and server, whatever the ports.
    """

    SECONDS = 180 * 24 * 3600

    def __init__(self, secret: str):
        self.secret = hashlib.sha256(f"devices:{secret}".encode()).digest()

    def cookie(self, user: str, secure: bool) -> str:
        """The header Set-Cookie for a device where `user` has just logged in."""
        nonce = secrets.token_urlsafe(16)
        flags = f"Path=/; HttpOnly; SameSite=Lax; Max-Age={self.SECONDS}" + ("; Secure" if secure else "")
        return f"{self._name(user)}={nonce}.{self._sign(user, nonce)}; {flags}"

    def key(self, user: str, address: str, cookies: str) -> tuple:
        """What counts the failures of a request: its device, where its header Cookie has one of this user's."""
        for cookie in cookies.split(";"):
            name, _, value = cookie.strip().partition("=")
            nonce, _, signature = value.partition(".")
            if name == self._name(user) and hmac.compare_digest(signature.encode(), self._sign(user, nonce).encode()):
                return ("device", nonce)
        return (plain(user), address)

    def _name(self, user: str) -> str:
        return f"toxic_device_{self._sign(user, '')[:12]}"

    def _sign(self, user: str, nonce: str) -> str:
        return hmac.new(self.secret, f"{plain(user)}\0{nonce}".encode(), hashlib.sha256).hexdigest()


def plain(user: str) -> str:
    """A user name as the servers compare it, or more loosely; of a bounded length."""
    return user.strip().casefold()[:100]


def too_many(wait: int) -> str:
    """For the answer to a login that is not looked at; `wait` in seconds."""
    return f"{FAILURES} logins of this user have failed within a minute: try again in {wait} s"
