"""Training steps of whole models on real photographs: several models in turns, their time, losses and peak memory."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

import torch
from timing import Samples, turns
from torch import Tensor, nn
from torch.autograd.profiler import profile

WARMUP_STEPS = 3  # trained, and in the losses, but not in the times
MIN_STEPS = 5  # timed, however busy the machine

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


class Trainer:
    """A model with its AdamW. A call is one training step, in bfloat16 autocast on CUDA, and returns the loss."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def __call__(self, images: Tensor, labels: Tensor) -> float:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
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
    for turn in range(-WARMUP_STEPS, steps):
        if turn == 0:
            deadline = time.perf_counter() + budget_s
        if turn >= MIN_STEPS and time.perf_counter() > deadline:
            break
        images, labels = next(data)
        for name in turns(list(trainers), turn):
            if images.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            loss = trainers[name](images, labels)
            elapsed_us = (time.perf_counter() - start) * 1e6
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of {name} is {loss} in training step {turn + WARMUP_STEPS}")
            losses[name].append(loss)
            if turn >= 0:
                times_us[name].append(elapsed_us)
    return times_us, losses
