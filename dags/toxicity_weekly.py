"""One retraining, every Monday at 03:00 UTC: from fresh data to a proven model in service.

A new model is put into service only after it has passed the gate, after a person or the configuration has said yes,
and after it has proved itself in a second server in the very form in which it will serve.
"""

import os
from datetime import timedelta

from airflow.sdk import DAG, CronTriggerTimetable, Param, TaskGroup, TriggerRule, chain

from dags import configured
from dags.notices import Failure, GateVerdict, Swapped
from dags.review import answer_of_review, review_task
from dags.steps import LIMITS, OWNER, PROFILE, RARELY, step_task

GRAPH = """
# One retraining

- **data**: fetch, check, clean and split the messages. *Skipped*, with all that follows, when there is nothing new;
  *failed* when the data breaks a critical expectation.
- **training**: fine-tune with QLoRA, merge, measure against the champion and a baseline.
- **promotion**: register in MLflow, hold against the gate, write the report, ask for a decision. *Skipped* from here
  on when the gate is missed (the report is written all the same) or the answer is no.
- **serving**: export, build, prove in a second Triton, swap without a dropped request. *Failed* when the model as it is
  served decides differently or misses the gate; the old version goes on serving.

*Skipped* is a normal end: the run stays green and the service untouched. *Failed* is for people: the last line of the
task's log says why and what to do. Every task is a command that can be typed as well: `python commands.py STEP`.

All figures and plots of a run are under `workspace/runs/`, in the folder named in the log of its first task.
"""

PARAMS = {
    "force": Param(
        False,
        type="boolean",
        title="Force",
        description="Retrain although this data, configuration and code already have their verdict.",
    ),
    "promotion": Param(
        "config",
        type="string",
        enum=["config", "auto", "review", "never"],
        values_display={
            "config": f"as configured: {configured.in_words('promotion.mode')}",
            "auto": "auto: into service if the gate is passed",
            "review": f"review: wait for a person, {configured.in_words('promotion.review_hours')} hours at most",
            "never": "never: only into the registry",
        },
        title="Promotion",
        description="What happens to a version that passes the gate.",
    ),
    "profile": PROFILE,
    "max_samples": Param(
        None,
        type=["null", "integer"],
        minimum=1 + min(configured.value("data.min_rows", profile) for profile in configured.PROFILES),
        title="Messages at most",
        description="How many messages to keep over all sources, more than data.min_rows "
        f"({configured.in_words('data.min_rows')}). Empty: as configured: {configured.in_words('data.max_samples')}.",
        section=RARELY,
    ),
    "epochs": Param(
        None,
        type=["null", "integer"],
        minimum=1,
        title="Epochs",
        description="Passes over the training split. Empty: as configured: "
        f"{configured.in_words('training.num_train_epochs')}.",
        section=RARELY,
    ),
    "data_folder": Param(
        None,
        type=["null", "string"],
        minLength=1,
        title="Data folder",
        description="A folder with Kaggle's own files (.csv, .csv.gz or .zip) to train on, as the steps see it. Empty: "
        "the sources of the profile.",
        section=RARELY,
    ),
    "limits": LIMITS,
    "reason": Param(
        None,
        type=["null", "string"],
        title="Reason for other limits",
        description="Why, in a sentence. Without it a run with other limits is refused before it starts.",
        section=RARELY,
    ),
}

with DAG(
    dag_id="toxicity_weekly",
    dag_display_name="Weekly retraining (toxicity_weekly)",
    description="Retrain the toxicity classifier and put it into service if it has proved itself",
    doc_md=GRAPH,
    # Without `run_immediately` a DAG that is unpaused within 17 hours of its Monday starts that Monday's run at once.
    # The minute is for the scheduler: a run that is just due must not be taken for one of the past.
    schedule=CronTriggerTimetable(
        os.environ.get("TOXIC_SCHEDULE") or "0 3 * * 1", timezone="UTC", run_immediately=timedelta(minutes=1)
    ),
    catchup=False,
    max_active_runs=1,
    params=PARAMS,
    default_args={**OWNER, "on_failure_callback": Failure()},
    tags=["toxicity"],
) as dag:
    with TaskGroup("data", prefix_group_id=False, tooltip="Fetch, check, clean and split the messages"):
        download = step_task("download")
        validate_raw = step_task("validate_raw")
        prepare = step_task("prepare")
        validate_prepared = step_task("validate_prepared")

    with TaskGroup("training", prefix_group_id=False, tooltip="Fine-tune, merge and measure"):
        train = step_task("train")
        evaluate = step_task("evaluate")

    with TaskGroup("promotion", prefix_group_id=False, tooltip="Is it good enough, and does somebody want it?"):
        register = step_task("register")
        gate = step_task("gate", on_success_callback=GateVerdict(), on_skipped_callback=GateVerdict())
        # A gate that was missed is skipped, and just then the report is wanted.
        report = step_task("report", trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
        review = review_task()
        decide = step_task("decide", review=answer_of_review)

    with TaskGroup("serving", prefix_group_id=False, tooltip="Prove it in the form in which it serves, then swap"):
        export_onnx = step_task("export_onnx")
        build_engine = step_task("build_engine")
        stage = step_task("stage")
        swap = step_task("swap", on_success_callback=Swapped())

    chain(download, validate_raw, prepare, validate_prepared, train, evaluate, register, gate)
    [register, gate] >> report
    [gate, report] >> review
    chain(review, decide, export_onnx, build_engine, stage, swap)
