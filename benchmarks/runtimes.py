"""How fast one GPU classifies messages with the merged model: PyTorch as it is, compiled and fused, and ONNX Runtime.

    python benchmarks/runtimes.py [--checkpoint=FOLDER] [--runtimes=eager,compiled,fused,onnxruntime,tensorrt]

Three figures for each: the median time of one message of 32 tokens; the share of the chip's bf16 rate at 64 messages of
256 tokens; messages per second on the rows of the test split, padded to serving's buckets, at the best batch. A runtime
that cannot run here says why. Needs a prepared workspace and a checkpoint folder, which `train` writes. Prints one JSON
line per figure.
"""

import argparse
import gc
import logging
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks import json_line  # noqa: E402
from tasks import config as configuration  # noqa: E402
from tasks.config import Config  # noqa: E402
from tasks.serving import export_onnx  # noqa: E402
from tasks.training import checkpoint, memory, model  # noqa: E402

log = logging.getLogger(__name__)

REPEATS = 50
WARM_UP = 5
CHECKED = 64  # messages on which a runtime's logits are compared with PyTorch's
TOLERANCE = 0.1  # of the largest logit: the same sums in another order, in bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--batches", default="32,64,128", help="messages in a batch, to find the best")
    parser.add_argument("--messages", type=int, default=4096, help="rows of the test split")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="the chip's dense bf16 rate; an H100's is 989")
    arguments, overrides = parser.parse_known_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    torch._dynamo.config.recompile_limit = 64  # one graph for each batch and bucket
    config = configuration.load(["profile=gpu", *overrides])
    source = Path(arguments.checkpoint or config.workspace / "models" / "finetuned" / "final")
    network, tokenizer = model.load_merged(source)
    network = network.to(getattr(torch, config.serving.dtype))
    rows = real_rows(config, tokenizer, checkpoint.settings(source)["max_length"], arguments.messages)
    linear = memory.Sizes.of(str(source / "merged")).linear
    check = torch.tensor(max(rows.values(), key=len)[:CHECKED]).to(network.device)
    expected = classify(eager(network, config, source), check)
    for name in arguments.runtimes.split(","):
        with torch.inference_mode():
            try:
                figures = measure(name, network, config, source, (check, expected), rows, arguments)
            except Exception as error:
                json_line.of_gpu(name, None, "", why=" ".join(f"{type(error).__name__}: {error}".split())[:300])
                log.exception(name)
                continue
        flops = 2 * linear * 64 * 256
        json_line.of_gpu(f"{name}_1x32_p50", round(1000 * figures["one"], 2), "ms")
        json_line.of_gpu(
            f"{name}_64x256", round(1000 * figures["full"], 1), "ms", logits_off_by=round(figures["difference"], 3)
        )
        share = flops / figures["full"] / (arguments.peak_tflops * 1e12)
        json_line.of_gpu(
            f"{name}_64x256_share_of_peak", round(share, 3), f"of {arguments.peak_tflops:.0f} TFLOP/s bf16"
        )
        for batch, rate in figures["rates"].items():
            best = rate == max(figures["rates"].values())
            json_line.of_gpu(f"{name}_real_rows", round(rate, 1), "messages/s", batch=batch, best=best)
        gc.collect()
        torch.cuda.empty_cache()


def measure(name, network, config: Config, source: Path, checked, rows, arguments) -> dict:
    log.info("%s", name)
    run = RUNTIMES[name](network, config, source)
    difference, largest = (float(of.abs().max()) for of in (classify(run, checked[0]) - checked[1], checked[1]))
    if not difference <= TOLERANCE * largest:
        raise ValueError(
            f"its logits differ from PyTorch's by {difference:.3g}, more than {TOLERANCE} of {largest:.3g}"
        )
    return {
        "difference": difference,
        "one": median_seconds(run, example(network, 1, 32)),
        "full": median_seconds(run, example(network, 64, 256)),
        "rates": {batch: rate(run, rows, batch) for batch in map(int, arguments.batches.split(","))},
    }


