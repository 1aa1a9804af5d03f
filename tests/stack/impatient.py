"""A DAG whose one step takes longer than it may."""

from datetime import timedelta

from airflow.sdk import DAG

from dags.steps import step_task

with DAG("impatient", schedule=None, params={"profile": "demo"}):
    download = step_task("download")
    download.command = ["sh", "-c", "trap 'touch /workspace/told-to-end; exit 143' TERM; sleep 600 & wait"]
    download.execution_timeout, download.retries = timedelta(seconds=15), 0
