"""A DAG whose one step takes longer than it may."""

from datetime import timedelta

from airflow.sdk import DAG

from dags.steps import step_task

with DAG("impatient", schedule=None, params={"profile": "demo"}):
    download = step_task("download")
    download.command, download.execution_timeout, download.retries = ["sleep", "600"], timedelta(seconds=15), 0
