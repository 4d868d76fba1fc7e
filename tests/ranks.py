"""Runs a function in several processes that form a process group."""

import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

RANKS = 2


def reports(task, tmp_path):
    """What ``task(rank)``, a function of a module, returns on each rank."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_run, args=(rank, tmp_path / "store", task, results), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=120) for _ in processes)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    for report in found.values():
        assert not isinstance(report, str), report
    assert all(process.exitcode == 0 for process in processes)
    return [found[rank] for rank in range(RANKS)]


def _run(rank, path, task, results):
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(path), RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
        results.put((rank, task(rank)))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))
        sys.exit(1)
