"""Promise: which samples stochastic_depth computes: unbiased, uniform, independent, and exactly predictable."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import (
    NO_CUDA_REASON,
    SAMPLINGS,
    Recorded,
    added_samples,
    draw_seed,
    fixed_count,
    fixed_slots,
    generator_state,
    philox,
    predict_fixed,
    predict_keep,
    random_tensor,
    seeded,
    skip_scale,
    twin_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

from droppath_ext import drop_path, reference, stochastic_depth
from droppath_ext._native import _C

DRAWS = 20_000
FIXED = ["native", "composite"]


class _Ones(Recorded):
    """The branch is one everywhere, so the output of a zero x is the scale of kept samples."""

    def compute(self, x):
        return torch.ones_like(x)


def _kept(size, drop_prob, device, sampling, generator=None):
    """One keep mask, read off an output; the generator is one of the device that draws."""
    x = torch.zeros(size, 1, device=device)
    out = stochastic_depth(x, torch.ones_like, drop_prob, training=True, sampling=sampling, generator=generator)
    return added_samples(out, x)


def _drawing_device(device, sampling):
    """Where the generator lives."""
    return torch.device("cpu") if sampling == "bernoulli" else device


def _bernoulli_masks(size, drop_prob, draws=DRAWS):
    """bool [draws, size], drawn one after the other as stochastic_depth does."""
    generator, host = seeded("cpu", 1), torch.device("cpu")
    slots = [_C.draw_bernoulli(size, drop_prob, host, generator)[0] for _ in range(draws)]
    return torch.stack(slots) >= 0


def _fixed_masks(path, size, count, device, draws=DRAWS):
    x, generator = torch.empty(size, device=device), seeded(device, 2)
    draw = _C.draw_fixed if path == "native" else reference.draw_fixed_in_aten
    return (torch.stack([draw(x, count, generator)[0] for _ in range(draws)]) >= 0).cpu()


def _standard_score(chi_square, degrees):
    """How many standard deviations a chi-square statistic is off, by the approximation of Wilson and Hilferty."""
    spread = 2 / (9 * degrees)
    return ((chi_square / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def _assert_chi_square(observed, expected, degrees):
    """Fixed seeds, so a bound of 4 standard deviations never flickers; too good a fit is suspicious, too."""
    observed, expected = (torch.as_tensor(t, dtype=torch.float64) for t in (observed, expected))
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    score = _standard_score(statistic, degrees)
    assert abs(score) < 4, f"chi-square {statistic:.1f} with {degrees} degrees of freedom"


def test_the_approximation_of_the_quantiles():
    """Against printed tables of the chi-square distribution: 97.5 % and 99.9 %."""
    for degrees, quantile, high in ((1, 5.024, 10.828), (10, 20.483, 29.588), (100, 129.561, 149.449)):
        assert _standard_score(quantile, degrees) == pytest.approx(1.960, abs=0.06)
        assert _standard_score(high, degrees) == pytest.approx(3.090, abs=0.06)


# --- bernoulli: independent draws ---


@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
def test_bernoulli_keep_rate(drop_prob):
    """Of each sample and of them all; the kept count is binomial."""
    masks = _bernoulli_masks(8, drop_prob)
    kept = masks.sum(0)
    rates = torch.tensor([1 - drop_prob, drop_prob], dtype=torch.float64) * DRAWS
    _assert_chi_square(torch.stack([kept, DRAWS - kept], 1), rates.expand(8, 2), 8)
    _assert_chi_square([kept.sum(), 8 * DRAWS - kept.sum()], rates * 8, 1)
    counts = torch.bincount(masks.sum(1), minlength=9)
    binomial = [math.comb(8, k) * (1 - drop_prob) ** k * drop_prob ** (8 - k) * DRAWS for k in range(9)]
    # Cells that expect few draws are one cell.
    likely = [k for k in range(9) if binomial[k] >= 5]
    observed = [counts[k].item() for k in likely]
    expected = [binomial[k] for k in likely]
    rest = DRAWS - sum(expected)
    if rest >= 5:
        observed, expected = [*observed, DRAWS - sum(observed)], [*expected, rest]
    _assert_chi_square(observed, expected, len(expected) - 1)


@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
def test_bernoulli_samples_are_pairwise_independent(drop_prob):
    masks = _bernoulli_masks(8, drop_prob)
    p, q = drop_prob, 1 - drop_prob
    expected = torch.tensor([p * p, p * q, q * p, q * q], dtype=torch.float64) * DRAWS
    for first, second in combinations(range(8), 2):
        table = torch.bincount(2 * masks[:, first].long() + masks[:, second].long(), minlength=4)
        _assert_chi_square(table, expected, 3)


@pytest.mark.parametrize("drop_prob", [0.1, 0.5])
def test_bernoulli_draws_are_independent_of_the_ones_before(drop_prob):
    masks = _bernoulli_masks(4, drop_prob)
    p, q = drop_prob, 1 - drop_prob
    expected = torch.tensor([p * p, p * q, q * p, q * q], dtype=torch.float64) * (DRAWS / 2)
    for sample in range(4):
        pairs = 2 * masks[0::2, sample].long() + masks[1::2, sample].long()
        _assert_chi_square(torch.bincount(pairs, minlength=4), expected, 3)


@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 7, 5000])
def test_bernoulli_is_the_predicted_mask(device, drop_prob, size):
    """Drawn on the host, wherever x is: the mask that drop_path draws on a CPU."""
    for seed in (0, 2**40, 2**64 - 1):
        torch.manual_seed(seed)
        masks, expected = [], []
        for _ in range(3):
            expected.append(predict_keep(torch.empty(size), drop_prob))
            masks.append(_kept(size, drop_prob, device, "bernoulli").cpu())
        assert torch.equal(torch.stack(masks), torch.stack(expected))
        torch.manual_seed(seed)
        on_cpu = [drop_path(torch.ones(size, 1), drop_prob, training=True).flatten() != 0 for _ in range(3)]
        assert torch.equal(torch.stack(masks), torch.stack(on_cpu))


@pytest.mark.parametrize("drop_prob", [0.3, 1.0])
@pytest.mark.parametrize("size", [1, 7, 5000])
def test_bernoulli_takes_one_number_from_the_host(device, drop_prob, size):
    twin, on_device = twin_of(torch.default_generator), generator_state(device)
    _kept(size, drop_prob, device, "bernoulli")
    draw_seed(twin)
    assert torch.equal(twin.get_state(), torch.get_rng_state())
    assert device.type == "cpu" or torch.equal(generator_state(device), on_device)


class _Copies(TorchDispatchMode):
    """Notes every copy to another device."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.copies.append((args[0].is_pinned(), (kwargs or {}).get("non_blocking", False)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device_type", ["meta", *([] if NO_CUDA_REASON else ["cuda"])])
