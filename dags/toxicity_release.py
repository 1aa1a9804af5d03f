"""Put a chosen registry version into service: a promotion from the registry, or the way back to an older model.

The version goes the same way as a freshly trained one, through the second server, from `decide` on.
"""

from datetime import timedelta
from functools import partial

from airflow.sdk import DAG, Context, Param, chain, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from dags import registry
from dags.approvals import APPROVAL, TOLD
from dags.notices import Failure, Swapped
from dags.review import decision
from dags.steps import LIMITS, OWNER, PROFILE, step_task

GRAPH = """
# Put a registry version into service

It starts when a reviewer sets the alias `approved` in the MLflow registry, or by hand with a version's number or alias;
`previous` is the way back. Nothing is trained: the version is exported, proved in a second Triton server and swapped
into the live one. If any task fails, the version that served before goes on serving.

- **choose** looks up the version; what does not exist ends here. *Skipped*: the alias `approved` is gone again.
- **decide** … **swap** are the steps of a retraining. Whoever triggered the release, or set the alias, is recorded.
- **settle** removes the alias `approved` when a release that it started is over, well or not, so that it can be set
  again. If `choose` could not ask the registry, the alias stays and starts another release. A release by hand removes
  it only if that very version came into service.
"""


def released_by(context: Context) -> dict:
    """Triggering a release, or setting the alias `approved`, is the decision."""
    chosen = context["ti"].xcom_pull(task_ids="choose")
    return decision("approve", chosen["reviewer"], chosen["reason"])


def chosen_version(context: Context) -> int:
    return context["ti"].xcom_pull(task_ids="choose")["version"]


# A release that could not ask the registry is told of again (`settle`). With a registry that answers the triggerer but
# never `choose`, these retries (20, 40, 80 and 160 s apart at least) make that one red release in 5 minutes at most.
@task(
    retries=4,
    retry_delay=timedelta(seconds=20),
    retry_exponential_backoff=True,
    execution_timeout=timedelta(minutes=5),
    doc_md="Which version is meant, who wants it and why. An alias is looked up once: it may move while this runs.",
)
def choose(**context) -> dict:
    wanted, dag_run = context["params"]["version"] or registry.APPROVED, context["dag_run"]
    try:
        aliases = registry.aliases()
    except registry.Refused as error:
        raise AirflowFailException(str(error)) from None
    version = int(wanted) if wanted.isdigit() else aliases.get(wanted)
    if version is None and dag_run.run_type == "asset_triggered":
        raise AirflowSkipException("the alias `approved` is gone: released already, or withdrawn")
    if version is None:
        known = ", ".join(sorted(aliases)) or "none"
        say = "" if context["params"]["version"] else "; trigger again and name a version, by its number or alias"
        if wanted in ("champion", "previous"):
            say = ", and `python commands.py swap --repair` sets champion and previous again by what serves"
        raise AirflowFailException(f"no version carries the alias {wanted}: the aliases are {known}{say}")
    tags = registry.tags(version)
    if tags is None:
        raise AirflowFailException(f"{registry.model_name()} has no version {version}: see {registry.server()}")
    return {"version": version, **wish(context, tags)}


def wish(context: Context, tags: dict) -> dict:
    """Who wants the release and why, as well as Airflow or the registry knows."""
    if context["dag_run"].run_type == "asset_triggered":
        return {
            "reviewer": tags.get(registry.APPROVED_BY, "a reviewer in MLflow"),
            "reason": tags.get(registry.APPROVED_WHY, "none given"),
        }
    return {
        "reviewer": context["dag_run"].triggering_user_name or "release",
        "reason": context["params"]["reason"] or "none given",
    }


@task(
    inlets=[APPROVAL],
    retries=5,
    retry_delay=timedelta(seconds=30),
    retry_exponential_backoff=True,
    execution_timeout=timedelta(minutes=5),
    doc_md="Removes the alias `approved` of this version, so that it can be set again: however the release ended that "
    "it started, or when a release by hand has put the version into service.",
)
def settle(**context) -> None:
    ti, told = context["ti"], context["asset_state_store"][APPROVAL]
    asked, chosen = context["dag_run"].run_type == "asset_triggered", ti.xcom_pull(task_ids="choose")
    if asked and chosen is None:  # the registry was away, or the alias gone: whatever is wished now is told of anew
        told.delete(TOLD)
        return
    if not asked and not swapped(context):
        return  # a wish for the same version has a release of its own
    try:
        if use_up_wish(chosen["version"]):
            told.delete(TOLD)
    except registry.NoAnswer:
        if ti.try_number > ti.max_tries:  # the wish stays in the registry: it must not stay without an answer
            told.delete(TOLD)
        raise


def use_up_wish(version: int) -> bool:
    """Whether no wish is left in the registry: a newer one for another version stays, its own release will end it."""
    approved = registry.aliases().get(registry.APPROVED)
    registry.delete_tags(version, registry.APPROVED_BY, registry.APPROVED_WHY)
    if approved not in (version, None):
        return False
    if approved == version:
        registry.delete_alias(registry.APPROVED)
    return True


def swapped(context: Context) -> bool:
    run_id = context["dag_run"].run_id
    states = context["ti"].get_task_states(dag_id=dag.dag_id, task_ids=["swap"], run_ids=[run_id])
    return states.get(run_id, {}).get("swap") == "success"


with DAG(
    dag_id="toxicity_release",
    dag_display_name="Release of a version (toxicity_release)",
    description="Put a version of the registry into service",
    doc_md=GRAPH,
    schedule=APPROVAL,
    is_paused_upon_creation=False,  # it starts only when a person wants it; paused, it would not see the alias
    max_active_runs=1,
    default_args={**OWNER, "on_failure_callback": Failure()},
    params={
        "version": Param(
            None,
            type=["null", "string"],
            pattern=r"^([1-9][0-9]{0,8}|[A-Za-z][A-Za-z0-9_-]{0,254})$",
            title="Version or alias",
            description="The version's number in the MLflow registry, or an alias: challenger, previous … Empty: the "
            "one that a reviewer has given the alias approved.",
        ),
        "reason": Param(
            None,
            type=["null", "string"],
            title="Reason",
            description="Why, in a sentence. It is kept in the registry with your name.",
        ),
        "profile": PROFILE,
        "limits": LIMITS,
    },
    tags=["toxicity"],
) as dag:
    step = partial(step_task, version=chosen_version)
    settled = settle()
    chain(
        choose(),
        step("decide", review=released_by),
        step("export_onnx"),
        step("build_engine"),
        step("stage"),
        step("swap", on_success_callback=Swapped()),
        settled,
    )
    # A teardown runs however the release ends, and cannot turn a failed one green. It has no setup: it runs as well
    # when `choose` has failed.
    settled.as_teardown()
