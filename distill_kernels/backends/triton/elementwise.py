"""Device functions of single logits: the math that divergences are written in, the LM head's epilogue, log-probabilities.

`device_function` makes the body of a divergence, the same Python function that torch runs, one that a kernel can call: its `exp`, `log`
and so on become those below. A kernel receives it as a `constexpr`.
"""

import functools
import inspect
import types

import triton
import triton.language as tl

from distill_kernels import divergences
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR

FLOOR = tl.constexpr(LOG_PROBABILITY_FLOOR)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def tanh(x):
    """By exp, and near 0, where that cancels, by the first terms of x·P(x²) (coefficients of a minimax fit on |x| < 0.625)."""
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = (near * square - 5.37397155531e-2) * square + 1.33314422036e-1
    near = (near * square - 3.33332819422e-1) * square * x + x
    shrunk = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def apply_head(product, bias, entries, inside, scale, softcap):
    """softcap(scale · (product + bias)) of a tile (R, C); `entries` (C,) are its columns, those beyond the vocabulary not `inside`."""
    z = product
    if bias is not None:
        z += tl.load(bias + entries, mask=inside, other=0.0)[None, :].to(tl.float32)
    z = scale * z
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def raised(log_probability):
    """Not below the floor. A comparison and not a maximum, which would make a number of NaN."""
    return tl.where(log_probability < FLOOR, FLOOR, log_probability)


@triton.jit
def value_and_slope(log_p, log_q, first, second, DIVERGENCE: tl.constexpr, PARAMETERS: tl.constexpr):
    if PARAMETERS == 0:
        return DIVERGENCE(log_p, log_q)
    elif PARAMETERS == 1:
        return DIVERGENCE(log_p, log_q, first)
    else:
        return DIVERGENCE(log_p, log_q, first, second)


MATH = {function.fn.__name__: function for function in (exp, log, maximum, minimum, sign)}  # what divergences.py offers
MOST_PARAMETERS = 2


def why_no_device_function(body) -> str | None:
    """None if `device_function` can make it, else why not."""
    try:
        inspect.getsource(body)
    except (OSError, TypeError):
        return f"{body.__name__} has no source file, which Triton compiles from; define it in one"
    unknown = sorted(name for name in body.__code__.co_names if name not in MATH and _meant(body, name) is None)
    if unknown:
        return f"{body.__name__} uses {', '.join(unknown)}; here a divergence may use {', '.join(MATH)} and functions of those"
    if body.__code__.co_argcount - 2 > MOST_PARAMETERS:
        return f"{body.__name__} has more than {MOST_PARAMETERS} parameters"
    return None


@functools.cache
def device_function(body):
    """The Triton function of a divergence's body (or of what it calls)."""
    names = {name: MATH.get(name) or _meant(body, name) for name in body.__code__.co_names}
    clone = types.FunctionType(body.__code__, {"tl": tl, **names}, body.__name__, body.__defaults__)
    clone.__module__, clone.__qualname__ = body.__module__, body.__qualname__
    return triton.jit(clone)


def _meant(body, name):
    """What a global name of a body stands for on the device; None: nothing that a kernel could use."""
    value = body.__globals__.get(name)
    if value is divergences:
        module = types.ModuleType("divergences")
        module.__dict__.update(MATH)
        return module
    if isinstance(value, (bool, int, float)):
        return tl.constexpr(value)
    if isinstance(value, types.FunctionType) and why_no_device_function(value) is None:
        return device_function(value)
    return None
