"""Kaggle's own client, run as a process: `python -m tasks.data.kaggle_client`, used by tasks/data/kaggle.py alone.

The client prints, exits, and calls the network when it is imported, so it lives in a process of its own. The first
line of stdin is a request, `{"call": NAME, …arguments}`; stdout carries one JSON object a line: at most one `started`,
then `done` or `error`. When stdin ends, whoever asked is gone, and so is this process: no orphan goes on writing to a
file that a restarted step is writing to.
"""

import json
import os
import sys
import threading
from pathlib import Path

from tasks.files import DISK_FULL

CHUNK = 1 << 16  # what a cut loses, and the step of its progress


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the client prints goes to stderr

    def say(event: str, **values) -> None:
        print(json.dumps({"event": event, **values}), file=answers, flush=True)

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_stdin, daemon=True).start()
    call = CALLS[request.pop("call")]
    try:
        say("done", **call(authenticated(), say=say, **request))
    except (Exception, SystemExit) as error:
        say("error", **described(error))


def end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def authenticated():
    """The client, logged in. Its import tries that too, and keeps to itself why it did not succeed."""
    import kaggle

    if kaggle.api.CONFIG_NAME_AUTH_METHOD not in kaggle.api.config_values:
        kaggle.api.authenticate()
    return kaggle.api


def competition_file(api, say, name: str, file: str) -> dict:
    """What Kaggle says about a competition's file: {"name", "bytes", "created"}, or what else it has under "others"."""
    others, token = [], None
    while True:
        page = api.competition_list_files(name, page_token=token, page_size=200)
        for found in page.files:
            if found.name.rsplit("/", 1)[-1] in (file, f"{file}.zip"):
                return {"name": found.name, "bytes": found.total_bytes, "created": when(found.creation_date)}
            others.append(found.name)
        token = page.next_page_token
        if not token:
            return {"others": others}


def dataset(api, say, name: str) -> dict:
    """What Kaggle says about a data set: {"version", "updated", "bytes" of all its files packed}."""
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = name.split("/")
    with api.build_kaggle_client() as client:
        found = client.datasets.dataset_api_client.get_dataset(request)
    return {"version": found.current_version_number, "updated": when(found.last_updated), "bytes": found.total_bytes}


def competition_download(api, say, name: str, file: str, target: str, timeout: float) -> dict:
    from kagglesdk.competitions.types.competition_api_service import ApiDownloadDataFileRequest

    request = ApiDownloadDataFileRequest()
    request.competition_name, request.file_name = name, file
    with api.build_kaggle_client() as client:
        response = client.competitions.competition_api_client.download_data_file(request)
        return transfer(api, say, client, response, target, timeout)


def dataset_download(api, say, name: str, file: str, version: int | None, target: str, timeout: float) -> dict:
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    request = ApiDownloadDatasetRequest()
    request.owner_slug, request.dataset_slug = name.split("/")
    request.dataset_version_number, request.file_name = version, file
    with api.build_kaggle_client() as client:
        response = client.datasets.dataset_api_client.download_dataset(request)
        return transfer(api, say, client, response, target, timeout)


CALLS = {
    "competition_file": competition_file,
    "dataset": dataset,
    "competition_download": competition_download,
    "dataset_download": dataset_download,
}


def transfer(api, say, client, response, target: str, timeout: float) -> dict:
    """Lets the client write the file, from where an earlier try of the same object stopped. Further tries are ours."""
    headers = response.headers
    said = {
        "called": response.url.split("?")[0].rsplit("/", 1)[-1],
        "bytes": int(headers["Content-Length"]) if headers.get("Content-Length", "").isdigit() else None,
        "content_type": headers.get("Content-Type", ""),
        "hashes": headers.get("x-goog-hash", ""),
    }
    say("started", **said)
    try:
        # Its own retries would wait a minute for a full disk to empty itself.
        api.download_file(
            response, target, client.http_client(), True, resume=True, chunk_size=CHUNK, max_retries=0, timeout=timeout
        )
    except ValueError as error:  # the wrong size: it may hold an error page, and must not be gone on from
        for path in (Path(target), Path(f"{target}.kaggle-partial")):
            path.unlink(missing_ok=True)
        raise WrongSize(str(error)) from None
    return said


class WrongSize(Exception):
    pass


def when(moment) -> str | None:
    return None if moment is None else moment.isoformat()


def described(error: BaseException) -> dict:
    """An exception of the client as {"kind", "message", "status", "retry_after"}."""
    import requests

    message = " ".join(str(error).split()) or type(error).__name__
    response = getattr(error, "response", None)
    if isinstance(error, requests.exceptions.HTTPError) and response is not None:
        from kaggle.api.kaggle_api_extended import KaggleApi

        # A failure may come as a JSON body under 200; Retry-After is seconds or a date.
        status = response.status_code if response.status_code >= 400 else response.json()["code"]
        wait = KaggleApi._get_retry_after_delay(response)
        return {"kind": "http", "status": status, "retry_after": wait, "message": message}
    if isinstance(error, SystemExit):
        return {"kind": "credentials", "message": message}
    if isinstance(error, (requests.exceptions.ChunkedEncodingError, WrongSize)):
        return {"kind": "cut", "message": message}
    if isinstance(error, json.JSONDecodeError):
        return {"kind": "network", "message": f"something else answered in its place ({message})"}
    if isinstance(error, requests.exceptions.RequestException):
        return {"kind": "network", "message": message}
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return {"kind": "disk", "message": message}
    return {"kind": "other", "message": f"{type(error).__name__}: {message}"}


if __name__ == "__main__":
    main()
