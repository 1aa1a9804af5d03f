"""What a person types as key=value: text is that text, and all that is wrong is named at once."""

import json
import re
from pathlib import Path
from typing import get_origin

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tasks import config, files, overrides
from tasks import run as runs
from tasks import step
from tasks.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("TOXIC_DVC_REMOTE", "MLFLOW_TRACKING_URI", "TOXIC_RUN_ID", "TOXIC_OVERRIDES", "TRITON_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOXIC_WORKSPACE", str(tmp_path))


def refused(*given, **more) -> str:
    with pytest.raises(UsageError) as error:
        config.load(given, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# Text -----------------------------------------------------------------------------------------------------------------

TEXT_KEYS = [
    key
    for key in overrides.keys(config.Config)
    if key != overrides.PROFILE and overrides.holds_text(overrides.kinds_at(config.Config, key))
]


def as_hydra_reads(override: str):
    """The key and the value of an override, an interpolation of it resolved as well, as the configuration has them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    read = OverridesParser.create().parse_override(override)
    container = OmegaConf.create({"value": read.value(), "other": "${value}"})
    return read.key_or_group, OmegaConf.to_container(container, resolve=True)["other"]


ODD = st.text(st.sampled_from("\\'\"${}[]()=,:~#%&;* \tabc1я🙂."), max_size=12)
PRINTABLE = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), max_size=30)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TEXT_KEYS), PRINTABLE | ODD, st.sampled_from(["", "+", "++"]))
@example("data.folder", "/tmp/archive (1)", "")
@example("model.name", "${oc.env:HOME}", "")
@example("model.name", "a\\\\${b\\", "++")
@example("workspace", "'a' and 'b'", "")
@example("mlflow.experiment", "true", "")
def test_any_text_comes_back_as_it_was_typed(key, text, how):
    kinds = overrides.kinds_at(config.Config, key)
    assume(not overrides.WHOLLY_QUOTED.fullmatch(text) and text != "???")
    assume(not (text == "null" and type(None) in kinds))
    assume(not (overrides.is_list(text) and any(get_origin(kind) is list for kind in kinds)))
    assert as_hydra_reads(overrides.as_written(f"{how}{key}={text}", config.Config).lstrip("+")) == (key, text)


def test_the_keys_that_hold_text_are_found_in_the_schema():
    assert {"workspace", "data.folder", "data.sources.0.name", "model.name", "versions.remote"} < set(TEXT_KEYS)
    assert {"serving.urls", "serving.triton_env", "promotion.mode", "gate.override_reason"} < set(TEXT_KEYS)
    assert not {"seed", "force", "data", "model.architecture", "serving.keep_previous_loaded"} & set(TEXT_KEYS)


FOLDERS = [
    "/tmp/archive (1)",
    "a, b",
    "a=b",
    "it's",
    '"x" y',
    "#1",
    "[a]",
    "{a",
    "$HOME",
    "50%",
    "a\\",
    "${seed}",
    "~~",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_path_means_itself_wherever_it_is_read(folder):
    given = ["data=folder", f"data.folder={folder}", f"versions.remote={folder}"]
    found = config.load(given)
    assert (found.data.folder, found.versions.remote) == (folder, folder)
    assert folder in {source.name for source in found.data.sources}


@pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if f not in ("{a", "$HOME", "a\\", "${seed}")]
)  # see tasks/paths.py
def test_a_workspace_means_itself_too(folder):
    found = config.load(["data=folder", "data.folder=/data", f"workspace=/w/{folder}"])
    assert found.workspace == Path(f"/w/{folder}")
    assert {source.name for source in found.data.sources} == {"/data", f"/w/{folder}/feedback"}


@pytest.mark.parametrize("word", ["123", "true", "1e3", "null", "2026-11-29", " two  words ", "None"])
def test_what_looks_like_something_else_stays_text(word):
    found = config.load([f"model.name={word}", f"mlflow.experiment={word}"])
    assert (found.model.name, found.mlflow.experiment) == (word, word)


def test_null_is_none_where_a_key_may_be_none_and_quotes_make_it_a_word():
    found = config.load(["data.folder=null", "model.architecture=null", "serving.triton_env=null"])
    assert (found.data.folder, found.model.architecture, found.serving.triton_env) == (None, None, None)
    assert config.load(["data=folder", "data.folder='null'"]).data.folder == "null"


@pytest.mark.parametrize(
    "typed, meant",
    [("'/tmp/a b'", "/tmp/a b"), ('"it\'s"', "it's"), ("'${seed}/x'", "42/x"), ("'\\${seed}'", "${seed}")],
)
def test_a_value_that_is_wholly_in_quotes_is_what_hydra_makes_of_it(typed, meant):
    assert config.load(["data=folder", f"data.folder={typed}"]).data.folder == meant


def test_lists_groups_and_signs_are_as_they_were():
    found = config.load(["training.lora.target_modules=[q_proj,k_proj]", "training.lora.modules_to_save=score, other"])
    assert found.training.lora.target_modules == ["q_proj", "k_proj"]
    assert found.training.lora.modules_to_save == ["score", "other"]
    assert config.load(["training.lora.target_modules=.*[qk]_proj$"]).training.lora.target_modules == ".*[qk]_proj$"
    assert config.load(["serving.urls=a:1,[::1]:2"]).serving.urls == ["a:1", "[::1]:2"]
    assert config.load(["data=sample", "+data.sources.0.max_bad_rows=3", "++seed=7", "~profile"]).seed == 7
    assert config.load(["data.sources.1.name=a/b", "training.lora={r: 8}"]).data.sources[1].name == "a/b"


def test_home_is_where_a_shell_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    given = ["data=folder", "data.folder=~/d", "workspace=~/w", "versions.remote=~/r", "serving.triton_env=~/t"]
    found = config.load(given)
    assert (found.data.folder, found.workspace) == ("/home/ada/d", Path("/home/ada/w"))
    assert (found.versions.remote, found.serving.triton_env) == ("/home/ada/r", "/home/ada/t")
    assert config.load(["model.name=a~b", "versions.remote=s3://b/~x"]).versions.remote == "s3://b/~x"


def test_a_variable_means_itself_too(monkeypatch):
    monkeypatch.setenv("TOXIC_WORKSPACE", "/tmp/$seed 'a', [b]")
    monkeypatch.setenv("TOXIC_DVC_REMOTE", "1e3")
    found = config.load()
    assert (str(found.workspace), found.versions.remote) == ("/tmp/$seed 'a', [b]", "1e3")
    monkeypatch.setenv("TOXIC_WORKSPACE", "")
    assert "workspace='': it is empty" in refused()


def test_a_run_keeps_what_was_meant_when_it_was_opened(tmp_path):
    opened = step.execute("download", lambda c, r: {}, ["profile=demo", "versions.remote=re mote, ${x}"])
    assert step.execute("prepare", lambda c, r: {"is": c.versions.remote})["is"] == "re mote, ${x}"
    file = runs.find(tmp_path, opened["run_id"]).folder / "run.json"
    # As an older release kept them: there `${…}` was an interpolation, and a backslash an escape.
    old = ["profile=demo", "versions.remote=${workspace}/remote", "mlflow.experiment=a\\ b", "model.name='x, y'"]
    files.write_json(file, {**files.read_json(file), "overrides": [*old, "gate.override_reason=it's ${x}"]})
    found = step.execute("prepare", lambda c, r: {"is": [c.versions.remote, c.mlflow.experiment, c.model.name]})
    assert found["is"] == [f"{tmp_path}/remote", "a b", "x, y"]


def test_what_is_typed_now_is_stronger_than_what_the_run_keeps():
    step.execute("download", lambda c, r: {}, ["profile=demo", "seed=1"])
    step.execute("prepare", lambda c, r: {}, ["seed=2"])
    assert step.execute("prepare", lambda c, r: {"seed": c.seed}, ["seed=1"])["seed"] == 1


def test_what_a_run_keeps_counts_before_the_whole_is_judged():
    step.execute("download", lambda c, r: {}, ["profile=gpu", "data.max_samples=90000"])
    assert step.execute("prepare", lambda c, r: {"is": c.data.min_rows}, ["data.min_rows=50000"])["is"] == 50000
    with pytest.raises(UsageError, match="must exceed data.min_rows.*run manual-.* keeps profile=gpu data.max_samples"):
        step.execute("prepare", lambda c, r: {}, ["data.min_rows=95000"])


# What was meant -------------------------------------------------------------------------------------------------------


MEANT = {
    "training.num_epochs=3": "training.num_epochs is no key; training.num_train_epochs?",
    "+training.num_epoch=3": "training.num_epoch is no key; training.num_train_epochs?",
    "epochs=3": "epochs is no key; training.num_train_epochs?",
    "max_samples=3000": "max_samples is no key; data.max_samples?",
    "data.sources.1.nmae=x": "data.sources.1.nmae is no key; data.sources.1.name?",
    "training.lora={rr: 8}": "training.lora.rr is no key; training.lora.r?",
    "modle=qwen": "modle is no key; model?",
    "workspace =x": "'workspace ' is no key; workspace?",
    "profile=dmeo": "profile/dmeo.yaml is not there, only demo, gpu; demo?",
    "profile=null": "profile/null.yaml is not there, only demo, gpu",
    "serving=tensort": "only onnx, tensorrt; tensorrt?",
    "promotion.mode=atuo": "promotion.mode='atuo': Input should be 'auto', 'review' or 'never'; auto?",
    "serving.engine=a~[to": "serving.engine='a~[to': Input should be 'tensorrt' or 'onnx'",
    "seed=1,2": "seed=1,2 is several values: a list stands in brackets",
    "=3": "=3 is not key=value",
    "workspace": "workspace is not key=value",
}


def test_what_was_perhaps_meant_is_said():
    said = refused(*MEANT)
    assert said.startswith(f"configuration: {len(MEANT)} problems: ")
    assert [words for words in MEANT.values() if words not in said] == []


# All at once ----------------------------------------------------------------------------------------------------------


def test_all_problems_are_named_together():
    said = refused(
        *("profile=dmeo", "training.num_epochs=1", "training.num_train_epochs=0", "promotion.mode=atuo"),
        *("data.max_samples=1000", "data.near_duplicate=7", "serving.http_port=8001", "gate.typs.min=0.6", "seed=x"),
    )
    assert said.startswith("configuration: 10 problems: (1) ")
    for part in (
        "profile/dmeo.yaml is not there",
        "training.num_train_epochs?",
        "training.num_train_epochs=0: Input should be greater than or equal to 1",
        "auto?",
        "data.max_samples must exceed data.min_rows (1000), it is 1000",
        "data.near_duplicate=7: Input should be less than or equal to 1",
        "serving needs three ports that differ",
        "gate.typs.min is no key; gate.types.min?",
        "gate.typs.min=0.6: limits other than the shipped ones need a reason",
        "seed='x'",
    ):
        assert part in said, part


def test_a_missing_value_hides_no_other_problem():
    said = refused("data=folder", "seed=-1", "gate.toxic.min=0.5")
    assert "data.folder is missing" in said and "seed=-1" in said and "gate.toxic.min is 0.5, not 0.85" in said


@pytest.mark.parametrize(
    "given, said",
    [
        (
            ["profile=demo", "data.max_samples=1000"],
            ["configuration: data.max_samples must exceed data.min_rows (1000)"],
        ),
        (
            ["profile=demo", "data.min_rows=9000", "data.split.train=0.9989", "data.split.val=0.001"],
            ["data.sample makes 9000 messages, which must exceed data.min_rows (9000)"],
        ),
        (
            [
                *("data.split.train=0.9989", "data.split.val=0.001", "data.sources.1.file=feedback.csv"),
                *(
                    "data.folder=/x",
                    "data.sources.0.kind=sample",
                    "serving.buckets=[0,512]",
                    "serving.metrics_port=8000",
                ),
                *("mlflow.registered_model=team/model", "mlflow.experiment=", "promotion.review_hours=inf"),
                *("release.version=0", "validation.toxic_share=[0.5,0.1]", "workspace=pyproject.toml"),
            ],
            [
                "leaves 4 of data.max_samples (40000) to test",
                "data.sources has feedback.csv 2 times",
                "data.folder=/x is read by no source: choose data=folder",
                "data.sample is null",
                "serving.buckets.0=0",
                "http_port 8000, grpc_port 8001, metrics_port 8000",
                "no name of a registered model with '/' or ':'",
                "mlflow.experiment='': it is empty",
                "promotion.review_hours=inf",
                "release.version=0",
                "the lower one first",
                "is a file: it is the folder that holds all state",
            ],
        ),
        (
            [
                *("model=tiny", "model.architecture.hidden_size=130", "model.architecture.num_key_value_heads=3"),
                *("serving.buckets=[64,32]", "serving.urls=http://127.0.0.1:8000"),
            ],
            [
                "hidden_size 130 must be a multiple of twice",
                "must be a multiple of num_key_value_heads (3)",
                "serving.buckets must rise from one to the next: [32, 64]?",
                "without http://; 127.0.0.1:8001, as 8000 is Triton's HTTP port?",
            ],
        ),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_loaded(given, said):
    problems = refused(*given)
    assert [words for words in said if words not in problems] == []


def test_a_retraining_is_refused_for_what_only_a_later_step_would_miss(tmp_path):
    given = ["data=folder", f"data.folder={tmp_path}/no (1)", f"model.name={tmp_path}/qwen", "serving=onnx"]
    said = refused(*given, retraining=True)
    assert (
        "3 problems" in said
        and f"{tmp_path}/no (1) has no jigsaw-toxic-comment-train.csv and no labeled.csv, it does" in said
    )
    assert "no such folder with a config.json" in said and "serving.buckets ends at 128: add 512" in said
    config.load(given)  # any other step goes on without
    with pytest.raises(UsageError, match="does not exist here"):
        step.execute("download", lambda c, r: pytest.fail("it began"), given)


def test_no_password_of_a_wrong_value_is_shown():
    said = refused("serving.urls=http://ada:S3cret@h:8000", "seed=x")
    assert "S3cret" not in said


def test_overrides_in_the_environment_are_text_as_well(monkeypatch):
    monkeypatch.setenv("TOXIC_OVERRIDES", json.dumps(["profile=demo", "mlflow.experiment=a, b (1)"]))
    assert step.without_a_run([]).mlflow.experiment == "a, b (1)"


def test_the_page_names_every_key_and_every_variable():
    page = (ROOT / "docs" / "configuration.md").read_text()
    alike = {r"per_language\.\w+": "per_language.en", r"per_type\.\w+": "per_type.threat"}
    alike |= {r"per_behaviour\.\w+": "per_behaviour.minimum"}
    every = set(overrides.keys(config.Config)) - {"profile", "gate.group", "gate.overrides"}
    for key in every - {key.rpartition(".")[0] for key in every} - {"data.sources.0"}:
        for pattern, one in alike.items():
            key = re.sub(pattern, one, key)
        assert f"`{key}`" in page, key
    code = [*(ROOT / "tasks").rglob("*.py"), *(ROOT / "dags").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    code += [ROOT / "docker-compose.yaml", ROOT / "Makefile", ROOT / "local" / "services.py"]
    read = r'(?:environ(?:\.get)?[\[(]"|oc\.env:|\$\{|export )((?:TOXIC|TRITON|MLFLOW|KAGGLE|AIRFLOW)_[A-Z_]+)'
    found = {name for file in code for name in re.findall(read, file.read_text())}
    assert {"TOXIC_WORKSPACE", "TRITON_URL", "TOXIC_APPROVAL_POLL_S", "MLFLOW_PORT", "TOXIC_STACK"} < found
    assert [name for name in sorted(found) if f"`{name}`" not in page] == []
