"""What Kaggle is asked for: what it has (`state`), and its files (`download`).

Kaggle's own client does the talking, in a process (kaggle_client.py) that is watched from here: cut when it makes no
progress, tried again when what went wrong passes by itself, and quoted without tokens and signed addresses.
"""

import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty, Queue

from tenacity import RetryCallState, Retrying, retry_if_exception_type

from tasks import files, proxies
from tasks.config import Config, Kaggle, Source
from tasks.errors import StepFailed, UsageError, without_credentials

log = logging.getLogger(__name__)

KAGGLE = "https://www.kaggle.com"
KINDS = ("kaggle_competition", "kaggle_dataset")
PARTIAL = ".kaggle-partial"  # the client's own note of what a part of a file is a part of
HOW_TO_LOG_IN = (
    "set KAGGLE_API_TOKEN (https://www.kaggle.com/settings/api makes one), or KAGGLE_USERNAME and KAGGLE_KEY, or save "
    "~/.kaggle/kaggle.json; or take the files from a folder: data=folder data.folder=PATH"
)


class Unreachable(StepFailed):
    """Kaggle did not answer, not even after some tries: it may tomorrow, and the last good copy is still there."""


class Passing(Exception):
    """One try failed for a reason that may pass: `words` say which, `retry_after` how long Kaggle wants to be left."""

    def __init__(self, words: str, retry_after: float | None = None):
        super().__init__(words)
        self.retry_after = retry_after


def require_account(sources: list[Source]) -> None:
    """Raises UsageError where a source is Kaggle's and no credentials are to be found where the client looks."""
    asked = [f"{source.kind} {source.name}" for source in sources if source.kind in KINDS]
    if asked and not credentials():
        raise UsageError(f"{', '.join(dict.fromkeys(asked))}: Kaggle needs an account: {HOW_TO_LOG_IN}")


def state(source: Source, knobs: Kaggle) -> dict:
    """What Kaggle has right now: equal answers mean the same data.

    For a data set {"version", "updated", "bytes"}, the size being that of the whole set; for a file of a competition,
    which has no versions, {"name", "bytes", "created"}.

    Raises:
        UsageError: wrong token, no right to it, no such set or file: a person must do something.
        Unreachable: it did not answer within the tries and waits of `knobs`.
    """
    if source.kind == "kaggle_dataset":
        return ask({"call": "dataset", "name": source.name}, source, knobs)
    found = ask({"call": "competition_file", "name": source.name, "file": source.file}, source, knobs)
    if "others" in found:
        raise UsageError(
            f"Kaggle's competition {source.name} has no {source.file}: it has {', '.join(found['others'][:10])}; "
            "correct `file` of the source"
        )
    return found


def download(source: Source, state: dict, config: Config, folder: Path) -> tuple[Path, str]:
    """Brings the file into `folder`, as Kaggle packs it; returns its path and the name that it has at Kaggle.

    A part of the same file that lies there already is gone on from, a whole one is taken as it is: `folder` is kept
    until a step has succeeded.

    Raises:
        UsageError, Unreachable: as for `state`.
        StepFailed: the disk is full, or what came is not what was sent.
    """
    target, note = folder / source.file, folder / f"{source.file}.json"
    wanted = {"kind": source.kind, "name": source.name, "state": state}
    folder.mkdir(parents=True, exist_ok=True)
    had = files.read_note(note)
    if had and target.exists() and had["wanted"] == wanted and had["sha256"] == files.sha256(target):
        log.info("%s of %s is already here, from a try that did not finish", source.file, source.name)
        return target, had["called"]
    note.unlink(missing_ok=True)
    if not Path(f"{target}{PARTIAL}").exists():  # what is left of another version, or of a try without a note
        target.unlink(missing_ok=True)

    request = {"name": source.name, "target": str(target), "timeout": config.kaggle.stall_s}
    if source.kind == "kaggle_dataset":
        request |= {"call": "dataset_download", "file": source.file, "version": state["version"]}
    else:
        request |= {"call": "competition_download", "file": state["name"]}
    try:
        sent = ask(request, source, config.kaggle, target)
        verify(target, sent["hashes"], source)
    except DiskFull as error:
        forget(target)
        raise StepFailed(str(error)) from None
    files.write_json(note, {"wanted": wanted, "called": sent["called"], "sha256": files.sha256(target)})
    return target, sent["called"]


def forget(target: Path) -> None:
    """Removes a download and what is known about it: it could not be unpacked, or there is no room for it."""
    for path in (target, Path(f"{target}{PARTIAL}"), Path(f"{target}.json")):
        path.unlink(missing_ok=True)


