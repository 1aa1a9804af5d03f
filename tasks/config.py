"""The configuration: composed by Hydra from `configs/`, then checked against the types below.

The YAML files explain each knob beside its value; here stand only their names, types and limits.
"""

import functools
import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from tasks.errors import UsageError
from tasks.labels import LABELS, LANGUAGES, TYPES

SHIPPED = Path(__file__).parents[1] / "configs"
NAMED = 5  # changed limits that a message names; gate.json has all

Share = Field(gt=0, lt=1)
Score = Field(ge=0, le=1)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Disk(Section):
    min_free_gib: float = Field(ge=0)
    keep_runs: int = Field(ge=1)


class MLflow(Section):
    tracking_uri: str
    experiment: str
    registered_model: str
    attempts: int = Field(ge=1, le=10)
    backoff_s: int = Field(ge=0)
    timeout_s: int = Field(ge=1)


class Promotion(Section):
    mode: Literal["auto", "review", "never"]
    review_hours: float = Field(gt=0)


class Release(Section):
    version: int | None = Field(ge=1)


class Architecture(Section):
    vocab_size: int = Field(ge=512)
    hidden_size: int = Field(ge=16)
    intermediate_size: int = Field(ge=16)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)


class Model(Section):
    name: str = Field(min_length=1)
    max_length: int = Field(ge=8, le=32768)
    load_in_4bit: bool
    compute_dtype: Literal["bfloat16", "float32"]
    architecture: Architecture | None


class Kaggle(Section):
    when_unreachable: Literal["fail", "last_copy"]
    attempts: int = Field(ge=1)
    backoff_s: float = Field(ge=0)
    max_wait_s: float = Field(ge=0)
    stall_s: float = Field(gt=0)
    progress_s: float = Field(gt=0, le=10)


class Unpack(Section):
    max_gib: float = Field(gt=0)
    max_ratio: float = Field(gt=1)
    max_members: int = Field(ge=1)


class Versions(Section):
    remote: str = Field(min_length=1)


class Source(Section):
    kind: Literal["kaggle_competition", "kaggle_dataset", "folder", "feedback", "sample"]
    name: str = Field(min_length=1)
    file: str = Field(pattern=r"^[^/\\]+\.csv$")
    schema_: Literal["jigsaw", "russian", "feedback", "messages"] = Field(alias="schema")
    language: Literal["en", "ru"]
    columns: dict[Literal["text", *LABELS], str] | None = None
    threshold: float | None = Field(None, gt=0, le=1)
    max_bad_rows: int = Field(20, ge=0)
    max_bad_share: float = Field(0.05, ge=0, le=1)

    @model_validator(mode="after")
    def fits_its_schema(self):
        if self.kind == "kaggle_dataset" and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.name):
            raise ValueError(f"{self.name} is not OWNER/DATA-SET, as in the address of its page at Kaggle")
        if (self.kind == "feedback") != (self.schema_ == "feedback"):
            raise ValueError(f"kind {self.kind} with schema {self.schema_}: feedback has a kind and schema of its own")
        if (self.schema_ == "messages") != (self.columns is not None):
            raise ValueError(f"schema {self.schema_}: `columns` belongs to schema messages, which needs it")
        if self.columns and not {"text", "toxic"} <= self.columns.keys():
            raise ValueError("columns must say where `text` and `toxic` stand; the types may be missing")
        if self.threshold and self.schema_ != "messages":
            raise ValueError(f"schema {self.schema_} has labels 0 and 1: `threshold` belongs to schema messages")
        return self


class Split(Section):
    salt: str = Field(min_length=1)
    train: float = Share
    val: float = Share

    @model_validator(mode="after")
    def leaves_a_test_split(self):
        if self.train + self.val >= 1:
            raise ValueError(f"train {self.train} and val {self.val} leave nothing for the test split")
        return self


class Sample(Section):
    english_rows: int = Field(ge=500)
    russian_rows: int = Field(ge=500)
    label_noise: float = Field(ge=0, lt=0.5)


class Data(Section):
    folder: str | None = None
    sources: list[Source] = Field(min_length=1)
    max_samples: int = Field(ge=1)
    min_language_share: float = Field(ge=0, le=1 / len(LANGUAGES))
    toxic_share: float | None = Share
    min_rows: int = Field(ge=1)
    max_chars: int = Field(ge=1)
    near_duplicate: float | None = Field(gt=0, le=1)
    split: Split
    sample: Sample | None


def rising(band):
    if not 0 <= band[0] < band[1] <= 1:
        raise ValueError(f"a band is two shares between 0 and 1, the lower one first, not {list(band)}")
    return band


Band = Annotated[tuple[float, float], AfterValidator(rising)]