def example(network, messages: int, length: int) -> torch.Tensor:
    """Token ids, int64 [messages, length], none of them padding."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, 10_000, (messages, length), generator=generator).to(network.device)


def real_rows(config: Config, tokenizer, max_length: int, messages: int) -> dict[int, list[list[int]]]:
    """Token ids of rows of the test split by the bucket they are padded to."""
    from tasks.data import splits

    texts = splits.read(config.workspace, "test")["text"].to_list()[:messages]
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    rows = {bucket: [] for bucket in config.serving.buckets}
    for row in ids:
        bucket = next(bucket for bucket in rows if bucket >= len(row))
        rows[bucket].append(row + [tokenizer.pad_token_id] * (bucket - len(row)))
    return rows


def classify(run, ids: torch.Tensor) -> torch.Tensor:
    found = run(ids)
    torch.cuda.synchronize()
    return found.clone()


def median_seconds(run, ids: torch.Tensor) -> float:
    """Of one call after another, the logits' arrival included."""
    took = []
    for i in range(WARM_UP + REPEATS):
        started = time.perf_counter()
        run(ids)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return statistics.median(took[WARM_UP:])


def rate(run, rows: dict[int, list[list[int]]], batch: int) -> float:
    """Messages per second over all rows, from lists of ids to logits in the host's memory."""
    batches = []
    for bucket, ids in rows.items():
        for start in range(0, len(ids), batch):
            part = ids[start : start + batch]
            padded = part + [ids[0]] * (batch - len(part))  # a shape that is compiled already
            batches.append(torch.tensor(padded).pin_memory())
    for each in {tuple(ids.shape): ids for ids in batches}.values():
        run(each.cuda())
    torch.cuda.synchronize()
    started = time.perf_counter()
    logits = [run(ids.cuda(non_blocking=True)).to("cpu", non_blocking=True) for ids in batches]
    torch.cuda.synchronize()
    assert len(logits) == len(batches)
    return sum(map(len, rows.values())) / (time.perf_counter() - started)


# The runtimes. Each is a function of (network, config, checkpoint folder) that returns one of ids, int64 [B, T] on the
# GPU, to logits, float [B, 6]. Messages end where padding begins, so no mask is needed: attention is causal.


def forward(network, blocks, ids: torch.Tensor) -> torch.Tensor:
    hidden, positions, rotary = embed(network, ids)
    for block in blocks:
        hidden = block(hidden, position_embeddings=rotary)
    return head(network, ids, positions, hidden)


def embed(network, ids: torch.Tensor):
    hidden = network.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return hidden, positions, network.model.rotary_emb(hidden, positions)


