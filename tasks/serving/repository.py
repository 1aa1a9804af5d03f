"""Triton's model repository on disk: what a version brings, and which version is served.

A version N is one folder N in each of three models: its tokenizer, its classifier, its labels. The ensemble
`toxic_text` names the version of all three, so that one rename of its config.pbtxt changes what a restarted server
serves, and no request ever meets one version's tokenizer and another's classifier.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from tasks import files, integrity
from tasks.config import Config
from tasks.errors import StepFailed

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parents[2] / "triton_model_repository"
CODE = Path(__file__).parents[1]

TOKENIZER, CLASSIFIER, LABELS, TEXT = "toxic_tokenizer", "toxic_classificator", "toxic_labels", "toxic_text"
PARTS = (TOKENIZER, CLASSIFIER, LABELS)
TRIAL = "toxic_trial"  # the ensemble under another name, in which a swap asks a version before any client can

KEEP = 3  # versions that stay on disk, so that going back needs no rebuilding


def live(config: Config) -> Path:
    return config.workspace / "triton" / "models"


def create(config: Config, repository: Path) -> None:
    """Writes the four models' configuration, with no version in service; one that serves a version is left alone."""
    if served(repository) is None:
        for part in PARTS:
            write(repository, part_config(config, part, []))
        write(repository, text_config(config, None))
        for ensemble in (TEXT, TRIAL):
            (repository / ensemble / "1").mkdir(parents=True, exist_ok=True)


def as_built(config: Config, engine: Path) -> Config:
    """The configuration, but with the engine, sizes and tolerance that a version was built with.

    Args:
        engine: a folder with the version's engine.json: that of its installed classifier, or one from build_engine.
    """
    facts = files.read_json(engine / "engine.json")
    built = {name: facts[name] for name in ("engine", "max_batch_size", "buckets", "score_tolerance") if name in facts}
    return config.model_copy(update={"serving": config.serving.model_copy(update=built)})


def for_both(config: Config, old: Path, new: Path) -> Config:
    """The new version's configuration, with batches that both versions take while both are loaded.

    Where a part takes less than the ensemble of the version in service, the server lets go of that ensemble.

    Args:
        old, new: folders with the versions' engine.json.

    Raises:
        StepFailed: they were built for different engines, or with other sizes of TensorRT's: no configuration has both.
    """
    before, after = as_built(config, old).serving, as_built(config, new).serving
    fixed = ["engine"] if after.engine == before.engine == "onnx" else ["engine", "max_batch_size", "buckets"]
    if differing := [name for name in fixed if getattr(before, name) != getattr(after, name)]:
        built, serves = (", ".join(f"{name}={getattr(of, name)}" for name in differing) for of in (after, before))
        raise StepFailed(
            f"it was built with {built}, what is in service with {serves}: a server can't have both loaded. Build it "
            "alike; or start another server on a workspace of its own, and move the clients to it once it serves"
        )
    size = max(before.max_batch_size, after.max_batch_size)
    return config.model_copy(update={"serving": after.model_copy(update={"max_batch_size": size})})


def part_config(config: Config, part: str, versions: list[int]):
    """The model configuration (protobuf) of a part that serves these versions; without any, of none in particular."""
    gpu = part == CLASSIFIER and config.serving.engine == "tensorrt"
    parsed = read(TEMPLATES / part / ("config.tensorrt.pbtxt" if gpu else "config.pbtxt"))
    parsed.max_batch_size = config.serving.max_batch_size
    counts = {TOKENIZER: config.serving.tokenizer_instances, LABELS: config.serving.labels_instances}
    parsed.instance_group[0].count = counts.get(part, config.serving.instances)
    if part == CLASSIFIER:
        parsed.dynamic_batching.max_queue_delay_microseconds = config.serving.max_queue_delay_us
    if gpu:  # one optimisation profile per bucket: the server takes the one that fits the request
        warm_up(parsed, config.serving.buckets, [1, parsed.max_batch_size])  # the largest batch sets up memory too
        parsed.instance_group[0].profile.extend(str(i) for i in range(len(config.serving.buckets)))
    if versions:
        parsed.version_policy.specific.versions.extend(versions)
    return parsed


def warm_up(parsed, buckets: list[int], batch_sizes: list[int]) -> None:
    """Has every length answered before the version counts as ready, so that no client waits for a first run.

    Only in a model with one instance: where a warm-up fails in one of several, the server ends with a segmentation
    fault (Triton 2.51), and with it what is in service. A model in Python warms itself up when it is initialized.
    """
    template = parsed.model_warmup.pop()
    if parsed.instance_group[0].count > 1:
        return
    for length in buckets:
        for batch_size in batch_sizes:
            sample = parsed.model_warmup.add()
            sample.CopyFrom(template)
            sample.name, sample.batch_size = f"{batch_size} x {length} tokens", batch_size
            for tensor in sample.inputs.values():
                tensor.dims[:] = [length]


def text_config(config: Config, version: int | None, name: str = TEXT):
    """The ensemble's configuration, tied to one version of its three parts."""
    parsed = read(TEMPLATES / TEXT / "config.pbtxt")
    parsed.name = name
    parsed.max_batch_size = config.serving.max_batch_size
    for step in parsed.ensemble_scheduling.step:
        step.model_version = version or -1
    return parsed


def loaded_at_start(repository: Path) -> set[int]:
    """Versions that a server which starts on this repository loads."""
    parsed = [read(config_file(repository, part)) for part in PARTS]
    return {version for part in parsed for version in part.version_policy.specific.versions}


