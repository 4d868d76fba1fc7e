#!/usr/bin/env python
"""Fuzzes every entry of the package: public functions and modules, native ops, the functions of `_C`.

    python tests/fuzz.py [--minutes 3] [--seed 0]

Hypothesis draws right arguments, in any layout, and puts wrong ones in the place of some (fuzz_arguments.py). A call
then returns what it returns on its other route, or raises an exception whose message is a sentence, and has changed
nothing. All else is a fault, a crash too: batches of calls run in processes of their own, whose last case is known.
The smallest case of each fault is shown, and the exit status is 1.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import logging
import mmap
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import hypothesis
import torch
from conftest import bits
from fuzz_arguments import (
    ANY_CHANGE,
    ANY_SAFE_CHANGE,
    FLAGS,
    TensorOf,
    build,
    is_plain,
    lists,
    mostly,
    right_arguments,
    shared_memory,
    wrong_in_place_of,
)
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import droppath_ext
from droppath_ext import _C

CALLS_OF_BATCH = 2000
SECONDS_OF_BATCH = 600  # a batch that takes longer hangs
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-4}
LEFT_OUT = {"patch_timm", "add_kept_"}  # takes no arguments; checks nothing, which its stub says

# --- Entries ---


def calling(cls: type[nn.Module]) -> Callable[..., Any]:
    """Builds a module and calls it, as one function."""
    inputs = [name for name in ("x", "residual") if name in inspect.signature(cls.forward).parameters]

    def call(training: Any, **arguments: Any) -> Any:
        given = [arguments.pop(name) for name in inputs]
        return cls(**arguments).train(bool(training))(*given)

    call.names = [*inspect.signature(cls).parameters, *inputs, "training"]  # type: ignore[attr-defined]
    return call


@functools.cache
def names_of(function: Callable[..., Any]) -> list[str]:
    """Those of its arguments."""
    if hasattr(function, "names"):
        return function.names
    if schema := getattr(function, "_schema", None):
        return [argument.name for argument in schema.arguments]
    if inspect.isbuiltin(function):  # pybind11's
        return re.findall(r"(\w+): ", (function.__doc__ or "").splitlines()[0])
    return list(inspect.signature(function).parameters)


def find_entries() -> dict[str, Callable[..., Any]]:
    public = {name: getattr(droppath_ext, name) for name in droppath_ext.__all__}
    ops = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("droppath_ext::"))
    native = {f"ops.{name[14:]}": getattr(torch.ops.droppath_ext, name[14:]).default for name in sorted(ops)}
    bound = {f"_C.{name}": getattr(_C, name) for name in dir(_C)}
    return {
        name: calling(entry) if inspect.isclass(entry) else entry
        for name, entry in {**public, **native, **bound}.items()
        if callable(entry) and name.split(".")[-1] not in LEFT_OUT and "__" not in name
    }


ENTRIES = find_entries()
CONTEXTS: dict[str, Callable[[], Any]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "dual_level": forward_ad.dual_level,
    "fake": FakeTensorMode,
}


@dataclass(frozen=True)
class Case:
    entry: str
    context: str
    arguments: dict[str, Any]
    cotangent: str

    @property
    def is_plain(self) -> bool:
        return self.context != "fake" and all(map(is_plain, self.arguments.values()))


@st.composite
def cases(draw: Any) -> Case:
    entry = draw(st.sampled_from(tuple(ENTRIES)))
    right, names = right_arguments(draw), names_of(ENTRIES[entry])
    values = {name: right.get(f"{entry}.{name}", right[name])() for name in names}
    change = ANY_CHANGE if entry.startswith("ops.") else ANY_SAFE_CHANGE
    for name in draw(lists(st.sampled_from(names), max_size=2, unique=True)) if draw(FLAGS) else ():
        values[name] = wrong_in_place_of(draw, values[name], change)
    case = Case(entry, draw(mostly("", *CONTEXTS)), values, draw(ANY_SAFE_CHANGE) if draw(FLAGS) else "")
    # What a fake tensor raises under a dual level leaves the thread without most dispatch keys once it is collected.
    hypothesis.assume(case.context != "dual_level" or "fake" not in repr(case))
    return case


# --- Calls ---


class Fault(Exception):
    pass


def is_torchs(error: Exception) -> bool:
    """Whether any op fails like that: of fake and nested tensors, lazy parameters, and transforms that have ended."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    of_python = any(file.endswith(("fake_tensor.py", "nested_tensor.py", "nn/parameter.py")) for file in files)
    of_dispatcher = files[-1].endswith(("_ops.py", "autograd/graph.py", "fuzz.py"))
    return of_python or (of_dispatcher and "functorch/PlumbingHelper.h" in str(error))


