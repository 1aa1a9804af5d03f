"""The configuration: composed by Hydra from `configs/`, then checked against the types below.

The YAML files explain each knob beside its value; here stand only their names, types and limits.
"""

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

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

from tasks import address, overrides, paths
from tasks.errors import UsageError, without_credentials
from tasks.labels import LABELS, LANGUAGES, TYPES

SHIPPED = Path(__file__).parents[1] / "configs"
NAMED = 5  # changed limits that a message names; gate.json has all
SMALLEST_SPLIT = 30  # messages; thresholds and intervals from fewer mean nothing

Share = Field(gt=0, lt=1)
Score = Field(ge=0, le=1)


def at_home(place: str | None) -> str | None:
    """`~/x` as a shell takes it. Where the value is no such path, it stays as it is."""
    return os.path.expanduser(place) if place and place.startswith("~") else place


def not_empty(text):
    if isinstance(text, str) and not text.strip():
        raise ValueError("it is empty")
    return text


Text = Annotated[str, AfterValidator(not_empty)]
Folder = Annotated[str, AfterValidator(not_empty), AfterValidator(at_home)]


def joined(problems: list[str]) -> None:
    """Raises one ValueError with a line for each thing that is wrong in a section, if anything is."""
    if problems:
        raise ValueError("\n".join(problems))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Disk(Section):
    min_free_gib: float = Field(ge=0)
    keep_runs: int = Field(ge=1)


def name_in_the_registry(name: str) -> str:
    if "/" in name or ":" in name or name in (".", ".."):
        raise ValueError("MLflow takes no name of a registered model with '/' or ':' in it")
    return name


class MLflow(Section):
    tracking_uri: Text
    experiment: Annotated[Text, Field(max_length=500)]
    registered_model: Annotated[Text, Field(max_length=250), AfterValidator(name_in_the_registry)]
    attempts: int = Field(ge=1, le=10)
    backoff_s: int = Field(ge=0)
    timeout_s: int = Field(ge=1)


class Promotion(Section):
    mode: Literal["auto", "review", "never"]
    review_hours: float = Field(gt=0, le=87600)


class Release(Section):
    version: int | None = Field(ge=1)


class Architecture(Section):
    vocab_size: int = Field(ge=512)
    hidden_size: int = Field(ge=16)
    intermediate_size: int = Field(ge=16)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)

    @model_validator(mode="after")
    def has_whole_heads(self):
        width, heads, shared = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        problems = []
        if width % (2 * heads):
            problems.append(
                f"model.architecture.hidden_size {width} must be a multiple of twice num_attention_heads ({heads})"
            )
        if heads % shared:
            problems.append(
                f"model.architecture.num_attention_heads {heads} must be a multiple of num_key_value_heads ({shared})"
            )
        joined(problems)
        return self


class Model(Section):
    name: Text
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
    remote: Folder


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
    folder: Folder | None = None
    sources: list[Source] = Field(min_length=1)
    max_samples: int = Field(ge=1)
    min_language_share: float = Field(ge=0, le=1 / len(LANGUAGES))
    toxic_share: float | None = Share
    min_rows: int = Field(ge=1)
    max_chars: int = Field(ge=1)
    near_duplicate: float | None = Field(gt=0, le=1)
    split: Split
    sample: Sample | None

    @model_validator(mode="after")
    def fits_together(self):
        joined([*self._wrong_sources(), *(self._too_few_messages() or self._too_small_splits())])
        return self

    def _wrong_sources(self) -> Iterator[str]:
        names = [source.file for source in self.sources]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"data.sources has {name} {names.count(name)} times: each file needs a name of its own in data/raw"
        if self.folder and not any(source.kind == "folder" for source in self.sources):
            yield f"data.folder={self.folder} is read by no source: choose data=folder beside it"
        if self.sample is None and any(source.kind == "sample" for source in self.sources):
            yield "data.sources has kind=sample, but data.sample is null: see configs/data/sample.yaml"

    def _too_few_messages(self) -> list[str]:
        found = []
        if self.max_samples <= self.min_rows:
            found.append(
                f"data.max_samples must exceed data.min_rows ({self.min_rows}), it is {self.max_samples}: raise it, or "
                "lower data.min_rows"
            )
        if self.sample and all(source.kind == "sample" for source in self.sources):
            rows = self.sample.english_rows + self.sample.russian_rows
            if rows <= self.min_rows:
                found.append(f"data.sample makes {rows} messages, which must exceed data.min_rows ({self.min_rows})")
        return found

    def _too_small_splits(self) -> Iterator[str]:
        shares = {"train": self.split.train, "val": self.split.val, "test": 1 - self.split.train - self.split.val}
        for name, share in shares.items():
            if (number := share * self.max_samples) < SMALLEST_SPLIT:
                yield (
                    f"data.split leaves {number:.0f} of data.max_samples ({self.max_samples}) to {name}, fewer than "
                    f"{SMALLEST_SPLIT}: make its share larger"
                )


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


