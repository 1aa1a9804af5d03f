"""What MLflow refuses, in one sentence that ends with what helps.

A person has deleted or renamed something there, or may not do it: MLflow would say the same again, so nobody tries.
"""

import os
import re

from tasks import proxies
from tasks.config import Config
from tasks.errors import StepFailed, UsageError, without_credentials

# MLflow's codes of what may pass by itself; all others are an answer that stays.
MAY_PASS = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "ABORTED")
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what it answers about what isn't there


class Refused(UsageError):
    """MLflow has said no, and says so until a person acts; `error_code` is its own."""

    def __init__(self, message: str, error_code: str):
        super().__init__(message)
        self.error_code = error_code


def in_words(config: Config, error) -> UsageError | StepFailed:
    """The MlflowException as one of this project's errors: Refused, or StepFailed where another try may go better."""
    code, said = error.error_code, " ".join(str(error).split())
    status = re.search(r"API request to .* failed with error code (\d+) ", said)
    if status and status[1] in ("401", "403"):
        return not_allowed(config, status[1], said)
    if "API request to " in said:  # what the server has answered itself does not say so
        return no_answer(config, said)
    said = said.removeprefix(f"{code}: ")
    if found := re.search(r"[Ee]xperiment '?(\w+)'? must be in the 'active' state", said):
        return experiment_deleted(config, found[1])
    if found := re.search(r"[Rr]un '?(\w+)'? must be in the 'active'|run with ID (\w+) because it is in the", said):
        return run_deleted(config, found[1] or found[2])
    if found := re.search(r"Run with id=(\w+) not found|Run '(\w+)' not found", said):
        return Refused(
            f"{at(config)} has no run {found[1] or found[2]}: it was deleted for good, with what was logged to it, or "
            "is another server's; where a training is under way, run `python commands.py train` and the steps after it",
            code,
        )
    if found := re.search(r"Registered Model with name=(\S+) not found", said):
        return Refused(
            f"{at(config)} has no registered model {found[1]}: where it was renamed, rename it back there, or say "
            "mlflow.registered_model=NAME; where it was deleted, `python commands.py register` makes it again",
            code,
        )
    if found := re.search(r"Model Version \(name=(\S+), version=(\S+)\) not found", said):
        return no_version(config, found[2], found[1])
    if code in MAY_PASS:
        return StepFailed(f"{at(config)} could not do it ({said[:300]}): its log says more; run this step again")
    return Refused(f"{at(config)} refuses it ({code}): {said[:500]}", code)


def at(config: Config) -> str:
    return f"MLflow at {address(config)}"


def address(config: Config) -> str:
    return without_credentials(config.mlflow.tracking_uri)


def no_answer(config: Config, said: str) -> StepFailed:
    # Of a chain of causes the first one; where it is a Python exception, what that says.
    cause = re.split("['\"]", said.rpartition(": ")[2].strip("()'\""))[-1]
    tried = "once" if config.mlflow.attempts == 1 else f"{config.mlflow.attempts} times"
    return StepFailed(
        f"{at(config)} does not answer, tried {tried} ({without_credentials(cause)[:150]})"
        f"{proxies.in_the_way(config.mlflow.tracking_uri)}: start it (`make demo` does) and this step again, or name "
        "another with mlflow.tracking_uri=…, or MLFLOW_TRACKING_URI"
    )


def not_allowed(config: Config, status: str, said: str) -> Refused:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if status == "401":
        who = f"the login of {user}" if user else "a request without a login"
        return Refused(
            f"{at(config)} does not accept {who} (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to "
            "those of a user that it knows",
            "UNAUTHENTICATED",
        )
    body = said.rpartition("Response body: ")[2].strip("'\"")[:150]
    return Refused(
        f"{at(config)} does not allow it to {user or 'a request without a login'} (403, {body}): an admin of MLflow "
        f"gives that user the right EDIT on the experiment {config.mlflow.experiment} and MANAGE on the registered "
        f"models {config.mlflow.registered_model} and {config.mlflow.registered_model}-lease, or set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those of one that has it",
        "PERMISSION_DENIED",
    )


def experiment_deleted(config: Config, experiment_id: str, name: str | None = None) -> Refused:
    called = f"{name} (experiment {experiment_id})" if name else experiment_id
    return Refused(
        f"the experiment {called} is deleted in {at(config)}, so nothing can be logged to it: run "
        f"`mlflow experiments restore --experiment-id {experiment_id}` with MLFLOW_TRACKING_URI={address(config)}, and "
        "this step again; or name another with mlflow.experiment=…",
        "INVALID_PARAMETER_VALUE",
    )


def run_deleted(config: Config, run_id: str) -> Refused:
    """With an experiment all of its runs are deleted, and restored."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    mlflow = MlflowClient(config.mlflow.tracking_uri)
    try:
        experiment = mlflow.get_experiment(mlflow.get_run(run_id).info.experiment_id)
        if experiment.lifecycle_stage == "deleted":
            return experiment_deleted(config, experiment.experiment_id, experiment.name)
    except MlflowException:  # then the run alone is named
        pass
    return Refused(
        f"the run {run_id} is deleted in {at(config)}, so nothing can be logged to it: run "
        f"`mlflow runs restore --run-id {run_id}` with MLFLOW_TRACKING_URI={address(config)}, and this step again",
        "INVALID_PARAMETER_VALUE",
    )


def no_version(config: Config, number, name: str) -> Refused:
    return Refused(
        f"the registry has no version {number} of {name} ({at(config)}): it was deleted there or never made; name "
        "another, or run `python commands.py register`, which makes a version of the newest run's model again",
        "RESOURCE_DOES_NOT_EXIST",
    )
