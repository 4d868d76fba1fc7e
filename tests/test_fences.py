"""Promise: what a CPU kernel streams past the caches is there for every thread once the op has returned.

On x86 a streamed store is ordered by nothing but a fence. That one is missing shows in next to no run, but it does show
in the machine code: whoever streams has a fence behind it, or all those who call it have.
"""

import re
import shutil
import subprocess
from collections import defaultdict

import pytest
import torch

from droppath_ext._native import _C


class Code:
    """A listing of objdump: the functions that stream, those that hold a fence, and by whom a function is named."""

    def __init__(self, listing):
        self.streaming = set()
        self.fenced = set()
        self.callers = defaultdict(set)
        function = None
        for line in listing.splitlines():
            if heading := re.match(r"[0-9a-f]+ <(.+)>:$", line):
                function = self._name(heading[1])
                continue
            if re.search(r"\tv?movnt", line):
                self.streaming.add(function)
            if "\tsfence" in line:
                self.fenced.add(function)
            # Whoever takes a function's address may call it.
            if (named := re.search(r"<(.+)>$", line)) and self._name(named[1]) != function:
                self.callers[self._name(named[1])].add(function)

    @staticmethod
    def _name(symbol):
        """f for f+0x10, f@plt, which leads to f, and f.cold, which is part of f."""
        return re.match(r"(.+?)(\.cold)?(@.*|\+0x[0-9a-f]+)?$", symbol)[1]

    def is_fenced(self, function, seen=()):
        if function in self.fenced:
            return True
        callers = self.callers[function].difference(seen)
        return bool(callers) and all(self.is_fenced(caller, (*seen, function)) for caller in callers)

    def unfenced(self):
        return sorted(function for function in self.streaming if not self.is_fenced(function))


def test_whoever_streams_is_fenced():
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    # The extension's kernels, and those that were loaded into their place.
    binaries = [_C.__file__, *torch.ops.loaded_libraries]
    codes = [
        Code(subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", path], text=True)) for path in binaries
    ]
    if not any(code.streaming for code in codes):
        pytest.skip("no kernel of this build streams")
    assert not [function for code in codes for function in code.unfenced()]


# --- that the check can fail: listings written by hand ---

STREAM = "vmovntdq %ymm0,(%rdi)"
FENCE = "sfence"


def call(function):
    return f"call   1040 <{function}>"


def unfenced(**functions):
    lines = []
    for name, instructions in functions.items():
        lines += ["", f"0000000000001000 <{name}>:", *(f"    1000:\t{text}" for text in instructions)]
    return Code("\n".join(lines)).unfenced()


def test_a_fence_may_stand_anywhere_above():
    assert unfenced(loop=[STREAM, FENCE]) == []
    assert unfenced(loop=[STREAM], span=[call("loop"), FENCE]) == []
    assert (
        unfenced(loop=[STREAM], span=[call("loop@plt")], body=["lea    0x9f(%rip),%rax        # 3a5e <span>", FENCE])
        == []
    )


def test_a_missing_fence_is_found():
    assert unfenced(loop=[STREAM]) == ["loop"]
    assert unfenced(loop=["movntdq %xmm0,(%rdi)"], span=[call("loop")]) == ["loop"]
    assert unfenced(loop=[STREAM], span=[call("loop"), FENCE], other=[call("loop")]) == ["loop"]
    assert unfenced(loop=[STREAM, "jne    1010 <loop+0x10>"]) == ["loop"]
    assert unfenced(loop=[STREAM], other=[FENCE]) == ["loop"]
    assert unfenced(loop=[STREAM, call("span")], span=[call("loop")]) == ["loop"]