class Drift(Section):
    label: float = Score
    broken_label: float = Score
    mix: float = Score
    length: float = Field(gt=0)


class Validation(Section):
    shares: dict[str, dict[Literal[LABELS], Band]]
    toxic_share: Band
    min_share_of_last_rows: float = Score
    split_tolerance: float = Score
    drift: Drift


class Lora(Section):
    r: int = Field(ge=1)
    alpha: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)
    target_modules: str | list[str]
    modules_to_save: list[str]


class Training(Section):
    num_train_epochs: int = Field(ge=1)
    per_device_train_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    validations_per_epoch: int = Field(ge=1)
    patience: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    lr_schedule: Literal["linear", "cosine"]
    warmup_ratio: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    type_loss_weight: float = Field(ge=0)
    ema_decay: float = Field(ge=0, lt=1)
    max_bad_steps: int = Field(ge=0)
    memory: Literal["auto", "low", "high"]
    compile: bool
    checkpoint_every_minutes: float = Field(gt=0)
    gpu_reserve_gib: float = Field(ge=0)
    lora: Lora


class Check(Section):
    binds: bool


class Minimum(Check):
    min: float = Score


class Gain(Check):
    min: float = Field(ge=-1, lt=1)


class Interval(Check):
    below: float = Score


class Champion(Check):
    tolerance: float = Score


class Loss(Check):
    max: float = Score


class Slice(Section):
    floor: Minimum
    loss: Loss


# A key that is left out is refused: a limit that is not there would be one that is turned off.
PerLanguage = create_model("PerLanguage", __base__=Section, **{name: Slice for name in LANGUAGES})
PerType = create_model("PerType", __base__=Section, **{name: Slice for name in TYPES})


class PerBehaviour(Section):
    minimum: Minimum
    invariance: Minimum
    direction: Minimum
    obfuscation: Minimum = Minimum(min=0.5, binds=False)  # configurations from before it was measured lack it


class Calibration(Check):
    max_ece: float = Score


class Latency(Check):
    max_ratio: float = Field(gt=0)


class Parity(Section):
    messages: int = Field(ge=1)
    near_threshold: float = Field(ge=0)
    min_equal: float = Score


class Gate(Section):
    toxic: Minimum
    types: Minimum
    interval: Interval
    min_gain_over_baseline: Gain
    champion: Champion
    per_language: PerLanguage
    min_positives: int = Field(ge=1)
    per_type: PerType
    calibration: Calibration
    behaviour: Minimum
    per_behaviour: PerBehaviour
    latency: Latency
    parity: Parity
    bootstrap: int = Field(ge=100)
    override_reason: str
    # `load` finds both: which file of the group it is, and what differs from the shipped limits: {"key", "from", "to"}.
    group: str = ""
    overrides: list[dict] = []


def not_float16(dtype):
    if dtype in ("float16", "fp16", "half"):
        raise ValueError("float16 overflows in the norms of Qwen2; bfloat16 is as small, and serves")
    return dtype


