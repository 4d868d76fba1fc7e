"""Promise: torch's generators only, reproducible, unbiased, independent, and exactly predictable."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import (
    DTYPES,
    FUSED_ADD_DTYPES,
    add_inputs,
    added_samples,
    assert_same_bits,
    draw_seed,
    dtypes_id,
    generator_state,
    kept_samples,
    needs_native,
    philox,
    predict_keep,
    predicted_mask,
    random_tensor,
    seeded,
    twin_of,
)

from droppath_ext import drop_path, drop_path_add, reference

MASKS = ["fused", "composite"]


def _draw(device, path, count, drop_prob, generator=None):
    """One keep mask of `count` samples, as the path under test draws it."""
    x = torch.ones(count, 1, device=device)
    if path == "composite":
        return reference.draw_keep_mask_in_aten(x, drop_prob, "row", generator).flatten()
    return kept_samples(drop_path(x, drop_prob, training=True, generator=generator))


def _chi_square_2x2(a, b):
    """Pearson's statistic of independence of two bool vectors; chi-square with one degree of freedom."""
    table = torch.stack([(a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()]).double().view(2, 2)
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    return ((table - expected) ** 2 / expected).sum().item()


# --- the draw ---


def test_philox_known_answers():
    """Vectors published with Random123: they vouch for the function that the next test trusts."""
    zeros, ones = np.zeros((1, 4), np.uint32), np.full((1, 4), 0xFFFFFFFF, np.uint32)
    assert philox(zeros, (0, 0))[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(ones, (0xFFFFFFFF, 0xFFFFFFFF))[0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 4, 2**35 + 8])
@pytest.mark.parametrize("drop_prob", [0.25, 0.5, 0.9])
def test_mask_isphilox(seed, offset, drop_prob):
    """Sample b is kept iff r(seed, subsequence=b, offset) < keep_prob * 2**32.

    Generators count the offset in 32-bit numbers, Philox its counter in blocks of four.
    """
    batch, block = 5000, offset // 4
    counter = np.zeros((batch, 4), np.uint64)
    counter[:, 0], counter[:, 1], counter[:, 2] = block & 0xFFFFFFFF, block >> 32, np.arange(batch)
    r = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[:, 0]
    expected = torch.from_numpy(r < (1 - drop_prob) * 2**32)
    assert torch.equal(predicted_mask(seed, offset, batch, drop_prob), expected)


@pytest.mark.parametrize("batch", [0, 1, 5, 4096, 70_001])
@pytest.mark.parametrize("drop_prob", [0.0, 0.1, 0.5, 1.0])
def test_mask_depends_on_seed_offset_and_sample_alone(batch, drop_prob):
    mask = predicted_mask(123, 8, batch, drop_prob)
    assert mask.dtype == torch.bool
    assert mask.shape == (batch,)
    assert torch.equal(mask, predicted_mask(123, 8, 100_000, drop_prob)[:batch])
    if drop_prob in (0.0, 1.0):
        assert mask.eq(drop_prob == 0).all()


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("batch", [1, 7, 5000])
def test_drawn_mask_is_the_predicted_mask(device, mode, drop_prob, batch):
    x = torch.ones(batch, 3, device=device)
    for seed in (0, 2**40, 2**64 - 1):
        torch.manual_seed(seed)
        for _ in range(3):
            expected = predict_keep(x, drop_prob, mode)
            assert expected.shape == ((batch,) if mode == "row" else (1,))
            out = drop_path(x, drop_prob, training=True, mode=mode)
            assert torch.equal(kept_samples(out), expected.expand(batch))


@needs_native
def test_a_call_takes_one_number_from_the_cpu_generator():
    for count, mode in [(1, "row"), (5000, "row"), (5000, "batch")]:
        twin = twin_of(torch.default_generator)
        drop_path(torch.ones(count, 2), 0.5, training=True, mode=mode)
        draw_seed(twin)
        assert torch.equal(twin.get_state(), torch.get_rng_state())


def test_mask_does_not_depend_on_dtype_shape_layout_or_threads(device):
    shapes = [(600,), (600, 1), (600, 7), (600, 3, 4, 5)]
    inputs = [torch.ones(shape, dtype=dtype, device=device) for shape in shapes for dtype in DTYPES]
    inputs += [torch.ones(7, 600, device=device).t(), torch.ones(600, 2, 4, 4, device=device)[:, :, ::2]]
    inputs += [torch.ones(600, 2000, device=device)]  # large enough for several threads
    threads = torch.get_num_threads()
    masks = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for x in inputs:
                masks.append(kept_samples(drop_path(x, 0.5, training=True, generator=seeded(device, 5))))
    finally:
        torch.set_num_threads(threads)
    assert 200 < masks[0].sum() < 400
    assert all(torch.equal(mask, masks[0]) for mask in masks)


# --- its statistics: fixed seeds, so a bound of 4.5 standard deviations never flickers ---


@pytest.mark.parametrize("path", MASKS)
@pytest.mark.parametrize("drop_prob", [0.001, 0.1, 0.3, 0.5, 0.77, 0.99])
def test_keep_rate_is_binomial(device, path, drop_prob):
    n = 200_000
    for seed in range(3):
        torch.manual_seed(seed)
        kept = _draw(device, path, n, drop_prob).sum().item()
        sigma = math.sqrt(n * drop_prob * (1 - drop_prob))
        assert abs(kept - n * (1 - drop_prob)) < 4.5 * sigma


@pytest.mark.parametrize("path", MASKS)
@pytest.mark.parametrize("drop_prob", [0.1, 0.5])
def test_samples_are_independent(device, path, drop_prob):
    mask = _draw(device, path, 200_000, drop_prob)
    for lag in (1, 2, 3, 4, 8, 32, 256, 1024):
        assert _chi_square_2x2(mask[:-lag], mask[lag:]) < 20, f"lag {lag}"  # P(chi2_1 > 20) = 8e-6
    assert _chi_square_2x2(mask[0::2][:1000], mask[1::2][:1000]) < 20


@pytest.mark.parametrize("path", MASKS)
def test_patterns_of_eight_samples_are_uniform(device, path):
    mask = _draw(device, path, 8 * 50_000, 0.5).view(-1, 8).cpu()
    codes = (mask.long() << torch.arange(8)).sum(1)
    counts = torch.bincount(codes, minlength=256).double()
    expected = len(codes) / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert 150 < chi_square < 380  # 255 degrees of freedom: mean 255, standard deviation 22.6


@pytest.mark.parametrize("path", MASKS)
def test_calls_are_independent(device, path):
    masks = [_draw(device, path, 100_000, 0.3) for _ in range(4)]
    for i in range(4):
        for j in range(i):
            assert _chi_square_2x2(masks[i], masks[j]) < 20


@pytest.mark.parametrize("path", MASKS)
def test_one_sample_over_many_calls(device, path):
    """What a training loop with batch size 1 sees: successive draws of sample 0 are a fair coin too."""
    draws = torch.cat([_draw(device, path, 1, 0.5) for _ in range(4000)])
    assert abs(draws.sum().item() - 2000) < 4.5 * math.sqrt(1000)
    assert _chi_square_2x2(draws[:-1], draws[1:]) < 20


# --- seeds and generators ---


@pytest.mark.parametrize("path", MASKS)
def test_manual_seed_reproduces(device, path):
    def three_masks(seed):
        torch.manual_seed(seed)
        return torch.stack([_draw(device, path, 1000, 0.5) for _ in range(3)])

    assert torch.equal(three_masks(3), three_masks(3))
    assert not torch.equal(three_masks(3), three_masks(4))


@pytest.mark.parametrize("path", MASKS)
def test_each_call_advances_the_generator(device, path):
    generator = seeded(device)
    states, masks = [generator.get_state()], []
    for _ in range(4):
        masks.append(_draw(device, path, 500, 0.5, generator))
        states.append(generator.get_state())
    for i in range(4):
        assert not torch.equal(states[i], states[i + 1])
        for j in range(i):
            assert not torch.equal(masks[i], masks[j])


@pytest.mark.parametrize("path", MASKS)
def test_generator_is_honoured_and_the_global_one_left_alone(device, path):
    before = generator_state(device)
    first, second = (_draw(device, path, 1000, 0.5, seeded(device, 9)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, _draw(device, path, 1000, 0.5, seeded(device, 10)))
    assert torch.equal(generator_state(device), before)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_generator_draws_what_the_global_one_would(device, mode):
    x = random_tensor((64, 5), device=device)
    torch.manual_seed(42)
    expected = drop_path(x, 0.5, training=True, mode=mode)
    assert_same_bits(drop_path(x, 0.5, training=True, mode=mode, generator=seeded(device, 42)), expected)


def test_state_can_be_saved_and_restored(device):
    x = random_tensor((200, 3), device=device)
    generator = seeded(device, 1)
    drop_path(x, 0.5, training=True, generator=generator)
    state = generator.get_state()
    expected = drop_path(x, 0.5, training=True, generator=generator)
    generator.set_state(state)
    assert_same_bits(drop_path(x, 0.5, training=True, generator=generator), expected)


def test_fork_rng_shields_the_global_generator(device):
    before = generator_state(device)
    with torch.random.fork_rng():
        drop_path(torch.ones(8, 2, device=device), 0.5, training=True)
        assert not torch.equal(generator_state(device), before)
    assert torch.equal(generator_state(device), before)


def test_threads_share_the_generator_safely(device):
    """Calls release the interpreter lock: whatever the order, each takes the next draw and no two take the same."""
    x = torch.ones(300, 2, device=device)
    torch.manual_seed(1)
    expected = [tuple(kept_samples(drop_path(x, 0.5, training=True)).tolist()) for _ in range(64)]
    torch.manual_seed(1)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda _: drop_path(x, 0.5, training=True), range(64)))
    assert sorted(tuple(kept_samples(out).tolist()) for out in outs) == sorted(expected)


