"""What the DAGs ask of the MLflow registry, over its REST API: Airflow's environment has no MLflow.

The steps do the real work in the registry. Here is what must be known or done without starting one: which version an
alias names before anything starts, whether a reviewer has set `approved`, and what a release leaves behind at its end.
"""

import ipaddress
import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[1]
APPROVED = "approved"
# A reviewer in MLflow may say who and why by tags of the version: MLflow itself keeps no record of who sets an alias.
APPROVED_BY, APPROVED_WHY = "approved_by", "approved_why"
TIMEOUT_S = 10
UNKNOWN = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # what MLflow answers about what isn't there


class NoAnswer(Exception):
    """The registry is away, or answers with an error; the message says where it is and what to do."""


class Refused(NoAnswer):
    """It answers, but does not accept the login, or does not allow this: no other try goes better."""


def server() -> str:
    """The registry's address as the DAGs reach it."""
    return (os.environ.get("MLFLOW_TRACKING_URI") or "http://127.0.0.1:8080").rstrip("/")


def page(path: str) -> str:
    """A page of MLflow for people: inside a network of containers the server has another address than for them."""
    return f"{(os.environ.get('TOXIC_MLFLOW_URL') or server()).rstrip('/')}/#/{path}"


@cache
def model_name() -> str:
    config = yaml.safe_load((ROOT / "configs" / "config.yaml").read_text(encoding="utf-8"))
    return config["mlflow"]["registered_model"]


def version_page(version: int) -> str:
    return page(f"models/{model_name()}/versions/{version}")


def report_page(mlflow_run: str) -> str:
    """The report among the artifacts of a version's MLflow run; the run itself if the registry does not answer."""
    try:
        with client() as mlflow:
            found = content(mlflow.get("runs/get", params={"run_id": mlflow_run}))
    except NoAnswer:
        found = None
    if found is None:
        return page(f"runs/{mlflow_run}")
    return page(f"experiments/{found['run']['info']['experiment_id']}/runs/{mlflow_run}/artifacts/report.html")


# Reading --------------------------------------------------------------------------------------------------------------


def aliases() -> dict[str, int]:
    """Which version each alias names.

    Raises:
        NoAnswer: as everything here that asks the registry.
    """
    with client() as mlflow:
        return aliases_of(mlflow.get("registered-models/get", params={"name": model_name()}))


async def approved_version() -> int | None:
    """The version that a reviewer has approved in the registry, if any; for the triggerer, which must not wait."""
    with errors_in_words():
        async with httpx.AsyncClient(**settings()) as mlflow:
            return aliases_of(await mlflow.get("registered-models/get", params={"name": model_name()})).get(APPROVED)


def aliases_of(answer: httpx.Response) -> dict[str, int]:
    found = content(answer)
    named = found["registered_model"].get("aliases", []) if found else []  # no version has been registered yet
    return {alias["alias"]: int(alias["version"]) for alias in named}


def tags(version: int) -> dict[str, str] | None:
    """The tags of a version; None if there is no such version."""
    with client() as mlflow:
        found = content(mlflow.get("model-versions/get", params={"name": model_name(), "version": str(version)}))
    return found and {tag["key"]: tag["value"] for tag in found["model_version"].get("tags", [])}


# Writing --------------------------------------------------------------------------------------------------------------


def delete_alias(alias: str) -> None:
    with client() as mlflow:
        content(mlflow.request("DELETE", "registered-models/alias", json={"name": model_name(), "alias": alias}))


def delete_tags(version: int, *keys: str) -> None:
    with client() as mlflow:
        for key in keys:
            named = {"name": model_name(), "version": str(version), "key": key}
            content(mlflow.request("DELETE", "model-versions/delete-tag", json=named))


@contextmanager
def client():
    with errors_in_words(), httpx.Client(**settings()) as mlflow:
        yield mlflow


@contextmanager
def errors_in_words():
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            user = os.environ.get("MLFLOW_TRACKING_USERNAME") or "a request without a login"
            raise Refused(
                f"the registry at {server()} refuses it to {user} ({status}): correct MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or have an admin of MLflow give that user the right to it"
            ) from None
        raise NoAnswer(f"the registry at {server()} answers with status {status}: its log says why") from None
    # ValueError and ImportError: a proxy in the environment that httpx does not know, or lacks a package for.
    except (httpx.HTTPError, ValueError, ImportError) as error:
        why = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise NoAnswer(
            f"the registry at {server()} does not answer as it should ({why}){proxy_in_the_way()}: start it, or "
            "correct MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        ) from None


def settings() -> dict:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    past_any_proxy = is_loopback(server())
    return {
        "base_url": f"{server()}/api/2.0/mlflow/",
        "timeout": TIMEOUT_S,
        "auth": auth,
        "trust_env": not past_any_proxy,  # httpx makes a client for ALL_PROXY whatever NO_PROXY says
    }


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own: no proxy leads there."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def proxy_in_the_way() -> str:
    """For the end of a sentence about a server that does not answer: which proxy is asked for it, if one is."""
    parts, known = urlsplit(server()), getproxies_environment()
    kind = next((kind for kind in (parts.scheme, "all") if known.get(kind)), None)
    if kind is None or is_loopback(server()) or proxy_bypass_environment(parts.hostname or "", known):
        return ""
    return f", asked for through the proxy that {kind}_proxy names (no_proxy={parts.hostname} would go past it)"


def content(answer: httpx.Response) -> dict | None:
    """The answer's JSON; None where MLflow says that there is no such thing."""
    if answer.status_code in (400, 404) and answer.json().get("error_code") in UNKNOWN:
        return None
    return answer.raise_for_status().json()