def test_nobody_goes_on_before_pageable_memory_is_copied(device_type):
    """A copy that does not block reads its source later, when pageable memory may have been freed."""
    with _Copies() as mode:
        _C.draw_bernoulli(8, 0.5, torch.device(device_type))
    assert len(mode.copies) == 1
    for is_pinned, non_blocking in mode.copies:
        assert is_pinned or not non_blocking


@pytest.mark.parametrize("size", [1, 9, 1000])
@pytest.mark.parametrize("drop_prob", [0.0, 0.5, 1.0])
def test_bernoulli_slots_and_kept_are_inverse(device, size, drop_prob):
    """Where no sample is kept there is one row all the same, and it is added to none."""
    slots, kept, count = _C.draw_bernoulli(size, drop_prob, device, None)
    assert (slots.dtype, kept.dtype) == (torch.int64, torch.int64)
    assert slots.device.type == kept.device.type == device.type
    assert count == (slots >= 0).sum()
    assert kept.tolist() == ((slots >= 0).nonzero().flatten().tolist() or [-1])
    assert slots[slots >= 0].tolist() == list(range(count))


# --- fixed: subsets of one size ---

CASES = [(size, drop_prob) for size in (1, 2, 3, 4, 7, 64) for drop_prob in (0.1, 0.5, 0.9)]