# --- drop_path_add draws as drop_path does ---

FLOATS = (torch.float32,) * 3


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9, 1.0])
def test_add_draws_the_mask_of_drop_path(device, dtypes, mode, drop_prob):
    """From the same seed the same samples, call after call, and the same random numbers consumed."""
    x, residual, gamma = add_inputs((200, 5), dtypes, device)
    torch.manual_seed(4)
    expected = [kept_samples(drop_path(x, drop_prob, training=True, mode=mode)) for _ in range(3)]
    after = generator_state(device)
    torch.manual_seed(4)
    for keep in expected:
        out = drop_path_add(x, residual, drop_prob, training=True, gamma=gamma, mode=mode)
        assert torch.equal(added_samples(out, residual), keep)
    assert torch.equal(generator_state(device), after)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("batch", [1, 7, 5000])
def test_add_drawn_mask_is_the_predicted_mask(device, mode, drop_prob, batch):
    x, residual, gamma = add_inputs((batch, 3), FLOATS, device)
    for seed in (0, 2**40, 2**64 - 1):
        torch.manual_seed(seed)
        for _ in range(3):
            expected = predict_keep(x, drop_prob, mode)
            out = drop_path_add(x, residual, drop_prob, training=True, gamma=gamma, mode=mode)
            assert torch.equal(added_samples(out, residual), expected.expand(batch))


