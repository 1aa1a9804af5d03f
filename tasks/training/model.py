"""The classifier: Qwen2 with six logits, quantised with a LoRA adapter while it is trained, merged and plain after."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from tasks import labels
from tasks.config import Lora, Model

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


def load_base(config: Model, base: str, seed: int, quantised: bool):
    """The base with a fresh head of six logits.

    Args:
        base: a folder, from base_model.resolve.
        seed: of the head's initial weights.
        quantised: NF4 with double quantisation (the head stays as it is), else plain `compute_dtype` weights.
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
    return AutoModelForSequenceClassification.from_pretrained(
        base,
        dtype=dtype,
        quantization_config=four_bits if quantised else None,
        device_map={"": device()},
        pad_token_id=load_tokenizer(base).pad_token_id,
        id2label=dict(enumerate(labels.LABELS)),
        label2id={name: k for k, name in enumerate(labels.LABELS)},
        problem_type="multi_label_classification",
    )


def add_adapter(lora: Lora, model):
    """The model with a LoRA adapter over its frozen weights; the head is trained in full."""
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=torch.cuda.is_available())
    adapted = get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            modules_to_save=lora.modules_to_save,
        ),
    )
    return adapted.train()  # from_pretrained left it in evaluation mode, and Lightning keeps what it finds


def merge(config: Model, base: str, adapter: Path):
    """The plain model with the adapter's update added to the base's own, unquantised weights."""
    from peft import PeftModel

    model = load_base(config, base, seed=0, quantised=False)  # the adapter brings the head
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


def loss(logits: torch.Tensor, truth: torch.Tensor, type_weight: float) -> torch.Tensor:
    """Binary cross-entropy of `toxic` plus, on rows whose types are known, that of the types.

    Args:
        logits: float [B, 6].
        truth: float [B, 6]; -1 where a label is unknown. A batch without known types has only the first term.
        type_weight: of the second term.
    """
    known = (truth != -1).float()
    each = nn.functional.binary_cross_entropy_with_logits(logits.float(), truth.clamp(min=0), reduction="none") * known
    toxic, types = each[:, 0].mean(), each[:, 1:].sum() / known[:, 1:].sum().clamp(min=1)
    return toxic + type_weight * types


def load_merged(folder: Path):
    """(model, tokenizer) of a checkpoint folder like models/finetuned/final, in evaluation mode."""
    from transformers import AutoModelForSequenceClassification

    merged = str(Path(folder) / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(merged, dtype="auto", device_map={"": device()})
    return model.eval(), load_tokenizer(merged)


@torch.inference_mode()
def logits(model, tokenizer, texts: list[str], max_length: int, batch_size: int = 64) -> np.ndarray:
    """Logits of messages, float32 [N, 6] in their order; batches join messages of similar length."""
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    found = np.zeros((len(texts), len(labels.LABELS)), dtype=np.float32)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = pad([ids[i] for i in rows], tokenizer.pad_token_id, model.device)
        found[rows] = model(**batch).logits.float().cpu().numpy()
    return found


def pad(ids: list[list[int]], pad_token_id: int, device=None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, T], padded on the right; a message without tokens gets one pad."""
    ids = [row or [pad_token_id] for row in ids]
    longest = max(len(row) for row in ids)
    return {
        "input_ids": torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in ids], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device),
    }
