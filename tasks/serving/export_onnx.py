"""Export the merged model to ONNX, with thresholds and version inside the graph, and check that it decides the same."""

import json
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np

from tasks import files
from tasks import run as runs
from tasks.config import Config
from tasks.errors import StepFailed, Unsuitable, UsageError
from tasks.labels import LABELS
from tasks.run import Run

log = logging.getLogger(__name__)

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("logits", "decisions", "model_version")
DECISIONS = "torch.parquet"  # text, decision_<label>

ONE_FILE_BYTES = 2**30  # protobuf ends at 2 GiB: larger models keep their weights in model.onnx.data


def exported(config: Config, run: Run) -> Path:
    """The run's own folder, which no other run touches; gone once its version is in service."""
    return config.workspace / "models" / "exported" / run.id


def is_there(config: Config, run: Run) -> bool:
    return (exported(config, run) / DECISIONS).exists()


def run(config: Config, run: Run) -> dict:
    """Writes models/exported/<run id>/: model.onnx (and its data), tokenizer.json, settings.json, torch.parquet.

    Returns the version, the folder's SHA-256 and size, and the parity with torch.

    Raises:
        StepFailed: the exported model decides differently on more test messages than gate.parity allows.
        Unsigned: no step has written what the registry says of the version.
    """
    from tasks.promotion import gate, registry
    from tasks.training import checkpoint

    version = registry.candidate(config, run)
    registry.require_signed(config, version)
    gate.record_overrides(config, version, "export")
    source = checkpoint.of_candidate(config, run)
    messages = test_messages(config)
    if not messages:
        raise UsageError(f"{test_split(config)} does not exist: run `python commands.py prepare` first")
    runs.prune_builds(config.workspace)
    files.require_free_disk(config.workspace, config.disk.min_free_gib)
    target = exported(config, run)
    with files.new_folder(target) as folder:
        settings, references = export(config, source, version, folder / "model.onnx", messages)
        shutil.copy2(source / "merged" / "tokenizer.json", folder)
        files.write_json(folder / "settings.json", settings)
        write_decisions(folder / DECISIONS, messages, references[config.serving.dtype], checkpoint.thresholds(source))
        parity = compare(config, folder / "model.onnx", source, messages, references)
        require_parity(config, parity)
    return {
        "version": version,
        "dtype": settings["dtype"],
        "opset": config.serving.opset,
        "sha256": files.sha256(target),
        "bytes": sum(file.stat().st_size for file in target.glob("model.onnx*")),
        "parity": parity,
    }


def write_decisions(file: Path, messages: list[str], logits: np.ndarray, thresholds: np.ndarray) -> None:
    """What torch decides of the messages, for `stage` where the run that evaluated the version was another one."""
    import polars as pl
    from scipy.special import logit

    decided = logits >= logit(thresholds)
    pl.DataFrame(
        {"text": messages, **{f"decision_{name}": decided[:, i] for i, name in enumerate(LABELS)}}
    ).write_parquet(file)


