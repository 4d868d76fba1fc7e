"""Training steps of whole models on real photographs: several models in turns, their time, losses and peak memory."""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from statistics import median

import torch
from timing import Samples, ratio, summary, turns
from torch import Tensor, nn
from torch.autograd.profiler import profile
from workloads import COMPILED_SUFFIX, NO_DROP_PATH, Backbone

# Trained, and in the losses, but not in the times. cuDNN and cuBLAS prepare for every number of samples that is new.
WARMUP_STEPS = {"cpu": 3, "cuda": 30}
MIN_STEPS = 5  # timed, however busy the machine
MEMORY_STEPS = 3

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report that a machine has no GPU as an error


def photographs(side: int, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of random crops and flips of scikit-learn's two photographs; the label says which of the two."""
    from sklearn.datasets import load_sample_images
    from torchvision.transforms import v2

    photos = [torch.tensor(image, device=device).permute(2, 0, 1) for image in load_sample_images().images]
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=(0.1, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    while True:
        labels = torch.randint(len(photos), (batch,))
        yield torch.stack([augment(photos[i]) for i in labels]), labels.to(device)


def create(backbone: Backbone, device: torch.device, drop_path_rate: float = 0.0) -> nn.Module:
    """The model of the next case, with two classes, in training mode."""
    import timm

    torch.compiler.reset()  # otherwise the recompile limit is met after a few models
    gc.collect()  # the models of the last case
    arguments = {"num_classes": 2, "drop_path_rate": drop_path_rate, **backbone.arguments}
    return timm.create_model(backbone.timm_name, **arguments).to(device).train()


def autocast(device: torch.device) -> torch.autocast:
    """What every step runs in: bfloat16 on CUDA, as it is on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Trainer:
    """A model with its AdamW. A call is one training step and returns the loss.

    ``unused`` are weights that get no gradient, because their branches are left out. Their update is part of the step
    all the same: AdamW updates every weight however many samples are dropped.
    """

    def __init__(self, model: nn.Module, unused: Sequence[nn.Parameter] = ()) -> None:
        self.model = model
        left_out = set(unused)
        self.optimizer = torch.optim.AdamW([w for w in model.parameters() if w not in left_out], lr=1e-4)
        if unused:
            for weight in unused:
                weight.grad = torch.randn_like(weight)
            update = torch.optim.AdamW(unused, lr=1e-4).step
            self.optimizer.register_step_post_hook(lambda *_: update())

    def __call__(self, images: Tensor, labels: Tensor) -> float:
        with autocast(images.device):
            loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()  # which also waits for the device

    def peak_bytes(self, images: Tensor, labels: Tensor) -> int:
        """Memory of one step at its peak: weights, optimizer state, and what torch's allocator hands out on top."""
        self.optimizer.zero_grad()  # then nothing that is older than the step is freed within it
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        held = sum(tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers(), *state])
        if images.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self(images, labels)
            return held + torch.cuda.max_memory_allocated() - before
        with profile(profile_memory=True) as profiler:
            self(images, labels)
        # The profiler knows every allocation, a positive number of bytes, and every release, a negative one.
        events = sorted(
            (event for event in profiler.kineto_results.events() if event.name() == "[memory]"),
            key=lambda event: event.start_ns(),
        )
        return held + max(accumulate(event.nbytes() for event in events))


def train_in_turns(
    trainers: Mapping[str, Callable[[Tensor, Tensor], float]],
    data: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    budget_s: float = math.inf,
) -> tuple[Samples, dict[str, list[float]]]:
    """Times the steps of all trainers, each round on one batch and in another order; and their losses."""
    times_us: Samples = {name: [] for name in trainers}
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    deadline = math.inf
    images, labels = next(data)
    warmup_steps = WARMUP_STEPS[images.device.type]
    for turn in range(-warmup_steps, steps):
        if turn == 0:
            deadline = time.perf_counter() + budget_s
        if turn >= MIN_STEPS and time.perf_counter() > deadline:
            break
        for name in turns(list(trainers), turn):
            if images.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            loss = trainers[name](images, labels)
            elapsed_us = (time.perf_counter() - start) * 1e6
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of {name} is {loss} in training step {turn + warmup_steps}")
            losses[name].append(loss)
            if turn >= 0:
                times_us[name].append(elapsed_us)
        images, labels = next(data)
    return times_us, losses


def describe(label: str, backbone: Backbone, batch: int, device: torch.device) -> dict:
    """What every row says about its model."""
    return {
        "model": label,
        "timm_name": backbone.timm_name,
        "arguments": dict(backbone.arguments),
        "batch": batch,
        "image_side": backbone.side,
        "autocast": "bfloat16" if device.type == "cuda" else None,
    }


def compare(
    trainers: Mapping[str, Trainer],
    data: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    budget_s: float,
    *,
    rest: str,
    dropped: float,
) -> dict:
    """Trains the models in turns, all on the same batches, and compares time, memory and losses.

    ``rest`` names the model in which no branch is computed. What the one without drop path takes beyond it is the time
    of the branches; the ideal step leaves out the share ``dropped`` of that, in each round by itself.
    """
    times_us, losses = train_in_turns(trainers, data, steps, budget_s)
    peaks: dict[str, list[int]] = {name: [] for name in trainers}
    for images, labels in (next(data) for _ in range(MEMORY_STEPS)):
        for name, trainer in trainers.items():
            peaks[name].append(trainer.peak_bytes(images, labels))
    ideal = {}
    for suffix in ("", COMPILED_SUFFIX):
        if rest + suffix in trainers:
            rounds = zip(times_us[rest + suffix], times_us[NO_DROP_PATH + suffix], strict=True)
            ideal[suffix] = [without + (1 - dropped) * (full - without) for without, full in rounds]
    return {
        "steps": len(times_us[NO_DROP_PATH]),
        "times_us": {name: summary(values) for name, values in times_us.items()},
        "ideal_us": {f"ideal{suffix}": summary(values) for suffix, values in ideal.items()},
        "ratio": {
            name: {peer: ratio(times_us[name], times_us[peer]) for peer in trainers if peer not in (name, rest)}
            for name in trainers
        },
        "of_ideal": {
            name: ratio(times_us[name], ideal[COMPILED_SUFFIX if name.endswith(COMPILED_SUFFIX) else ""])
            for name in trainers
        },
        "peak_bytes": {name: median(values) for name, values in peaks.items()},
        "losses": losses,
    }


def with_references(contestants: Sequence[str], references: Sequence[str]) -> list[str]:
    """The contestants behind what they are measured by, which is compiled, too, where a contestant is."""
    suffixes = [COMPILED_SUFFIX] if any(name.endswith(COMPILED_SUFFIX) for name in contestants) else []
    return [name + suffix for suffix in ("", *suffixes) for name in references] + list(contestants)


def as_named(model: nn.Module, name: str) -> nn.Module:
    """The model, under torch.compile where the contestant is called compiled."""
    return torch.compile(model) if name.endswith(COMPILED_SUFFIX) else model