def split_at_commas(value):
    """A list may come as one word, of an environment variable say: "a:8001,b:8001"."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class Lora(Section):
    r: int = Field(ge=1)
    alpha: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)
    target_modules: str | list[str]
    modules_to_save: Annotated[list[str], BeforeValidator(split_at_commas)]


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


Address = Annotated[str, AfterValidator(address.grpc)]  # host:port


class Serving(Section):
    engine: Literal["tensorrt", "onnx"]
    tensorrt_package: Literal["tensorrt", "tensorrt_rtx"]
    compute_capability: str = Field(pattern=r"^(CURRENT|SM\d{2,3})$")
    dtype: Annotated[Literal["bfloat16", "float32"], BeforeValidator(not_float16)]
    opset: int = Field(ge=18)
    urls: Annotated[list[Address], BeforeValidator(split_at_commas), Field(min_length=1)]
    listen: Text
    http_port: int = Field(ge=1, le=65535)
    grpc_port: int = Field(ge=1, le=65535)
    metrics_port: int = Field(ge=1, le=65535)
    triton_env: Folder | None
    max_batch_size: int = Field(ge=1)
    buckets: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
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

    @model_validator(mode="after")
    def fits_together(self):
        ports = {name: getattr(self, name) for name in ("http_port", "grpc_port", "metrics_port")}
        problems = []
        if len(set(ports.values())) < len(ports):
            named = ", ".join(f"{name} {port}" for name, port in ports.items())
            problems.append(f"serving needs three ports that differ, they are {named}")
        if self.buckets != sorted(set(self.buckets)):
            problems.append(f"serving.buckets must rise from one to the next: {sorted(set(self.buckets))}?")
        joined(problems)
        return self

    @property
    def url(self) -> str:
        """The server that whoever wants an answer asks; only what changes service goes to all of them."""
        return self.urls[0]


class Config(Section):
    workspace: Annotated[Path, BeforeValidator(not_empty)]
    seed: int = Field(ge=0, le=2**32 - 1)  # as NumPy takes it
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


def load(overrides=(), config_path="configs", config_name="config", retraining=False) -> Config:
    """Composes and checks the configuration.

    Args:
        overrides: as people type them, `"training.num_train_epochs=5"`; see tasks/overrides.py.
        config_path: folder with the YAML files.
        config_name: the root file's name, without `.yaml`.
        retraining: a whole retraining begins with it, so that what only a later step needs is looked at too: folders
            of sources and model, the longest bucket.

    Raises:
        UsageError: in one line, with all that is wrong: unknown keys, groups that are not there, wrong types, values
            out of range or that contradict each other, limits of the gate that are not the shipped ones without
            `gate.override_reason`; or for a missing file.
    """
    folder = configuration_folder(config_path, config_name)
    written, refused = _looked_through(overrides, folder)
    problems = list(refused.values())
    composed = _composed(folder, config_name, written, problems)
    config = _checked(composed, folder, config_name, written, problems)
    if config is not None:
        unknown_limits = [override for override in refused if re.match(r"[+~]*gate\.", override)]
        _compare_gate(config, folder, config_name, written, composed.chosen, unknown_limits, problems)
        problems += _missing_places(config) if retraining else []
        config.workspace = Path(os.path.expanduser(config.workspace)).absolute()
        paths.require(config.workspace, *paths.WORKSPACE)
        if config.workspace.exists() and not config.workspace.is_dir():
            problems.append(f"workspace={config.workspace} is a file: it is the folder that holds all state")
    refuse(problems)
    return config


def configuration_folder(config_path, config_name: str) -> Path:
    folder = Path(os.path.expanduser(config_path)).absolute()
    if not (folder / f"{config_name}.yaml").is_file():
        raise UsageError(f"{folder / config_name}.yaml does not exist: see --config-path and --config-name")
    return folder


def workspace_of(typed=(), config_path="configs", config_name="config") -> Path:
    """Where the workspace is: what must be known to find the run, whose own overrides belong to all others.

    Raises:
        UsageError: as `load`, with all that is wrong with the overrides.
    """
    alone = [o for o in typed if overrides.parsed(o).key == "workspace" or "." not in overrides.parsed(o).key]
    try:
        return load(alone, config_path, config_name).workspace
    except UsageError:
        return load(typed, config_path, config_name).workspace


def as_hydra(typed) -> list[str]:
    """Overrides as people type them in Hydra's grammar, which `load` takes as well."""
    return [overrides.as_written(str(o), Config) for o in typed]