def export_by_hand(overrides, checkpoint_folder, output_path, config_path, config_name) -> dict:
    """Exports any checkpoint folder to any file, as version 0; the tokenizer goes beside it, unless one is there.

    Raises:
        UsageError: the folder is not a checkpoint.
    """
    from tasks.step import open_run
    from tasks.training import checkpoint

    source, target = checkpoint.require(Path(checkpoint_folder)), Path(output_path)
    _, config, _ = open_run("export_onnx", [str(o) for o in overrides], config_path, config_name)
    messages = test_messages(config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        made = Path(place) / target.name
        settings, references = export(config, source, 0, made, messages)
        parity = compare(config, made, source, messages, references) if messages else None
        if messages:
            require_parity(config, parity)
        else:
            log.warning("%s does not exist: parity is not checked", test_split(config))
        for file in made.parent.iterdir():
            os.replace(file, target.parent / file.name)
    if not (target.parent / "tokenizer.json").exists():
        shutil.copy2(source / "merged" / "tokenizer.json", target.parent)
    return {"step": "export_onnx", "output": str(target), "dtype": settings["dtype"], "parity": parity}


def test_split(config: Config) -> Path:
    return config.workspace / "data" / "processed" / "test.parquet"


def test_messages(config: Config) -> list[str]:
    """gate.parity.messages of the test split, the same ones for the same seed; none where there is no test split."""
    from tasks.data import splits

    if not test_split(config).exists():
        return []
    texts = splits.read(config.workspace, "test")["text"]
    return texts.sample(min(config.gate.parity.messages, len(texts)), seed=config.seed).to_list()


def export(config: Config, source: Path, version: int, file: Path, messages: list[str]) -> tuple[dict, dict]:
    """Writes the checkpoint's merged model as one ONNX file, with its weights beside it where they need a file.

    Args:
        source: a checkpoint folder.
        version: what the output `model_version` says.
        messages: that torch classifies for comparison.

    Returns:
        The model's settings, which the file carries as metadata too, and torch's logits, float32 [N, 6], with the
        exported weights: computed in the engine's dtype, as evaluate did and the engine will, and in float32; by the
        name of the dtype.
    """
    import torch

    from tasks.training import checkpoint, model

    network, tokenizer = model.load_merged(source)
    dtype = getattr(torch, config.serving.dtype)
    max_length = checkpoint.settings(source)["max_length"]
    thresholds = checkpoint.thresholds(source)
    settings = {
        "version": version,
        "labels": list(LABELS),
        "thresholds": thresholds.tolist(),
        "max_length": max_length,
        "max_chars": config.data.max_chars,
        "pad_id": tokenizer.pad_token_id,
        "tokenizer_sha256": files.sha256(source / "merged" / "tokenizer.json"),
        "dtype": config.serving.dtype,
    }
    references = {
        kind: model.logits(network.to(dtype).to(getattr(torch, kind)), tokenizer, messages, max_length)
        for kind in dict.fromkeys((config.serving.dtype, "float32"))
    }
    network = network.to("cpu", dtype)
    network.set_attn_implementation("eager")
    served = served_model(network, thresholds, version, clamped=config.serving.engine == "tensorrt")
    write_onnx(config, served, settings, file)
    return settings, references


def served_model(network, thresholds: np.ndarray, version: int, clamped: bool):
    """The classifier as it is served: `forward(input_ids, attention_mask)`, int64 [B, T], gives float logits [B, 6],
    bool decisions [B, 6] and the version, int64 [B, 1].

    The mask only says where a message ends: with causal attention and padding on the right, no token sees padding.
    Args:
        clamped: ids outside the vocabulary count as the nearest id inside. ONNX Runtime refuses them; TensorRT would
            read other memory than the embedding's.
    """
    import torch

    class ServedModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = network.model, network.score.weight
            self.register_buffer("thresholds", torch.logit(torch.from_numpy(thresholds)).float())
            self.register_buffer("version", torch.tensor([[version]]))

        def forward(self, input_ids, attention_mask):
            batch, length = input_ids.shape
            if clamped:
                input_ids = input_ids.clamp(0, network.config.vocab_size - 1)
            forbidden = torch.full((length, length), torch.finfo(self.head.dtype).min, dtype=self.head.dtype).triu(1)
            hidden = self.backbone(
                input_ids, attention_mask={"full_attention": forbidden[None, None]}, use_cache=False
            ).last_hidden_state
            last = ((attention_mask > 0) * torch.arange(length)).amax(dim=1)  # whatever the mask holds, inside
            pooled = hidden[torch.arange(batch), last]
            logits = torch.nn.functional.linear(pooled.float(), self.head.float())
            return logits, logits >= self.thresholds, self.version.expand(batch, 1)

    return ServedModel().eval()


def write_onnx(config: Config, served, settings: dict, file: Path) -> None:
    import onnx
    import torch

    for talkative in ("torch.onnx", "onnxscript", "onnx_ir"):  # the first misses torchvision, which nothing here needs
        logging.getLogger(talkative).setLevel(logging.ERROR)
    example = (torch.ones((2, 7), dtype=torch.int64), torch.ones((2, 7), dtype=torch.int64))
    sizes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("sequence", min=1, max=32768)}
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            served,
            example,
            dynamo=True,
            opset_version=config.serving.opset,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes={name: sizes for name in INPUTS},
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the source lines each node comes from: paths of this machine
    program.model.metadata_props.update({key: json.dumps(value) for key, value in settings.items()})
    weights = sum(p.numel() * p.element_size() for p in served.parameters())
    program.save(file, external_data=weights > ONE_FILE_BYTES)
    try:
        onnx.checker.check_model(str(file))  # by its path: beyond 2 GiB there is no other way
    except onnx.checker.ValidationError as error:
        raise StepFailed(
            f"torch has written an ONNX file that is not valid: {error}: try another serving.opset"
        ) from None


