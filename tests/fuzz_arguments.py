"""What fuzz.py calls the entries with, drawn by Hypothesis: right arguments in any layout, and wrong ones."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import droppath_ext

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# --- Recipes: a value can be shown before it is there ---


class Subclass(Tensor):
    """Of which the functions know nothing."""


def with_memory(tensor: Tensor, share: float) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(int(tensor.untyped_storage().nbytes() * share))
    return tensor


def misaligned(tensor: Tensor) -> Tensor:
    memory = bytearray(tensor.numel() * tensor.element_size() + 1)
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape).copy_(tensor)


def escaped(tensor: Tensor) -> Tensor:
    """A tensor of a transform that has ended."""
    found = []
    torch.func.vmap(lambda t: found.append(t) or t)(tensor[None])
    return found[0]


def reversed_dims(tensor: Tensor) -> Tensor:
    return tensor.permute(*range(tensor.ndim)[::-1])


# Each keeps shape and dtype: what was right is right still.
LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda t: reversed_dims(reversed_dims(t).contiguous()),
    "batch_second": lambda t: t.transpose(0, t.ndim // 2).contiguous().transpose(0, t.ndim // 2),
    "every_second": lambda t: torch.stack([t, t], -1)[..., 0],
    "offset": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape),
    "misaligned": misaligned,
    "one_sample": lambda t: t[:1].expand(t.shape),
    "one_feature": lambda t: t[..., :1].expand(t.shape),
    "overlapping": lambda t: t.as_strided(t.shape, [1] * t.ndim),
    "leaf": lambda t: t.detach().requires_grad_(),
    "parameter": lambda t: nn.Parameter(t.detach()),
    "computed": lambda t: t.detach().requires_grad_() * 1,
    "negated": lambda t: torch._neg_view(-t),
    "not_finite": lambda t: t.index_fill(0, torch.tensor([0]), float("nan")),
}
KINDS: dict[str, Callable[[Tensor], Any]] = {
    "of_inference": lambda t: torch.inference_mode()(t.clone)(),
    "subclass": lambda t: t.as_subclass(Subclass),
    "dual": lambda t: forward_ad.make_dual(t, torch.ones_like(t)),
    "zero_tensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "meta": lambda t: t.to("meta"),
    "escaped": escaped,
    "without_memory": lambda t: with_memory(t, 0),
    "in_half_of_its_memory": lambda t: with_memory(t, 0.5),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "imaginary": lambda t: t.to(torch.complex64).conj().imag,
    "bytes_as_bool": lambda t: t.contiguous().view(torch.uint8).view(torch.bool),
    "sparse": lambda t: t.to_sparse(),
    "sparse_rows": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "lazy": lambda t: nn.UninitializedParameter(),
    "integers": lambda t: t.long(),
    "bools": lambda t: t > 0,
    "float8": lambda t: t.to(torch.float8_e5m2),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "scalar": lambda t: t.flatten()[0],
    "longer": lambda t: torch.cat([t, t]),
    "shorter": lambda t: t[:-1],
    "with_another_dim": lambda t: t[..., None],
    "with_a_dim_less": lambda t: t.sum(-1),
    "huge": lambda t: t[:1].expand(2**41, *t.shape[1:]),
    "huge_and_empty": lambda t: t.new_empty(2**60, 0, 2),
}

# Torch itself reads, copies and prints what has not its memory: only a call that reaches the ops is ours.
SAFE_KINDS = tuple(kind for kind in KINDS if "memory" not in kind)


@functools.cache
def shared_memory() -> Tensor:
    """Tensors that lie in it overlap; anew for each call."""
    return torch.ones(50_000, dtype=torch.float64)


@dataclass(frozen=True)
class TensorOf:
    """A tensor of random numbers, or of these, over and over."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    changes: tuple[str, ...] = ()
    numbers: tuple[int | bool, ...] | None = None
    shared: bool = False

    def build(self) -> Any:
        size = torch.Size(self.shape).numel()
        if self.numbers:
            tensor = torch.tensor((self.numbers * size)[:size], dtype=self.dtype).view(self.shape)
        elif self.shared:
            tensor = shared_memory().view(self.dtype)[len(self.shape) :][:size].view(self.shape)
        else:
            numbers = torch.randn(size, generator=torch.Generator().manual_seed(size))
            tensor = numbers.to(self.dtype).view(self.shape)
        for change in self.changes:
            tensor = (LAYOUTS | KINDS)[change](tensor)
        return tensor


class Block(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.linear, self.drop_path = nn.Linear(3, 3), drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.linear(x))


def generator_with(words: int) -> torch.Generator:
    """One that has handed out all but so many of the words that it computes at once."""
    generator = torch.Generator().manual_seed(0)
    torch.empty(624 - words, dtype=torch.int32).random_(generator=generator)
    return generator


def raising(*_: Any) -> Tensor:
    raise RuntimeError("this branch always raises")