def as_hydra_once(kept) -> list[str]:
    """Overrides that a run has kept, in Hydra's grammar; see overrides.as_kept."""
    return [overrides.as_kept(str(o), Config) for o in kept]


def refuse(problems: list[str]) -> None:
    """Raises UsageError with all of them in one line, if there are any."""
    found = [" ".join(problem.split()) for problem in dict.fromkeys(problems)]
    if len(found) == 1:
        raise UsageError(without_credentials(f"configuration: {found[0]}"))
    if found:
        numbered = " ".join(f"({number}) {problem};" for number, problem in enumerate(found, 1))
        raise UsageError(without_credentials(f"configuration: {len(found)} problems: {numbered.rstrip(';')}"))


class Composed(NamedTuple):
    """What Hydra makes of files and overrides, and the file that it chose from each group."""

    values: dict
    chosen: dict[str, str]
    missing: list[str]  # keys that want a value and have none: `???`


def _looked_through(typed, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The overrides that can be composed, in Hydra's grammar; and of each of the others what is wrong with it."""
    groups, written, refused = _groups(folder), [], {}
    for override in as_hydra(typed):
        problem = overrides.problem(override, Config, groups)
        if problem:
            refused[override] = problem
        else:
            written.append(override)
    return written, refused


def _groups(folder: Path) -> dict[str, list[str]]:
    """The files of each group, by its name: {"data": ["folder", "sample", "toxic_data"], …}."""
    return {
        group.name: sorted(file.relative_to(group).with_suffix("").as_posix() for file in group.rglob("*.yaml"))
        for group in folder.iterdir()
        if group.is_dir()
    }


def _composed(folder: Path, config_name: str, written: list[str], problems: list[str]) -> Composed | None:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        composed = _compose(folder, config_name, written)
    except (HydraException, OmegaConfBaseException) as error:
        problems.append(str(error))
        return None
    problems += [f"{key} is missing: give it, {key}=…" for key in composed.missing]
    return composed


def _compose(folder: Path, name: str, written: list[str]) -> Composed:
    """Raises HydraException, OmegaConfBaseException."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf, open_dict

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), version_base="1.3"):
        composed = compose(name, overrides=[_settable(o) for o in written], return_hydra_config=True)
    chosen = dict(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    missing = [key for key, value in flat(OmegaConf.to_container(composed, resolve=False)).items() if value == "???"]
    for key in missing:  # so that the rest can be looked at
        OmegaConf.update(composed, key, "missing")
    return Composed(OmegaConf.to_container(composed, resolve=True), chosen, missing)


def _settable(override: str) -> str:
    """An override of a key of the schema is taken also where no file has the key: the schema may know a default."""
    how, key, value = overrides.parsed(override)
    return f"++{override}" if how == "" and "." in key and overrides.kinds_at(Config, key) else override


def _checked(composed: Composed | None, folder: Path, config_name: str, written, problems: list[str]) -> Config | None:
    """The checked configuration, or None; what is wrong with it is added to the problems.

    What is wrong is put back to what the chosen files say, and the rest checked again: contradictions between values
    are found only where each of them is valid by itself.
    """
    if composed is None:
        return None
    values, shipped = composed.values, None
    while True:
        try:
            return Config.model_validate({**values, "profile": composed.chosen.get("profile")})
        except ValidationError as error:
            problems += _in_words(error)
            if shipped is None:
                choices = [o for o in written if overrides.parsed(o).key in _groups(folder)]
                shipped = _composed(folder, config_name, choices, [])
            if shipped is None or not any([_put_back(values, shipped.values, e["loc"]) for e in error.errors()]):
                return None


def _put_back(values, shipped, place: tuple) -> bool:
    """Whether the value at a place, or the section around it, was another than the shipped one, which it is now."""
    key, *rest = place or [None]
    if not isinstance(values, dict | list) or key is None:
        return False
    try:
        other, mine = shipped[key], values[key]
    except (KeyError, IndexError, TypeError):
        if isinstance(values, dict) and isinstance(shipped, dict):
            if key in values:
                del values[key]
                return True
            if key in shipped:
                values[key] = shipped[key]
                return True
        return False
    if rest and type(mine) is type(other) and isinstance(mine, dict | list) and _put_back(mine, other, tuple(rest)):
        return True
    if mine == other:
        return False
    values[key] = other
    return True


def _in_words(error: ValidationError) -> list[str]:
    """A sentence for each problem, with the key, its value, what is wanted, and what was perhaps meant."""
    found: dict[str, list[str]] = {}
    for one in error.errors(include_url=False):
        parts = [str(part) for part in one["loc"]]
        if parts and parts[-1] == "[key]":  # the name itself is wrong
            parts.pop()
        elif one["type"] != "extra_forbidden":  # of a union, pydantic adds the kind that it has tried
            while parts and not overrides.kinds_at(Config, ".".join(parts)):
                parts.pop()
        key, said = ".".join(parts), one["msg"].removeprefix("Value error, ")
        section = isinstance(one["input"], dict) and one["type"] == "value_error"
        if one["type"] == "extra_forbidden":
            found.setdefault(f"{key} is no key{overrides.perhaps_key(key, overrides.keys(Config))}", [])
        elif one["type"] == "missing":
            found.setdefault(f"{key}: {said}", [])
        elif section:  # its contradictions, one a line; those that name no key are of one source
            for line in said.splitlines():
                found.setdefault(line if re.match(r"(data|model|serving)\b", line) else f"{key}: {line}", [])
        else:
            if one["type"] == "literal_error":
                said += overrides.perhaps(str(one["input"]), re.findall(r"'([^']*)'", said))
            found.setdefault(f"{key}={_short(one['input'])}", []).append(said)
    return [": ".join([what, *([" or ".join(said)] if said else [])]) for what, said in found.items()]


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _missing_places(config: Config) -> list[str]:
    """What a retraining would miss hours later, and can be seen now."""
    found = []
    wanted: dict[str, list[str]] = {}
    for source in config.data.sources:
        if source.kind == "folder":
            wanted.setdefault(source.name, []).append(source.file)
    for place, names in wanted.items():
        if not Path(place).expanduser().exists():
            found.append(
                f"data.folder: {place} has no {' and no '.join(names)}, it does not exist here, where the step "
                "runs: put it there, or name another folder or archive"
            )
    base = Path(config.model.name).expanduser()
    if config.model.architecture is None and config.model.name.startswith((".", "/", "~")):
        if not (base / "config.json").is_file():
            found.append(f"model.name={config.model.name}: no such folder with a config.json")
    if config.model.max_length > config.serving.buckets[-1]:
        found.append(
            f"model.max_length is {config.model.max_length} tokens, but serving.buckets ends at "
            f"{config.serving.buckets[-1]}: add {config.model.max_length} to them, or lower it"
        )
    return found


def _compare_gate(config, folder, config_name, written, chosen, unknown: list[str], problems: list[str]) -> None:
    """Says in the configuration which limits differ from the shipped ones; without a reason that is a problem."""
    config.gate.group = chosen.get("gate", "")
    config.gate.overrides = _differences(_shipped_gate(folder, config_name, written, chosen), config.gate)
    changed = [in_words(config.gate.overrides), *unknown] if config.gate.overrides else unknown
    if changed and not config.gate.override_reason.strip():
        problems.append(
            f"{'; '.join(changed)}: limits other than the shipped ones need a reason, which is kept with "
            'the version; add gate.override_reason="…", or leave them as they are'
        )


def _shipped_gate(folder: Path, config_name: str, written: list[str], chosen: dict[str, str]) -> Gate:
    """The limits that this project ships for the chosen profile: whatever overrides, or a configuration kept elsewhere,
    say about the gate."""
    others = [override for override in written if not re.match(r"[+~]*gate\b", override)]
    if others != written:
        chosen = _compose(folder, config_name, others).chosen
    group = chosen.get("gate", "default")
    return _shipped(group if (SHIPPED / "gate" / f"{group}.yaml").exists() else "default")


@functools.cache
def _shipped(group: str) -> Gate:
    return Gate.model_validate(_compose(SHIPPED, f"gate/{group}", []).values["gate"])


def in_words(changed: list[dict]) -> str:
    """The first few of the gate's changed limits: "gate.toxic.min is 0.5, not 0.85"."""
    shown = [f"{o['key']} is {json.dumps(o['to'])}, not {json.dumps(o['from'])}" for o in changed[:NAMED]]
    more = [f"and {len(changed) - NAMED} more"] if len(changed) > NAMED else []
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
