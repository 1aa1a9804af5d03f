"""Every configuration that the project ships, and every way to get one wrong."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from tasks import config
from tasks.errors import UsageError

ROOT = Path(__file__).parents[2]


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / "configs" / group).glob("*.yaml"))


GROUPS = ("model", "data", "training", "gate", "serving")
EVERYTHING = list(itertools.product(*(choices(group) for group in GROUPS)))


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("TOXIC_WORKSPACE", "TOXIC_DVC_REMOTE", "MLFLOW_TRACKING_URI"):  # the files' own words are meant
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("names", EVERYTHING, ids="-".join)
def test_every_shipped_combination_composes(names):
    overrides = [f"{group}={name}" for group, name in zip(GROUPS, names)]
    overrides += ["gate.override_reason=the gate of the demo"] if "demo" in names else []
    config.load([*overrides, "data.folder=/some/folder"] if "folder" in names else overrides)


@pytest.mark.parametrize("profile", choices("profile"))
def test_every_profile_composes(profile):
    config.load([f"profile={profile}"])


def test_the_defaults_are_the_mission():
    found = config.load()
    assert found.model.name == "Qwen/Qwen2.5-1.5B-Instruct"
    assert (found.model.max_length, found.model.load_in_4bit) == (512, True)
    assert found.mlflow.tracking_uri == "http://127.0.0.1:8080"
    assert (found.gate.toxic.min, found.gate.types.min) == (0.85, 0.70)
    assert (found.training.lora.r, found.training.lora.alpha) == (16, 32)
    assert (found.data.max_samples, found.data.split.train, found.data.split.val) == (40000, 0.70, 0.15)


def test_the_demo_profile_still_binds_the_two_limits():
    gate = config.load(["profile=demo"]).gate
    assert (gate.toxic.min, gate.toxic.binds, gate.types.min, gate.types.binds) == (0.85, True, 0.70, True)
    binding = [key for key, value in config.flat(gate.model_dump()).items() if key.endswith("binds") and value]
    assert binding == ["toxic.binds", "types.binds"]


def test_a_group_named_beside_a_profile_wins():
    assert config.load(["profile=demo", "model=qwen"]).model.name == "Qwen/Qwen2.5-1.5B-Instruct"


def test_a_type_that_the_engine_has_no_kernels_for_is_refused():
    with pytest.raises(UsageError, match="serving.dtype='bfloat16'.*no bfloat16 kernels.*float32"):
        config.load(["serving=onnx", "serving.dtype=bfloat16"])


@pytest.mark.parametrize(
    "override, words",
    [
        ("training.nope=1", "training.nope"),
        ("+training.nope=1", "training.nope"),
        ("training.num_train_epochs=many", "training.num_train_epochs='many'"),
        ("training.num_train_epochs=0", "greater than or equal to 1"),
        ("training.learning_rate=-1", "training.learning_rate=-1"),
        ("data.split.train=0.9", "leave nothing for the test split"),
        ("promotion.mode=maybe", "promotion.mode='maybe'"),
        ("model=nope", "model/nope"),
        ("data=folder", "data.folder"),
        ("just_words", "just_words"),
    ],
)
def test_a_wrong_override_is_named_in_one_line(override, words):
    with pytest.raises(UsageError) as error:
        config.load([override])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source, words",
    [
        ("kind: kaggle_dataset, name: no-owner, file: a.csv, schema: russian", "no-owner is not OWNER/DATA-SET"),
        ("kind: folder, name: x, file: ../a.csv, schema: russian", "file='../a.csv'"),
        ("kind: folder, name: x, file: a.csv, schema: feedback", "feedback has a kind and schema of its own"),
        (
            "kind: folder, name: x, file: a.csv, schema: messages",
            "`columns` belongs to schema messages, which needs it",
        ),
        (
            "kind: folder, name: x, file: a.csv, schema: jigsaw, threshold: 0.5",
            "`threshold` belongs to schema messages",
        ),
        ("kind: folder, name: x, file: a.csv, schema: messages, columns: {text: t}", "where `text` and `toxic` stand"),
        ("kind: folder, name: x, file: a.csv, schema: messages, columns: {texts: t}", "columns.texts"),
    ],
)
def test_a_source_that_does_not_fit_together_is_named(source, words):
    with pytest.raises(UsageError) as error:
        config.load([f"data.sources=[{{{source}, language: en}}]"])
    assert words in str(error.value)


def sources_for_people_to_copy():
    """The example in docs/data.md, and what the YAML files have as comments."""
    yield yaml.safe_load((ROOT / "docs" / "data.md").read_text().split("```yaml\n")[1].split("```")[0])
    for file in (ROOT / "configs" / "data").glob("*.yaml"):
        commented = re.findall(r"^  # - kind:.*\n(?:  #   .*\n)+", file.read_text(), re.MULTILINE)
        for entry in commented:
            yield yaml.safe_load(entry.replace("  # ", ""))


def test_sources_that_people_copy_are_sources():
    found = [config.Source.model_validate(source) for (source,) in sources_for_people_to_copy()]
    assert sorted(source.schema_ for source in found) == ["messages", "messages"]


def test_a_missing_config_file_is_named():
    with pytest.raises(UsageError, match="nowhere/config.yaml does not exist"):
        config.load(config_path="nowhere")