def test_add_mask_does_not_depend_on_dtype_shape_layout_gamma_or_threads(device):
    cases = [add_inputs(shape, dtypes, device) for shape in [(600, 7), (600, 3, 4, 5)] for dtypes in FUSED_ADD_DTYPES]
    cases.append(add_inputs((600, 200), FLOATS, device))  # large enough for several threads
    x, residual, gamma = add_inputs((7, 600), FLOATS, device, (7,))
    cases.append((x.t(), residual.t(), gamma))
    threads = torch.get_num_threads()
    masks = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for x, residual, gamma in cases:
                out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma, generator=seeded(device, 5))
                masks.append(added_samples(out, residual))
    finally:
        torch.set_num_threads(threads)
    assert 200 < masks[0].sum() < 400
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("with_gamma", [False, True])
def test_add_manual_seed_reproduces(device, with_gamma):
    x, residual, gamma = add_inputs((1000, 2), FLOATS if with_gamma else (*FLOATS[:2], None), device)

    def three(seed):
        torch.manual_seed(seed)
        return torch.stack([drop_path_add(x, residual, 0.5, training=True, gamma=gamma) for _ in range(3)])

    first = three(3)
    assert_same_bits(three(3), first)
    assert not torch.equal(three(4), first)
    assert not torch.equal(first[0], first[1])


