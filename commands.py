"""One command line for people and for the DAG: every step of a retraining by its name.

    python commands.py STEP [hydra.override=value …]
    python commands.py STEP --help

Logs go to stderr. The last line of stdout is the step's result, one JSON object. Exit codes: 0 done; 99 nothing that
follows should run (no new data, gate not passed, rejected); 2 bad arguments, configuration or data, so that another try
would end alike; 1 failed. The last line of stderr says why.
"""

import inspect
import json
import logging
import os
import sys

import fire
from fire.decorators import SetParseFn, SetParseFns
from fire.parser import DefaultParseValue

from tasks import proxies
from tasks.config import Config
from tasks.errors import Skip, StepFailed, Unsuitable, UsageError
from tasks.overrides import kinds_at, parsed, perhaps
from tasks.step import execute, prepare_process, stdout_for_the_result

A_NUMBER = "--version=N, a version's number in the registry"
PATHS = {"checkpoint", "output_path", "onnx", "input_file", "output_file", "config_path"}


def download(*overrides, config_path="configs", config_name="config"):
    """Brings the raw data into the workspace and gives it a version; skips the rest when there is nothing new.

    Example: python commands.py download profile=demo
    """
    from tasks.data import download

    return execute("download", download.run, overrides, config_path=config_path, config_name=config_name, reuse=True)


def validate(*overrides, what="all", config_path="configs", config_name="config"):
    """Checks data against the expectations in expectations/*.json.

    Args:
        what: raw, prepared or all.
    """
    from tasks.data import validate

    wanted = {"raw": ["raw"], "prepared": ["prepared"], "all": ["raw", "prepared"]}.get(what)
    if wanted is None:
        raise UsageError(f"--what={what} is not one of raw, prepared, all")
    results = [
        execute(
            f"validate_{stage}", validate.run, overrides, stage=stage, config_path=config_path, config_name=config_name
        )
        for stage in wanted
    ]
    return results[0] if len(results) == 1 else {"step": "validate", "results": results}


def prepare(*overrides, config_path="configs", config_name="config"):
    """Cleans, joins and splits the raw data into data/processed/{train,val,test}.parquet."""
    from tasks.data import prepare

    return execute("prepare", prepare.run, overrides, config_path=config_path, config_name=config_name, reuse=True)


def train(*overrides, config_path="configs", config_name="config"):
    """Fine-tunes the base model with QLoRA, then merges the adapter: models/finetuned/final.

    Example: python commands.py train model=qwen training.num_train_epochs=1
    """
    from tasks.training import train

    return execute("train", train.run, overrides, config_path=config_path, config_name=config_name, reuse=True)


def evaluate(*overrides, config_path="configs", config_name="config"):
    """Chooses thresholds on the validation split; measures model, champion and baseline on the same test rows."""
    from tasks.training import evaluate

    return execute("evaluate", evaluate.run, overrides, config_path=config_path, config_name=config_name, reuse=True)


def register(*overrides, config_path="configs", config_name="config"):
    """Makes the trained model a new version in the MLflow registry."""
    from tasks.promotion import register

    return execute(
        "register", register.run, overrides, config_path=config_path, config_name=config_name, reuse=register.is_there
    )


def gate(*overrides, config_path="configs", config_name="config"):
    """Holds the version's metrics against the limits in configs/gate; exit 99 when one that binds is missed."""
    from tasks.promotion import gate

    return execute("gate", gate.run, overrides, config_path=config_path, config_name=config_name)


def report(*overrides, config_path="configs", config_name="config"):
    """Writes report.html: everything a reviewer needs, on one page that works offline."""
    from tasks.promotion import report

    return execute("report", report.run, overrides, config_path=config_path, config_name=config_name)


def decide(*overrides, decision=None, reviewer=None, reason=None, config_path="configs", config_name="config"):
    """Records in the registry who decided what about the version, when and why; exit 99 when it was rejected.

    Args:
        decision: approve or reject. Without one, promotion.mode decides.
        reviewer: who decides; the login name by default.
        reason: why, in a sentence.
    """
    from tasks.promotion import decide

    return execute(
        "decide",
        decide.run,
        overrides,
        decision=decision,
        reviewer=reviewer,
        reason=reason,
        config_path=config_path,
        config_name=config_name,
    )


def export_onnx(*overrides, checkpoint=None, output_path=None, config_path="configs", config_name="config"):
    """Exports the merged model to ONNX and checks that it decides like the original.

    Args:
        checkpoint: a folder like models/finetuned/final, with --output-path. Without both, the run's candidate.
        output_path: the ONNX file to write.
    """
    from tasks.serving import export_onnx

    if (checkpoint is None) != (output_path is None):
        raise UsageError("--checkpoint and --output-path go together; without both, the run's candidate is exported")
    if checkpoint is not None:
        return export_onnx.export_by_hand(overrides, checkpoint, output_path, config_path, config_name)
    return execute(
        "export_onnx",
        export_onnx.run,
        overrides,
        config_path=config_path,
        config_name=config_name,
        reuse=export_onnx.is_there,
    )


