"""drop_path alone: time, bytes, GB/s and the ratio to each peer over the activations of real models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from peers import COMPILED, COPY, OURS, compiled, eager_ops
from rich.progress import Progress
from timing import Samples, ratio, summary, time_cuda, time_host
from torch import Tensor
from torch.utils.benchmark import Timer

PASSES = {"forward": 1, "forward+backward": 2}  # name -> number of passes over the tensor


@dataclass(frozen=True)
class Activation:
    """One tensor of a real model that drop_path meets: shape of a sample, and the batch on either device."""

    name: str
    sample: tuple[int, ...]
    cpu_batch: int
    cuda_batch: int
    channels_last: bool = False


# CPU, float32: two fit in an L2 of 1 MiB, most in a last-level cache, ConvNeXt-T 56x56 in neither.
# CUDA: 64 MiB and more in float32, but for the tiny one and the last EfficientNet stages.
ACTIVATIONS = (
    Activation("tiny", (4, 16), 8, 8),
    Activation("EfficientNet-B0", (192, 7, 7), 4, 256),
    Activation("EfficientNet-B0", (80, 14, 14), 4, 256, channels_last=True),
    Activation("EfficientNet-B0", (24, 56, 56), 16, 256),
    Activation("ViT-S/16", (197, 384), 8, 256),
    Activation("ViT-B/16", (197, 768), 16, 256),
    Activation("ViT-L/16", (197, 1024), 32, 128),
    Activation("ConvNeXt-T", (384, 14, 14), 32, 256, channels_last=True),
    Activation("ConvNeXt-T", (96, 56, 56), 32, 128),
)
COMPILED_WHEN_QUICK = (ACTIVATIONS[2], ACTIVATIONS[4])


def bytes_moved(tensor_bytes: int, p: float, passes: int) -> float:
    """What this project has to move on average, the byte model behind every GB/s of this benchmark.

    Forward: reads the kept samples, (1 - p)N, and writes the whole output, N. Backward: the same for the gradient.
    Together (2 - p)N a pass; the keep mask, one byte per sample, is left out.
    """
    return passes * (2 - p) * tensor_bytes


def copy_bytes(tensor_bytes: int) -> int:
    """`out.copy_(x)` reads N and writes N."""
    return 2 * tensor_bytes


def combinations(
    dtypes: Sequence[torch.dtype], ps: Sequence[float], quick: bool
) -> Iterator[tuple[torch.dtype, float]]:
    """Every dtype with every p; when quick only those with the first dtype or the first p."""
    return ((d, p) for d, p in product(dtypes, ps) if not quick or d == dtypes[0] or p == ps[0])


def measure(calls: dict[str, Callable[[], object]], device: torch.device, budget_s: float) -> Samples:
    """Microseconds per call: between events on CUDA, from `torch.utils.benchmark` on the CPU."""
    if device.type == "cuda":
        return time_cuda(calls, budget_s)
    threads = torch.get_num_threads()
    return time_host(
        {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}, budget_s
    )


def _calls(
    ops: dict[str, Callable[[Tensor], Tensor]], x: Tensor, grad: Tensor, passes: int
) -> dict[str, Callable[[], object]]:
    """One call without arguments for each op, and the copy of x that is this row's measure of bandwidth."""
    calls: dict[str, Callable[[], object]] = {}
    for name, op in ops.items():
        if passes == 1:
            calls[name] = lambda op=op: op(x)
        else:
            calls[name] = lambda op=op: torch.autograd.grad(op(x), x, grad)
    source, target = x.detach(), torch.empty_like(x)
    calls[COPY] = lambda: target.copy_(source)
    return calls


def _row(activation: Activation, x: Tensor, p: float, pass_name: str, samples: Samples) -> dict:
    tensor_bytes = x.numel() * x.element_size()
    moved = bytes_moved(tensor_bytes, p, PASSES[pass_name])
    times = {name: summary(values) for name, values in samples.items()}
    gb_per_s = moved / times[OURS]["median"] / 1e3
    copy_gb_per_s = copy_bytes(tensor_bytes) / times[COPY]["median"] / 1e3
    return {
        "activation": activation.name,
        "shape": list(x.shape),
        "channels_last": activation.channels_last,
        "dtype": str(x.dtype).removeprefix("torch."),
        "p": p,
        "pass": pass_name,
        "tensor_bytes": tensor_bytes,
        "bytes_moved": moved,
        "times_us": times,
        "gb_per_s": gb_per_s,
        "copy_gb_per_s": copy_gb_per_s,
        "percent_of_copy": 100 * gb_per_s / copy_gb_per_s,
        "ratio": {name: ratio(samples[OURS], samples[name]) for name in samples if name not in (OURS, COPY)},
    }


def run(
    device: torch.device, dtypes: Sequence[torch.dtype], ps: Sequence[float], quick: bool, progress: Progress
) -> list[dict]:
    """One row for each activation, dtype, p and pass. On the CPU the batches of CUDA are added unless quick."""
    eager = eager_ops()
    batches = [(a, a.cpu_batch if device.type == "cpu" else a.cuda_batch) for a in ACTIVATIONS]
    if device.type == "cpu" and not quick:
        batches += [(a, a.cuda_batch) for a in ACTIVATIONS if a.cuda_batch > a.cpu_batch]
    cases = [(a, b, d, p) for d, p in combinations(dtypes, ps, quick) for a, b in batches]
    task = progress.add_task("ops", total=len(cases))
    rows = []
    for activation, batch, dtype, p in cases:
        layout = torch.channels_last if activation.channels_last else torch.contiguous_format
        shape = (batch, *activation.sample)
        progress.update(task, description=f"ops: {activation.name} {list(shape)} {dtype} p={p}", refresh=True)
        # Training's forward records a graph, so x requires a gradient in both passes.
        x = torch.randn(shape, device=device).to(dtype=dtype, memory_format=layout).requires_grad_()
        grad = torch.randn_like(x)
        ops = {name: (lambda x, op=op, p=p: op(x, p)) for name, op in eager.items()}
        # A compiled op moves the same bytes at every p, so one p will do; compilation is what takes the time.
        if p == ps[0] and (not quick or (dtype == dtypes[0] and activation in COMPILED_WHEN_QUICK)):
            torch.compiler.reset()  # otherwise the recompile limit is met after a few activations
            ops |= {label: compiled(eager[name], p) for name, label in COMPILED.items() if name in eager}
        for pass_name, passes in PASSES.items():
            samples = measure(_calls(ops, x, grad, passes), device, budget_s=0.5 if quick else 1.0)
            rows.append(_row(activation, x, p, pass_name, samples))
        progress.advance(task)
    return rows
