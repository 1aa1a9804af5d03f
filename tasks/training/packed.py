"""Messages packed end to end: no padding is computed, and every pack has the same shape, so one compiled graph serves.

Attention stays within a message: on a GPU through PyTorch's variable-length flash attention, elsewhere through a
block-diagonal mask.
"""

import inspect
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

ATTENTION = "packed"  # the name under which transformers finds `attend`


@dataclass(frozen=True)
class Shape:
    """What fixes the shapes of a pack's tensors.

    tokens: in all. longest: tokens of one message at most. messages: at most. An empty slot for a message costs
        attention as much as a short message, so `messages` is near what a pack holds.
    """

    tokens: int
    longest: int
    messages: int

    @classmethod
    def of(cls, lengths: list[int], tokens: int, longest: int) -> "Shape":
        """Room for a quarter more messages than `tokens` tokens hold on average."""
        return cls(tokens, longest, math.ceil(1.25 * tokens * len(lengths) / sum(lengths)))

    @property
    def slots(self) -> int:
        return self.messages + -(-self.tokens // self.longest)

    def halved(self) -> "Shape":
        """Of half the size, but for one message at least."""
        return Shape(max(self.tokens // 2, self.longest), self.longest, -(-self.messages // 2))


def split(lengths: list[int], shape: Shape) -> list[list[int]]:
    """Indices of messages, in packs of this shape: the longest first, each into the first with room."""
    packs, room = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (k for k, left in enumerate(room) if left >= lengths[index] and len(packs[k]) < shape.messages)
        k = next(fits, None)
        if k is None:
            k = len(packs)
            packs.append([])
            room.append(shape.tokens)
        packs[k].append(index)
        room[k] -= lengths[index]
    return packs


def pack(ids: list[list[int]], pad_token_id: int, shape: Shape) -> dict[str, torch.Tensor]:
    """Messages end to end, filled up with padding that no message sees.

    Args:
        ids: token ids per message, none empty, of no more than `shape` has room for.

    Returns:
        `input_ids`, `position_ids` int64 [1, tokens]; `boundaries` int32 [slots + 1], where each sequence starts and
        the last ends, messages first; `last` int64 [B], each message's last token.
    """
    lengths = [len(row) for row in ids]
    filler = shape.tokens - sum(lengths)
    fillers = [min(shape.longest, filler - start) for start in range(0, filler, shape.longest)]
    ends = torch.tensor(lengths + fillers).cumsum(0)
    boundaries = torch.full((shape.slots + 1,), shape.tokens, dtype=torch.int32)
    boundaries[0] = 0
    boundaries[1 : len(ends) + 1] = ends
    return {
        "input_ids": torch.tensor([[token for row in ids for token in row] + [pad_token_id] * filler]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths + fillers])[None],
        "boundaries": boundaries,
        "last": ends[: len(ids)] - 1,
    }


def messages(pack: dict[str, torch.Tensor]) -> list[list[int]]:
    """The token ids that `pack` was made of."""
    ids, starts = pack["input_ids"][0].tolist(), pack["boundaries"].tolist()
    return [ids[start : last + 1] for start, last in zip(starts, pack["last"].tolist())]


def logits(network, pack: dict[str, torch.Tensor], longest: int) -> torch.Tensor:
    """Logits of a pack's messages, float32 [B, 6]; the head sees only each message's last token.

    Args:
        network: a Qwen2 classifier, with or without an adapter, that attends as `attention` says.
    """
    classifier = classifier_of(network)
    hidden = classifier.model(
        input_ids=pack["input_ids"],
        position_ids=pack["position_ids"],
        attention_mask=None,
        use_cache=False,
        boundaries=pack["boundaries"],
        longest=longest,
    ).last_hidden_state
    pooled = hidden[0, pack["last"]]
    with torch.autocast(pooled.device.type, enabled=False):
        return nn.functional.linear(pooled.float(), classifier.score.weight.float())


def classifier_of(network):
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def use_packed_attention(network) -> None:
    """Has the network attend within the boundaries of its packs from here on."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    set_attention(network, ATTENTION)


@contextmanager
def attention(network):
    """Packed attention while the block lasts."""
    before = classifier_of(network).config._attn_implementation
    use_packed_attention(network)
    try:
        yield
    finally:
        set_attention(network, before)


def set_attention(network, name: str) -> None:
    classifier = classifier_of(network)
    classifier.config._attn_implementation = name
    classifier.model.config._attn_implementation = name


def attend(module, query, key, value, attention_mask, scaling, boundaries, longest, **_):
    """Causal attention within each sequence, in the form that transformers asks for.

    Args:
        query: [1, heads, tokens, width]; key and value likewise, with fewer heads.
        boundaries: from `pack`. longest: tokens of the longest sequence.

    Returns:
        ([1, tokens, heads, width], None)
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    if query.is_cuda:
        return flash(query, key, value, boundaries, longest), None
    tokens = query.shape[2]
    sequence = torch.bucketize(torch.arange(tokens, device=query.device), boundaries[1:], right=True)
    mask = (sequence[:, None] == sequence[None, :]).tril()
    found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return found.transpose(1, 2), None


def flash(query, key, value, boundaries, longest: int) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # The scale is left to its default, 1 / sqrt(width), which is Qwen2's. Later versions say `window_size`, earlier
    # ones `is_causal`.
    later = "window_size" in inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if later else {"is_causal": True}
    query, key, value = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    return varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **causal)[None]


def prepare_layers(network, compiled: bool, checkpointed: bool) -> None:
    """Compiles the decoder layers (one graph serves all) and has them forget what their backward can compute again.

    Not through transformers' own gradient checkpointing: its versions differ in whether that is outside or inside of
    what is compiled.
    """
    for layer in classifier_of(network).model.layers:
        if compiled:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        if checkpointed:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