@pytest.mark.parametrize(("size", "drop_prob"), [*CASES, (10, 0.96), (5, 0.3), (6, 0.25), (2, 0.75), (1000, 0.4)])
def test_fixed_count(device, size, drop_prob):
    """k = max(1, round(B * keep_prob)), in every call, and the scale is B / k."""
    count = fixed_count(size, drop_prob)
    x = torch.zeros(size, 1, device=device)
    for _ in range(20):
        branch = _Ones()
        out = stochastic_depth(x, branch, drop_prob, training=True, sampling="fixed")
        assert [len(rows) for (rows,) in branch.calls] == [count]
        assert added_samples(out, x).sum() == count
        torch.testing.assert_close(out[out != 0], torch.full((count,), size / count, device=device))
        plain = stochastic_depth(x, branch, drop_prob, True, False, sampling="fixed")
        assert torch.equal(plain[plain != 0], torch.ones(count, device=device))


def test_fixed_count_by_hand():
    """Python rounds half to even."""
    table = {(8, 0.5): 4, (8, 0.9): 1, (2, 0.9): 1, (1, 0.5): 1, (3, 0.5): 2, (5, 0.5): 2, (7, 0.1): 6, (10, 0.04): 10}
    assert {case: fixed_count(*case) for case in table} == table


@pytest.mark.parametrize("path", FIXED)
@pytest.mark.parametrize(("size", "count"), [(7, 3), (64, 6), (64, 58)])
def test_fixed_marginals_are_uniform(device, path, size, count):
    masks = _fixed_masks(path, size, count, device)
    assert masks.sum(1).eq(count).all()
    kept = masks.sum(0)
    # Without replacement the counts vary less than independent ones: by (size - 1) / (size - count) with size - 1
    # degrees of freedom.
    expected = DRAWS * count / size
    statistic = ((kept.double() - expected) ** 2 / expected).sum().item() * (size - 1) / (size - count)
    assert abs(_standard_score(statistic, size - 1)) < 4


@pytest.mark.parametrize("path", FIXED)
@pytest.mark.parametrize(("size", "count"), [(2, 1), (4, 2), (7, 3), (6, 5)])
def test_fixed_subsets_are_uniform(device, path, size, count):
    """Each of the C(B, k) subsets comes as often as any other: no order, no neighbourhood, no first sample matters."""
    masks = _fixed_masks(path, size, count, device)
    codes = (masks.long() << torch.arange(size)).sum(1)
    subsets = torch.tensor([sum(1 << i for i in subset) for subset in combinations(range(size), count)])
    observed = (codes[:, None] == subsets).sum(0)
    assert observed.sum() == DRAWS
    _assert_chi_square(observed, torch.full((len(subsets),), DRAWS / len(subsets)), len(subsets) - 1)


@pytest.mark.parametrize("path", FIXED)
def test_fixed_draws_are_independent_of_the_ones_before(device, path):
    masks = _fixed_masks(path, 4, 1, device)
    places = masks.long().argmax(1)
    table = torch.bincount(4 * places[0::2] + places[1::2], minlength=16)
    _assert_chi_square(table, torch.full((16,), DRAWS / 32), 15)


@pytest.mark.parametrize("path", FIXED)
@pytest.mark.parametrize(("size", "count"), [(1, 1), (5, 5), (7, 3), (300, 1), (5000, 2500), (70_001, 69_000)])
def test_fixed_slots_and_kept_are_inverse(device, path, size, count):
    draw = _C.draw_fixed if path == "native" else reference.draw_fixed_in_aten
    slots, kept = draw(torch.empty(size, device=device), count)
    assert (slots.dtype, slots.shape) == (torch.int64, (size,))
    assert (kept.dtype, kept.shape) == (torch.int64, (count,))
    assert slots.device.type == kept.device.type == device.type
    assert torch.equal(kept, (slots >= 0).nonzero().flatten()), "ascending, so memory is read in order"
    assert torch.equal(slots[kept], torch.arange(count, device=device))
    assert slots.ne(-1).sum() == count


