"""What every step has in common: its run, its configuration, its log, its result."""

import json
import logging
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from datetime import datetime, timezone

from tasks import config as configuration
from tasks import run as runs
from tasks.errors import Skip, UsageError

log = logging.getLogger(__name__)


def execute(step, function, overrides=(), *, config_path="configs", config_name="config", reuse=False, **arguments):
    """Runs one step in its run folder and returns its result, a dict that fits in one line of JSON.

    Args:
        step: the step's name, which is that of its result file.
        function: called as `function(config, run, **arguments)`; returns a dict.
        overrides: Hydra overrides from the command line. The run's own come first.
        reuse: in the DAG, a result that is already there is returned: finished work is not done twice. A function of
            configuration and run says whether what the step made is still there, too.

    Raises:
        Skip: with the same dict as `result`, when nothing that follows should run.
    """
    run, config, all_overrides = open_run(step, [str(o) for o in overrides], config_path, config_name)
    if in_dag() and run.has(step) and (reuse(config, run) if callable(reuse) else reuse):
        log.info("%s is already done in run %s", step, run.id)
        return run.result(step)
    run.forget_from(step)
    runs.record(run, config, all_overrides)
    with log_file(config.workspace / "logs" / f"{run.id}.log"):
        log.info("%s of run %s", step, run.id)
        started = time.monotonic()
        try:
            found, status = function(config, run, **arguments), "done"
        except Skip as skip:
            found, status = {"reason": str(skip), **skip.result}, "skipped"
            skip.result = found
            save(run, step, status, started, found)
            raise
        return save(run, step, status, started, found)


def open_run(step, overrides, config_path="configs", config_name="config"):
    """The run a step belongs to, its checked configuration and the overrides that made it."""
    overrides = configuration.as_hydra(overrides_from_environment() + overrides)
    workspace = configuration.workspace_of(overrides, config_path, config_name)
    if in_dag():
        run_id = os.environ["TOXIC_RUN_ID"]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", run_id):
            raise UsageError(f"TOXIC_RUN_ID={run_id!r} is not a slug: letters, digits, '.', '_' and '-', 200 at most")
        run = runs.find(workspace, run_id)
    else:
        run = None if step == "download" else runs.newest(workspace)
        run = run or runs.find(workspace, runs.new_id())
    known = [o for o in configuration.as_hydra_once(runs.overrides(run)) if o not in overrides]
    all_overrides = known + overrides
    try:
        config = configuration.load(all_overrides, config_path, config_name, retraining=step == "download")
    except UsageError as error:
        if not known:
            raise
        raise UsageError(f"{error}; run {run.id} keeps {' '.join(known)}: override that, or open another run") from None
    return run, config, all_overrides


def without_a_run(overrides, config_path="configs", config_name="config"):
    """The configuration of a command that belongs to no run, and so takes no run's overrides."""
    all_overrides = overrides_from_environment() + [str(o) for o in overrides]
    return configuration.load(all_overrides, config_path, config_name)


def in_dag() -> bool:
    return bool(os.environ.get("TOXIC_RUN_ID"))


def overrides_from_environment() -> list[str]:
    """TOXIC_OVERRIDES, a JSON list of Hydra overrides: how the DAG passes its parameters, never through a shell."""
    text = os.environ.get("TOXIC_OVERRIDES", "[]")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"TOXIC_OVERRIDES={text!r} is not JSON: {error}") from None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"TOXIC_OVERRIDES={text!r} is not a JSON list of strings")
    return value


def save(run, step, status, started, found) -> dict:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    seconds = round(time.monotonic() - started, 1)
    result = {"step": step, "run_id": run.id, "status": status, "finished_at": now, "seconds": seconds, **found}
    run.save(step, result)
    return result


@contextmanager
def log_file(path):
    """Everything that is logged goes to stderr and, while the block lasts, to `path` too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    except Exception as error:
        if not isinstance(error, Skip):
            log.error("%s: %s", type(error).__name__, error)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextmanager
def stdout_for_the_result():
    """Sends file descriptor 1 to stderr while a step runs, so that stdout carries the step's result and nothing else.

    Libraries and child processes print as they like; the caller reads the last line of stdout.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def prepare_process() -> None:
    """Logging to stderr, quiet libraries, and SIGTERM as an exception, so that a stopped step cleans up."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    for noisy in ("httpx", "urllib3", "alembic", "matplotlib", "great_expectations", "dvc", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    quiet = {
        "GX_ANALYTICS_ENABLED": "False",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it may hold a password
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)

    def stop(signum, frame):
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
