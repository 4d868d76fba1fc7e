"""Host microseconds per call on a tensor so small that nothing but the call itself takes time."""

import time

import peers
import torch
from rich.progress import Progress
from timing import ratio, summary, time_host
from torch.utils.benchmark import Timer

from droppath_ext import _C, DropPath, drop_path

SHAPE = (8, 4, 16)
BASELINE = "x * 2"
PASSES = {
    "forward, no graph": ("{call}", False),
    "forward": ("{call}", True),
    "forward+backward": ("grad({call}, x, g)", True),
}


def _calls() -> tuple[dict[str, str], dict[str, object]]:
    """Each call as a user writes it, since a wrapper would cost as much as what is measured, and its globals."""
    calls = {BASELINE: BASELINE}
    if peers.timm_drop_path:
        calls["timm"] = "timm_drop_path(x, 0.1, True)"
    if peers.stochastic_depth:
        calls["torchvision"] = "stochastic_depth(x, 0.1, 'row')"
    calls |= {
        "_C.drop_path": "_C_drop_path(x, 0.1, True, True, None)",
        "drop_path": "drop_path(x, 0.1, True)",
        "DropPath": "module(x)",
    }
    return calls, {
        "timm_drop_path": peers.timm_drop_path,
        "stochastic_depth": peers.stochastic_depth,
        "_C_drop_path": _C.drop_path,
        "drop_path": drop_path,
        "module": DropPath(0.1).train(),
        "grad": torch.autograd.grad,
    }


def run(device: torch.device, quick: bool, progress: Progress) -> list[dict]:
    """One row for each pass: every call's time on one thread and its ratio to `x * 2`."""
    calls, names = _calls()
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rows = []
    task = progress.add_task("overhead", total=len(PASSES))
    for pass_name, (template, requires_grad) in PASSES.items():
        progress.update(task, description=f"overhead: {pass_name}", refresh=True)
        x = torch.randn(SHAPE, device=device, requires_grad=requires_grad)
        namespace = names | {"x": x, "g": torch.randn_like(x)}
        # The bare clock: on CUDA the default one would wait for the device and so count its time as the host's.
        timers = {
            name: Timer(template.format(call=call), globals=namespace, timer=time.perf_counter, num_threads=1)
            for name, call in calls.items()
        }
        samples = time_host(timers, 1.0 if quick else 3.0, settle)
        rows.append(
            {
                "pass": pass_name,
                "shape": list(SHAPE),
                "dtype": "float32",
                "times_us": {name: summary(values) for name, values in samples.items()},
                "ratio": {name: ratio(values, samples[BASELINE]) for name, values in samples.items()},
            }
        )
        progress.advance(task)
    return rows