def head(network, ids: torch.Tensor, positions: torch.Tensor, *hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the sum of `hidden`, each [B, T, H], at the last token that is not padding."""
    last = torch.where(ids != network.config.pad_token_id, positions, 0).amax(dim=1)
    rows = torch.arange(len(ids), device=ids.device)
    pooled = network.model.norm(sum(part[rows, last] for part in hidden))
    return functional.linear(pooled.float(), network.score.weight.float())


def eager(network, config: Config, source: Path):
    return torch.inference_mode()(partial(forward, network, network.model.layers))


def compiled(network, config: Config, source: Path):
    """A block compiled, whose code the 28 blocks share, and one CUDA graph of the whole model for each shape."""
    blocks = [torch.compile(layer, dynamic=False) for layer in network.model.layers]
    return graphed(partial(forward, network, blocks))


def fused(network, config: Config, source: Path):
    """Compiled, with fewer and larger products: query, key and value in one, gate and up in one with what follows it
    (benchmarks/swiglu.py), cuDNN's attention."""
    blocks = [torch.compile(Block(layer), dynamic=False) for layer in network.model.layers]

    def forward(ids):
        hidden, positions, rotary = embed(network, ids)
        addend = torch.zeros_like(hidden)
        # tasks/training/model.py turns cuDNN's attention off for its backward pass; there is none here.
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            for block in blocks:
                hidden, addend = block(hidden, addend, rotary)
        return head(network, ids, positions, hidden, addend)

    return graphed(forward)


class Block(nn.Module):
    """One decoder layer of Qwen2. Its last sum is left to the next one, which computes it together with its norm."""

    def __init__(self, layer):
        from benchmarks import swiglu

        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.sizes = [p.out_features for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.head = attention.head_dim
        self.norm, self.after = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = cat([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out, self.down = attention.o_proj, mlp.down_proj
        self.gate_up = nn.Parameter(swiglu.interleave(mlp.gate_proj.weight, mlp.up_proj.weight), requires_grad=False)
        self.swiglu = swiglu.swiglu

    def forward(self, hidden, addend, rotary):
        from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

        hidden = hidden + addend
        batch, length, width = hidden.shape
        parts = self.qkv(self.norm(hidden)).split(self.sizes, dim=-1)
        query, key, value = (part.view(batch, length, -1, self.head).transpose(1, 2) for part in parts)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        between = self.swiglu(self.after(hidden).view(-1, width), self.gate_up)
        return hidden, self.down(between).view(batch, length, width)


def cat(layers: list[nn.Linear]) -> nn.Linear:
    """One linear layer that computes several of the same input."""
    weight = torch.cat([layer.weight for layer in layers])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if layers[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return joined


def graphed(forward):
    """Replays a CUDA graph for each shape: at small batches the host would be slower than the GPU."""
    graphs = {}

    @torch.inference_mode()
    def run(ids):
        if ids.shape not in graphs:
            fixed = ids.clone()
            for _ in range(3):
                forward(fixed)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = forward(fixed)
            graphs[ids.shape] = graph, fixed, found
        graph, fixed, found = graphs[ids.shape]
        fixed.copy_(ids)
        graph.replay()
        return found

    return run


def onnxruntime(network, config: Config, source: Path):
    """The file that `export_onnx` writes, in ONNX Runtime's CUDA provider, bf16 as for TensorRT."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError("this ONNX Runtime has no CUDA provider: install onnxruntime-gpu")
    with tempfile.TemporaryDirectory() as place:
        file = exported(config, source, Path(place))
        session = onnxruntime.InferenceSession(str(file), providers=["CUDAExecutionProvider"])

    def run(ids):
        mask = (ids != network.config.pad_token_id).long()
        found = torch.empty((len(ids), 6), dtype=torch.float32, device=ids.device)
        binding = session.io_binding()
        for name, tensor in (("input_ids", ids.contiguous()), ("attention_mask", mask)):
            binding.bind_input(name, "cuda", 0, np.int64, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output("logits", "cuda", 0, np.float32, tuple(found.shape), found.data_ptr())
        torch.cuda.current_stream().synchronize()
        session.run_with_iobinding(binding)
        return found

    return run


def tensorrt(network, config: Config, source: Path):
    """The plan that `build_engine` writes, in TensorRT."""
    from tasks.serving import build_engine

    trt = build_engine.import_tensorrt(config.serving.tensorrt_package)
    with tempfile.TemporaryDirectory() as place:
        file = exported(config, source, Path(place))
        build_engine.build_plan(config, file, Path(place) / "model.plan")
        plan = (Path(place) / "model.plan").read_bytes()
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan)
    context, buckets = engine.create_execution_context(), config.serving.buckets

    def run(ids):
        stream = torch.cuda.current_stream().cuda_stream
        profile = next(i for i, bucket in enumerate(buckets) if bucket >= ids.shape[1])
        context.set_optimization_profile_async(profile, stream)
        tensors = {"input_ids": ids.contiguous(), "attention_mask": (ids != network.config.pad_token_id).long()}
        for name, tensor in tensors.items():
            context.set_input_shape(name, tuple(tensor.shape))
        tensors["logits"] = torch.empty((len(ids), 6), dtype=torch.float32, device=ids.device)
        tensors["decisions"] = torch.empty((len(ids), 6), dtype=torch.bool, device=ids.device)
        tensors["model_version"] = torch.empty((len(ids), 1), dtype=torch.int64, device=ids.device)
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        context.execute_async_v3(stream)
        return tensors["logits"]

    return run


def exported(config: Config, source: Path, folder: Path) -> Path:
    """The merged model as `export_onnx` writes it."""
    export_onnx.export(config, source, 0, folder / "model.onnx", [])
    log.info("exported")
    return folder / "model.onnx"


RUNTIMES = {function.__name__: function for function in (eager, compiled, fused, onnxruntime, tensorrt)}


if __name__ == "__main__":
    main()
