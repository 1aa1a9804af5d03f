"""The configuration: composed by Hydra from `configs/`, then checked against the types below.

The YAML files explain each knob beside its value; here stand only their names, types and limits.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.errors import UsageError
from tasks.labels import LABELS

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
    label_smoothing: float = Field(ge=0, lt=1)
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


class Champion(Check):
    tolerance: float = Score


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
    min_gain_over_baseline: Gain
    champion: Champion
    language: Minimum
    calibration: Calibration
    behaviour: Minimum
    latency: Latency
    parity: Parity
    bootstrap: int = Field(ge=100)


class Serving(Section):
    engine: Literal["tensorrt", "onnx"]
    dtype: Literal["bfloat16", "float32"]
    opset: int = Field(ge=18)
    url: str
    listen: str
    http_port: int = Field(ge=1, le=65535)
    grpc_port: int = Field(ge=1, le=65535)
    metrics_port: int = Field(ge=1, le=65535)
    triton_env: str | None
    max_batch_size: int = Field(ge=1)
    buckets: list[int] = Field(min_length=1)
    max_queue_delay_us: int = Field(ge=0)
    instances: int = Field(ge=1)
    workspace_gib: float = Field(ge=0)
    load_timeout_s: int = Field(ge=1)


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


def load(overrides=(), config_path="configs", config_name="config") -> Config:
    """Composes and checks the configuration.

    Args:
        overrides: Hydra overrides, `"training.num_train_epochs=5"`.
        config_path: folder with the YAML files.
        config_name: the root file's name, without `.yaml`.

    Raises:
        UsageError: in one line, for an unknown key, a wrong type, a value out of range, a missing file or group.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = Path(config_path).absolute()
    if not (folder / f"{config_name}.yaml").is_file():
        raise UsageError(f"{folder / config_name}.yaml does not exist: see --config-path and --config-name")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose(config_name, overrides=[str(o) for o in overrides])
            values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        values.pop("profile", None)
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"configuration: {_first_problem(error)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"configuration: {' '.join(str(error).split())}") from None
    config.workspace = Path(os.path.expanduser(config.workspace)).absolute()
    return config


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}={first['input']!r}: {first['msg']}"