@pytest.mark.parametrize(("size", "count"), [(1, 1), (7, 3), (64, 58), (1000, 1), (5000, 2500)])
def test_fixed_is_the_predicted_subset(device, size, count):
    x = torch.empty(size, device=device)
    for seed in (0, 2**40, 2**64 - 1):
        torch.manual_seed(seed)
        for _ in range(3):
            expected = predict_fixed(x, count)
            slots, kept = _C.draw_fixed(x, count)
            assert torch.equal(slots, expected)
            assert torch.equal(kept, (expected >= 0).nonzero().flatten())


@pytest.mark.parametrize("drop_prob", [0.3, 0.9])
def test_fixed_calls_draw_the_predicted_subsets(device, drop_prob):
    x = torch.zeros(50, 1, device=device)
    for _ in range(3):
        expected = predict_fixed(x, fixed_count(50, drop_prob)) >= 0
        assert torch.equal(_kept(50, drop_prob, device, "fixed"), expected)


def test_fixed_takes_one_number_from_the_cpu_generator():
    for size in (7, 5000):
        twin = twin_of(torch.default_generator)
        _kept(size, 0.5, "cpu", "fixed")
        draw_seed(twin)
        assert torch.equal(twin.get_state(), torch.get_rng_state())


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 2**35 + 8])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (7, 3), (64, 63), (65, 2), (5000, 2500)])
def test_fixed_subset_is_philox(seed, offset, size, count):
    """The samples with the smallest of 64-bit keys; the last bits, as many as they need, are their own numbers."""
    block = offset // 4
    counter = np.zeros((size, 4), np.uint64)
    counter[:, 0], counter[:, 1], counter[:, 2] = block & 0xFFFFFFFF, block >> 32, np.arange(size)
    r = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    bits = (size - 1).bit_length()
    keys = [(((int(a) << 32 | int(b)) << bits) % 2**64) | sample for sample, (a, b) in enumerate(r[:, :2])]
    kept = sorted(sorted(range(size), key=keys.__getitem__)[:count])
    expected = torch.full((size,), -1)
    expected[kept] = torch.arange(count)
    assert torch.equal(fixed_slots(seed, offset, size, count), expected)


def test_fixed_slots_depend_on_the_seed_the_offset_and_the_sizes_alone():
    slots = fixed_slots(123, 8, 1000, 400)
    assert torch.equal(slots, fixed_slots(123, 8, 1000, 400))
    others = [fixed_slots(124, 8, 1000, 400), fixed_slots(123, 12, 1000, 400), fixed_slots(2**63 + 123, 8, 1000, 400)]
    for other in others:
        assert 300 < ((slots >= 0) != (other >= 0)).sum() < 660  # 480 expected
    fewer = fixed_slots(123, 8, 1000, 100) >= 0
    assert (slots >= 0)[fewer].all(), "the samples with the smallest keys"


def test_fixed_does_not_depend_on_dtype_shape_or_threads(device):
    masks = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for dtype in (torch.float16, torch.float64):
                for shape in ((600,), (600, 7), (600, 2, 3, 4)):
                    x = random_tensor(shape, dtype, device)
                    generator = seeded(device, 5)
                    out = stochastic_depth(x, torch.neg, 0.5, training=True, sampling="fixed", generator=generator)
                    masks.append(added_samples(out, x))
    finally:
        torch.set_num_threads(threads)
    assert masks[0].sum() == 300
    assert all(torch.equal(mask, masks[0]) for mask in masks)


# --- the expectation is that of the whole branch ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("size", "drop_prob"), CASES)
def test_expectation_by_the_samples(device, sampling, size, drop_prob):
    """E[scale * keep] is 1 for every sample, over 20,000 draws of the samples."""
    if sampling == "bernoulli":
        masks = _bernoulli_masks(size, drop_prob)
        variance = drop_prob / (1 - drop_prob)
    else:
        count = fixed_count(size, drop_prob)
        masks = _fixed_masks("native", size, count, device)
        variance = size / count - 1
    means = masks.double().mean(0) * skip_scale(size, drop_prob, sampling)
    assert (means - 1).abs().max() <= 4.5 * math.sqrt(variance / DRAWS)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("size", "drop_prob"), CASES)
