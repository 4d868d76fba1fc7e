"""What planning a model leaves as it was, although it runs parts of it."""

import contextlib
import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def preserved(root: nn.Module) -> Iterator[None]:
    """Buffers and random number generators are afterwards as they were."""
    places = [(module._buffers, name, buffer) for module in root.modules() for name, buffer in module._buffers.items()]
    values = [(buffer, buffer.clone()) for buffer in root.buffers() if not buffer.is_meta]
    devices = {p.device for p in itertools.chain(root.parameters(), root.buffers()) if p.is_cuda}
    try:
        with preserved_generators(device.index for device in devices):
            yield
    finally:
        for buffers, name, buffer in places:
            buffers[name] = buffer
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):  # else autograd would take it for another
                    buffer.copy_(value)


@contextlib.contextmanager
def preserved_generators(cuda_devices: Iterable[int] = ()) -> Iterator[None]:
    """The random number generators of PyTorch, of Python and, where it is imported, of NumPy."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(cuda_devices)):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)


@contextlib.contextmanager
def unsharded(root: nn.Module) -> Iterator[None]:
    """With the parameters that FSDP2 has sharded at hand, as they are while their modules run."""
    sharded: list[Any] = [
        module for module in root.modules() if hasattr(module, "unshard") and hasattr(module, "reshard")
    ]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
