"""Put a chosen registry version into service: a promotion from the registry, or the way back to an older model.

The version goes the same way as a freshly trained one, through the second server, from `decide` on.
"""

import os

from airflow.sdk import DAG, Context, Param, chain

from dags.review import decision
from dags.steps import step_task

GRAPH = """
# Put a registry version into service

Triggered by hand, with the number of a version in the MLflow registry. Nothing is trained: the version is exported,
proved in a second Triton server and swapped into the live one. Whoever triggers it is recorded as the one who decided.
If any task fails, the version that served before goes on serving.
"""


def released_by(context: Context) -> dict:
    """Triggering a release is the decision."""
    reviewer = context["dag_run"].triggering_user_name or "release"
    return decision("approve", reviewer, context["params"]["reason"] or "released by hand")


with DAG(
    dag_id="toxicity_release",
    description="Put a version of the registry into service",
    doc_md=GRAPH,
    schedule=None,
    max_active_runs=1,
    params={
        "version": Param(
            type="integer",
            minimum=1,
            title="Version",
            description="The version's number in the MLflow registry.",
        ),
        "reason": Param(
            None,
            type=["null", "string"],
            title="Reason",
            description="Why, in a sentence. It is kept in the registry with your name.",
        ),
        "profile": Param(
            os.environ.get("TOXIC_PROFILE", "gpu"),
            type="string",
            enum=["demo", "gpu"],
            title="Profile",
            description="The profile that the version was trained with.",
        ),
    },
    tags=["toxicity"],
) as dag:
    chain(
        step_task("decide", review=released_by),
        step_task("export_onnx"),
        step_task("build_engine"),
        step_task("stage"),
        step_task("swap"),
    )
