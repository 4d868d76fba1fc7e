"""The ops alone: time, bytes, GB/s and the ratio to each peer over the activations of real models."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import product

import torch
from peers import COMPILED, COPY, OURS, Formula, eager_formulas
from rich.progress import Progress
from timing import Samples, ratio, summary, time_cuda, time_host
from torch import Tensor
from torch.utils.benchmark import Timer
from workloads import ACTIVATIONS, COMPILED_WHEN_QUICK, OPS, PASSES, Activation

# Seconds for a measurement when quick, else twice that. Events on CUDA scatter less than times of the host.
BUDGET_S = {"cpu": 0.4, "cuda": 0.25}


def copy_bytes(tensor_bytes: int) -> int:
    """`out.copy_(x)` reads N and writes N."""
    return 2 * tensor_bytes


def batches(
    activations: Collection[str], batch: int | None, device: torch.device, quick: bool
) -> list[tuple[Activation, int]]:
    """The activations of these names, each with its batch; on the CPU the batches of CUDA are added unless quick."""
    chosen = [a for a in ACTIVATIONS if a.name in activations]
    if batch is not None:
        return [(a, batch) for a in chosen]
    if device.type == "cuda":
        return [(a, a.cuda_batch) for a in chosen]
    return [(a, a.cpu_batch) for a in chosen] + [
        (a, a.cuda_batch) for a in chosen if not quick and a.cuda_batch > a.cpu_batch
    ]


def measure(calls: dict[str, Callable[[], object]], device: torch.device, budget_s: float) -> Samples:
    """Microseconds per call: between events on CUDA, from `torch.utils.benchmark` on the CPU."""
    if device.type == "cuda":
        return time_cuda(calls, budget_s)
    threads = torch.get_num_threads()
    return time_host(
        {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}, budget_s
    )


def _inputs(
    names: Sequence[str], activation: Activation, batch: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Random tensors. Training's forward records a graph, so all of them require a gradient in both passes."""

    def random() -> Tensor:
        if activation.sequence_first:
            length, *rest = activation.sample
            return torch.randn((length, batch, *rest), device=device).to(dtype).transpose(0, 1)
        layout = torch.channels_last if activation.channels_last else torch.contiguous_format
        return torch.randn((batch, *activation.sample), device=device).to(dtype=dtype, memory_format=layout)

    x, residual = random(), random()
    gamma = torch.randn(activation.gamma, device=device).to(dtype)
    inputs = {"x": x, "residual": residual, "gamma": gamma}
    return [inputs[name].requires_grad_() for name in names]


def _calls(
    formulas: dict[str, Formula], inputs: list[Tensor], grad: Tensor, pass_name: str
) -> dict[str, Callable[[], object]]:
    """One call without arguments for each formula, and the copy of x that is this row's measure of bandwidth."""
    calls: dict[str, Callable[[], object]] = {}
    for name, formula in formulas.items():
        if pass_name == "forward":
            calls[name] = lambda formula=formula: formula(*inputs)
        else:
            calls[name] = lambda formula=formula: torch.autograd.grad(formula(*inputs), inputs, grad)
    source, target = inputs[0].detach(), torch.empty_like(inputs[0])
    calls[COPY] = lambda: target.copy_(source)
    return calls


def _row(op: str, activation: Activation, x: Tensor, p: float, pass_name: str, samples: Samples) -> dict:
    tensor_bytes = x.numel() * x.element_size()
    moved = OPS[op].bytes_moved(tensor_bytes, p, pass_name)
    times = {name: summary(values) for name, values in samples.items()}
    gb_per_s = moved / times[OURS]["median"] / 1e3
    copy_gb_per_s = copy_bytes(tensor_bytes) / times[COPY]["median"] / 1e3
    return {
        "op": op,
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
    device: torch.device,
    quick: bool,
    progress: Progress,
    *,
    ops: Sequence[str],
    activations: Collection[str],
    batch: int | None,
    dtypes: Sequence[torch.dtype],
    ps: Sequence[float],
    seconds: int | None,
) -> list[dict]:
    """One row for each op, dtype, p, activation and pass."""
    eager = eager_formulas()
    budget_s = seconds or BUDGET_S[device.type] * (1 if quick else 2)
    cases = list(product(ops, dtypes, ps, batches(activations, batch, device, quick)))
    task = progress.add_task("ops", total=len(cases))
    rows = []
    for op, dtype, p, (activation, size) in cases:
        inputs = _inputs(OPS[op].inputs, activation, size, dtype, device)
        x, grad = inputs[0], torch.randn_like(inputs[0])
        progress.update(task, description=f"{op}: {activation.name} {list(x.shape)} {dtype} p={p}", refresh=True)
        formulas = {name: partial(formula, p) for name, formula in eager.items()}
        # What a compiled op moves does not depend on p, so one p will do; compilation is what takes the time.
        if p == ps[0] and (not quick or (dtype == dtypes[0] and activation.name == COMPILED_WHEN_QUICK)):
            torch.compiler.reset()  # otherwise the recompile limit is met after a few activations
            formulas |= {
                label: torch.compile(formulas[name], fullgraph=True, dynamic=False)
                for name, label in COMPILED.items()
                if name in formulas
            }
        for pass_name in PASSES:
            samples = measure(_calls(formulas, inputs, grad, pass_name), device, budget_s)
            rows.append(_row(op, activation, x, p, pass_name, samples))
        progress.advance(task)
    return rows