# The pair that a kernel serves, and one that it does not.
GENERATOR_DTYPES = [FLOATS, (torch.float32, torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("dtypes", GENERATOR_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_add_generator_is_honoured_and_the_global_one_left_alone(device, dtypes, mode):
    x, residual, gamma = add_inputs((1000, 2), dtypes, device)
    generator = seeded(device, 9)
    before = generator_state(device)

    def draw(generator):
        out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma, mode=mode, generator=generator)
        return added_samples(out, residual)

    drawn = [draw(generator) for _ in range(8)]
    assert torch.equal(generator_state(device), before)
    same = seeded(device, 9)
    for mask in drawn:
        assert torch.equal(draw(same), mask)
    assert torch.equal(same.get_state(), generator.get_state())
    assert len({tuple(mask.tolist()) for mask in drawn}) == (8 if mode == "row" else 2)


@pytest.mark.parametrize("dtypes", GENERATOR_DTYPES, ids=dtypes_id)
def test_add_each_call_advances_the_generator(device, dtypes):
    x, residual, gamma = add_inputs((500, 2), dtypes, device)
    generator = seeded(device)
    states = [generator.get_state()]
    for _ in range(4):
        drop_path_add(x, residual, 0.5, training=True, gamma=gamma, generator=generator)
        states.append(generator.get_state())
    for i in range(4):
        assert not torch.equal(states[i], states[i + 1])


@pytest.mark.parametrize("dtypes", GENERATOR_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False), (1.0, False)])
def test_add_draws_nothing_where_nothing_is_dropped(device, dtypes, drop_prob, training):
    x, residual, gamma = add_inputs((50, 2), dtypes, device)
    generator = seeded(device)
    before, own = generator_state(device), generator.get_state()
    drop_path_add(x, residual, drop_prob, training, gamma=gamma)
    drop_path_add(x, residual, drop_prob, training, gamma=gamma, generator=generator)
    assert torch.equal(generator_state(device), before)
    assert torch.equal(generator.get_state(), own)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_add_generator_draws_what_the_global_one_would(device, mode):
    x, residual, gamma = add_inputs((64, 5), FLOATS, device)
    torch.manual_seed(42)
    expected = drop_path_add(x, residual, 0.5, training=True, gamma=gamma, mode=mode)
    actual = drop_path_add(x, residual, 0.5, training=True, gamma=gamma, mode=mode, generator=seeded(device, 42))
    assert_same_bits(actual, expected)


def test_add_threads_share_the_generator_safely(device):
    """Calls release the interpreter lock: whatever the order, each takes the next draw and no two take the same."""
    x, residual, gamma = add_inputs((300, 2), FLOATS, device)

    def draw(_):
        return drop_path_add(x, residual, 0.5, training=True, gamma=gamma)

    torch.manual_seed(1)
    expected = [tuple(added_samples(draw(None), residual).tolist()) for _ in range(64)]
    torch.manual_seed(1)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(draw, range(64)))
    assert sorted(tuple(added_samples(out, residual).tolist()) for out in outs) == sorted(expected)