def test_expectation_of_the_output(device, sampling, size, drop_prob):
    """The mean over many calls is x + gamma * branch(x), as near as the number of calls promises."""
    calls = 600
    x = random_tensor((size, 3), torch.float64, device)
    gamma = random_tensor((3,), torch.float64, device, seed=2)
    added = gamma * (x.sin() + 2)
    total = torch.zeros_like(x)
    for _ in range(calls):
        total += stochastic_depth(
            x, lambda rows: rows.sin() + 2, drop_prob, training=True, gamma=gamma, sampling=sampling
        )
    keep_rate = 1 - drop_prob if sampling == "bernoulli" else fixed_count(size, drop_prob) / size
    sigma = added.abs() * math.sqrt((1 / keep_rate - 1) / calls)
    assert ((total / calls - (x + added)).abs() <= 4.5 * sigma + 1e-12).all()


# --- seeds and generators ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_manual_seed_reproduces(device, sampling):
    def three_masks(seed):
        torch.manual_seed(seed)
        return torch.stack([_kept(1000, 0.5, device, sampling) for _ in range(3)])

    first = three_masks(3)
    assert torch.equal(three_masks(3), first)
    assert not torch.equal(three_masks(4), first)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_generator_is_honoured_and_the_global_one_left_alone(device, sampling):
    on = _drawing_device(device, sampling)
    generator = seeded(on, 9)
    before = generator_state(device), generator_state("cpu")
    states, masks = [generator.get_state()], []
    for _ in range(4):
        masks.append(_kept(500, 0.5, device, sampling, generator))
        states.append(generator.get_state())
    assert torch.equal(generator_state(device), before[0])
    assert torch.equal(generator_state("cpu"), before[1])
    same = seeded(on, 9)
    for i, mask in enumerate(masks):
        assert not torch.equal(states[i], states[i + 1])
        assert torch.equal(_kept(500, 0.5, device, sampling, same), mask)
    assert len({tuple(mask.tolist()) for mask in masks}) == 4
    assert torch.equal(same.get_state(), states[-1])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_generator_draws_what_the_global_one_would(device, sampling):
    torch.manual_seed(42)
    expected = _kept(500, 0.5, device, sampling)
    generator = seeded(_drawing_device(device, sampling), 42)
    assert torch.equal(_kept(500, 0.5, device, sampling, generator), expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_state_can_be_saved_and_restored(device, sampling):
    generator = seeded(_drawing_device(device, sampling), 1)
    _kept(200, 0.5, device, sampling, generator)
    state = generator.get_state()
    expected = _kept(200, 0.5, device, sampling, generator)
    generator.set_state(state)
    assert torch.equal(_kept(200, 0.5, device, sampling, generator), expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_draw_comes_before_the_branch(device, sampling):
    """A branch that draws random numbers itself, as dropout does, finds the generator after the call's own draw."""
    x = random_tensor((20, 3), device=device)
    torch.manual_seed(4)
    keep = added_samples(stochastic_depth(x, torch.neg, 0.5, training=True, sampling=sampling), x)
    torch.manual_seed(4)
    noisy = stochastic_depth(x, lambda rows: rows + torch.rand_like(rows) + 9, 0.5, training=True, sampling=sampling)
    assert torch.equal(added_samples(noisy, x), keep)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_two_calls_draw_apart(device, sampling):
    x = random_tensor((200, 3), device=device)
    inner = []

    def branch(rows):
        inner.append(stochastic_depth(rows, torch.neg, 0.5, training=True, sampling=sampling))
        return inner[-1]

    first, second = (stochastic_depth(x, branch, 0.5, training=True, sampling=sampling) for _ in range(2))
    assert not torch.equal(added_samples(first, x), added_samples(second, x))
    assert len(inner) == 2