def judge(error: Exception) -> None:
    """Is it a sentence, of a type that a caller expects?"""
    if is_torchs(error) or isinstance(error, MemoryError):  # Python's, of a list of so many blocks
        return
    if not isinstance(error, TypeError | ValueError | RuntimeError | IndexError) or isinstance(error, RecursionError):
        raise Fault(f"{type(error).__name__} is none that a caller expects") from error
    if len(str(error).split()) < 3 or "INTERNAL ASSERT" in str(error):
        raise Fault("the message is no sentence") from error


def tensors_in(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]


def differentiate(cotangent: str, values: Iterable[Any], out: Any) -> None:
    leaves = [v for v in values if isinstance(v, Tensor) and v.requires_grad and v.is_leaf]
    outs = [t for t in tensors_in(out) if t.requires_grad]
    if not leaves or not outs:
        return
    try:
        cotangents = [TensorOf(tuple(t.shape), t.dtype, (cotangent,) * bool(cotangent)).build() for t in outs]
    except Exception:  # of a layout that this shape has not
        return
    grads = torch.autograd.grad(outs, leaves, cotangents, allow_unused=True, create_graph=cotangent == "leaf")
    for grad, leaf in zip(grads, leaves, strict=True):
        if grad is not None and (grad.shape, grad.dtype) != (leaf.shape, leaf.dtype):
            raise Fault(f"the gradient is {grad}")


def on_other_route(case: Case) -> Case | None:
    """The call whose result is the same: by the composite path, or of an op that is differentiated in ATen."""
    module, _, name = case.entry.rpartition(".")
    changed = "grad" if "grad" in case.arguments else "x"
    x = case.arguments.get(changed)
    of_sources = module == "ops" and name in ("scale_kept", "add_kept", "add_kept_backward")
    if not isinstance(x, TensorOf) or (module and not of_sources) or name == "draw_keep":
        return None
    changes = (*x.changes, "leaf" if of_sources else "subclass")
    return replace(case, arguments=case.arguments | {changed: replace(x, changes=changes)})


def assert_near(out: Any, other: Any) -> None:
    for actual, expected in zip(tensors_in(out), tensors_in(other), strict=True):
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            raise Fault(f"the result is {actual}, elsewhere {expected}")
        a, b = (t.detach().as_subclass(Tensor).double() for t in (actual, expected))
        near = (a - b).abs() <= TOLERANCES.get(actual.dtype, 0) * (1 + b.abs())
        if not (near | (a == b) | (a.isnan() & b.isnan())).all():
            raise Fault(f"the result is {actual}, elsewhere {expected}")


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Exception | None]:
    """The result, or the exception."""
    try:
        return function(*args, **kwargs), None
    except Exception as error:
        return None, error


def arguments_of(case: Case) -> dict[str, Any]:
    """Those of a call: for the same recipes the same ones, weights of models too."""
    torch.manual_seed(0)
    return {name: build(recipe) for name, recipe in case.arguments.items()}


