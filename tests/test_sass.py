"""Promise: no CUDA kernel spills, and every full-width one has enough loads in flight, as its machine code shows."""

import sys
from pathlib import Path

import pytest
from conftest import HAS_CUDA

from droppath_ext._native import _C

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import sass  # noqa: E402


@pytest.fixture(scope="module")
def kernels():
    """Those of the extension that is built, for the architectures that it was built for."""
    if not HAS_CUDA:
        pytest.skip("the extension was built without CUDA")
    cuobjdump = sass.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump and nvdisasm")
    return sass.read_kernels(cuobjdump, Path(_C.__file__)) or pytest.skip("the extension holds PTX only")


def test_no_kernel_spills_or_starves_memory(kernels):
    assert any(kernel.is_full_width for kernel in kernels)
    found = sass.problems(kernels)
    assert not found, "\n".join(["", *found])


# --- that the check can fail: machine code written by hand ---

LOAD_A = "LDG.E.128.CONSTANT R4, desc[UR6][R2.64]"
LOAD_B = "@P0 LDG.E.128 R8, desc[UR6][R2.64+0x10]"
USE_A = "FADD R20, R5, R21"
USE_B = "FADD R20, R11, R21"
STORE = "STG.E.128.STRONG.SM desc[UR6][R16.64], R20"
END = "EXIT"


def parsed(*instructions):
    lines = (f"        /*{16 * i:04x}*/    {text} ;    /* 0x0 */" for i, text in enumerate(instructions))
    return sass.parse_sass("\n".join(["\tcode for sm_90", "\t\tFunction : kernel", *lines]))[90, "kernel"]


@pytest.mark.parametrize(
    ("code", "in_flight", "late_loads"),
    [
        pytest.param([LOAD_A, USE_A, LOAD_B, USE_B, STORE, END], 1, 0, id="each_used_at_once"),
        pytest.param([LOAD_A, LOAD_B, USE_A, USE_B, STORE, END], 2, 0, id="used_after_both"),
        pytest.param([LOAD_A, "PRMT R12, R6, 0x7632, R12", LOAD_B, STORE, END], 1, 0, id="half_unpacked_at_once"),
        pytest.param([LOAD_A, USE_A, STORE, LOAD_B, USE_B, STORE, END], 1, 1, id="store_between"),
        pytest.param([LOAD_A, STORE, LOAD_B, USE_A, STORE, END], 2, 1, id="store_between_while_in_flight"),
        pytest.param(["@P1 BRA 0x20", LOAD_A, "BSYNC B0", LOAD_B, USE_A, STORE, END], 2, 0, id="load_branched_around"),
        pytest.param([LOAD_A, USE_A, STORE, "@P1 BRA 0x0", END], 1, 0, id="loop"),
        pytest.param(
            [LOAD_A, LOAD_B, USE_A, USE_B, STORE, "@P1 BRA 0x0", LOAD_A, STORE, END], 2, 0, id="loop_and_rest"
        ),
        pytest.param(
            [LOAD_A, USE_A, STORE, LOAD_B, USE_B, STORE, "@P1 BRA 0x0", END], 1, 1, id="store_between_in_loop"
        ),
        pytest.param(
            ["LDG.E.ENL2.256 R8, R4, desc[UR6][R2.64]", USE_A, USE_B, STORE, END], 2, 0, id="load_of_32_bytes"
        ),
        pytest.param(["LDG.E.64 R4, desc[UR6][R2.64]", "LDS.128 R8, [R1]", STORE, END], 0, 0, id="no_16_byte_loads"),
    ],
)
def test_follow(code, in_flight, late_loads):
    assert sass.follow(parsed(*code)) == (in_flight, late_loads)


def test_four_loads_then_their_use():
    loads = [f"LDG.E.128 R{4 * i}, desc[UR6][R40.64]" for i in range(4)]
    uses = [f"FADD R24, R{4 * i + 3}, R24" for i in range(4)]
    assert sass.follow(parsed(*loads, *uses, STORE, END)) == (4, 0)
    assert sass.instructions_per_vector(parsed(*loads, *uses, STORE, END)) == 10 / 5


def test_instructions_are_those_of_one_turn_of_the_loop():
    code = parsed("NOP", "NOP", LOAD_A, USE_A, "@P2 BRA 0x60", "NOP", STORE, "@P1 BRA 0x20", END)
    assert sass.instructions_per_vector(code) == 5 / 2


def made(code=(LOAD_A, LOAD_B, USE_A, USE_B, STORE, END), name="kernel<float, 4>", arch=90, **resources):
    resources = {"registers": 32, "spilled": 0, "shared": 9216, "threads": 256} | resources
    return sass.Kernel(name, arch, code=parsed(*code), **resources)


def test_problems():
    assert not sass.problems([made()])
    assert sass.problems([made(spilled=8)]) == ["kernel<float, 4> on sm_90 spills 8 bytes a thread."]
    (starved,) = sass.problems([made(registers=128)])
    assert (
        "has 16 KB in flight a multiprocessor, not 24 (16-byte loads a thread: 2; blocks: 2 of 256 threads)" in starved
    )
    (late,) = sass.problems([made([LOAD_A, STORE, LOAD_B, STORE, END])])
    assert "issues 1 of its 16-byte loads after a store" in late


def test_a_kernel_whose_stores_were_split_does_not_pass_for_a_narrow_one():
    narrow = made([USE_A, "STG.E desc[UR6][R16.64], R20", END], name="kernel<float, 1>")
    split = made([LOAD_A, USE_A, "STG.E desc[UR6][R16.64], R20", END])
    assert not sass.problems([narrow])
    assert not sass.problems([narrow, made()])
    assert sass.problems([narrow, split]) == ["kernel<float, *> on sm_90 stores no 16-byte vectors in any width."]


# The blocks are those that the toolkit's cuda_occupancy.h computes.
@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [
        (90, 37, 9216, 256, 6),
        (90, 54, 9216, 256, 4),
        (90, 90, 5120, 256, 2),
        (90, 32, 9216, 256, 8),
        (90, 168, 0, 256, 1),
        (90, 16, 32 << 10, 64, 7),
        (80, 32, 20 << 10, 256, 7),
        (75, 32, 8192, 256, 4),
        (75, 16, 0, 32, 16),
        (86, 32, 8192, 256, 6),
        (120, 29, 1152, 1024, 1),
    ],
)
def test_blocks(arch, registers, shared, threads, blocks):
    kernel = made(arch=arch, registers=registers, shared=shared, threads=threads)
    assert kernel.blocks == blocks
