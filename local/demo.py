"""One retraining through Airflow, as a person would start it, told as it happens.

    python -m local.demo [--force] [--review] [--data=FOLDER]

Starts MLflow, Triton and Airflow where they aren't running yet, triggers `toxicity_weekly` and follows it. The last
line of stdout is one JSON object with what came of it; every figure in it is read from the run's own folder or asked
of the server.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.markup import escape
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from local import services
from tasks import files
from tasks.errors import StepFailed, UsageError

DAG = "toxicity_weekly"
POLL_S = 0.7
EXCEPTION = re.compile(r"(\w+\.)*\w*(Error|Exception|Exit): .+")  # the last line of a traceback
PLAIN_PROGRESS_S = 15  # between two lines about the training where no terminal shows it in place
FINISHED = ("success", "failed")
STEPS = (
    *("download", "validate_raw", "prepare", "validate_prepared", "train", "evaluate", "register", "gate", "report"),
    *("review", "decide", "export_onnx", "build_engine", "stage", "swap"),
)

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class DagRun:
    """A run of the weekly DAG and where its results are."""

    id: str
    at: services.Place

    @property
    def slug(self) -> str:
        return f"weekly-{self.id}"  # dags/steps.py: run_slug; the id below needs no replacing

    @property
    def folder(self) -> Path:
        return self.at.workspace / "runs" / self.slug

    @property
    def path(self) -> str:
        return f"/dags/{DAG}/dagRuns/{quote(self.id)}"

    @property
    def page(self) -> str:
        return f"{self.at.url('AIRFLOW_PORT')}/dags/{DAG}/runs/{quote(self.id)}"

    def result(self, step: str) -> dict | None:
        file = self.folder / f"{step}.json"
        return files.read_json(file) if file.exists() else None


class Airflow:
    """Airflow's REST API, as the demo needs it."""

    def __init__(self, at: services.Place):
        self.http = httpx.Client(base_url=at.url("AIRFLOW_PORT"), timeout=30, trust_env=False)  # past any proxy
        login = {"username": "admin", "password": at.password}
        token = self.http.post("/auth/token", json=login).raise_for_status().json()["access_token"]
        self.http.headers["Authorization"] = f"Bearer {token}"

    # A busy laptop may let the API wait; a refused request is not repeated.
    @retry(
        retry=retry_if_exception_type(httpx.TransportError), stop=stop_after_delay(20), wait=wait_fixed(1), reraise=True
    )
    def get(self, path: str, **parameters) -> dict:
        return self.http.get(f"/api/v2{path}", params=parameters).raise_for_status().json()

    def wait_for_the_dag(self) -> None:
        """Returns once the DAG has been read from its file."""
        deadline = time.monotonic() + 60
        while self.http.get(f"/api/v2/dags/{DAG}").status_code == 404:
            errors = self.get("/importErrors")["import_errors"]
            if errors or time.monotonic() > deadline:
                why = errors[0]["stack_trace"].strip().splitlines()[-1] if errors else "not read within 60 s"
                raise StepFailed(f"Airflow has no DAG {DAG}: {why}")
            time.sleep(POLL_S)

    def active_run(self) -> dict | None:
        runs = self.get(f"/dags/{DAG}/dagRuns", state=["running", "queued"], order_by="run_after")["dag_runs"]
        return runs[0] if runs else None

    def trigger(self, run_id: str, conf: dict) -> None:
        # Unpausing starts nothing but what is triggered: see the schedule in dags/toxicity_weekly.py.
        self.http.patch(f"/api/v2/dags/{DAG}", json={"is_paused": False}).raise_for_status()
        body = {"dag_run_id": run_id, "logical_date": None, "conf": conf}
        self.http.post(f"/api/v2/dags/{DAG}/dagRuns", json=body).raise_for_status()

    def tasks(self, run: DagRun) -> dict[str, dict]:
        return {task["task_id"]: task for task in self.get(f"{run.path}/taskInstances")["task_instances"]}


def demo(at: services.Place, force: bool, review: bool, data: str | None) -> int:
    """Runs the demo and prints its account; returns the exit code: 0 also when the gate was missed."""
    started = time.monotonic()
    conf = parameters(force, review, data)
    with console.status("starting MLflow, Triton and Airflow …"):
        services.start(at, say=lambda product: console.print(f"  [green]✓[/] {product} answers"))
        airflow = Airflow(at)
        airflow.wait_for_the_dag()
    run = begin(airflow, at, conf)
    state = follow(airflow, run)
    tell_the_end(airflow, run, state)
    tell_where_to_look(run)
    print(json.dumps({**summary(run, state), "seconds": round(time.monotonic() - started)}, ensure_ascii=False))
    return 0 if state == "success" else 1