def verify(target: Path, hashes: str, source: Source) -> None:
    """Holds a download against the MD5 that Google's storage, Kaggle's, sends in `x-goog-hash`, where it does."""
    found = re.search(r"md5=([A-Za-z0-9+/=]+)", hashes)
    if not found:
        return
    with target.open("rb") as stream:
        had = hashlib.file_digest(stream, "md5").digest()
    if had != base64.b64decode(found[1]):
        forget(target)
        raise StepFailed(
            f"{source.file} of {source.name} came with MD5 {had.hex()}, Kaggle's storage sent "
            f"{base64.b64decode(found[1]).hex()}: it was damaged on its way. It is removed; run again"
        )


# Asking ---------------------------------------------------------------------------------------------------------------


def ask(request: dict, source: Source, knobs: Kaggle, target: Path | None = None) -> dict:
    """The client's answer to a request, tried again with growing waits while what goes wrong may pass by itself."""

    def wait(attempt: RetryCallState) -> float:
        asked_for = attempt.outcome.exception().retry_after
        return knobs.backoff_s * 2 ** (attempt.attempt_number - 1) if asked_for is None else asked_for

    def enough(attempt: RetryCallState) -> bool:
        waited = attempt.idle_for + attempt.upcoming_sleep
        return attempt.attempt_number >= knobs.attempts or waited > knobs.max_wait_s

    def say(attempt: RetryCallState) -> None:
        log.warning("%s; trying again in %.0f s", attempt.outcome.exception(), attempt.upcoming_sleep)

    def give_up(attempt: RetryCallState):
        tries, last = attempt.attempt_number, attempt.outcome.exception()
        limit = f"kaggle.attempts={knobs.attempts}"
        if tries < knobs.attempts:
            limit = f"kaggle.max_wait_s={knobs.max_wait_s:g}, and another {attempt.upcoming_sleep:.0f} s are asked for"
        kept = ""
        if target is not None and target.exists():
            kept = f" {target.stat().st_size} bytes of it are kept, and the next try goes on from there."
        raise Unreachable(
            f"{last}; given up after {tries} {'try' if tries == 1 else 'tries'} ({limit}). data/raw is as it was."
            f"{kept} "
            "Run again later; kaggle.when_unreachable=last_copy goes on with the last good copy"
        ) from None

    return Retrying(
        retry=retry_if_exception_type(Passing), wait=wait, stop=enough, before_sleep=say, retry_error_callback=give_up
    )(once, request, source, knobs, target)


