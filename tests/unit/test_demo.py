"""What the demo says of a task that has failed."""

import json

import pytest

from local import demo, services

TASK = {"task_id": "download", "try_number": 1, "state": "up_for_retry"}
WORD = "ImportError: Using SOCKS proxy, but the 'socksio' package is not installed."
SCHEDULER = f"""2026-11-29T19:40:28.630076Z [error    ] Workload execution failed. [LocalExecutor]
Traceback (most recent call last):
  File "/a/client.py", line 191, in __init__
    raise ImportError(
{WORD}
2026-11-29T19:40:28.969655Z [error    ] Executor reported that the task instance finished with state failed
"""


@pytest.fixture
def run(tmp_path):
    at = services.Place(tmp_path / "a [b]", {name: 1 for name in services.PORTS})
    at.log("airflow-scheduler").parent.mkdir(parents=True)
    return demo.DagRun("demo-1", at)


def test_a_task_without_a_log_has_its_last_words_in_the_schedulers(run):
    log = run.at.log("airflow-scheduler")
    assert demo.last_words(run, TASK) == f"up_for_retry, and the task never came to write a log: see {log}"
    log.write_text(SCHEDULER)
    assert demo.last_words(run, TASK).startswith(f"{WORD} (in {log}")


def test_a_tasks_own_log_comes_first(run):
    run.at.log("airflow-scheduler").write_text(SCHEDULER)
    log = demo.task_log(run, TASK)
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"event": "failed", "error_detail": [{"exc_value": "the disk is full"}]}))
    assert demo.last_words(run, TASK) == "the disk is full"