def build_engine(*overrides, onnx=None, output_path=None, config_path="configs", config_name="config"):
    """Builds what Triton loads from the exported ONNX model: a TensorRT plan, or the ONNX file as it is on a CPU.

    Args:
        onnx: an ONNX file, with --output-path. Without both, the run's exported model.
        output_path: the engine file to write.
    """
    from tasks.serving import build_engine

    if (onnx is None) != (output_path is None):
        raise UsageError("--onnx and --output-path go together; without both, the run's exported model is built")
    if onnx is not None:
        return build_engine.build_by_hand(overrides, onnx, output_path, config_path, config_name)
    return execute(
        "build_engine",
        build_engine.run,
        overrides,
        config_path=config_path,
        config_name=config_name,
        reuse=build_engine.is_there,
    )


def stage(*overrides, config_path="configs", config_name="config"):
    """Proves the candidate in a second, short-lived Triton on the whole test set; the live server is not touched."""
    from tasks.serving import stage

    return execute("stage", stage.run, overrides, config_path=config_path, config_name=config_name)


@SetParseFns(repair=DefaultParseValue)
def swap(*overrides, repair=False, config_path="configs", config_name="config"):
    """Puts the staged version into service without a dropped request, or leaves everything as it was.

    Args:
        repair: set the aliases champion and previous again by what serves, where a hand in MLflow has removed or moved
            them; nothing else is put into service.
    """
    from tasks.serving import swap

    if not isinstance(repair, bool):
        raise UsageError(f"--repair={repair}: it takes no value; put it after the overrides")
    if repair:
        return swap.repair(overrides, config_path, config_name)
    return execute("swap", swap.run, overrides, config_path=config_path, config_name=config_name)


def rollback(*overrides, reviewer=None, reason=None, config_path="configs", config_name="config"):
    """Puts the previous champion back into service and holds automatic promotion until a person clears it.

    Args:
        reviewer: who rolls back; the login name by default.
        reason: why, in a sentence.
    """
    from tasks.serving import rollback

    return rollback.run(overrides, reviewer, reason, config_path, config_name)


@SetParseFns(clear=DefaultParseValue)
def hold(*overrides, clear=False, reviewer=None, reason=None, config_path="configs", config_name="config"):
    """Says whether automatic promotion is on hold since a rollback, and why; --clear ends that.

    Example: python commands.py hold --clear --reason="version 8 has been retrained without the broken labels"

    Args:
        clear: end it; who did so and why is kept in the registry.
        reviewer: who ends it; the login name by default.
        reason: why, in a sentence.
    """
    from tasks.promotion import hold

    return hold.run(overrides, clear, reviewer, reason, config_path, config_name)


def predict(
    *overrides,
    text=None,
    input_file=None,
    output_file=None,
    checkpoint=None,
    url=None,
    config_path="configs",
    config_name="config",
):
    """Classifies messages with a trained model, or through a server.

    Args:
        text: one message.
        input_file: a file with one message a line, in UTF-8 or UTF-16.
        output_file: where to write the JSON list of {"text", "toxic", "labels"}; without it, it is printed.
        checkpoint: a folder like models/finetuned/final; the newest one by default.
        url: a Triton's gRPC address, host:port, instead of a checkpoint; its answers have scores and version too.
    """
    from tasks.serving import predict

    return predict.run(overrides, text, input_file, output_file, checkpoint, url, config_path, config_name)


@SetParseFns(version=DefaultParseValue, replace=DefaultParseValue, prune=DefaultParseValue)
def data(
    *overrides,
    version=None,
    output_path=None,
    replace=False,
    prune=False,
    config_path="configs",
    config_name="config",
):
    """Brings back the raw and prepared data that a registered version was trained on.

    Example: python commands.py data --version 3 --output-path /tmp/data-of-3

    Args:
        version: the version's number in the registry.
        output_path: a folder to put raw/ and processed/ into; workspace/data by default.
        replace: put it in the place of other data that is there. In the workspace that gets a version first.
        prune: remove, here and in the DVC remote, every version that neither the registry nor a run folder names.
    """
    from tasks.data import restore

    if prune is True and version is None:
        return restore.prune(overrides, config_path, config_name)
    if prune or isinstance(version, bool) or not isinstance(version, int):
        raise UsageError(f"data wants {A_NUMBER}, or --prune")
    return restore.run(overrides, version, output_path, bool(replace), config_path, config_name)


@SetParseFns(version=DefaultParseValue, anew=DefaultParseValue)
def sign(*overrides, version=None, anew=False, reviewer=None, reason=None, config_path="configs", config_name="config"):
    """Signs what the registry says of a version that is from before there were signatures: look at its tags first.

    Example: python commands.py sign --version=3 --reason="it has served since June"

    Args:
        version: the version's number in the registry.
        anew: also what has a wrong signature, as after a change of the key: you vouch for what its tags say now.
        reviewer: who vouches for it; the login name by default.
        reason: why, in a sentence.
    """
    from tasks.promotion import sign

    require_number("sign", version)
    if not isinstance(anew, bool):
        raise UsageError(f"--anew={anew}: it takes no value; put it after the overrides")
    return sign.run(overrides, version, anew, reviewer, reason, config_path, config_name)


