"""Writes what a run came to into its note, which Airflow shows beside it: a green run may well mean "gate not passed".

A task cannot write the note of its run. The scheduler can, and listeners run inside it.
"""

import sys

from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin
from sqlalchemy.orm import object_session

from dags.notices import outcome
from dags.steps import run_folder


@hookimpl
def on_dag_run_success(dag_run):
    if object_session(dag_run) is None:  # in `dag.test()`, which has no scheduler
        return
    if dag_run.dag_id.startswith("toxicity_") and not dag_run.note:  # a person's note stays
        dag_run.note = outcome(run_folder(dag_run.dag_id, dag_run.run_id))


class RunNote(AirflowPlugin):
    name = "toxic_run_note"
    listeners = [sys.modules[__name__]]