def run(case: Case) -> str:
    """The outcome of the call."""
    other = on_other_route(case) if case.is_plain else None
    shared_memory.cache_clear()
    with CONTEXTS[case.context]():
        try:
            values, others = (arguments_of(c) if c else {} for c in (case, other))
        except Exception:  # of a layout that this shape has not
            return "not built"
        plain = [name for name, recipe in case.arguments.items() if is_plain(recipe) and case.context != "fake"]
        copies = {name: values[name].detach().clone() for name in plain if isinstance(values[name], Tensor)}
        torch.manual_seed(0)
        state = torch.get_rng_state()
        out, refusal = attempt(ENTRIES[case.entry], **values)
        state_after = torch.get_rng_state()
        _, refusal_of_backward = attempt(differentiate, case.cotangent, values.values(), out)
        torch.manual_seed(0)
        expected = ENTRIES[case.entry](**others) if other and refusal is None else None
    if is_plain(case.arguments.get("branch")):
        for name, copy in copies.items():
            if not torch.equal(bits(values[name]), bits(copy)):
                raise Fault(f"{name} was changed")
    if refusal is not None:
        judge(refusal)
        of_checks = isinstance(refusal, TypeError | ValueError | IndexError) and not is_torchs(refusal)
        if of_checks and "branch" not in values and not torch.equal(state, state_after):
            raise Fault("a refused call has drawn") from refusal
        return "refused"
    if refusal_of_backward is not None:
        judge(refusal_of_backward)
        return "refused backward"
    if other:
        assert_near(out, expected)
    return "elsewhere" if out is None and case.entry.startswith("_C.") else "result"


# --- Batches ---


def run_batch(seed: int, end: float, last_case: mmap.mmap, results: Connection) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    outcomes: Counter[tuple[str, str]] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=CALLS_OF_BATCH,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases())
    def test(case: Case) -> None:
        if time.monotonic() > end:
            return
        last_case.seek(0)
        last_case.write(repr(case).encode()[: len(last_case) - 1] + b"\0")
        outcomes[case.entry, run(case)] += 1

    fault = ""
    try:
        test()
    except Exception:
        fault = traceback.format_exc()
    results.send((outcomes, fault))


def batches(seed: int, seconds: float) -> Iterator[tuple[Counter[tuple[str, str]], str]]:
    """Outcomes by entry, and what is wrong."""
    fork = multiprocessing.get_context("fork")
    last_case = mmap.mmap(-1, 1 << 16)  # shared with the batch
    end = time.monotonic() + seconds
    for batch in itertools.count(seed):
        if time.monotonic() > end:
            return
        results, send = fork.Pipe(duplex=False)
        process = fork.Process(target=run_batch, args=(batch, end, last_case, send))
        process.start()
        send.close()
        try:
            outcomes, fault = results.recv() if results.poll(SECONDS_OF_BATCH) else (Counter(), "the process hangs in")
            process.kill()
            process.join()
        except EOFError:
            process.join()
            outcomes, fault = Counter(), f"the process ends with {process.exitcode} in"
        if fault and not outcomes:
            fault += "\n" + last_case[:].partition(b"\0")[0].decode()
        yield outcomes, fault and f"--- seed {batch} ---\n{fault}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the first batch; the next one's is the next number")
    options = parser.parse_args()
    total: Counter[tuple[str, str]] = Counter()
    faults = 0
    for outcomes, fault in batches(options.seed, options.minutes * 60):
        total += outcomes
        if fault:
            faults += 1
            print(fault, flush=True)
    columns = ("result", "elsewhere", "refused", "refused backward", "not built")
    print(f"{'entry':24} {'calls':>8}", *(f"{column:>16}" for column in columns))
    for entry in (*ENTRIES, "all"):
        counts = [sum(n for (e, o), n in total.items() if entry in (e, "all") and o == column) for column in columns]
        calls = sum(counts)
        print(f"{entry:24} {calls:8}", *(f"{n:9} {100 * n / max(calls, 1):4.0f} %" for n in counts))
    print(f"{faults} batches with a fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