def parameters(force: bool, review: bool, data: str | None) -> dict:
    conf = {"profile": "demo", "force": force, "promotion": "review" if review else "auto"}
    if data is not None:
        folder = Path(data).expanduser().absolute()
        if not folder.is_dir():
            raise UsageError(f"DATA={data} is not a folder: name one with Kaggle's own files")
        conf["data_folder"] = str(folder)
    return conf


def begin(airflow: Airflow, at: services.Place, conf: dict) -> DagRun:
    """Triggers a run, or joins the one that is active if that is what was asked for."""
    if active := airflow.active_run():
        run = DagRun(active["dag_run_id"], at)
        if active["conf"] != conf:
            raise UsageError(
                f"run {run.id} is still {active['state']} with other parameters, and there is one retraining at a "
                f"time: watch it at {run.page}, then start another"
            )
        console.print(f"\n[bold]{DAG}[/] {run.id} is already {active['state']}: {run.page}")
        return run
    run = DagRun(datetime.now(timezone.utc).strftime("demo-%Y-%m-%dT%H-%M-%S"), at)
    airflow.trigger(run.id, conf)
    console.print(f"\n[bold]{DAG}[/] {run.id}: {run.page}")
    return run


# Following ------------------------------------------------------------------------------------------------------------


def follow(airflow: Airflow, run: DagRun) -> str:
    """Prints a line for each task that ends, until the run has ended; returns the run's state."""
    told: dict[str, tuple] = {}
    plain_at = time.monotonic()
    with console.status("waiting for the scheduler …") as status:
        while True:
            state = airflow.get(run.path)["state"]
            tasks = airflow.tasks(run)
            for name in STEPS:
                tell(run, tasks[name], told)
            if state in FINISHED:
                return state
            now = doing(run, [tasks[name] for name in STEPS])
            status.update(escape(now))
            plain = not console.is_terminal and now.startswith("train")
            if plain and time.monotonic() > plain_at + PLAIN_PROGRESS_S:
                console.print(f"    {escape(now)}")
                plain_at = time.monotonic()
            time.sleep(POLL_S)


def tell(run: DagRun, task: dict, told: dict[str, tuple]) -> None:
    """One line for what is new about a task."""
    name, state = task["task_id"], task["state"]
    if told.get(name) == (state, task["try_number"]):
        return
    told[name] = (state, task["try_number"])
    result, who = run.result(name), f"{name:18}{task['duration'] or 0:6.1f} s "
    if state == "success":
        console.print(f"  [green]✓[/] {who} {escape(figures(name, result))}")
    elif state == "skipped" and result:  # what follows a skipped task says nothing of its own
        console.print(f"  [yellow]–[/] {who} skipped: {escape(result['reason'])}")
    elif state in ("failed", "up_for_retry"):
        again = ", trying again" if state == "up_for_retry" else ""
        console.print(f"  [red]✗[/] {who} failed{again}: {escape(last_words(run, task))}")
    elif state == "awaiting_input":
        console.print(f"  [yellow]?[/] {name:18}waits for you: {run.page}/tasks/review/required_actions")


def doing(run: DagRun, tasks: list[dict]) -> str:
    """What happens right now; in training, its own last line."""
    running = next((task["task_id"] for task in tasks if task["state"] == "running"), None)
    if running is None:
        return "waiting for the scheduler …"
    return f"train … {last_log_line(run)}" if running == "train" else f"{running} …"


def last_log_line(run: DagRun) -> str:
    """The last that the project's own code wrote into the run's log."""
    log = run.at.workspace / "logs" / f"{run.slug}.log"
    lines = lines_of(log)
    return next((line.split(": ", 1)[1] for line in reversed(lines) if " tasks." in line and ": " in line), "")


def last_words(run: DagRun, task: dict) -> str:
    """Why a task failed: its exception, which is the last line that its step wrote to stderr. What never came to write
    a log has failed in the scheduler."""
    log = task_log(run, task)
    if not log.exists():
        return words_of_the_scheduler(run, task)
    for line in reversed(lines_of(log)):
        try:
            details = json.loads(line).get("error_detail") or []
        except ValueError:
            continue
        if details:
            return details[0]["exc_value"]
    return task["state"]


def words_of_the_scheduler(run: DagRun, task: dict) -> str:
    """The last exception in the scheduler's log, and where that is."""
    log = run.at.log("airflow-scheduler")
    for line in reversed(lines_of(log)):
        if found := EXCEPTION.match(line):
            return f"{found[0]} (in {log}: the task never came to write a log of its own)"
    return f"{task['state']}, and the task never came to write a log: see {log}"


