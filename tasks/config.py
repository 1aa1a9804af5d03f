"""The configuration: composed by Hydra from `configs/`, then checked against the types below.

The YAML files explain each knob beside its value; here stand only their names, types and limits.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.errors import UsageError

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


class Source(Section):
    kind: Literal["kaggle_competition", "kaggle_dataset", "folder", "sample"]
    name: str
    file: str
    schema_: Literal["jigsaw", "russian"] = Field(alias="schema")
    language: Literal["en", "ru"]


class Split(Section):
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
    split: Split
    sample: Sample | None


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


class Baseline(Check):
    margin: float = Score


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
    baseline: Baseline
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
    promotion: Promotion
    release: Release
    model: Model
    data: Data
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