BRANCHES: dict[str, Callable[..., Any]] = {
    "sin": lambda x, *_: x.sin(),
    "itself": lambda x, *_: x,
    "double": lambda x, *_: x.double() * 2,
    "transposed": lambda x, *_: LAYOUTS["transposed"](x) * 2,
}
WRONG_BRANCHES: dict[str, Callable[..., Any]] = {
    "raises": raising,
    "nothing": lambda *_: None,
    "inputs": lambda *inputs: inputs,
    "changes": lambda x, *_: x.add_(1),
    "resizes": lambda x, *_: x.resize_(1, 1),
    "frees": lambda x, *_: (x.untyped_storage().resize_(0), x)[1],
    **{name: lambda x, *_, name=name: KINDS[name](x) for name in SAFE_KINDS},
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: nn.Sequential(*(Block(droppath_ext.DropPath(0.1)) for _ in range(2))),
    "without_rate": lambda: nn.Sequential(Block(nn.Identity()), Block(nn.Identity())),
    "drop_path": lambda: droppath_ext.DropPath(0.5),
    "without_drop_path": lambda: nn.Linear(3, 3),
}
THINGS: dict[str, Callable[[], Any]] = {
    **{f"branch: {name}": lambda name=name: BRANCHES[name] for name in BRANCHES},
    **{f"wrong branch: {name}": lambda name=name: WRONG_BRANCHES[name] for name in WRONG_BRANCHES},
    **{f"model: {name}": build for name, build in MODELS.items()},
    **{f"generator: {words} words": lambda words=words: generator_with(words) for words in (0, 1, 2, 623)},
    "closed generator": lambda: (number for number in ()),
    "generator of numpy": numpy.random.default_rng,
}


@dataclass(frozen=True)
class Named:
    """Something else, which is built for each call."""

    name: str

    def build(self) -> Any:
        return THINGS[self.name]()


def build(recipe: Any) -> Any:
    if isinstance(recipe, tuple):
        return tuple(map(build, recipe))
    return recipe.build() if isinstance(recipe, TensorOf | Named) else recipe


def is_plain(recipe: Any) -> bool:
    """Whether it is a value that the functions are made for, in whatever layout."""
    if isinstance(recipe, Named):
        return not recipe.name.startswith("wrong")
    return not isinstance(recipe, TensorOf) or not set(recipe.changes) & set(KINDS)


ALL_NAMED = tuple(map(Named, THINGS))


def named(kind: str) -> list[Named]:
    return [thing for thing in ALL_NAMED if thing.name.startswith(f"{kind}: ")]


# --- Arguments, by their names ---

WRONG_VALUES = (
    -1, 0, 1, 2, 3.5, -0.1, 2**41, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**70), 10**400, float("nan"),
    float("inf"), -float("inf"), 1j, True, Fraction(1, 3), Decimal("0.5"), Decimal("NaN"), numpy.float16(0.5),
    numpy.array(0.5), numpy.array([0.5, 0.5]), numpy.array(1j), numpy.int8(-1), None, "", "0.5", b"\0", "fixed",
    "batch", "cuda", "nowhere", [], (), [None], {}, [0.5], int, object, Ellipsis, torch.float32, torch.int64,
    torch.float8_e5m2, torch.device("meta"), torch.device("cuda:7"), torch.strided,
)  # fmt: skip


