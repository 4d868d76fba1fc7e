#!/usr/bin/env python
"""What the compiled binary says about each CUDA kernel. No GPU is needed.

    python benchmarks/sass.py                      the extension that is built
    python benchmarks/sass.py FILE...              .so, .o and .cubin files
    python benchmarks/sass.py --compile            csrc/cuda for every default architecture: `make sass`
    python benchmarks/sass.py --arch 8.0,9.0       these architectures only
    python benchmarks/sass.py --markdown FILE      also writes the tables there, dated

The exit status is 1 if a kernel has a problem (`problems`). How the figures are counted: benchmarks/README.md.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a multiprocessor must have in flight to use the bandwidth of memory: 3.35 and 4.8 TB/s * 660 ns / 132.
NEEDED_KB = {"H100": 17, "H200": 24}
NEEDED_KB_OF_TURING = 8  # 672 GB/s * 800 ns / 72; half as many threads fit into its multiprocessors
DETAILED_ARCHS = (90, 80)  # a table of all figures for each

# Warps, blocks and bytes of shared memory of a multiprocessor: the table "Technical Specifications per Compute
# Capability" of NVIDIA's CUDA programming guide. Each has 65,536 registers.
LIMITS = {
    75: (32, 16, 64 << 10),
    80: (64, 32, 164 << 10),
    86: (48, 16, 100 << 10),
    87: (48, 16, 164 << 10),
    89: (48, 24, 100 << 10),
    90: (64, 32, 228 << 10),
    100: (64, 32, 228 << 10),
    103: (64, 32, 228 << 10),
    120: (48, 24, 100 << 10),
    121: (48, 24, 100 << 10),
}


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@!P0", or empty
    opcode: str  # "LDG.E.128.CONSTANT"
    operands: str
    targets: tuple[int, ...] = ()  # where a branch may go

    @cached_property
    def vectors(self) -> int:
        """16-byte vectors that it loads from global memory or stores there."""
        match = re.match(r"(?:LDG?|STG?)\.(?:.*\.)?(128|256)\b", self.opcode)
        return int(match[1]) // 128 if match else 0

    @cached_property
    def loads(self) -> bool:
        return self.vectors > 0 and self.opcode.startswith("LD")

    @cached_property
    def successors(self) -> tuple[int, ...]:
        """Addresses of what may come next. Calls are stepped over: the slow path of a division loads nothing."""
        ends = self.opcode == "BRA" or self.opcode.split(".")[0] in ("EXIT", "RET", "BRX", "BRXU")
        return self.targets + (() if ends and not self.guard else (self.address + 16,))


@dataclass
class Kernel:
    name: str
    arch: int  # 90 for sm_90
    registers: int
    spilled: int  # bytes of local memory of a thread: registers that were spilled, or an array indexed at run time
    shared: int  # bytes of a block
    threads: int  # of a block, as __launch_bounds__ says
    code: Sequence[Instruction] = field(repr=False)

    def __post_init__(self) -> None:
        # By its stores: gamma, in float32, may be loaded in 16-byte vectors beside narrower elements.
        self.is_full_width = any(i.vectors and not i.loads for i in self.code)
        self.in_flight, self.late_loads = follow(self.code)

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at a time, by the rules of the toolkit's cuda_occupancy.h."""
        max_warps, max_blocks, max_shared = LIMITS[self.arch]
        # A warp lives in one of four parts of the multiprocessor and takes its registers there, 256 at a time.
        max_warps = min(max_warps, 4 * (65536 // 4 // round_up(self.registers * 32, 256)))
        # From 8.0 on the system takes 1 KiB for each block. Binaries for 9.0 and later count it themselves.
        reserved = 1024 if 80 <= self.arch < 90 else 0
        shared = max(round_up(self.shared + reserved, 256 if self.arch < 80 else 128), 1)
        return min(max_warps // (round_up(self.threads, 32) // 32), max_blocks, max_shared // shared)

    @property
    def kb_in_flight(self) -> float:
        """Of a multiprocessor that is full of blocks, all threads of which work."""
        return self.in_flight * 16 * self.threads * self.blocks / 1000


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def loops_of(code: Sequence[Instruction]) -> list[range]:
    """The addresses of each loop, from the target of a branch backwards to that branch."""
    ends: dict[int, int] = defaultdict(int)
    for i in code:
        for target in i.targets:
            if target <= i.address:
                ends[target] = max(ends[target], i.address)
    return [range(start, end + 16) for start, end in ends.items()]


def follow(code: Sequence[Instruction]) -> tuple[int, int]:
    """The most 16-byte loads that a thread has in flight, and how many of its loads are late.

    A load is in flight from its instruction to the first that names a register of its result. A late load comes after
    a store of the same batch, so that it cannot share its latency with the loads before that store. A batch ends where
    a loop begins, repeats or ends. All ways that branches may take are followed, until nothing new is found.
    """
    stored = 1 << 256  # beside a bit for each load in flight, that of its first register; it fills four
    loops = loops_of(code)
    steps = []
    for i in code:
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", i.operands)]
        named = sum({1 << number // 4 * 4 for number in registers})
        # A load of 32 bytes names both its results.
        added = sum(1 << number for number in registers[: i.vectors]) if i.loads else stored if i.vectors else 0
        steps.append((i, named, added, [loop for loop in loops if i.address in loop]))
    loops_around = {i.address: around for i, _, _, around in steps}
    before = {code[0].address: 0}  # by address, what may be in flight there
    most, late = 0, set()
    changed = True
    while changed:
        changed = False
        for i, named, added, around in steps:
            if i.address not in before:
                continue
            state = before[i.address]
            if i.loads and state & stored:
                late.add(i.address)
            state = state & ~named | added
            most = max(most, (state & ~stored).bit_count())
            for address in i.successors:
                same_batch = address > i.address and loops_around.get(address) == around
                after = before.get(address, 0) | (state if same_batch else state & ~stored)
                if before.get(address) != after:
                    before[address] = after
                    changed = True
    return most, len(late)


def instructions_per_vector(code: Sequence[Instruction]) -> float:
    """Instructions of the main path, divided by the 16-byte vectors that it loads and stores.

    The main path is the one that moves the most vectors and, among such, is the shortest: through one turn of the loop
    that moves the most, or from the kernel's entry to its end if no loop moves any.
    """
    loops = {loop: sum(i.vectors for i in code if i.address in loop) for loop in loops_of(code)}
    whole = range(code[0].address, code[-1].address + 16)
    span = max((loop for loop in loops if loops[loop]), key=lambda loop: (loops[loop], -len(loop)), default=whole)
    best: dict[int, tuple[int, int]] = {}  # by address, vectors and -instructions from there to the end of the path
    for i in reversed(code):
        if i.address in span:
            ways = [best[address] for address in i.successors if address > i.address and address in best]
            vectors, fewest = max(ways, default=(0, 0))
            best[i.address] = vectors + i.vectors, fewest - 1
    vectors, fewest = best[span.start]
    return -fewest / vectors


def problems(kernels: Iterable[Kernel]) -> list[str]:
    """A sentence for each kernel that spills, and each full-width one that has too little in flight or loads late."""
    found = []
    families = defaultdict(list)
    for kernel in kernels:
        where = f"{kernel.name} on sm_{kernel.arch}"
        need = NEEDED_KB_OF_TURING if kernel.arch < 80 else max(NEEDED_KB.values())
        families[re.sub(r"\b\d+\b", "*", kernel.name), kernel.arch].append(kernel)
        if kernel.spilled:
            found.append(f"{where} spills {kernel.spilled} bytes a thread.")
        if kernel.is_full_width and kernel.kb_in_flight < need:
            found.append(
                f"{where} has {kernel.kb_in_flight:.0f} KB in flight a multiprocessor, not {need} "
                f"(16-byte loads a thread: {kernel.in_flight}; blocks: {kernel.blocks} of {kernel.threads} threads)."
            )
        if kernel.is_full_width and kernel.late_loads:
            found.append(f"{where} issues {kernel.late_loads} of its 16-byte loads after a store of the same batch.")
    for (family, arch), instances in families.items():
        if len(instances) > 1 and not any(kernel.is_full_width for kernel in instances):
            found.append(f"{family} on sm_{arch} stores no 16-byte vectors in any width.")
    return found


def parse_code(text: str, jumps: Mapping[int, tuple[int, ...]]) -> list[Instruction]:
    """The instructions of one function. jumps: the targets of its indirect branches."""
    code = []
    line = r"^\s*/\*([0-9a-f]+)\*/\s+(@\S+ )?\s*([A-Z][\w.]*)\s*([^;]*?)\s*;"
    for address_text, guard, opcode, operands in re.findall(line, text, re.MULTILINE):
        address = int(address_text, 16)
        target = re.search(r"0x([0-9a-f]+)$", operands) if opcode.startswith("BRA") else None
        targets = (int(target[1], 16),) if target else jumps.get(address, ())
        if opcode.startswith(("BRA", "BRX")) and not targets:
            raise ValueError(f"a branch without a target: {opcode} {operands}")
        code.append(Instruction(address, guard.strip(), opcode, operands, targets))
    return code


def parse_sass(text: str, jumps: Mapping[tuple[int, str], dict] | None = None) -> dict[tuple[int, str], list]:
    """The code of each function, by architecture and name, from what `cuobjdump -sass` prints."""
    functions = {}
    for section in re.split(r"^\s*code for sm_", text, flags=re.MULTILINE)[1:]:
        arch = int(re.match(r"\d+", section)[0])
        for function in re.split(r"^\s*Function : ", section, flags=re.MULTILINE)[1:]:
            name, _, listing = function.partition("\n")
            functions[arch, name.strip()] = parse_code(listing, (jumps or {}).get((arch, name.strip()), {}))
    return functions


def parse_elf(text: str) -> tuple[dict, dict]:
    """What each function takes, and the targets of its indirect branches, from what `cuobjdump -elf` prints."""
    taken: dict[tuple[int, str], dict[str, int]] = defaultdict(dict)
    jumps: dict[tuple[int, str], dict[int, tuple[int, ...]]] = defaultdict(dict)
    for elf in re.split(r"^64-bit ELF: ", text, flags=re.MULTILINE)[1:]:
        arch = int(re.search(r"\bsm=(\d+)", elf)[1])
        for name, what, value in re.findall(r"function: (\S+)\(0x\w+\)\s+(register count|frame size): (\w+)", elf):
            taken[arch, name][what] = int(value, 0)
        for name, size in re.findall(r"^\.text\.(\S+)\n.*?smem=(\d+)", elf, re.MULTILINE):
            taken[arch, name]["shared memory"] = int(size)
        for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
            name, _, attributes = section.split("\n\n\n")[0].partition("\n")
            if bounds := re.search(r"EIATTR_MAX_THREADS\s.*\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", attributes):
                x, y, z = (int(size, 16) for size in bounds.groups())
                taken[arch, name]["__launch_bounds__"] = x * y * z
            for branch, targets in re.findall(r"Indirect Branch: (\w+).*\s+Targets:((?: 0x\w+)+)", attributes):
                jumps[arch, name][int(branch, 16)] = tuple(int(target, 16) for target in targets.split())
    return taken, jumps


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """`add_kept<float, void, float, 4, false>` for what the linker calls the kernel."""
    names = sorted(set(mangled))
    command = ["c++filt", "--no-params"]
    text = subprocess.run(command, input="\n".join(names), capture_output=True, text=True, check=True).stdout
    left_out = r"\(anonymous namespace\)::|\b\w+::|_kernel\b|\b__(nv_)?(?=half|bfloat16)"
    return {name: re.sub(left_out, "", line) for name, line in zip(names, text.splitlines(), strict=True)}


def find_cuobjdump() -> Path | None:
    """From CUDA_HOME, PATH, pip's nvidia packages, or Triton, which comes with CUDA builds of torch.

    It needs an nvdisasm, beside it or on PATH.
    """
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if on_path := shutil.which("cuobjdump"):
        folders.append(Path(on_path).parent)
    for package, pattern in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            folders += Path(place).glob(pattern)
    for folder in folders:
        if (folder / "cuobjdump").exists() and ((folder / "nvdisasm").exists() or shutil.which("nvdisasm")):
            return folder / "cuobjdump"
    return None


def dump(cuobjdump: Path, option: str, file: Path) -> str:
    return subprocess.run([cuobjdump, option, file], capture_output=True, text=True, check=True).stdout


def read_kernels(cuobjdump: Path, file: Path, archs: Sequence[int] = ()) -> list[Kernel]:
    """The kernels in a file, of all architectures that it has machine code for or of those named."""
    taken, jumps = parse_elf(dump(cuobjdump, "-elf", file))
    functions = parse_sass(dump(cuobjdump, "-sass", file), jumps)
    names = short_names(name for _, name in functions)
    kernels = []
    for (arch, name), code in functions.items():
        if archs and arch not in archs:
            continue
        wanted = ("register count", "frame size", "shared memory", "__launch_bounds__")
        if missing := [what for what in wanted if what not in taken[arch, name]]:
            raise ValueError(f"{file}: {names[name]} on sm_{arch} has no {' and no '.join(missing)}")
        if arch not in LIMITS:
            raise ValueError(f"{file}: sm_{arch} is not in LIMITS of {__file__}")
        kernels.append(Kernel(names[name], arch, *(taken[arch, name][what] for what in wanted), code))
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.arch))


def default_archs() -> list[int]:
    archs = re.search(r'^DEFAULT_ARCHS = "(.+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    return parse_archs(archs.replace(";", ","))


def parse_archs(text: str) -> list[int]:
    """Of "8.0,9.0" or "12.0+PTX"."""
    archs = [int(re.sub(r"\D", "", arch) or 0) for arch in text.split(",")]
    if unknown := [arch for arch in archs if arch not in LIMITS]:
        known = ", ".join(f"{arch // 10}.{arch % 10}" for arch in LIMITS)
        raise argparse.ArgumentTypeError(f"sm_{unknown[0]} is none of the architectures it knows: {known}")
    return archs


def tables(kernels: Sequence[Kernel], quote: str = "") -> list:
    """All figures of the full-width kernels on DETAILED_ARCHS, then every kernel's registers on every architecture."""
    from report import Table

    made = []
    header = ["kernel", "registers", "spilled bytes", "shared bytes", "threads", "blocks", "loads in flight"]
    header += ["KB in flight", "late loads", "instructions for 16 bytes"]
    need = ", ".join(f"{gpu} needs {kb}" for gpu, kb in NEEDED_KB.items())
    for arch in DETAILED_ARCHS:
        if chosen := [kernel for kernel in kernels if kernel.arch == arch and kernel.is_full_width]:
            made.append(table := Table(f"sm_{arch}, full-width kernels; KB in flight a multiprocessor: {need}", header))
            for k in chosen:
                figures = [k.registers, k.spilled, k.shared, k.threads, k.blocks, k.in_flight]
                figures += [f"{k.kb_in_flight:.0f}", k.late_loads, f"{instructions_per_vector(k.code):.0f}"]
                table.rows.append([f"{quote}{k.name}{quote}", *map(str, figures)])
    archs = sorted({kernel.arch for kernel in kernels})
    made.append(table := Table("Registers, and bytes spilled if any", ["kernel", *(f"sm_{arch}" for arch in archs)]))
    by_name: dict[str, dict[int, str]] = defaultdict(dict)
    for k in kernels:
        by_name[k.name][k.arch] = f"{k.registers}" + (f", {k.spilled} spilled" if k.spilled else "")
    for name, cells in by_name.items():
        table.rows.append([f"{quote}{name}{quote}", *(cells.get(arch, "–") for arch in archs)])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--compile", action="store_true", help="compile csrc/cuda instead of reading files")
    parser.add_argument("--arch", type=parse_archs, help="default: what the files have; with --compile setup.py's")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        sys.exit("sass: no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    files = arguments.files
    if arguments.compile and files:
        parser.error("--compile takes no files: it compiles csrc/cuda.")
    if arguments.compile:
        import native_build

        if reason := native_build.without_cuda():
            sys.exit(f"sass: {reason}")
        files = native_build.compile_cubins(arguments.arch or default_archs())
    elif not files:
        from droppath_ext import _C

        files = [Path(_C.__file__)]
    try:
        kernels = [kernel for file in files for kernel in read_kernels(cuobjdump, file, arguments.arch or ())]
    except subprocess.CalledProcessError as error:
        sys.exit(f"sass: {error.stderr.strip()}")
    kernels.sort(key=lambda kernel: (kernel.name, kernel.arch))
    if not kernels:
        sys.exit(f"sass: no kernels for these architectures in {', '.join(map(str, files))}")

    from report import commit
    from rich.console import Console

    for table in tables(kernels):
        table.show(Console())
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        nvcc = re.search(r"toolkit=([\d.]+)", dump(cuobjdump, "-elf", files[0]))
        head = f"# What the binary says, {date.today()}\n\nCommit {commit()}, nvcc {nvcc[1] if nvcc else 'unknown'}; "
        head += "[how it is counted](../../README.md#sass). Blocks are taken to be full.\n"
        arguments.markdown.write_text("\n".join([head, *(table.markdown() for table in tables(kernels, "`"))]))
    found = problems(kernels)
    print("\n".join(found) or f"Kernels: {len(kernels)}. None spills, and every full-width one has enough in flight.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
