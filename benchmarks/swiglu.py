"""silu(x Wg) * (x Wu) in one kernel, for the benchmark of runtimes: what a fused engine can gain over compiled PyTorch.

The product of both has twice the columns of its result. Written out and read again, they cost as much memory traffic as
the rest of the layer; here gate and up of the same columns meet in one tile and only the result is written.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS, DEPTH = 128, 256, 64  # of a tile: rows of x, rows of the joined weight, what both share
GROUP = 8  # row tiles that share a column tile while it is in the cache
SMALL = 1024  # rows up to which there are too few tiles for the chip


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Both weights, [N, K] each, as one [2 N, K]: half a tile's rows of one, then those of the other."""
    half, (rows, depth) = COLUMNS // 2, gate.shape
    parts = [weight.view(rows // half, half, depth) for weight in (gate, up)]
    return torch.stack(parts, 1).reshape(2 * rows, depth).contiguous()


def swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    Args:
        x: bf16 [M, K].
        weight: bf16 [2 N, K], interleaved.

    Returns:
        bf16 [M, N].
    """
    if len(x) > SMALL:
        return fused(x, weight)
    gate, up = functional.linear(x, weight).view(len(x), -1, 2, COLUMNS // 2).unbind(2)
    return (functional.silu(gate) * up).reshape(len(x), -1)


@torch.library.custom_op("toxic::swiglu", mutates_args=())
def fused(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    found = x.new_empty(len(x), len(weight) // 2)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    kernel[(processors,)](
        TensorDescriptor.from_tensor(x, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH]),
        TensorDescriptor.from_tensor(found, [ROWS, COLUMNS // 2]),
        *(len(x), len(weight), x.shape[1]),
        *(ROWS, COLUMNS, DEPTH, GROUP, processors),
        num_stages=3,
        num_warps=8,
    )
    return found


@fused.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight) // 2)


@triton.jit
def kernel(
    x,
    weight,
    found,
    m,
    n,
    k,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    group: tl.constexpr,
    processors: tl.constexpr,
):
    """One program per processor, which takes tile after tile."""
    down, across = tl.cdiv(m, rows), tl.cdiv(n, columns)
    for tile in tl.range(tl.program_id(0), down * across, processors, flatten=True):
        first = tile // (group * across) * group
        height = min(down - first, group)
        row, column = first + tile % height, tile % (group * across) // height
        sums = tl.zeros((rows, columns), dtype=tl.float32)
        for step in range(tl.cdiv(k, depth)):
            left = x.load([row * rows, step * depth])
            right = weight.load([column * columns, step * depth])
            sums = tl.dot(left, right.T, sums)
        gate, up = tl.split(tl.permute(tl.reshape(sums, (rows, 2, columns // 2)), (0, 2, 1)))
        answer = gate * tl.sigmoid(gate) * up
        found.store([row * rows, column * (columns // 2)], answer.to(tl.bfloat16))