def keep_only(repository: Path, versions: set[int]) -> None:
    """Leaves other versions out of what a server that starts on this repository loads."""
    for part in PARTS:
        parsed = read(config_file(repository, part))
        named = parsed.version_policy.specific.versions
        if set(named) - versions:
            named[:] = [version for version in named if version in versions]
            write(repository, parsed)


def read(file: Path):
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse(file.read_text(encoding="utf-8"), ModelConfig())


def write(repository: Path, parsed) -> None:
    """Puts a configuration in place with one rename."""
    from google.protobuf import text_format

    files.write_text(config_file(repository, parsed.name), text_format.MessageToString(parsed))


def config_file(repository: Path, model: str) -> Path:
    return repository / model / "config.pbtxt"


def served(repository: Path) -> int | None:
    """The version that a server which starts on this repository serves, or None."""
    file = config_file(repository, TEXT)
    if not file.exists():
        return None
    version = read(file).ensemble_scheduling.step[0].model_version
    return version if version > 0 else None


def installed(repository: Path) -> list[int]:
    """Versions whose folders are there, oldest first."""
    folders = (repository / CLASSIFIER).glob("[1-9]*")
    return sorted(int(f.name) for f in folders if all((repository / part / f.name).is_dir() for part in PARTS))


def folder(repository: Path, part: str, version: int) -> Path:
    return repository / part / str(version)


def install(engine: Path, repository: Path, version: int, parts=PARTS, golden: list[dict] = ()) -> None:
    """Adds a version; folders of that number, left by an earlier try or damaged, are replaced one after another.

    Args:
        engine: a folder from build_engine: model files, tokenizer.json, settings.json, engine.json.
        golden: messages with the answers that this version gave on trial, kept for whoever puts it into service.
    """
    is_plan = (engine / "model.plan").exists()
    recorded = files.read_json(engine / "engine.json")["files"]
    code = {
        TOKENIZER: [TEMPLATES / TOKENIZER / "1" / "model.py", CODE / "text.py", CODE / "integrity.py"],
        CLASSIFIER: [] if is_plan else [TEMPLATES / CLASSIFIER / "1" / "model.py", CODE / "integrity.py"],
        LABELS: [TEMPLATES / LABELS / "1" / "model.py", CODE / "labels.py", CODE / "integrity.py"],
    }
    model = {
        TOKENIZER: [engine / "tokenizer.json", engine / "settings.json"],
        CLASSIFIER: [*engine.glob("model.*"), engine / "engine.json"],
        LABELS: [],
    }
    for part in parts:
        with files.new_folder(folder(repository, part, version)) as beside:
            for file in code[part]:
                shutil.copy2(file, beside)
            # Bytecode that the server's Python wrote here would count as a change: the version would be loaded twice.
            # Its interpreter heeds no PYTHONDONTWRITEBYTECODE; a file of this name keeps it from writing any.
            (beside / "__pycache__").touch()
            for file in model[part]:
                link(file, beside / file.name)
            hashes = {file.name: integrity.sha256(file) for file in code[part]}
            hashes |= {file.name: recorded[file.name] for file in model[part] if file.name in recorded}
            files.write_json(beside / integrity.RECORD, hashes)
            if part == CLASSIFIER:
                files.write_json(beside / "golden.json", list(golden))


def engine(repository: Path, version: int) -> dict:
    """What is known of an installed version's engine (see build_engine.record); empty where that can't be read."""
    try:
        return files.read_json(folder(repository, CLASSIFIER, version) / "engine.json")
    except (OSError, ValueError):
        return {}


def golden(repository: Path, version: int) -> list[dict]:
    """The version's trial answers, as [{"text", "answer"}, …]."""
    return files.read_json(folder(repository, CLASSIFIER, version) / "golden.json")


def link(file: Path, target: Path) -> None:
    """The same file under a second name, or a copy of it on another disk: an engine has gigabytes.

    Only for files that are replaced as a whole, never written in place.
    """
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)


def verify(repository: Path, version: int) -> None:
    """Raises StepFailed where an installed version is damaged."""
    if problem := damage(repository, version):
        raise StepFailed(problem)


def damage(repository: Path, version: int) -> str | None:
    """Which installed file is not, byte for byte, the one recorded by build_engine or install, or what is known of the
    version and can't be read, with the way out; None where a server that loads the version finds it whole."""
    for part in PARTS:
        if complaint := integrity.changed(folder(repository, part, version)):
            return complaint
    classifier = folder(repository, CLASSIFIER, version)
    for name in ("engine.json", "golden.json"):
        try:
            json.loads((classifier / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{classifier / name} can't be read ({error}): {integrity.way_out(classifier)}"
    return None


def prune(repository: Path, history: list[int]) -> None:
    """Keeps KEEP versions on disk: the one in service, those that served last, then the newest of the others.

    What a killed install or removal has left half-done goes, too.

    Args:
        history: versions that were in service and are good, the last one first; others are bad or never served.
    """
    there = installed(repository)
    ranked = dict.fromkeys([served(repository), *history, *reversed(there)])
    kept = [version for version in ranked if version in there][:KEEP]
    for version in set(there) - set(kept):
        log.info("removing version %d from %s", version, repository)
    for part in PARTS:
        for other in [*(repository / part).glob("[1-9]*"), *(repository / part).glob(".[1-9]*")]:
            if other.name not in map(str, kept):
                shutil.rmtree(other, ignore_errors=True)


def remove(repository: Path, version: int) -> None:
    for part in PARTS:
        shutil.rmtree(folder(repository, part, version), ignore_errors=True)
