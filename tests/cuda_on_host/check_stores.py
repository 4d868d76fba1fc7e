"""Promise: a kernel writes every element of its output once, and nothing else.

An element that is written twice ends the process (check_shim.py); here is the rest.
"""

from contextlib import contextmanager

import torch
from conftest import DTYPES, FUSED_ADD_DTYPES
from cuda_on_host.plugin import OPS as HOST
from hypothesis import strategies as st
from test_geometry import _C, OPS, draw_gamma, draw_index, draw_tensors, explored, shapes

CPU = torch.device("cpu")


@contextmanager
def recorded():
    """A list that holds, in the end, the runs of memory that were written: where each begins and where it ends."""
    runs = []
    HOST.record_stores(True)
    yield runs
    runs += HOST.recorded_stores()
    HOST.record_stores(False)


def memory_of(tensor, samples=slice(None)):
    """The same of the elements of these samples."""
    places = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(size) * stride
    places = places[samples].flatten().sort().values
    begins = places[places.diff(prepend=torch.tensor([-2])) > 1]
    ends = places[places.diff(append=torch.tensor([2**62])) > 1] + 1
    return (tensor.data_ptr() + torch.stack([begins, ends], 1).flatten() * tensor.element_size()).tolist()


@explored
def test_drop_path(data):
    (x,) = draw_tensors(data, CPU, (data.draw(shapes()), data.draw(st.sampled_from(DTYPES))))
    with recorded() as runs:
        out, keep = OPS.drop_path(x, 0.5, True, True)
    assert runs == memory_of(out)
    with recorded() as runs:
        grad_x = OPS.scale_kept(x, keep, 2.0)
    assert runs == memory_of(grad_x)


@explored
def test_drop_path_add(data):
    shape, dtypes = data.draw(shapes()), data.draw(st.sampled_from(FUSED_ADD_DTYPES))
    x, residual = draw_tensors(data, CPU, (shape, dtypes[0]), (shape, dtypes[1]))
    gamma = draw_gamma(data, CPU, shape, dtypes[2])
    with recorded() as runs:
        out, keep = OPS.drop_path_add(x, residual, gamma, 0.5, True, True)
    assert runs == memory_of(out)
    for output_mask in ((True, gamma is not None), (True, False), (False, gamma is not None)):
        with recorded() as runs:
            grad_x, _ = OPS.add_kept_backward(out, x, gamma, keep, 2.0, x.dtype, output_mask)
        assert runs == memory_of(grad_x)


@explored
def test_gather_and_scatter_add(data):
    shape, dtypes = data.draw(shapes()), data.draw(st.sampled_from(FUSED_ADD_DTYPES))
    x, residual = draw_tensors(data, CPU, (shape, dtypes[0]), (shape, dtypes[1]))
    gamma = draw_gamma(data, CPU, shape, dtypes[2])
    kept, slots = draw_index(data, CPU, shape[0])
    with recorded() as runs:
        y = OPS.scale_kept(x, kept, 1.0)
    assert runs == memory_of(y)
    with recorded() as runs:
        out = OPS.add_kept(y, residual, gamma, slots, 2.0)
    assert runs == memory_of(out)
    with recorded() as runs:
        grad_y, _ = OPS.add_kept_backward(out, y, gamma, kept, 2.0, y.dtype, (True, gamma is not None))
    assert runs == memory_of(grad_y)

    x = torch.empty_like(x).copy_(x)  # dense, its dims in the order of x
    with recorded() as runs:
        _C.add_kept_(x, y, slots)
    assert runs == memory_of(x, slots >= 0)


def test_an_index_that_points_nowhere_reads_nothing():
    """On a GPU nobody can refuse it in time."""
    residual, x = torch.zeros(6, 100), torch.ones(8, 100)
    _C.add_kept_(residual, x, torch.tensor([7, 8, -1, -2, 2**40, -(2**40)]))
    assert residual.sum(1).tolist() == [100, 0, 0, 0, 0, 0]
