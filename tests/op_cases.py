"""The table of ops: the public functions, each in the kinds that its promises hold for alike.

A test that takes `op` from it states a promise once, for all of them. `op.inputs` names the tensors that the op takes,
in order; wherever a test speaks of inputs, it means a list of those tensors.
"""

from dataclasses import dataclass, field, replace

import torch
from conftest import (
    ADD_DTYPES,
    ADD_GAMMA_DTYPES,
    DTYPES,
    Recorded,
    add_inputs,
    added_samples,
    assert_near,
    assert_rounded_once,
    assert_same_bits,
    checked,
    checked_add,
    checked_skip,
    exact_add,
    random_tensor,
    seeded,
    skip_formula,
    skip_scale,
)

from droppath_ext import drop_path, drop_path_add, reference, stochastic_depth


@dataclass(frozen=True, eq=False)
class Op:
    name: str
    inputs: tuple[str, ...]
    dtypes: tuple  # what its kernels serve: dtypes of x, residual and gamma, None where there is none
    options: dict = field(default_factory=dict)  # of the call

    @property
    def __name__(self):
        """What pytest calls a parameter."""
        return self.name

    @property
    def has_gamma(self):
        return "gamma" in self.inputs

    def make(self, shape, dtypes=torch.float64, device="cpu", gamma_shape=None):
        """The inputs with other numbers in each, gamma along the last dim by default; one dtype, or three."""
        dtypes = (dtypes,) * 3 if isinstance(dtypes, torch.dtype) else dtypes
        named = dict(zip(("x", "residual", "gamma"), add_inputs(shape, dtypes, device, gamma_shape), strict=True))
        if "weight" in self.inputs:
            named["weight"] = random_tensor(shape[-1:], dtypes[0], device, seed=3)
            named["bias"] = random_tensor(shape, dtypes[0], device, seed=4)
        return [named[name] for name in self.inputs]

    def generator(self, device, seed=3):
        """One that the op draws from if it is given."""
        return seeded("cpu" if self.options.get("sampling") == "bernoulli" else device, seed)

    def same_draw_each_time(self, device, drop_prob=0.5, scale_by_keep=True, seed=3):
        """The op as a function of its inputs that drops the same samples in every call."""
        return lambda *inputs: self(inputs, drop_prob, True, scale_by_keep, generator=self.generator(device, seed))

    def keep(self, out, inputs):
        """bool[B] read off an output: the samples that are not what a dropped one is."""
        return added_samples(out, self.dropped(inputs))

    def scale(self, batch, drop_prob, scale_by_keep=True):
        return reference.keep_scale(drop_prob, scale_by_keep)


class _DropPath(Op):
    assert_near = staticmethod(assert_same_bits)  # nothing but the product is rounded

    def __call__(self, inputs, drop_prob=0.5, training=True, scale_by_keep=True, generator=None):
        return drop_path(*inputs, drop_prob, training, scale_by_keep, generator=generator, **self.options)

    def dropped(self, inputs):
        """What a dropped sample becomes."""
        return torch.zeros_like(inputs[0])

    def formula(self, inputs, keep, scale):
        """The output in operations of PyTorch, with derivatives of any order and mode."""
        return reference.apply_keep_mask(*inputs, keep, scale)

    def assert_output(self, out, inputs, keep, scale):
        """The output is that of the formula: bit for bit, or rounded once, or near it if a branch computes it."""
        assert_same_bits(out.detach(), self.formula(inputs, keep, scale).detach())

    def checked(self, inputs, drop_prob=0.5, scale_by_keep=True):
        """Forward and backward held to the formula, on these tensors as they lie in memory. Returns the output."""
        return checked(*inputs, drop_prob, scale_by_keep, **self.options)


class _DropPathAdd(Op):
    assert_near = staticmethod(assert_near)

    def __call__(self, inputs, drop_prob=0.5, training=True, scale_by_keep=True, generator=None):
        x, residual, *gamma = inputs
        gamma = gamma[0] if gamma else None
        return drop_path_add(
            x, residual, drop_prob, training, scale_by_keep, gamma=gamma, generator=generator, **self.options
        )

    def dropped(self, inputs):
        return inputs[1]

    def formula(self, inputs, keep, scale):
        x, residual, *gamma = inputs
        return skip_formula(residual, x, keep.expand(len(x)), scale, *gamma)

    def assert_output(self, out, inputs, keep, scale):
        x, residual, *gamma = inputs
        assert_rounded_once(out, *exact_add(x, residual, gamma[0] if gamma else None, keep, scale))

    def checked(self, inputs, drop_prob=0.5, scale_by_keep=True):
        x, residual, *gamma = inputs
        return checked_add(x, residual, gamma[0] if gamma else None, drop_prob, scale_by_keep, **self.options)


class Wave(Recorded):
    """A branch: what it adds to x is never lost in rounding, and its derivative is never the same."""

    def compute(self, x):
        return x.sin() + 2 * x


class _StochasticDepth(Op):
    """Its branch reads x, a bias that is batched with x, and a weight."""

    assert_near = staticmethod(assert_near)

    @staticmethod
    def branch(x, bias, weight):
        return (x * weight + bias).sin() * x

    def __call__(self, inputs, drop_prob=0.5, training=True, scale_by_keep=True, generator=None):
        x, gamma, bias, weight = inputs
        return stochastic_depth(
            x,
            lambda rows, bias: self.branch(rows, bias, weight),
            drop_prob,
            training,
            scale_by_keep,
            gamma=gamma,
            batched=(bias,),
            generator=generator,
            **self.options,
        )

    def dropped(self, inputs):
        return inputs[0]

    def scale(self, batch, drop_prob, scale_by_keep=True):
        return skip_scale(batch, drop_prob, self.options["sampling"], scale_by_keep)

    def formula(self, inputs, keep, scale):
        x, gamma, bias, weight = inputs
        return skip_formula(x, self.branch(x, bias, weight), keep.expand(len(x)), scale, gamma)

    def assert_output(self, out, inputs, keep, scale):
        assert_near(out, self.formula(inputs, keep, scale))

    def checked(self, inputs, drop_prob=0.5, scale_by_keep=True):
        x, gamma, *_ = inputs
        # A branch of its own: bias and weight would not fit every layout of x.
        return checked_skip(x, Wave(), drop_prob, scale_by_keep, gamma=gamma, **self.options)


DROP_PATH = _DropPath("drop_path", ("x",), tuple((dtype, None, None) for dtype in DTYPES))
ADD = _DropPathAdd("drop_path_add", ("x", "residual"), tuple(ADD_DTYPES))
ADD_GAMMA = _DropPathAdd("drop_path_add_gamma", ("x", "residual", "gamma"), tuple(ADD_GAMMA_DTYPES))
SKIP_BERNOULLI, SKIP_FIXED = (
    _StochasticDepth(
        f"stochastic_depth_{sampling}",
        ("x", "gamma", "bias", "weight"),
        tuple((dtype, None, dtype) for dtype in DTYPES),
        {"sampling": sampling},
    )
    for sampling in ("bernoulli", "fixed")
)
DROP_PATH_OPS = (DROP_PATH, ADD, ADD_GAMMA)
SKIP_OPS = (SKIP_BERNOULLI, SKIP_FIXED)
OPS = (*DROP_PATH_OPS, *SKIP_OPS)
# stochastic_depth has no modes.
BATCH_MODE_OPS = tuple(replace(op, name=f"{op.name}_batch", options={"mode": "batch"}) for op in DROP_PATH_OPS)
