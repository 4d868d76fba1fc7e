#!/usr/bin/env python
"""Tests the tests: each mutant is a copy of the sources with one fault, which its tests must catch.

    python tests/mutants.py [NAME ...] [--quickest N] [--markdown]

The table of `tests/README.md` lists them. A mutant that survives is named, and the exit status is 1.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
README = TESTS / "README.md"
TABLE = re.compile(r"(?<=<!-- mutants -->\n).*(?=<!-- end of mutants -->)", re.DOTALL)
TIMEOUT = 900  # seconds: a mutant may wait for ever

sys.path[:0] = [str(ROOT), str(TESTS), str(ROOT / "benchmarks")]
import native_build  # noqa: E402
from cuda_on_host import run as cuda_on_host  # noqa: E402
from native_build import Change  # noqa: E402

# Of what is no CUDA kernel, with their names in the table.
OTHER_BUILDS = {"cpu": "CPU", "cpu_address": "CPU, address", "python": "Python"}


@dataclass(frozen=True)
class Mutant:
    name: str
    fault: str
    file: str
    old: str  # text that the file holds once
    new: str
    tests: tuple[str, ...]
    build: str = "plain"  # CUDA on the host, see cuda_on_host/run.py; or one of OTHER_BUILDS

    @property
    def change(self) -> Change:
        return Change(self.file, self.old, self.new)

    @property
    def is_cuda(self) -> bool:
        return self.build in cuda_on_host.BUILDS


# Of tests that would all fail, those that take the least.
MUTANTS = [
    Mutant(
        "cuda_vector_tail",
        "a thread stores a vector behind its tile",
        "csrc/cuda/add_kept.cuh",
        "vector >= vectors",
        "vector > vectors",
        ("test_layouts.py::test_writes_nothing_outside_the_output",),
    ),
    Mutant(
        "cuda_misaligned_path",
        "every address passes for aligned",
        "csrc/cuda/launcher.cuh",
        "(sizeof(T) * kWidth) == 0",
        "(sizeof(T) * kWidth) >= 0",
        ("test_layouts.py::test_misaligned_views[cpu-1-0-0-drop_path]",),
        "address",
    ),
    Mutant(
        "cuda_mask_index",
        "the mask is read by the row, not by its sample",
        "csrc/cuda/add_kept.cuh",
        "sources(location.sample, writes_mask)",
        "sources(tile.first_row + i, writes_mask)",
        ("test_layouts.py::test_layout",),
    ),
    Mutant(
        "cuda_offset_of_32_bits",
        "positions in the output are counted in 32 bits",
        "csrc/cuda/add_kept.cuh",
        "const int64_t first_position",
        "const int first_position",
        ("cuda_on_host/check_offsets.py::test_drop_path_add",),
    ),
    Mutant(
        "cuda_missing_last_block",
        "the number of blocks is rounded down",
        "csrc/cuda/tiling.h",
        "return ceil_div(rows.count, rows_per_tile) *",
        "return rows.count / rows_per_tile *",
        ("test_layouts.py::test_odd_sizes_have_no_tail_bugs",),
        "pattern",
    ),
    Mutant(
        "cuda_gamma_stride",
        "gamma is read as if it were dense",
        "csrc/cuda/add_kept.cu",
        "dense_gamma = gamma->contiguous();",
        "dense_gamma = *gamma;",
        ("test_layouts.py::test_add_takes_any_view_of_gamma",),
    ),
    Mutant(
        "cuda_backward_scale",
        "the gradient of gamma is not scaled",
        "csrc/cuda/gamma_grad.cuh",
        "sum *= factor == nullptr ? scale : scale * static_cast<F>(*factor);",
        "",
        ("test_semantics.py::test_formula",),
    ),
    Mutant(
        "cuda_scale_of_nothing",
        "a gradient of gamma to which nothing was added is scaled",
        "csrc/cuda/gamma_grad.cuh",
        "if (sum != 0) {",
        "{",
        ("test_ops.py::test_infinite_scale_of_what_is_not_kept",),
    ),
    Mutant(
        "cuda_factor",
        "a scale that only the device knows is left out",
        "csrc/cuda/operands.cuh",
        "factor == nullptr ? scale : scale * static_cast<F>(*factor)",
        "scale",
        ("test_options.py::test_factors_of_the_ops",),
    ),
    Mutant(
        "cuda_rate",
        "a rate that only the device knows is not clamped",
        "csrc/cuda/draws.cu",
        "clamped_rate(*drop_prob)",
        "static_cast<double>(*drop_prob)",
        ("test_options.py::test_rate_that_only_the_device_knows",),
    ),
    Mutant(
        "cuda_rounding",
        "bfloat16 is rounded towards zero",
        "csrc/cuda/vector.cuh",
        "__float2bfloat16_rn(x)",
        "__float2bfloat16_rz(x)",
        ("test_semantics.py::test_formula",),
    ),
    Mutant(
        "cuda_row_behind_the_last_sample",
        "a step over the last sample does not begin anew",
        "csrc/rows.h",
        "location.sample >= samples",
        "location.sample > samples",
        ("test_layouts.py::test_add_layout_with_gamma_along_any_dim[cpu-sequence_first-dtype2]",),
    ),
    Mutant(
        "cuda_generator_not_advanced",
        "every call draws with the state of the first",
        "csrc/cuda/draws.cu",
        "return cuda_generator->philox_cuda_state(/*increment=*/4);",
        "static const auto state = cuda_generator->philox_cuda_state(/*increment=*/4);\n  return state;",
        ("test_random.py::test_each_call_advances_the_generator",),
    ),
    Mutant(
        "cuda_removed_barrier",
        "nobody waits for the offsets of the tile's rows",
        "csrc/cuda/add_kept.cuh",
        "__syncthreads();",
        "",
        ("test_layouts.py::test_layout",),
        "reversed",
    ),
    Mutant(
        "cuda_removed_barrier_in_order",
        "the same; that the first thread runs first hides it from all but ThreadSanitizer",
        "csrc/cuda/add_kept.cuh",
        "__syncthreads();",
        "",
        ("test_semantics.py::test_formula",),
        "thread",
    ),
    Mutant(
        "cuda_removed_barrier_of_the_sums",
        "nobody waits for the sums of other lines",
        "csrc/cuda/gamma_grad.cuh",
        "__syncthreads();\n  // The sum of",
        "// The sum of",
        ("test_layouts.py::test_add_layout_with_gamma_along_any_dim[cpu-feature_map-dtype2]",),
        "reversed",
    ),
    Mutant(
        "cuda_removed_barrier_between_turns",
        "the counts of a turn are written while those of the one before are read",
        "csrc/cuda/draw_fixed.cuh",
        "slot += all;\n    __syncthreads();",
        "slot += all;",
        ("test_sampling.py::test_fixed_is_the_predicted_subset",),
        "thread",
    ),
    Mutant(
        "cuda_wrong_warp_mask",
        "a ballot names half of the warp",
        "csrc/cuda/draw_fixed.cuh",
        "__ballot_sync(0xffffffff,",
        "__ballot_sync(0x0000ffff,",
        ("test_sampling.py::test_fixed_is_the_predicted_subset",),
    ),
    Mutant(
        "cuda_dropped_row_read",
        "a gather reads in front of x where the index is -1",
        "csrc/cuda/add_kept.cuh",
        "is_kept[i] = offset != kDropped;\n      if (is_kept[i]) {",
        "is_kept[i] = offset != kDropped;\n      if (true) {",
        ("test_ops.py::test_scale_kept",),
        "address",
    ),
    Mutant(
        "cuda_slots_off_by_one",
        "every slot is the next one",
        "csrc/cuda/draw_fixed.cuh",
        "is_kept ? slot + before : kDropped",
        "is_kept ? slot + before + 1 : kDropped",
        ("test_sampling.py::test_fixed_is_the_predicted_subset",),
    ),
    Mutant(
        "cpu_vector_tail",
        "the last element of a span is left out",
        "csrc/cpu/loops.inc",
        "walk<kFull<F>>(i, n, body);",
        "walk<kFull<F>>(i, n - 1, body);",
        ("test_layouts.py::test_odd_sizes_have_no_tail_bugs",),
        "cpu",
    ),
    Mutant(
        "cpu_misaligned_stream",
        "lines are streamed to wherever a span begins",
        "csrc/cpu/loops.inc",
        "const int64_t head = (",
        "const int64_t head = 0 * (",
        ("test_layouts.py::test_add_beyond_the_caches[cpu-contiguous-float32-float32-None]",),
        "cpu",
    ),
    Mutant(
        "cpu_missing_fence",
        "no fence behind streamed stores",
        "csrc/cpu/loops.cpp",
        "_mm_sfence();",
        "",
        ("test_fences.py::test_whoever_streams_is_fenced",),
        "cpu",
    ),
    Mutant(
        "cpu_mask_index",
        "every sample has the first one's entry of the mask",
        "csrc/cpu/parallel_rows.h",
        "keep_[sample] ?",
        "keep_[0] ?",
        ("test_semantics.py::test_formula",),
        "cpu",
    ),
    Mutant(
        "cpu_mask_behind_its_end",
        "the byte behind the mask is read, and not used",
        "csrc/cpu/parallel_rows.h",
        "last < end && keep_[last] == keep_[sample]",
        "keep_[last] == keep_[sample] && last < end",
        ("test_semantics.py::test_formula",),
        "cpu_address",
    ),
    Mutant(
        "cpu_missing_last_part",
        "a thread leaves out the part of a row that it ends with",
        "csrc/cpu/loops.inc",
        "std::min(next_row_begin, range.end)",
        "std::min(next_row_begin, range.end / rows.length * rows.length)",
        ("test_layouts.py::test_shared_by_threads",),
        "cpu",
    ),
    Mutant(
        "cpu_gamma_stride",
        "gamma is read as if it were dense",
        "csrc/cpu/operands.h",
        "data + i * stride, sizeof",
        "data + i, sizeof",
        ("test_layouts.py::test_add_takes_any_view_of_gamma",),
        "cpu",
    ),
    Mutant(
        "cpu_few_channels",
        "a block of several rounds of gamma goes back by one round",
        "csrc/cpu/loops.h",
        "blocks <= 64 * kBlock ? blocks :",
        "blocks < 0 ? blocks :",
        ("test_layouts.py::test_add_odd_planes_have_no_tail_bugs",),
        "cpu",
    ),
    Mutant(
        "cpu_backward_scale",
        "the gradient of gamma is not scaled",
        "csrc/cpu/gamma_grad.cpp",
        "(total == 0 ? total : total * static_cast<F>(scale))",
        "(total)",
        ("test_semantics.py::test_formula",),
        "cpu",
    ),
    Mutant(
        "cpu_scale_of_nothing",
        "a gradient of gamma to which nothing was added is scaled",
        "csrc/cpu/gamma_grad.cpp",
        "(total == 0 ? total : total * static_cast<F>(scale))",
        "(total * static_cast<F>(scale))",
        ("test_ops.py::test_infinite_scale_of_what_is_not_kept",),
        "cpu",
    ),
    Mutant(
        "cpu_generator_not_advanced",
        "the seed is drawn from a copy of the generator",
        "csrc/cpu/draws.cpp",
        "return cpu_generator->random64();",
        "return cpu_generator->clone()->random64();",
        ("test_random.py::test_each_call_advances_the_generator",),
        "cpu",
    ),
    Mutant(
        "python_fixed_scale",
        '"fixed" is scaled by 1 / keep_prob, not by B / K',
        "droppath_ext/sampling.py",
        "scale = size / count if scale_by_keep and count else 1.0",
        "scale = reference.keep_scale(drop_prob, scale_by_keep)",
        ("test_skip.py::test_formula_of_tokens",),
        "python",
    ),
    Mutant(
        "python_all_dropped",
        "where all samples are dropped, the branch gets sample -1",
        "droppath_ext/sampling.py",
        "kept.clamp(min=0)",
        "kept",
        ("test_skip.py::test_all_dropped",),
        "python",
    ),
    Mutant(
        "python_dropped_row_read",
        "the composite path multiplies what is dropped by zero",
        "droppath_ext/reference.py",
        "return mask_dropped(x * scale, keep, 0.0)",
        "return x * scale * keep.view(-1, *[1] * (x.ndim - 1))",
        ("test_composite.py::test_composite_drops_to_positive_zero",),
        "python",
    ),
    Mutant(
        "python_scale_rounded",
        "the composite path rounds the scale to the dtype of x",
        "droppath_ext/reference.py",
        "return mask_dropped(x * scale, keep, 0.0)",
        "return mask_dropped(x * x.new_tensor(scale), keep, 0.0)",
        ("test_semantics.py::test_reference_formula",),
        "python",
    ),
    Mutant(
        "python_generator_ignored",
        "the composite path draws with the global generator",
        "droppath_ext/reference.py",
        "bernoulli_(1.0 - drop_prob, generator=generator)",
        "bernoulli_(1.0 - drop_prob)",
        ("test_random.py::test_generator_is_honoured_and_the_global_one_left_alone",),
        "python",
    ),
]


# --- Running ---

# A kernel library takes the place of the extension's kernels where it is loaded behind it.
LOAD_AND_TEST = """
import sys, pytest, torch, droppath_ext
torch.ops.load_library(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""


def run_tests(build: str, tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and output of pytest, with what the tree holds in the place of what the checkout holds."""
    arguments = ["-vv", "-x", *(str(TESTS / test) for test in tests)]
    if build in cuda_on_host.BUILDS:
        environment = cuda_on_host.environment(build, tree)
        command = cuda_on_host.pytest_command(*arguments)
    else:
        environment = {**os.environ, "PYTHONPATH": str(tree if build == "python" else ROOT)}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        if build != "python":
            flags, libraries, variables = cuda_on_host.BUILDS["address"] if build == "cpu_address" else ([], [], {})
            environment |= variables | cuda_on_host.preloading(libraries)
            library = native_build.cpu_library(tree, build, flags)
            command = [sys.executable, "-c", LOAD_AND_TEST, str(library), *command[3:]]
    result = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, timeout=TIMEOUT)
    return result.returncode, result.stdout + result.stderr


def failed_test(status: int, output: str) -> str | None:
    """The test that failed, or in which the process ended; None if all passed."""
    if status == 0:
        return None
    started = re.findall(r"^\S*?(\w+\.py::\w+)", output, re.MULTILINE)
    if status in (2, 3, 4, 5) or not started:  # pytest's: interrupted, internal error, usage, no tests
        raise RuntimeError(f"the tests did not run (status {status}):\n{output[-2000:]}")
    return started[-1]


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    seconds: float
    caught_by: str | None = None
    problem: str = ""

    def row(self) -> list[str]:
        mutant = self.mutant
        build = f"CUDA, {mutant.build}" if mutant.is_cuda else OTHER_BUILDS[mutant.build]
        test = self.caught_by or "**nothing**"
        return [mutant.name, Path(mutant.file).name, mutant.fault, build, test, f"{self.seconds:.0f}"]


COLUMNS = ("mutant", "file", "fault", "kernels", "caught by", "s")


def check(mutant: Mutant) -> Result:
    """Builds the mutant and runs its tests."""
    begin = time.monotonic()
    try:
        tree = native_build.changed_tree(f"mutant_{mutant.name}", [mutant.change], Path(mutant.file).parts[0])
        caught_by = failed_test(*run_tests(mutant.build, tree, mutant.tests))
        problem = "" if caught_by else "SURVIVES: its tests pass"
    except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        caught_by, problem = None, str(error)
    return Result(mutant, time.monotonic() - begin, caught_by, problem)


def check_unchanged(build: str, mutants: Sequence[Mutant]) -> str:
    """What is wrong with the mutants' tests where nothing is changed; empty if they pass."""
    tests = tuple(dict.fromkeys(test for mutant in mutants if mutant.build == build for test in mutant.tests))
    try:
        test = failed_test(*run_tests(build, ROOT, tests))
    except RuntimeError as error:
        return str(error)
    return f"{test} fails without a mutant (kernels: {build})" if test else ""


# --- The table ---


def read_table() -> list[list[str]]:
    """The rows of tests/README.md."""
    found = TABLE.search(README.read_text())
    assert found, f"{README} has no table of mutants"
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in found[0].strip().splitlines()[2:]]


def write_table(results: Sequence[Result]) -> None:
    rows = [[f"`{name}`", f"`{file}`", *rest] for name, file, *rest in (result.row() for result in results)]
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    README.write_text(TABLE.sub(lambda _: "\n".join([*lines, ""]), README.read_text()))


def quickest(count: int) -> list[Mutant]:
    """Those that take the least by the table, with one of CUDA at least."""
    seconds = {row[0]: float(row[-1]) for row in read_table()}
    ordered = sorted(MUTANTS, key=lambda mutant: seconds.get(mutant.name, TIMEOUT))
    cuda = [mutant for mutant in ordered if mutant.is_cuda]
    return [cuda[0], *(mutant for mutant in ordered if mutant is not cuda[0])][:count]


def choose(names: Sequence[str], count: int) -> list[Mutant]:
    """Those of these names and the ``count`` quickest; without either, all."""
    quick = quickest(count) if count else []
    wanted = {*names, *(mutant.name for mutant in quick)}
    return [mutant for mutant in MUTANTS if not wanted or mutant.name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [mutant.name for mutant in MUTANTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants; default: all")
    parser.add_argument(
        "--quickest", type=int, metavar="N", help="also the N that take the least, one of CUDA at least"
    )
    parser.add_argument("--markdown", action="store_true", help="write the table of tests/README.md anew")
    options = parser.parse_args(arguments)
    if unknown := set(options.names).difference(names):
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    if options.markdown and (options.names or options.quickest):
        parser.error("--markdown needs all mutants")
    chosen = choose(options.names, options.quickest or 0)
    if reason := native_build.without_cuda():
        print(f"mutants of CUDA are left out: {reason}")
        chosen = [mutant for mutant in chosen if not mutant.is_cuda]

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        builds = dict.fromkeys(mutant.build for mutant in chosen)
        if wrong := list(filter(None, pool.map(lambda build: check_unchanged(build, chosen), builds))):
            print("\n".join(wrong))
            return 1
        results = []
        for result in pool.map(check, chosen):
            print(f"{result.mutant.name:36} {result.seconds:4.0f} s  {result.caught_by or result.problem}", flush=True)
            results.append(result)
    if options.markdown:
        write_table(results)
    missed = [result.mutant.name for result in results if not result.caught_by]
    print(
        f"{len(results) - len(missed)} of {len(results)} mutants are caught"
        + (f", but not {', '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