@SetParseFns(version=DefaultParseValue)
def verify(*overrides, version=None, config_path="configs", config_name="config"):
    """Checks the signatures of a version, its code and its checkpoint, before you load it; runs nothing of it.

    Example: python commands.py verify --version=3

    Args:
        version: the version's number in the registry.
    """
    from tasks.promotion import verify

    require_number("verify", version)
    return verify.run(overrides, version, config_path, config_name)


def require_number(step: str, version) -> None:
    if isinstance(version, bool) or not isinstance(version, int):
        raise UsageError(f"{step} wants {A_NUMBER}")


STEPS = [
    download,
    validate,
    prepare,
    train,
    evaluate,
    register,
    gate,
    report,
    decide,
    export_onnx,
    build_engine,
    stage,
    swap,
    rollback,
    hold,
    predict,
    data,
    sign,
    verify,
]


def main(arguments=None) -> int:
    prepare_process()
    os.environ.setdefault("PAGER", "cat")  # `--help` prints; it does not wait in a pager
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # What is typed is text: Fire would make a number of 1e3, and a list of [x], where nothing else is said.
    steps = {step.__name__: SetParseFn(str)(step) for step in STEPS}
    if "--help" in arguments or not arguments:
        fire.Fire(steps, command=arguments, name="commands.py")
        return 0
    try:
        proxies.prepare()
        command = unmistakable(steps, arguments)
        with stdout_for_the_result():
            result = fire.Fire(steps, command=command, name="commands.py", serialize=lambda _: None)
        print(json.dumps(result, ensure_ascii=False))
        return 0
    except Skip as skip:
        print(json.dumps({"status": "skipped", **skip.result}, ensure_ascii=False))
        return last_words(99, str(skip))
    except (UsageError, Unsuitable) as error:
        return last_words(2, str(error))
    except StepFailed as error:
        return last_words(1, str(error))
    except Exception as error:
        if type(error).__module__.startswith("mlflow."):  # of a call that no `registry.answering` stands around
            return last_words(*refused(error))
        logging.exception("unexpected")
        return last_words(1, f"{type(error).__name__}: {error}")


def unmistakable(steps: dict, arguments: list[str]) -> list[str]:
    """The arguments with each flag and its value as one, `--text=-5`, so that Fire takes no value for a flag.

    Raises:
        UsageError: an unknown step or flag, which Fire would complain about after the step has run; a flag without its
            value; what is neither a flag nor key=value.
    """
    name, *rest = arguments
    if name not in steps:
        raise UsageError(f"{name} is no step{perhaps(name, steps)}: the steps are {', '.join(steps)}")
    flags = inspect.signature(steps[name]).parameters
    command, left = [name], iter(rest)
    for argument in left:
        if not argument.startswith("-"):
            command.append(override_of(name, argument))
            continue
        flag, equals, value = argument.partition("=")
        parameter = known_flag(name, flags, flag)
        if parameter.default is False:  # it takes no value
            command.append(f"--{parameter.name}={value if equals else True}")
            continue
        if not equals:
            value = next(left, None)
            if value is None or value.startswith("--") and value.partition("=")[0][2:].replace("-", "_") in flags:
                or_prune = ", or --prune" if name == "data" else ""
                wants = f"; {name} wants {A_NUMBER}{or_prune}" if parameter.name == "version" else ""
                raise UsageError(f"{flag} needs a value: {flag}=…{wants}")
        command.append(f"--{parameter.name}={place_of(flag, value) if parameter.name in PATHS else value}")
    return command


def known_flag(step: str, flags, flag: str) -> inspect.Parameter:
    known = {f"--{name.replace('_', '-')}": parameter for name, parameter in flags.items() if name != "overrides"}
    dashed = flag.replace("_", "-")
    if dashed in known:
        return known[dashed]
    key = flag.lstrip("-").replace("-", "_")
    as_key = f"; {key}=…, without dashes?" if kinds_at(Config, key) else ""
    raise UsageError(
        f"{step} has no {dashed}{as_key or perhaps(dashed, known)}: see `python commands.py {step} --help`"
    )


def override_of(step: str, argument: str) -> str:
    if parsed(argument).value is None and not argument.startswith("~"):
        raise UsageError(
            f"{argument!r} is neither a flag nor key=value: a sentence or a path with spaces stands in the shell's "
            f"quotes; see `python commands.py {step} --help`"
        )
    return argument


def place_of(flag: str, value: str) -> str:
    """A path, with `~` as a shell takes it that sees it alone: of --flag=~/x it leaves it as it is."""
    if not value:
        raise UsageError(f"{flag} is empty: it names a file or folder")
    return os.path.expanduser(value)


def refused(error) -> tuple[int, str]:
    """Exit code and last words for what MLflow has refused."""
    import mlflow

    from tasks import config
    from tasks.promotion import refusals

    shipped = config.load((), str(config.SHIPPED))
    shipped.mlflow.tracking_uri = mlflow.get_tracking_uri()  # the one that was asked
    found = refusals.in_words(shipped, error)
    return (2 if isinstance(found, UsageError) else 1), str(found)


def last_words(code: int, message: str) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