@functools.cache
def mostly(right: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from((right,) * (2 * len(others) + 2) + others)


def lists(values: st.SearchStrategy[Any], **sizes: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, **sizes).map(tuple)


FLAGS = st.booleans()
SIZES = st.sampled_from((3, 2, 4, 1, 5, 8, 17, 0))
SHAPES = lists(SIZES, min_size=1, max_size=4) | mostly((4, 3), (2, 20000), (40000, 1))
DRAWN_DTYPES = st.sampled_from(DTYPES)
CHANGES = mostly((), ("leaf",)) | lists(st.sampled_from(tuple(LAYOUTS)), max_size=2)
ANY_CHANGE, ANY_SAFE_CHANGE = (st.sampled_from((*kinds, *LAYOUTS)) for kinds in (KINDS, SAFE_KINDS))
RATES = st.sampled_from((0.5, 0.1, 0.9, 0.0, 1.0, 1e-9, 0.999))
MASKS = lists(FLAGS, min_size=1, max_size=9)
INDICES = lists(st.integers(0, 20), max_size=9)
WORDS = st.integers(0, 2**64 - 1)
OUTSIDE = st.sampled_from((-2, 2**31, 2**62, 2**63 - 1, -(2**63), 9, 17))
ODD_TENSORS = st.builds(
    TensorOf, st.sampled_from(((), (1,), (3,), (2, 3))), DRAWN_DTYPES, st.tuples(st.sampled_from(SAFE_KINDS))
)
ODD_VALUES = st.sampled_from(WRONG_VALUES) | ODD_TENSORS


def right_arguments(draw: Any) -> dict[str, Callable[[], Any]]:
    """By name, what draws the right argument of one call; by "entry.name" where an entry has its own."""
    shape = draw(SHAPES)
    samples, features, dtype = shape[0], shape[1:], draw(DRAWN_DTYPES)
    long = draw(SIZES) % len(shape)  # the dimension along which gamma has entries

    def one_of(*values: Any) -> Callable[[], Any]:
        return lambda: draw(mostly(*values))

    def tensor(shape: tuple[int, ...], dtype: torch.dtype | None = dtype) -> TensorOf:
        return TensorOf(shape, dtype or draw(mostly(*DTYPES)), draw(CHANGES), None, draw(mostly(False, True)))

    def mask() -> TensorOf:
        return TensorOf(draw(mostly((samples,), (1,))), torch.bool, (), draw(MASKS))

    sources = inverse = mask()
    if samples < 100 and draw(FLAGS):  # for each sample of the output one of x, or -1; and the reverse
        index = [number % (samples + 1) - 1 for number in draw(INDICES)]
        places = [max((i for i, entry in enumerate(index) if entry == b), default=-1) for b in range(samples)]
        sources, inverse = (TensorOf((len(n),), torch.int64, (), tuple(n)) for n in (index, places))
    outputs = sources.shape[0] if sources.dtype is torch.int64 else samples

    def rate() -> Any:
        return draw(RATES)

    def device_rate() -> Any:
        return tensor((), draw(mostly(torch.float32, torch.float64)))

    def rate_of_either() -> Any:
        return draw(RATES) if draw(FLAGS) else device_rate()

    def x() -> TensorOf:
        return tensor(shape)

    def output() -> TensorOf:
        return tensor((outputs, *features), None)

    def flag() -> bool:
        return draw(FLAGS)

    def word() -> int:
        return draw(WORDS)

    batched = (None, TensorOf((samples,), torch.int64), TensorOf(shape, torch.float32, ("leaf",)))
    gamma_shape = tuple(size if dim == long else 1 for dim, size in enumerate(shape))[1:]
    return {
        "x": x, "y": x, "grad": x, "residual": lambda: tensor(shape, None if flag() else dtype),
        "gamma": lambda: tensor(gamma_shape, None if flag() else dtype) if flag() else None,
        "drop_prob": rate, "rate": rate, "min_drop_prob": one_of(None, 0.5), "scale": one_of(2.0, 1.0, 0.0),
        "factor": lambda: tensor((), torch.float64) if flag() else None, "training": one_of(True, False),
        "scale_by_keep": flag, "per_sample": flag, "strict": flag, "channels_first": one_of(False, True),
        "output_mask": lambda: (flag(), flag()), "mode": one_of("row", "batch"), "dim": one_of(0, 1, -1),
        "sample_dim": one_of(0, 1, -1), "keep": lambda: mask() if flag() else None,
        "generator": one_of(None, *named("generator")), "branch": one_of(*named("branch")),
        "sampling": one_of("bernoulli", "fixed"), "batched": one_of((), batched),
        "count": lambda: draw(SIZES) % max(samples, 1) + 1, "size": lambda: samples,
        "device": one_of(torch.device("cpu"), torch.device("meta")), "seed": word, "offset": word,
        "sources": lambda: sources, "index": lambda: sources, "slots": lambda: sources,
        "inverse": lambda: inverse, "kept": lambda: inverse, "dtype": lambda: dtype,
        "model": one_of(*named("model")), "depth": lambda: draw(SIZES) if flag() else draw(SHAPES)[:3],
        "schedule": one_of("linear", "uniform", "stagewise"), "filter": lambda: None, "init_values": lambda: None,
        "example": one_of(None, TensorOf((4, 3), torch.float32)), "convert.residual": one_of("keep", "fuse", "skip"),
        "ops.add_kept.residual": output, "_C.scatter_add.residual": output,
        "ops.add_kept_backward.x": lambda: tensor((outputs, *features)), "_C.index_kept.keep": mask,
        "_C.scale_kept.keep": mask, "ops.draw_keep.drop_prob": device_rate, "_C.draw_keep_at.drop_prob": device_rate,
        "DropPathAdd.dim": lambda: None, "StochasticDepth.dim": lambda: None,
        **dict.fromkeys((f"{name}.drop_prob" for name in RATED_BY_TENSORS), rate_of_either),
    }  # fmt: skip


RATED_BY_TENSORS = ("drop_path", "drop_path_add", "draw_keep", "DropPath", "DropPathAdd")


def wrong_in_place_of(draw: Any, right: Any, change: st.SearchStrategy[str]) -> Any:
    if isinstance(right, TensorOf) and draw(mostly(True, False)):
        if right.numbers and right.dtype is torch.int64 and draw(FLAGS):
            return TensorOf(right.shape, right.dtype, right.changes, (*right.numbers[1:], draw(OUTSIDE)))
        return TensorOf(right.shape, right.dtype, (*right.changes, draw(change)), right.numbers)
    if isinstance(right, Named) and draw(mostly(True, False)):
        return draw(st.sampled_from(ALL_NAMED))
    return draw(ODD_VALUES)
