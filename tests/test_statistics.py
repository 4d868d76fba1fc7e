"""Promise: masks are what independent draws would be, over samples, seeds, calls, layers, steps and ranks.

Seeds are fixed, so nothing flickers. What is tested is in benchmarks/randomness.py, what it came to in
docs/statistics.md.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fixed_slots, philox, predicted_mask
from scipy import stats

from droppath_ext import drop_path

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from randomness import (  # noqa: E402
    EXTREME,
    LAGS,
    LAYERS,
    OFFSETS_A_CALL,
    RANKS,
    RATES,
    SAMPLES,
    SEED,
    SEQUENCES,
    SOURCES,
    STREAMS,
    TESTS,
    TRAININGS,
    calls_of_drop_path,
    correlation_p_values,
    count_kept,
    p_values,
    runs,
    uniformity,
)

ALARM = 1e-4  # of some 400 p-values none is below, by chance, for 24 of 25 choices of the seeds


def _alarms(values):
    """Whether p-values are not what chance would make them: all together, or the smallest of them."""
    return min(uniformity(values)) < ALARM


def _noticed_by(masks, keep_prob):
    return {test for test in TESTS if _alarms(p_values(test, masks, keep_prob))}


def _lags_noticed(streams, keep_prob):
    return {lag for lag in LAGS if _alarms(correlation_p_values(streams, keep_prob, lag))}


# --- sequences of samples, seeds and calls ---


@pytest.mark.parametrize("drop_prob", RATES)
@pytest.mark.parametrize("source", SOURCES)
def test_sequences_are_random(source, drop_prob):
    masks = SOURCES[source](drop_prob)
    assert masks.shape == (SEQUENCES, SAMPLES)
    assert _noticed_by(masks, 1 - drop_prob) == set()


def test_calls_are_random_on_each_device(device):
    assert _noticed_by(calls_of_drop_path(0.3, device), 0.7) == set()


# --- that a test can fail: generators that are not random, and the tests that notice ---


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def _fair(rng):
    return rng.random((SEQUENCES, SAMPLES)) < 0.5


def _period_of_two(rng):
    return np.tile([True, False], (SEQUENCES, SAMPLES // 2))


def _biased(rng):
    return rng.random((SEQUENCES, SAMPLES)) < 0.502


def _exactly_half(rng):
    return rng.permuted(_period_of_two(rng), axis=1)


def _drifting(rng):
    """Within every sequence once above, once below."""
    return rng.random((SEQUENCES, SAMPLES)) < 0.5 + 0.03 * np.sin(np.linspace(0, 2 * np.pi, SAMPLES))


def _sticky(rng):
    """Neighbours are equal in 50.5 % of all cases."""
    return np.logical_xor.accumulate(rng.random((SEQUENCES, SAMPLES)) < 0.495, 1)


def _odd_triples(rng):
    """Any two are independent; of three neighbours an odd number is kept in 50.5 % of all cases."""
    masks = rng.random((SEQUENCES, SAMPLES)) < 0.505
    for i in range(2, SAMPLES):
        masks[:, i] ^= masks[:, i - 1] ^ masks[:, i - 2]
    return masks


def _one_bad_sequence(rng):
    masks = _fair(rng)
    masks[7, 1::10] = masks[7, ::10][: len(masks[7, 1::10])]
    return masks


GENERATORS = {
    _fair: set(),
    _period_of_two: set(TESTS),
    _biased: {"frequency"},
    _exactly_half: {"frequency"},
    _drifting: {"block frequency"},
    _sticky: {"runs", "pairs"},
    _odd_triples: {"triples"},
    _one_bad_sequence: {"runs", "pairs"},
}


@pytest.mark.parametrize(("generator", "tests"), GENERATORS.items())
def test_a_generator_that_is_not_random_is_noticed(generator, tests, rng):
    assert _noticed_by(generator(rng), 0.5) == tests


# --- layers, steps and ranks ---


@pytest.mark.parametrize("drop_prob", RATES)
@pytest.mark.parametrize("training", TRAININGS)
def test_layers_steps_and_ranks_are_independent(training, drop_prob):
    masks = TRAININGS[training](drop_prob)
    for name, streams in STREAMS.items():
        assert _lags_noticed(streams(masks), 1 - drop_prob) == set(), name


def _steps(rng, rows, samples=2**16):
    return rng.random((rows, samples)) < 0.5


def test_a_mask_that_layers_share_shifted_by_a_sample_is_noticed(rng):
    """As if layers counted samples on from each other: no two draws of one moment are equal."""
    shared = _steps(rng, 1)[0]
    layers = np.stack([np.roll(shared, layer) for layer in range(LAYERS)])
    assert 0 not in _lags_noticed(layers, 0.5)
    assert _lags_noticed(layers, 0.5) >= {1, 2, 4, 8}


def test_a_seed_that_ranks_share_is_noticed(rng):
    """All ranks draw the masks of the first."""
    ranks = np.tile(_steps(rng, LAYERS), (RANKS, 1))
    assert _lags_noticed(ranks, 0.5) >= {0}


def test_a_weak_correlation_of_two_layers_is_noticed(rng):
    """Of 48 streams, two that agree in 51.5 % of all samples."""
    streams = _steps(rng, RANKS * LAYERS)
    streams[40] = streams[7] ^ (rng.random(streams.shape[1]) < 0.485)
    assert _lags_noticed(streams, 0.5) == {0}


# --- "fixed": draws without replacement ---

FIXED_SIZES = [(64, 6), (64, 32), (128, 115)]
FIXED_DRAWS = 20_000


def _fixed_masks(size, count):
    slots = [fixed_slots(SEED, OFFSETS_A_CALL * call, size, count) for call in range(FIXED_DRAWS)]
    return (torch.stack(slots) >= 0).numpy()


def _hypergeometric_p_value(masks):
    """How many of the kept lie in the first half of the batch."""
    size, count, half = masks.shape[1], masks[0].sum(), masks.shape[1] // 2
    observed = np.bincount(masks[:, :half].sum(1), minlength=count + 1)
    expected = len(masks) * stats.hypergeom.pmf(np.arange(count + 1), size, count, half)
    likely = np.flatnonzero(expected >= 5)  # chi-square needs as many in each cell: the rest join the outermost
    cells = np.clip(np.arange(count + 1), likely[0], likely[-1])
    return stats.chisquare(np.bincount(cells, observed)[likely], np.bincount(cells, expected)[likely]).pvalue


def _pair_p_values(masks):
    """Of every pair of samples: how often both are kept."""
    size, count = masks.shape[1], masks[0].sum()
    both = count * (count - 1) / (size * (size - 1))
    observed = (masks.T.astype(np.float32) @ masks.astype(np.float32))[np.triu_indices(size, 1)]
    score = (observed - len(masks) * both) / np.sqrt(len(masks) * both * (1 - both))
    return 2 * stats.norm.sf(abs(score))


@pytest.mark.parametrize(("size", "count"), FIXED_SIZES)
def test_fixed_samples_and_pairs_are_those_of_draws_without_replacement(size, count):
    """Each sample is kept K / B of the time, two of them K (K - 1) / (B (B - 1)), halves by the hypergeometric law."""
    masks = _fixed_masks(size, count)
    assert (masks.sum(1) == count).all()
    # The counts add up to a constant, which takes a degree of freedom.
    deviations = masks.sum(0) - FIXED_DRAWS * count / size
    statistic = (deviations**2).sum() / (FIXED_DRAWS * count * (size - count) / (size * (size - 1)))
    assert ALARM < stats.chi2.sf(statistic, size - 1) < 1 - ALARM
    assert not _alarms(_pair_p_values(masks))
    assert ALARM < _hypergeometric_p_value(masks) < 1 - ALARM


@pytest.mark.parametrize("drop_prob", RATES)
def test_fixed_has_as_many_runs_as_chance(drop_prob):
    """Given how many are kept, every arrangement is as likely as any other."""
    count = round(SAMPLES * (1 - drop_prob))
    masks = [fixed_slots(seed, 0, SAMPLES, count) >= 0 for seed in range(SEQUENCES)]
    assert not _alarms(runs(torch.stack(masks).numpy(), 1 - drop_prob))


def test_a_subset_of_neighbours_is_noticed(rng):
    """Every sample as often as any other, but in one run that begins anywhere: pairs and halves tell."""
    size, count = 64, 32
    first = np.roll(np.arange(size) < count, -7)
    masks = np.stack([np.roll(first, shift) for shift in rng.integers(0, size, FIXED_DRAWS)])
    assert _alarms(_pair_p_values(masks))
    assert _hypergeometric_p_value(masks) < ALARM


# --- rates, up to the extremes ---


@pytest.mark.parametrize("drop_prob", [EXTREME, 1 - EXTREME])
def test_extreme_rates(drop_prob):
    """Of 2²⁸ draws some 16 come out the other way."""
    draws = 2**28
    assert stats.binomtest(count_kept(drop_prob, draws), draws, 1 - drop_prob).pvalue > 0.01


def test_a_mask_changes_at_the_very_word_of_philox():
    """Sample b is kept iff r < keep_prob · 2³², for the smallest and the largest r of many, and any between."""
    n = 2**18
    counter = np.zeros((n, 4), np.uint64)
    counter[:, 2] = np.arange(n)
    words = philox(counter, (SEED, 0))[:, 0]
    order = np.argsort(words)
    for sample in order[[0, 1, n // 3, n // 2, -2, -1]]:
        r = int(words[sample])
        dropped, kept = (predicted_mask(SEED, 0, n, 1 - threshold / 2**32).numpy() for threshold in (r, r + 1))
        assert np.flatnonzero(dropped != kept).tolist() == [sample]
        assert kept[sample]
        assert kept.sum() == (words <= r).sum()


@pytest.mark.parametrize("device_rate", [False, True])
def test_never_and_always_are_exact(device, device_rate):
    """Also next to the rates at which one word in 2³² decides, and as a rate that only the device knows."""
    n = 2**22
    x = torch.ones(n, device=device)

    def kept(drop_prob):
        rate = torch.tensor(drop_prob, dtype=torch.float64, device=device) if device_rate else drop_prob
        generator = torch.Generator(device).manual_seed(SEED)
        return int((drop_path(x, rate, True, False, generator=generator) != 0).sum())

    assert kept(0.0) == kept(2.0**-40) == n
    assert kept(1.0) == 0