def split_at_commas(value):
    """A list may come as one word of an environment variable: "a:8001,b:8001"."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Address = Annotated[str, Field(pattern=r"^[^/\s,]+:\d+$")]  # host:port


class Serving(Section):
    engine: Literal["tensorrt", "onnx"]
    tensorrt_package: Literal["tensorrt", "tensorrt_rtx"]
    compute_capability: str = Field(pattern=r"^(CURRENT|SM\d{2,3})$")
    dtype: Annotated[Literal["bfloat16", "float32"], BeforeValidator(not_float16)]
    opset: int = Field(ge=18)
    urls: Annotated[list[Address], BeforeValidator(split_at_commas), Field(min_length=1)]
    listen: str
    http_port: int = Field(ge=1, le=65535)
    grpc_port: int = Field(ge=1, le=65535)
    metrics_port: int = Field(ge=1, le=65535)
    triton_env: str | None
    max_batch_size: int = Field(ge=1)
    buckets: list[int] = Field(min_length=1)
    max_queue_delay_us: int = Field(ge=0)
    instances: int = Field(ge=1)
    tokenizer_instances: int = Field(ge=1)
    labels_instances: int = Field(ge=1)
    score_tolerance: float = Field(gt=0, le=1)
    workspace_gib: float = Field(ge=0)
    load_timeout_s: int = Field(ge=1)
    memory_headroom_gib: float = Field(ge=0)
    keep_previous_loaded: Literal["auto"] | bool

    @field_validator("dtype")
    @classmethod
    def has_kernels(cls, dtype, known):
        if dtype == "bfloat16" and known.data.get("engine") == "onnx":
            raise ValueError("ONNX Runtime has no bfloat16 kernels on a CPU: float32 it is with serving.engine=onnx")
        return dtype

    @property
    def url(self) -> str:
        """The server that whoever wants an answer asks; only what changes service goes to all of them."""
        return self.urls[0]


class Config(Section):
    workspace: Path
    seed: int
    force: bool
    disk: Disk
    mlflow: MLflow
    versions: Versions
    promotion: Promotion
    release: Release
    kaggle: Kaggle
    unpack: Unpack
    model: Model
    data: Data
    validation: Validation
    training: Training
    gate: Gate
    serving: Serving
    profile: str | None = None  # the one that was chosen; `load` finds it


def load(overrides=(), config_path="configs", config_name="config") -> Config:
    """Composes and checks the configuration.

    Args:
        overrides: Hydra overrides, `"training.num_train_epochs=5"`.
        config_path: folder with the YAML files.
        config_name: the root file's name, without `.yaml`.

    Raises:
        UsageError: in one line, for an unknown key, a wrong type, a value out of range, a missing file or group, and
            for limits of the gate that are not the shipped ones without `gate.override_reason`.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    folder = Path(config_path).absolute()
    if not (folder / f"{config_name}.yaml").is_file():
        raise UsageError(f"{folder / config_name}.yaml does not exist: see --config-path and --config-name")
    overrides = [_as_written(str(o)) for o in overrides]
    try:
        values, chosen = _compose(folder, config_name, overrides)
        config = Config.model_validate({**values, "profile": chosen.get("profile")})
        config.gate.group = chosen.get("gate", "")
        config.gate.overrides = _differences(_shipped_gate(folder, config_name, overrides, chosen), config.gate)
    except ValidationError as error:
        raise UsageError(f"configuration: {_first_problem(error)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"configuration: {' '.join(str(error).split())}") from None
    if config.gate.overrides and not config.gate.override_reason.strip():
        raise UsageError(
            f"{in_words(config.gate.overrides)}: limits other than the shipped ones need a reason, which is kept with "
            'the version; add gate.override_reason="…", or leave them as they are'
        )
    config.workspace = Path(os.path.expanduser(config.workspace)).absolute()
    return config


def _as_written(override: str) -> str:
    """The override of the gate's reason, quoted: in a person's words a comma is no list, a dollar no variable."""
    key, _, words = override.partition("=")
    if key != "gate.override_reason" or words[:1] in ("", "'", '"'):
        return override
    # Hydra reads a backslash as an escape only before a quote, OmegaConf only before an interpolation.
    escaped = re.sub(r"(\\*)('|\$\{|\Z)", lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], words)
    return f"{key}='{escaped}'"


def _compose(folder: Path, name: str, overrides: list[str]) -> tuple[dict, dict[str, str]]:
    """The values that Hydra composes, and which file it chose from each group."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf, open_dict

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), version_base="1.3"):
        composed = compose(name, overrides=overrides, return_hydra_config=True)
    choices = dict(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True), choices


def _shipped_gate(folder: Path, config_name: str, overrides: list[str], chosen: dict[str, str]) -> Gate:
    """The limits that this project ships for the chosen profile: whatever overrides, or a configuration kept elsewhere,
    say about the gate."""
    others = [override for override in overrides if not re.match(r"[+~]*gate\b", override)]
    if others != overrides:
        _, chosen = _compose(folder, config_name, others)
    group = chosen.get("gate", "default")
    return _shipped(group if (SHIPPED / "gate" / f"{group}.yaml").exists() else "default")


@functools.cache
def _shipped(group: str) -> Gate:
    values, _ = _compose(SHIPPED, f"gate/{group}", [])
    return Gate.model_validate(values["gate"])


def in_words(overrides: list[dict]) -> str:
    """The first few of the gate's changed limits: "gate.toxic.min is 0.5, not 0.85"."""
    shown = [f"{o['key']} is {json.dumps(o['to'])}, not {json.dumps(o['from'])}" for o in overrides[:NAMED]]
    more = [f"and {len(overrides) - NAMED} more"] if len(overrides) > NAMED else []
    return "; ".join(shown + more)


def _differences(shipped: Gate, gate: Gate) -> list[dict]:
    """Where two gates differ, as [{"key": "gate.toxic.min", "from": 0.85, "to": 0.5}]."""
    before, after = (flat({"gate": limits(of)}) for of in (shipped, gate))
    return [{"key": key, "from": before[key], "to": after[key]} for key in before if before[key] != after[key]]


def limits(gate: Gate) -> dict:
    """The gate's sections without what is only said about them."""
    return gate.model_dump(exclude={"override_reason", "overrides", "group"})


def flat(values: dict, prefix: str = "") -> dict:
    """{"toxic.min": 0.85, …} of nested sections."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}={first['input']!r}: {first['msg']}"
