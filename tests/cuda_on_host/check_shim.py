"""Promise: on the host a kernel runs as CUDA says, and what CUDA leaves undefined ends the process with a sentence."""

import faulthandler
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_on_host.plugin import BUILD, OPS

sees_races = pytest.mark.skipif(BUILD != "thread", reason="only ThreadSanitizer sees a race")
sees_addresses = pytest.mark.skipif(BUILD != "address", reason="only AddressSanitizer sees where memory ends")


def run(name, blocks=1, threads=64):
    out = torch.full((blocks * threads,), -1)
    OPS.tiny(out, name, blocks, threads)
    return out


def death_of(*arguments):
    """How a child process ends that runs this tiny kernel, and what it says."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os.dup2(write_end, 2)
        try:
            run(*arguments)
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    return os.waitpid(child, 0)[1], said


# --- what CUDA computes ---


def test_ballot():
    bits = [sum((32 * warp + lane) % 3 == 0 and 1 << lane for lane in range(32)) for warp in range(2)]
    assert run("ballot").tolist() == [bits[thread // 32] for thread in range(64)]


def test_ballot_of_some_lanes():
    bits = [sum(lane % 2 == 0 and (32 * warp + lane) % 3 == 0 and 1 << lane for lane in range(32)) for warp in range(2)]
    expected = [bits[thread // 32] if thread % 2 == 0 else -1 for thread in range(64)]
    assert run("ballot_of_even_lanes").tolist() == expected


def test_shuffle():
    assert run("shuffle").tolist() == [(thread ^ 5) << 40 for thread in range(64)]


def test_shuffles_one_after_the_other():
    assert run("sum_of_warp").tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


@pytest.mark.parametrize("threads", [1, 7, 33, 64, 1024])
def test_syncthreads_count(threads):
    expected = 1000 * len(range(0, threads, 3)) + (threads > 7)
    assert run("two_counts", threads=threads).tolist() == [expected] * threads


@pytest.mark.parametrize("threads", [1, 31, 64, 256])
def test_shared_memory_is_that_of_the_block(threads):
    out = run("mirrored", blocks=3, threads=threads)
    assert torch.equal(out.view(3, threads).flip(1).flatten(), torch.arange(3 * threads))


def test_order_of_turns():
    out = run("turns", blocks=3)
    turns = out - out.min()
    assert torch.equal(turns.flip(0) if BUILD == "reversed" else turns, torch.arange(3 * 64))


def test_some_blocks():
    OPS.run_blocks(1, 2)
    try:
        out = run("mirrored", blocks=4)
    finally:
        OPS.run_blocks(0, 2**63 - 1)
    assert [(block >= 0).all().item() for block in out.view(4, 64)] == [False, True, True, False]


def test_launches_of_several_threads_take_turns():
    with ThreadPoolExecutor(8) as pool:
        for out in pool.map(lambda _: run("mirrored", 3, 256), range(64)):
            assert torch.equal(out.view(3, 256).flip(1).flatten(), torch.arange(3 * 256))


@pytest.mark.skipif(BUILD != "pattern", reason="only the build pattern fills memory")
def test_memory_is_full_of_a_pattern():
    """New tensors, shared memory in each block, and local variables."""
    assert set(torch.empty(1000, dtype=torch.uint8).tolist()) == {0x7F}
    assert set(run("shared_as_it_is", blocks=2).tolist()) == {0x7F7F7F7F7F7F7F7F}
    assert len(set(run("local_as_it_is").tolist()) - {0, -1}) == 1


# --- which elements were written ---


@pytest.fixture
def recording():
    OPS.record_stores(True)
    yield
    OPS.record_stores(False)


def test_stores_are_recorded(recording):
    out = run("stores", 3, 64)
    assert OPS.recorded_stores() == [out.data_ptr(), out.data_ptr() + 3 * 64 * 8]
    OPS.record_stores(True)
    assert OPS.recorded_stores() == []


def test_runs_of_stores_are_joined(recording):
    out = torch.empty(4 * 64, dtype=torch.int64)
    begin, runs = out.data_ptr(), {}
    for block in (0, 2, 1, 3):
        OPS.run_blocks(block, block)
        OPS.tiny(out, "stores", 4, 64)
        runs[block] = [(place - begin) // (64 * 8) for place in OPS.recorded_stores()]
    OPS.run_blocks(0, 2**63 - 1)
    assert runs == {0: [0, 1], 2: [0, 1, 2, 3], 1: [0, 3], 3: [0, 4]}


def test_a_store_written_twice_ends_the_process(recording):
    status, said = death_of("stores_twice")
    assert os.WTERMSIG(status) == signal.SIGABRT
    assert "cuda_on_host: an element of an output is written twice\n" in said


# --- what ends the process ---


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lane_has_left", "a mask names a lane that has left, or that the block does not have"),
        ("lane_is_not_named", "a lane calls a warp collective whose mask does not name it"),
        ("lane_asks_outside_of_mask", "a lane asks for the value of one that the mask does not name"),
        ("two_masks", "lanes that wait for each other call two kinds of warp collective, or give two masks"),
        ("two_collectives", "lanes that wait for each other call two kinds of warp collective, or give two masks"),
        ("two_barriers", "threads of a block wait at two kinds of barrier"),
        ("barrier_without_one", "a thread waits at a barrier for one that has left"),
        ("endless", "threads wait for each other without an end"),
    ],
)
def test_what_cuda_leaves_undefined_ends_the_process(name, sentence):
    status, said = death_of(name)
    assert os.WTERMSIG(status) == signal.SIGABRT
    assert f"cuda_on_host: {sentence}\n" in said


@sees_races
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("race_of_threads", 1),
        ("race_behind_a_barrier", 1),
        ("race_in_a_warp", 1),
        ("race_of_blocks", 2),
        ("race_of_blocks", 20),
        ("race_of_blocks_before_a_barrier", 2),
    ],
)
@pytest.mark.parametrize("threads", [64, 256])
def test_races_are_seen(name, blocks, threads):
    status, said = death_of(name, blocks, threads)
    assert os.WEXITSTATUS(status) == 66
    assert "ThreadSanitizer: data race" in said


@sees_addresses
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("beyond_shared", "index 32 out of bounds"),
        ("beyond_out", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_wrong_addresses_are_seen(name, words):
    status, said = death_of(name, 1, 32)
    assert os.WEXITSTATUS(status) == 1
    assert words in said