def once(request: dict, source: Source, knobs: Kaggle, target: Path | None) -> dict:
    """One run of the client, followed: what it says, and how the file grows."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tasks.data.kaggle_client"],
        cwd=Path(__file__).resolve().parents[2],
        env=proxies.for_outside(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    lines: Queue[str | None] = Queue()
    stderr: list[str] = []
    readers = [
        threading.Thread(target=lambda: [lines.put(line) for line in child.stdout] + [lines.put(None)], daemon=True),
        threading.Thread(target=lambda: stderr.extend(child.stderr), daemon=True),
    ]
    try:
        for reader in readers:
            reader.start()
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()  # and kept open: the child ends when it closes
        answer = followed(lines, source, knobs, target)
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        for reader in readers:
            reader.join()
        child.stdout.close(), child.stderr.close()
    if answer is None:
        said = [line.strip() for line in stderr if line.strip()]
        raise StepFailed(f"Kaggle's client ended without an answer: {without_secrets(said[-1] if said else 'no word')}")
    if answer["event"] == "error":
        raise in_words(answer, source, target)
    return {key: value for key, value in answer.items() if key != "event"}


def followed(lines: Queue, source: Source, knobs: Kaggle, target: Path | None) -> dict | None:
    """The client's last line; None if it ended without one. Logs how far the download is.

    Raises:
        Passing: nothing has moved for `knobs.stall_s`.
    """
    total, size, moved, told, first = None, grown(target), time.monotonic(), time.monotonic(), grown(target)
    began = moved
    while True:
        try:
            line = lines.get(timeout=min(0.2, knobs.stall_s / 4))
        except Empty:
            pass
        else:
            event = None if line is None else json.loads(line)
            if event is None or event["event"] != "started":
                return event
            total, moved = event["bytes"], time.monotonic()
            log.info("%s: downloading %s from %s", source.file, amount(total), source.name)
            if first:
                log.info("%s: going on from byte %d, if it is still the same file", source.file, first)
        now, was = time.monotonic(), size
        size = grown(target)
        moved = now if size != was else moved
        if total is not None and now - told >= knobs.progress_s:
            speed = max(size - first, 0) / (now - began) / 2**20
            log.info("%s: %s of %s, %.1f MiB/s", source.file, amount(size), amount(total), speed)
            told = now
        if now - moved > knobs.stall_s:
            what = "the download stands still" if total is not None else "Kaggle does not answer"
            raise Passing(f"{source.file} of {source.name}: {what} for {knobs.stall_s:g} s (kaggle.stall_s)")


def grown(target: Path | None) -> int:
    return target.stat().st_size if target is not None and target.exists() else 0


def amount(size: int | None) -> str:
    return "an unknown size" if size is None else f"{size / 2**20:.1f} MiB"


# Errors in words ------------------------------------------------------------------------------------------------------


class DiskFull(StepFailed):
    pass


def in_words(error: dict, source: Source, target: Path | None) -> Exception:
    """What a person can do about an error of the client, or a Passing where waiting may do."""
    what = f"{source.file} of {source.name}"
    said = without_secrets(error["message"])
    competition = source.kind == "kaggle_competition"
    page = f"https://www.kaggle.com/{'competitions' if competition else 'datasets'}/{source.name}"
    status = error.get("status")
    if error["kind"] == "credentials" or status == 401:
        return UsageError(
            f"Kaggle does not accept the token it was given for {what} (401): it is wrong, or was replaced or expired. "
            f"Make a new one, then {HOW_TO_LOG_IN}"
        )
    if status == 403 and competition:
        return UsageError(
            f"Kaggle refused {what} (403): accept the competition's rules once, in a browser, with the account whose "
            f"token is used: {page}/rules"
        )
    if status == 403:
        return UsageError(
            f"Kaggle refused {what} (403): the data set is private or under another name. Open {page} with the account "
            "whose token is used, and correct `name` or have it shared"
        )
    if status == 404:
        return UsageError(
            f"Kaggle has no {what} (404): it is gone, or never was there. Look at {page}, and correct `name` and "
            "`file` of the source; the last good copy in data/raw is untouched"
        )
    if status == 429:
        return Passing(f"Kaggle has had too many requests (429), at {what}", error["retry_after"])
    if status is not None and status >= 500:
        return Passing(f"Kaggle is out of order ({status}), at {what}: {said}", error["retry_after"])
    if error["kind"] == "cut":
        return Passing(f"the download of {what} was truncated after {amount(grown(target))}: {said}")
    if error["kind"] == "network":
        proxy = proxies.in_the_way(KAGGLE)
        return Passing(f"Kaggle cannot be reached for {what}{proxy}: {said}. Check network, name resolution and proxy")
    if error["kind"] == "disk":
        return DiskFull(
            f"the disk is full: {amount(grown(target))} of {what} were written, then {said}. They are removed again: "
            "free some space and run again"
        )
    return StepFailed(f"Kaggle's client could not get {what}{f' ({status})' if status else ''}: {said}")


def credentials() -> list[str]:
    """What Kaggle's client will log in with, from the environment and the files that it reads; empty without any."""
    found = []
    token = os.environ.get("KAGGLE_API_TOKEN", "")
    if token:
        found.append(Path(token).read_text().strip() if os.path.isfile(token) else token)
    if os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"):
        found.append(os.environ["KAGGLE_KEY"])
    folders = [Path(folder).expanduser() for folder in (os.environ.get("KAGGLE_CONFIG_DIR"), "~/.kaggle") if folder]
    for path in [folder / name for folder in [*folders, Path("~/.config/kaggle").expanduser()] for name in FILES]:
        if path.is_file():
            text = path.read_text(errors="replace")
            # A token file is the token; the JSON files hold it among other things, all of them better not shown.
            found += re.findall(r'"\w*(?:key|token)\w*"\s*:\s*"([^"]+)"', text) or [text.strip()]
    return [secret for secret in found if secret]


FILES = ("kaggle.json", "access_token", "access_token.txt", "credentials.json")


def without_secrets(text: str) -> str:
    """What the client said, in one line, without tokens, passwords in addresses, and what signs an address."""
    line = " ".join(text.split())
    for secret in credentials():
        line = line.replace(secret, "***")
    line = without_credentials(line)
    line = re.sub(r"\?[^\s'\")]*", "?…", line)
    return line if len(line) <= 300 else line[:300] + "…"
