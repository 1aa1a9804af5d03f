"""How training fits the GPU: what is kept in memory, and in how many packs an optimiser step is computed."""

import logging
from dataclasses import dataclass

import torch

from tasks.config import Lora, Model, Training

log = logging.getLogger(__name__)

FIXED = 2**30  # bytes that PyTorch's kernels and the compiler's scratch take beside the model
LOW = 7 * 2**30  # bytes that `low` stays within, however much is free: an 8 GB card
FEWEST = 2048  # tokens in a pack below which `auto` prefers `low`: smaller ones leave a GPU idle


@dataclass(frozen=True)
class Plan:
    """
    mode: `high` unpacks NF4 once, into weights with the same values, and keeps every activation; `low` keeps NF4 and
        computes activations again in the backward pass.
    step_tokens: tokens of an optimiser step, the same in both modes.
    pack_tokens: tokens of one of the packs that a step is computed in.
    limit: bytes PyTorch may take; None: no limit.
    """

    mode: str
    step_tokens: int
    pack_tokens: int
    limit: int | None = None

    def __str__(self) -> str:
        return f"memory {self.mode}, steps of {self.step_tokens} tokens in packs of {self.pack_tokens}"


def plan(training: Training, model: Model, base: str) -> Plan:
    """Chooses `high` where it fits in what is free on the GPU less `gpu_reserve_gib`, and the largest packs that fit.

    On a CPU memory isn't measured.
    """
    if not torch.cuda.is_available():
        mode = "high" if training.memory == "auto" else training.memory
        return Plan(mode, step_tokens(training, model), pack_sizes(training, model)[0])
    available = torch.cuda.mem_get_info()[0] - round(training.gpu_reserve_gib * 2**30)
    chosen = choose(training, model, Sizes.of(base), available)
    log.info("%.1f GiB are free for training: %s", available / 2**30, chosen)
    return chosen


def keep_within(plan: Plan) -> None:
    """Has PyTorch run out of memory before it takes what is reserved for others on the GPU."""
    if plan.limit is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.limit / total))


def step_tokens(training: Training, model: Model) -> int:
    return training.gradient_accumulation_steps * training.per_device_train_batch_size * model.max_length


def pack_sizes(training: Training, model: Model) -> list[int]:
    """Tokens a pack may have, the largest first: per_device_train_batch_size messages of max_length tokens, halves of
    that, at least one message."""
    sizes = [training.per_device_train_batch_size * model.max_length]
    while sizes[-1] // 2 >= model.max_length:
        sizes.append(sizes[-1] // 2)
    return sizes


def choose(training: Training, model: Model, sizes: "Sizes", available: int) -> Plan:
    """The plan for `available` bytes. Where nothing fits, the smallest: an estimate must not forbid what may work."""
    step, packs = step_tokens(training, model), pack_sizes(training, model)
    for mode in ("high", "low") if training.memory == "auto" else (training.memory,):
        budget = available if mode == "high" else min(available, LOW)
        enough = min(FEWEST, packs[0]) if mode == "high" and training.memory == "auto" else 0
        for tokens in packs:
            if tokens >= enough and sizes.need(mode, tokens, training.lora, model) <= budget:
                return Plan(mode, step, tokens, max(available, 0))
    return Plan(mode, step, packs[-1], max(available, 0))


@dataclass(frozen=True)
class Sizes:
    """What of the architecture decides how much memory it takes."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    key_values: int  # width of keys, and of values

    @classmethod
    def of(cls, base: str) -> "Sizes":
        from transformers import AutoConfig

        c = AutoConfig.from_pretrained(base)
        width = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
        return cls(c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, width)

    @property
    def linear(self) -> int:
        """Weights of the decoder's linear layers."""
        h = self.hidden
        return self.layers * (2 * h * h + 2 * h * self.key_values + 3 * h * self.intermediate)

    def need(self, mode: str, tokens: int, lora: Lora, model: Model) -> int:
        """Bytes that training takes at its peak with packs of `tokens` tokens: an estimate.

        For 1.5B it says 2.4 MiB a token in `high` and 0.3 in `low`, beside 4.3 and 2.4 GiB.
        """
        bytes_each = 2 if model.compute_dtype == "bfloat16" else 4
        h, i, kv = self.hidden, self.intermediate, self.key_values
        packed = mode == "low" and model.load_in_4bit
        weights = self.linear * (0.53 if packed else bytes_each) + self.vocabulary * h * bytes_each
        # Adapters in fp32, with their gradients and AdamW's two moments.
        adapters = 16 * lora.r * self.layers * (2 * (h + h) + 2 * (h + kv) + 3 * (h + i))
        layer = (12 * h + 3 * i) * bytes_each
        activations = self.layers * layer if mode == "high" else self.layers * h * bytes_each + 2 * layer
        return round(FIXED + weights + adapters + tokens * activations)
