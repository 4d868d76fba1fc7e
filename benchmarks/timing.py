"""Timing of several calls against each other.

All contestants take turns, round after round, each round in another order: what drifts on a shared machine (clock,
neighbours, temperature) then hits all of them alike, and two contestants are compared within the same round.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils.benchmark import Timer

Samples = dict[str, list[float]]  # name -> microseconds per call, one entry per round

BLOCK_S = 0.01  # the first calls of a block find caches and heap as another contestant left them
FLUSH_BYTES = 1 << 30


def turns(names: Sequence[str], turn: int) -> list[str]:
    """The order of one round: shuffled, or a contestant would always find the caches and the heap of the same other."""
    return random.Random(turn).sample(names, len(names))


def time_host(timers: Mapping[str, Timer], budget_s: float, settle: Callable[[], None] = lambda: None) -> Samples:
    """Host time of each timer's statement, in blocks of about 10 ms, `settle` called between them.

    Runs until `budget_s` is used up, 5 rounds at least and 50 at most.
    """
    # The calibration is also the warm-up: allocator, lazy initialisation and compilation all happen there.
    median_s = {name: timer.blocked_autorange(min_run_time=0.005).median for name, timer in timers.items()}
    samples: Samples = {name: [] for name in timers}
    end = time.perf_counter() + budget_s
    for turn in range(50):
        if turn >= 5 and time.perf_counter() > end:
            break
        for name in turns(list(timers), turn):
            settle()
            samples[name].append(timers[name].timeit(max(1, int(BLOCK_S / median_s[name]))).mean * 1e6)
    return samples


def time_cuda(calls: Mapping[str, Callable[[], object]], budget_s: float) -> Samples:
    """Device time of each call between two CUDA events, L2 flushed before; at least 20 rounds, about `budget_s` long.

    The flush writes far more than any L2 holds. It evicts the inputs, and it keeps the device busy while the host
    queues the call, so that a slow launch does not count as kernel time.
    """
    total_memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    flush = torch.empty(min(FLUSH_BYTES, total_memory // 8), dtype=torch.int8, device="cuda")
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls.values():
        flush.zero_()
        call()
    torch.cuda.synchronize()
    rounds = min(max(20, int(budget_s / (time.perf_counter() - start))), 200)

    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in turns(list(calls), turn):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            calls[name]()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) * 1e3 for begin, end in pairs] for name, pairs in events.items()}


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile and minimum."""
    p20, median, p80 = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {"median": median.item(), "p20": p20.item(), "p80": p80.item(), "min": min(samples)}


def ratio(samples: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the rounds of `samples / baseline`; steadier than the quotient of two medians."""
    return summary([a / b for a, b in zip(samples, baseline, strict=True)])["median"]