def lines_of(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []


def task_log(run: DagRun, task: dict) -> Path:
    folder = run.at.workspace / "logs" / "airflow" / f"dag_id={DAG}" / f"run_id={run.id}"
    return folder / f"task_id={task['task_id']}" / f"attempt={task['try_number']}.log"


def figures(step: str, result: dict | None) -> str:
    """The figure of a step that a person would ask for."""
    if result is None:
        return ""
    if step == "evaluate":
        return ", ".join(
            f"{model} F1 toxic {result[model]['f1_toxic']:.3f}, types {result[model]['f1_types']:.3f}"
            for model in ("challenger", "champion", "baseline")
            if result.get(model)
        )
    wanted = {
        "prepare": ("train", "val", "test"),
        "train": ("messages", "steps"),
        "register": ("version",),
        "decide": ("decision", "reviewer", "reason"),
        "stage": ("f1_toxic", "f1_types", "latency_p99_ms"),
        "swap": ("served_version",),
    }.get(step, ())
    shown = {
        key: rounded(result[key]) if isinstance(result[key], float) else result[key] for key in wanted if key in result
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


# The end --------------------------------------------------------------------------------------------------------------


def tell_the_end(airflow: Airflow, run: DagRun, state: str) -> None:
    gate = run.result("gate")
    if state == "failed":
        for task in airflow.tasks(run).values():
            if task["state"] == "failed":
                console.print(f"\n[bold red]{task['task_id']} failed:[/] {escape(last_words(run, task))}")
                if task_log(run, task).exists():
                    console.print(f"Its log: {escape(str(task_log(run, task)))}")
    elif gate is None:
        reason = escape((run.result("download") or {}).get("reason", "skipped"))
        console.print(f"\n[bold]Nothing to do:[/] {reason}. `make demo FORCE=1` retrains.")
    elif not gate["passed"]:
        console.print("\n[bold yellow]The gate was missed[/]; the service is untouched.")
        for check in gate["checks"]:
            mark = {True: "[green]✓[/]", False: "[red]✗[/]" if check["binds"] else "[yellow]![/]", None: " "}
            console.print(f"  {mark[check['passed']]} {escape(check['sentence'])}")


def tell_where_to_look(run: DagRun) -> None:
    at, report = run.at, run.folder / "report.html"
    console.print(f"\n  Airflow  {run.page}   login: admin / {at.password}")
    console.print(f"  MLflow   {at.url('MLFLOW_PORT')}")
    console.print(f"  Triton   {at.url('TRITON_HTTP_PORT')}/v2/models/toxic_text")
    if report.exists():
        console.print(f"  Report   {escape(str(report))}")
    console.print("  All of it goes on running: `make status`, `make down`.\n")


def summary(run: DagRun, state: str) -> dict:
    evaluated, gate = run.result("evaluate"), run.result("gate")
    measured = evaluated["challenger"] if evaluated else {}
    verdict = ("passed" if gate["passed"] else "failed") if gate else "skipped" if state == "success" else None
    return {
        "dag_run": state,
        "served_version": served_version(run.at),
        "f1_toxic": rounded(measured.get("f1_toxic")),
        "f1_types": rounded(measured.get("f1_types")),
        "gate": verdict,
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def served_version(at: services.Place) -> int | None:
    """The version that answers right now, by its own word; None while nothing is served."""
    text = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["Hello!"]}
    try:
        url = at.url("TRITON_HTTP_PORT") + "/v2/models/toxic_text/infer"
        answer = httpx.post(url, json={"inputs": [text]}, timeout=30, trust_env=False).raise_for_status().json()
    except httpx.HTTPError:
        return None
    return json.loads(answer["outputs"][0]["data"][0])["version"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local.demo", description="One retraining through Airflow")
    parser.add_argument("--force", action="store_true", help="retrain although there is nothing new")
    parser.add_argument("--review", action="store_true", help="ask a person before the new version goes into service")
    parser.add_argument("--data", metavar="FOLDER", help="train on Kaggle's own files from this folder")
    arguments = parser.parse_args()
    try:
        return demo(services.place(), arguments.force, arguments.review, arguments.data)
    except (UsageError, StepFailed) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except httpx.HTTPError as error:
        print(f"Airflow does not answer any more ({type(error).__name__}): see `make status`", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("The run goes on in Airflow: `make status` shows the services, `make down` stops them.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