def settings_of(file: Path) -> dict:
    """The settings that an exported file carries as metadata; empty for a file from elsewhere.

    Raises:
        UsageError: it is not an ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(file, load_external_data=False)
    except DecodeError as error:
        raise UsageError(f"{file} is not an ONNX file, or only a part of one: {error}") from None
    found = {p.key: p.value for p in model.metadata_props}
    return {key: json.loads(value) for key, value in found.items()} if "tokenizer_sha256" in found else {}


def compare(config: Config, file: Path, source: Path, messages: list[str], references: dict[str, np.ndarray]) -> dict:
    """Parity of the exported file with torch.

    ONNX Runtime has no bfloat16 kernels on a CPU, so it runs the file's bfloat16 weights in float32. Against torch in
    float32 that shows whether the graph is right, to the last digits; against torch in bfloat16, whether the rounding
    of the arithmetic changes decisions. How TensorRT rounds, `stage` sees.

    Args:
        references: torch's logits by the dtype of its arithmetic, from `export`.

    Returns {"messages", dtype: {"equal", "near_threshold", "different", "max_difference"}, …}: `equal` is the share of
    the (message, label) decisions that are the same; those whose logit in torch is within gate.parity.near_threshold of
    the threshold are only counted.
    """
    from scipy.special import logit

    from tasks import metrics
    from tasks.training import checkpoint

    logits, decisions = classify(config, file, source, messages)
    thresholds = logit(checkpoint.thresholds(source))
    parity = {"messages": len(messages)}
    for dtype, reference in references.items():
        near = np.abs(reference - thresholds) < config.gate.parity.near_threshold
        parity[dtype] = {
            **metrics.agreement(reference >= thresholds, decisions, near),
            "max_difference": float(np.abs(logits - reference).max()),
        }
    return parity


def classify(config: Config, file: Path, source: Path, messages: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Logits, float32 [N, 6], and decisions, bool [N, 6], of an ONNX file; tokenizer and batches are as in service."""
    from tokenizers import Tokenizer

    from tasks.training import checkpoint, model

    tokenizer = Tokenizer.from_file(str(source / "merged" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(checkpoint.settings(source)["max_length"])
    ids = [encoding.ids for encoding in tokenizer.encode_batch(messages)]
    logits = np.zeros((len(messages), len(LABELS)), dtype=np.float32)
    decisions = np.zeros(logits.shape, dtype=bool)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with tempfile.TemporaryDirectory(dir=file.parent) as place:
        session = open_session(in_float32(file, Path(place)) if config.serving.dtype == "bfloat16" else file)
        for start in range(0, len(order), config.serving.max_batch_size):
            rows = order[start : start + config.serving.max_batch_size]
            batch = {name: tensor.numpy() for name, tensor in model.pad([ids[i] for i in rows], 0).items()}
            logits[rows], decisions[rows], _ = session.run(OUTPUTS, batch)
    return logits, decisions


def open_session(file: Path):
    """An ONNX Runtime session on the CPU.

    Raises:
        StepFailed: it cannot read the file, or has no kernel for an operator in it.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions have no common base
        raise StepFailed(f"ONNX Runtime cannot load {file}: {error}") from None


def in_float32(file: Path, folder: Path) -> Path:
    """The same graph with its bfloat16 weights and casts in float32: ONNX Runtime has no bfloat16 kernels on a CPU."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
    del model.graph.value_info[:]  # the types of what is between the nodes; they are inferred anew
    target = folder / "float32.onnx"
    onnx.save_model(model, target, save_as_external_data=True, location="float32.data")
    return target


def require_parity(config: Config, parity: dict) -> None:
    """Raises StepFailed where too many decisions differ, in the engine's dtype or in float32; see `compare`."""
    limit = config.gate.parity.min_equal
    for dtype in ("float32", "bfloat16"):  # in this order: only where the graph is right is the rounding to blame
        found = parity.get(dtype)
        if found and found["equal"] < limit:
            way_out = {
                "float32": "check that merged/tokenizer.json is the tokenizer of the training",
                "bfloat16": "in float32 they agree, so it is the rounding: try serving.dtype=float32",
            }
            raise Unsuitable(
                f"the exported model decides like torch in {dtype} on {found['equal']:.4%} of the (message, label) "
                f"pairs, gate.parity.min_equal is {limit:.2%}; the logits differ by up to "
                f"{found['max_difference']:.3g}: {way_out[dtype]}"
            )
        if found:
            log.info(
                "torch in %s: equal decisions %.4f, largest difference of %d messages %.2g",
                dtype,
                found["equal"],
                parity["messages"],
                found["max_difference"],
            )
