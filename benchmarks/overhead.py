"""Host microseconds per call on a tensor so small that nothing but the call itself takes time."""

import copy
import time

import peers
import torch
from rich.progress import Progress
from timing import ratio, summary, time_host
from torch import nn
from torch.utils.benchmark import Timer
from workloads import AS_IS, CONVERT_LEVELS, OPS

from droppath_ext import _C, DropPath, DropPathAdd, convert, drop_path, drop_path_add

SHAPE = (8, 4, 16)
BLOCK_SHAPE = (4, 4, 64)
DOUBLE = "x * 2"
BLOCK = "ViT block"
# Each call as a user writes it, since a wrapper would cost as much as what is measured. The first is the op's baseline.
CALLS = {
    "drop_path": {
        DOUBLE: "x * 2",
        "timm": "timm_drop_path(x, 0.1, True)",
        "torchvision": "stochastic_depth(x, 0.1, 'row')",
        "_C.drop_path": "_C_drop_path(x, 0.1, True, True, None)",
        "drop_path": "drop_path(x, 0.1, True)",
        "DropPath": "DropPath(x)",
    },
    "drop_path_add+gamma": {
        "timm": "residual + timm_drop_path(x * gamma, 0.1, True)",
        "torchvision": "residual + stochastic_depth(x * gamma, 0.1, 'row')",
        "_C.drop_path_add": "_C_drop_path_add(x, residual, gamma, 0.1, True, True, None)",
        "drop_path_add": "drop_path_add(x, residual, 0.1, True, gamma=gamma)",
        "DropPathAdd": "DropPathAdd(x, residual)",
    },
    # Of timm's ViT with LayerScale, of two heads.
    BLOCK: {AS_IS: "as_is(tokens)", **{level: f"{level}(tokens)" for level in CONVERT_LEVELS}},
}
PASSES = {
    "forward, no graph": ("{call}", False),
    "forward": ("{call}", True),
    "forward+backward": ("grad({call}, inputs, g)", True),
}


def _names(op: str, requires_grad: bool, device: torch.device) -> dict[str, object]:
    """What the calls and passes above refer to."""
    x, residual, g = (torch.randn(SHAPE, device=device) for _ in range(3))
    module = DropPathAdd(0.1, dim=SHAPE[-1], init_values=0.1).to(device)
    # gamma is the module's own, so that all calls have one list of inputs.
    tensors = {"x": x, "residual": residual, "gamma": module.gamma}
    for tensor in tensors.values():
        tensor.requires_grad_(requires_grad)
    return tensors | {
        "timm_drop_path": peers.timm_drop_path,
        "stochastic_depth": peers.stochastic_depth,
        "_C_drop_path": _C.drop_path,
        "_C_drop_path_add": _C.drop_path_add,
        "drop_path": drop_path,
        "drop_path_add": drop_path_add,
        "DropPath": DropPath(0.1),
        "DropPathAdd": module,
        "grad": torch.autograd.grad,
        "inputs": [tensors[name] for name in OPS[op].inputs],
        "g": g,
    }


def _block_names(requires_grad: bool, device: torch.device) -> dict[str, object]:
    """What the calls of the block refer to: copies of one block that share its weights."""
    from timm.models.vision_transformer import Block

    tokens = torch.randn(BLOCK_SHAPE, device=device)
    block = Block(BLOCK_SHAPE[-1], 2, qkv_bias=True, init_values=0.1, drop_path=0.1).to(device)
    inputs = [tokens.requires_grad_(requires_grad), *block.requires_grad_(requires_grad).parameters()]

    def converted(level: str) -> nn.Module:
        other = copy.deepcopy(block, {id(weight): weight for weight in block.parameters()})
        convert(other, level, example=tokens.detach(), min_drop_prob=0.0)
        return other

    return {
        "tokens": tokens,
        "as_is": block,
        **{level: converted(level) for level in CONVERT_LEVELS},
        "grad": torch.autograd.grad,
        "inputs": inputs,
        "g": torch.randn(BLOCK_SHAPE, device=device),
    }


def run(device: torch.device, quick: bool, progress: Progress) -> list[dict]:
    """One row for each op and pass: every call's time on one thread and its ratio to the op's baseline."""
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rows = []
    task = progress.add_task("overhead", total=len(CALLS) * len(PASSES))
    for op, calls in CALLS.items():
        if op == BLOCK and peers.LEFT_OUT:
            continue
        calls = {name: call for name, call in calls.items() if name not in peers.LEFT_OUT}
        baseline = next(iter(calls))
        for pass_name, (template, requires_grad) in PASSES.items():
            progress.update(task, description=f"overhead of {op}: {pass_name}", refresh=True)
            names = _block_names(requires_grad, device) if op == BLOCK else _names(op, requires_grad, device)
            # The bare clock: on CUDA the default one would wait for the device and so count its time as the host's.
            timers = {
                name: Timer(template.format(call=call), globals=names, timer=time.perf_counter, num_threads=1)
                for name, call in calls.items()
            }
            samples = time_host(timers, 1.0 if quick else 3.0, settle)
            rows.append(
                {
                    "op": op,
                    "pass": pass_name,
                    "shape": list(BLOCK_SHAPE if op == BLOCK else SHAPE),
                    "dtype": "float32",
                    "baseline": baseline,
                    "times_us": {name: summary(values) for name, values in samples.items()},
                    "ratio": {name: ratio(values, samples[baseline]) for name, values in samples.items()},
                }
            )
            progress.advance(task)
    return rows
