"""The classifier: Qwen2 with six logits, quantised with a LoRA adapter while it is trained, merged and plain after."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from tasks import labels
from tasks.config import Lora, Model
from tasks.training import packed

INFERENCE_TOKENS, INFERENCE_MESSAGES = 16384, 64  # in one pack, or one padded batch

# PyTorch 2.11 picks cuDNN attention for some shapes (64 x 64), and its backward gives NaN there. The other backends are
# sound. May go once no supported PyTorch does that.
torch.backends.cuda.enable_cudnn_sdp(False)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(folder: str):
    """The base's tokenizer, padding on the right: the classifier pools at the last real token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(config: Model, base: str, seed: int, weights: str):
    """The base with a fresh head of six logits.

    Args:
        base: a folder, from base_model.resolve.
        seed: of the head's initial weights.
        weights: `plain`, as they are, in `compute_dtype`; `nf4`, quantised to 4 bits with double quantisation (the head
            stays as it is); `unpacked`, the same values as `nf4`, but plain: QLoRA's arithmetic without unpacking them
            anew at every step.
    """
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    dtype = getattr(torch, config.compute_dtype)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["score"],
    )
    torch.manual_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(
        base,
        dtype=dtype,
        quantization_config=four_bits if weights == "nf4" else None,
        device_map={"": device()},
        pad_token_id=load_tokenizer(base).pad_token_id,
        id2label=dict(enumerate(labels.LABELS)),
        label2id={name: k for k, name in enumerate(labels.LABELS)},
        problem_type="multi_label_classification",
    )
    if weights == "nf4":
        for layer in network.model.modules():
            # On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weights for inference, and can't train it after.
            layer.support_avx512bf16_for_cpu = False
    if weights == "unpacked":
        through_nf4(network)
    return network


@torch.no_grad()
def through_nf4(network) -> None:
    """Rounds the weight of every linear layer but the head to what NF4 with double quantisation makes of it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for layer in network.model.modules():
        if isinstance(layer, nn.Linear):
            packed, state = quantize_4bit(layer.weight.data, compress_statistics=True, quant_type="nf4")
            layer.weight.copy_(dequantize_4bit(packed, state))


def add_adapter(lora: Lora, network):
    """The network with a LoRA adapter over its frozen weights; the head is trained in full. What is trained is float32.

    Not through PEFT's prepare_model_for_kbit_training: it would cast everything that isn't quantised to float32.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    adapted = get_peft_model(
        network,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            modules_to_save=lora.modules_to_save,
        ),
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.train()  # from_pretrained left it in evaluation mode, and Lightning keeps what it finds


def merge(config: Model, base: str, adapter: Path, onto: str):
    """The plain model with the adapter's update added to the base's own weights.

    Args:
        onto: `plain` or `unpacked` weights; see `load_base`.
    """
    from peft import PeftModel

    network = load_base(config, base, seed=0, weights=onto)  # the adapter brings the head
    return PeftModel.from_pretrained(network, str(adapter)).merge_and_unload().eval()


def loss(
    logits: torch.Tensor,
    truth: torch.Tensor,
    type_weight: float,
    whole: torch.Tensor | None = None,
) -> torch.Tensor:
    """Binary cross-entropy of `toxic` plus, on rows whose types are known, that of the types.

    Args:
        logits: float [B, 6].
        truth: float [B, 6]; -1 where a label is unknown. A batch without known types has only the first term.
        type_weight: of the second term.
        whole: the truth of all messages of a step, of which these are a part; the parts' losses add up to the step's.
    """
    whole = truth if whole is None else whole
    each = nn.functional.binary_cross_entropy_with_logits(logits.float(), truth.clamp(min=0), reduction="none")
    each = each * (truth != -1)
    toxic = each[:, 0].sum() / len(whole)
    types = each[:, 1:].sum() / (whole[:, 1:] != -1).sum().clamp(min=1)
    return toxic + type_weight * types


def load_merged(folder: Path):
    """(model, tokenizer) of a checkpoint folder like models/finetuned/final, in evaluation mode."""
    from transformers import AutoModelForSequenceClassification

    merged = str(Path(folder) / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(merged, dtype="auto", device_map={"": device()})
    return model.eval(), load_tokenizer(merged)


def logits(network, tokenizer, texts: list[str], max_length: int) -> np.ndarray:
    """Logits of messages, float32 [N, 6] in their order."""
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    return logits_of([row or [tokenizer.pad_token_id] for row in ids], network, tokenizer.pad_token_id)


@torch.inference_mode()
def logits_of(ids: list[list[int]], network, pad_token_id: int) -> np.ndarray:
    """Logits of token ids, float32 [N, 6].

    On a GPU messages are packed. Elsewhere, and in float32, which flash attention lacks, batches join messages of
    similar length.
    """
    found = np.zeros((len(ids), len(labels.LABELS)), dtype=np.float32)
    if network.device.type == "cuda" and network.dtype != torch.float32:
        with packed.attention(network):
            lengths = [len(row) for row in ids]
            longest = max(lengths, default=0)
            for rows in packed.split(lengths, packed.Shape(max(INFERENCE_TOKENS, longest), longest, INFERENCE_TOKENS)):
                exact = packed.Shape(sum(lengths[i] for i in rows), lengths[rows[0]], len(rows))
                batch = packed.pack([ids[i] for i in rows], pad_token_id, exact)
                batch = {name: tensor.to(network.device) for name, tensor in batch.items()}
                found[rows] = packed.logits(network, batch, exact.longest).cpu().numpy()
        return found
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), INFERENCE_MESSAGES):
        rows = order[start : start + INFERENCE_MESSAGES]
        batch = pad([ids[i] for i in rows], pad_token_id, network.device)
        found[rows] = network(**batch).logits.float().cpu().numpy()
    return found


def pad(ids: list[list[int]], pad_token_id: int, device=None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, T], padded on the right; a message without tokens gets one pad."""
    ids = [row or [pad_token_id] for row in ids]
    longest = max(len(row) for row in ids)
    return {
        "input_ids": torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in ids], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device),
    }
