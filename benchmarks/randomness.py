"""Statistical tests of masks, and where the masks come from.

tests/test_statistics.py asserts the results, randomness_report.py shows them. Masks are bool [sequences, samples], True
where a sample is kept. All seeds are fixed: the numbers are always the same.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from droppath_ext import _C, drop_path, stochastic_depth

Masks = NDArray[np.bool_]
Values = NDArray[np.float64]

SEED = 2016
SEQUENCES, SAMPLES = 128, 2**14
RATES = (0.1, 0.5, 0.9)
OFFSETS_A_CALL = 4  # by which a call on a GPU advances the offset of its generator


# --- tests of sequences, after NIST SP 800-22 and for any keep_prob: a p-value for each ---


def frequency(masks: Masks, keep_prob: float) -> Values:
    """Are as many kept as keep_prob says?"""
    n = masks.shape[1]
    score = (masks.sum(1) - n * keep_prob) / np.sqrt(n * keep_prob * (1 - keep_prob))
    return 2 * stats.norm.sf(abs(score))


def block_frequency(masks: Masks, keep_prob: float, block: int = 128) -> Values:
    """Also in every block of samples?"""
    kept = masks.reshape(len(masks), -1, block).sum(-1)
    statistic = ((kept - block * keep_prob) ** 2).sum(1) / (block * keep_prob * (1 - keep_prob))
    return stats.chi2.sf(statistic, kept.shape[1])


def runs(masks: Masks, keep_prob: float) -> Values:
    """Do neighbours differ as often as they should, given how many are kept? (Wald and Wolfowitz 1940)"""
    n = masks.shape[1]
    kept = masks.sum(1)
    changes = (masks[:, 1:] != masks[:, :-1]).sum(1)
    mean = 2 * kept * (n - kept) / n
    return 2 * stats.norm.sf(abs(changes - mean) / np.sqrt(mean * (mean - 1) / (n - 1)))


def serial(masks: Masks, keep_prob: float, length: int) -> Values:
    """Does every pattern of so many neighbours come as often as the shorter ones say? (Good 1953)

    Patterns overlap, so Pearson's statistic of their counts is not chi-square, but its second difference is. The
    sequence is a circle.
    """
    codes = sum(np.roll(masks, -i, 1).astype(np.uint8) << i for i in range(length))
    counts = np.stack([np.bincount(sequence, minlength=2**length) for sequence in codes])
    shorter = counts.reshape(len(masks), 2, -1).sum(1)
    shortest = shorter.reshape(len(masks), 2, -1).sum(1)
    of_length, of_shorter, of_shortest = (_pearson(c, keep_prob) for c in (counts, shorter, shortest))
    return stats.chi2.sf(of_length - 2 * of_shorter + of_shortest, 2 ** (length - 2))


def _pearson(counts: NDArray[np.int64], keep_prob: float) -> Values:
    kept = np.array([code.bit_count() for code in range(counts.shape[1])])
    expected = counts.sum(1, keepdims=True) * keep_prob**kept * (1 - keep_prob) ** (kept.max() - kept)
    return ((counts - expected) ** 2 / expected).sum(1)


TESTS: dict[str, Callable[[Masks, float], Values]] = {
    "frequency": frequency,
    "block frequency": block_frequency,
    "runs": runs,
    "pairs": lambda masks, keep_prob: serial(masks, keep_prob, 2),
    "triples": lambda masks, keep_prob: serial(masks, keep_prob, 3),
}


def p_values(test: str, masks: Masks, keep_prob: float) -> Values:
    """Of each sequence; and of all as one, which adds up what is too little to be seen in one of them."""
    return np.append(TESTS[test](masks, keep_prob), TESTS[test](masks.reshape(1, -1), keep_prob))


# --- where sequences come from ---


def predicted(seed: int, call: int, samples: int, drop_prob: float) -> Masks:
    """What a GPU draws in this call from this seed: host and device share the code."""
    return _C.keep_mask(seed, OFFSETS_A_CALL * call, samples, drop_prob).numpy()


def over_samples(drop_prob: float) -> Masks:
    return predicted(SEED, 0, SEQUENCES * SAMPLES, drop_prob).reshape(SEQUENCES, SAMPLES)


def over_seeds(drop_prob: float) -> Masks:
    return np.stack([predicted(seed, 0, SAMPLES, drop_prob) for seed in range(SEQUENCES)])


def over_calls(drop_prob: float) -> Masks:
    return np.stack([predicted(SEED, call, SAMPLES, drop_prob) for call in range(SEQUENCES)])


def sample_over_seeds(drop_prob: float) -> Masks:
    return np.stack([predicted(seed, 0, SEQUENCES, drop_prob) for seed in range(SAMPLES)], 1)


def sample_over_calls(drop_prob: float) -> Masks:
    return np.stack([predicted(SEED, call, SEQUENCES, drop_prob) for call in range(SAMPLES)], 1)


def calls_of_drop_path(drop_prob: float, device: str = "cpu") -> Masks:
    generator, x = torch.Generator(device).manual_seed(SEED), torch.ones(SAMPLES, device=device)
    calls = [drop_path(x, drop_prob, training=True, generator=generator) for _ in range(SEQUENCES)]
    return (torch.stack(calls) != 0).cpu().numpy()


def calls_of_bernoulli(drop_prob: float) -> Masks:
    generator, x = torch.Generator().manual_seed(SEED + 1), torch.zeros(SAMPLES)  # of SEED it draws what drop_path does
    calls = [
        stochastic_depth(x, torch.ones_like, drop_prob, training=True, generator=generator) for _ in range(SEQUENCES)
    ]
    return (torch.stack(calls) != 0).numpy()


def sample_over_calls_of_fixed(drop_prob: float) -> Masks:
    """Within a call samples depend on each other; over the calls, each is kept K / B of the time."""
    batch = 160  # of which every rate takes a whole number
    calls = [
        _C.fixed_slots(SEED, OFFSETS_A_CALL * call, batch, round(batch * (1 - drop_prob))) for call in range(SAMPLES)
    ]
    return (torch.stack(calls, 1)[:SEQUENCES] >= 0).numpy()


SOURCES: dict[str, Callable[[float], Masks]] = {
    "the samples of one call, GPU": over_samples,
    "a call for each of the seeds 0, 1, …, GPU": over_seeds,
    "call after call, GPU": over_calls,
    "one sample over the seeds 0, 1, …, GPU": sample_over_seeds,
    "one sample over the calls, GPU": sample_over_calls,
    "call after call of `drop_path`, CPU": calls_of_drop_path,
    'call after call of `stochastic_depth`, "bernoulli"': calls_of_bernoulli,
    'one sample over the calls, "fixed", GPU': sample_over_calls_of_fixed,
}


# --- correlation between layers, steps and ranks ---

RANKS, LAYERS, STEPS, BATCH = 4, 12, 32, 1024
LAGS = (0, 1, 2, 4, 8, 32)  # in samples


def training_on_gpus(drop_prob: float) -> Masks:
    """[ranks, layers, steps, batch] of a training whose ranks have the seeds SEED, SEED + 1, …"""
    calls = [
        [predicted(SEED + rank, call, BATCH, drop_prob) for call in range(STEPS * LAYERS)] for rank in range(RANKS)
    ]
    return np.stack(calls).reshape(RANKS, STEPS, LAYERS, BATCH).swapaxes(1, 2)


def training_on_cpus(drop_prob: float) -> Masks:
    """The same of CPUs, each rank with its own generator."""
    x, calls = torch.ones(BATCH), []
    for rank in range(RANKS):
        generator = torch.Generator().manual_seed(SEED + rank)
        calls += [drop_path(x, drop_prob, training=True, generator=generator) for _ in range(STEPS * LAYERS)]
    return (torch.stack(calls) != 0).numpy().reshape(RANKS, STEPS, LAYERS, BATCH).swapaxes(1, 2)


TRAININGS = {"GPU": training_on_gpus, "CPU": training_on_cpus}

# What is compared with what, [streams, samples].
STREAMS: dict[str, Callable[[Masks], Masks]] = {
    "layers × ranks": lambda masks: masks.reshape(RANKS * LAYERS, -1),
    "steps": lambda masks: masks.transpose(2, 0, 1, 3).reshape(STEPS, -1),
}


def correlations(streams: Masks, keep_prob: float, lag: int = 0) -> Values:
    """[streams, streams]: each with what the others hold `lag` samples later, in standard deviations of chance."""
    x = torch.from_numpy(streams).float().sub_(keep_prob).div_((keep_prob * (1 - keep_prob)) ** 0.5)
    return (x @ x.roll(-lag, 1).T / x.shape[1] ** 0.5).double().numpy()


def correlation_p_values(streams: Masks, keep_prob: float, lag: int = 0) -> Values:
    """Of all pairs of streams, with a lag of each with itself, too; and of their sum."""
    scores = correlations(streams, keep_prob, lag)
    pairs = scores.ravel() if lag else scores[np.triu_indices(len(scores), 1)]
    return 2 * stats.norm.sf(abs(np.append(pairs, pairs.sum() / np.sqrt(pairs.size))))


# --- many p-values ---


def uniformity(p_values: Values) -> tuple[float, float]:
    """Two p-values: of all of them being uniform (Kolmogorov and Smirnov), and of the smallest among so many."""
    smallest = 1 - (1 - p_values.min()) ** p_values.size
    return float(stats.kstest(p_values, "uniform").pvalue), float(smallest)


# --- rates, up to the extremes ---

EXTREME = 2.0**-24


def count_kept(drop_prob: float, draws: int, seed: int = SEED) -> int:
    """In calls of 2²⁵ samples."""
    return sum(np.count_nonzero(predicted(seed, call, 2**25, drop_prob)) for call in range(draws // 2**25))
