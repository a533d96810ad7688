"""Listed entries of each token in a chunk's logits (n, V) float32, and all others: `distill_kernels.listed` says what is made of them.

    take      writes the meant logits of the listed entries, and LOWEST in their place, by which the others are told from them; a program
              has a block of the lists of ROWS tokens. No product is LOWEST: what is too large for float32 is infinite.
    others    maxima and sums of the others, by splits of the vocabulary as in `rows`; the caller merges those
    gradient  dz of the others, in place or beside
    put       dz of the listed entries

A list names no entry twice, so that no two programs meet. Bytes of logits for each token and entry: 4 read by others, 4 read and 2 or 4
written by gradient; for each listed entry some 40.
"""

import triton
import triton.language as tl

from distill_kernels.backends.triton import tiles
from distill_kernels.backends.triton.elementwise import apply_head
from distill_kernels.backends.triton.tiles import LOWEST

OTHERS = 3  # fields of `others_kernel`


def block_of(width: int, most: int) -> int:
    """Entries of a list to a program of `take` and `put`."""
    return min(triton.next_power_of_2(width), most)


@triton.jit
def _places(ids, tokens, vocabulary, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(where in a list (R, C), the entry there, where in a matrix (n, V), whether there is one)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (rows < tokens)[:, None] & (at < width)[None, :]
    places = rows.to(tl.int64)[:, None] * width + at[None, :]
    entries = tl.load(ids + places, mask=there, other=-1)
    return places, entries, rows.to(tl.int64)[:, None] * vocabulary + entries, there & (entries >= 0)


@triton.jit
def take_kernel(
    logits,  # (n, V) float32, bare products; LOWEST written where listed
    bias,  # (V,), or None
    ids,  # (n, K) int64, negative where there is none
    listed,  # (n, K) float32, written: meant logits
    tokens,
    vocabulary,
    width,
    scale,
    softcap,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places, entries, at, there = _places(ids, tokens, vocabulary, width, ROWS, BLOCK)
    product = tl.load(logits + at, mask=there, other=0.0)
    if bias is not None:
        product += tl.load(bias + entries, mask=there, other=0.0).to(tl.float32)
    tl.store(listed + places, apply_head(product, None, entries, there, scale, softcap), mask=there)
    tl.store(logits + at, LOWEST, mask=there)


@triton.jit
def _others(logits, bias, rows, there, entries, inside, vocabulary, scale, softcap):
    """(meant logits (R, C), which of them are of the others)."""
    at = logits + rows.to(tl.int64)[:, None] * vocabulary + entries[None, :]
    product = tl.load(at, mask=there[:, None] & inside[None, :], other=LOWEST)
    counted = product != LOWEST
    return apply_head(tl.where(counted, product, 0.0), bias, entries, inside, scale, softcap), counted


@triton.jit
def others_kernel(
    logits,  # (n, V) float32, as `take_kernel` leaves them
    bias,  # (V,), or None
    partial,  # (OTHERS, n, splits) float32, written: maximum, Σ exp of what is above it tempered, and untempered
    tokens,
    vocabulary,
    splits,
    slice_entries,  # of a split, a multiple of BLOCK
    inverse_temperature,
    scale,
    softcap,
    SEPARATE: tl.constexpr,  # the untempered sum is wanted, and another one
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < tokens
    begin = tl.program_id(1) * slice_entries
    maximum = tl.full((ROWS,), LOWEST, tl.float32)
    tempered, untempered = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in range(begin, tl.minimum(begin + slice_entries, vocabulary), BLOCK):
        entries = first + tl.arange(0, BLOCK)
        z, counted = _others(logits, bias, rows, there, entries, entries < vocabulary, vocabulary, scale, softcap)
        now = tl.maximum(maximum, tl.max(tl.where(counted, z, LOWEST), 1))
        below = z - now[:, None]
        tempered *= tl.exp((maximum - now) * inverse_temperature)
        tempered += tl.sum(tl.where(counted, tl.exp(below * inverse_temperature), 0.0), 1)
        if SEPARATE:
            untempered = untempered * tl.exp(maximum - now) + tl.sum(tl.where(counted, tl.exp(below), 0.0), 1)
        maximum = now
    sums = maximum, tempered, untempered if SEPARATE else tempered
    tiles.put_statistics(partial, rows, there, tl.program_id(1), tokens, splits, sums)


@triton.jit
def others_gradient_kernel(
    logits,  # (n, V) float32, as `take_kernel` leaves them
    bias,  # (V,), or None
    others,  # (n, 3) float32: reference, log-sum-exps tempered and untempered less it
    d_others,  # (n, 2) float32
    dz,  # (n, V), written but where listed, may be `logits`
    dz_scale,  # () float32: multiplies dz; None: 1
    tokens,
    vocabulary,
    slice_entries,
    inverse_temperature,
    scale,
    softcap,
    UNTEMPERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < tokens
    reference = tl.load(others + rows * 3, mask=there, other=0.0)
    log_sum = tl.load(others + rows * 3 + 1, mask=there, other=0.0)
    log_sum_bare = tl.load(others + rows * 3 + 2, mask=there, other=0.0)
    weight = tl.load(d_others + rows * 2, mask=there, other=0.0)
    pull = tl.load(d_others + rows * 2 + 1, mask=there, other=0.0)
    factor = scale
    if dz_scale is not None:
        factor *= tl.load(dz_scale)
    begin = tl.program_id(1) * slice_entries
    for first in range(begin, tl.minimum(begin + slice_entries, vocabulary), BLOCK):
        entries = first + tl.arange(0, BLOCK)
        z, counted = _others(logits, bias, rows, there, entries, entries < vocabulary, vocabulary, scale, softcap)
        below = z - reference[:, None]
        made = weight[:, None] * tl.exp(below * inverse_temperature - log_sum[:, None])
        if UNTEMPERED:
            made += pull[:, None] * tl.exp(below - log_sum_bare[:, None])
        if softcap is not None:
            ratio = z / softcap
            made *= 1.0 - ratio * ratio
        # A token that counts for nothing has no gradient, whatever it holds.
        made = tl.where(((weight == 0.0) & (pull == 0.0))[:, None], 0.0, made * factor)
        tl.store(dz + rows.to(tl.int64)[:, None] * vocabulary + entries[None, :], made.to(dz.dtype.element_ty), mask=counted)


@triton.jit
def put_kernel(
    ids,  # (n, K) int64, negative where there is none
    listed,  # (n, K) float32, meant logits
    d_listed,  # (n, K) float32
    dz,  # (n, V), written where listed
    dz_scale,  # () float32: multiplies dz; None: 1
    tokens,
    vocabulary,
    width,
    scale,
    softcap,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places, _entries, at, there = _places(ids, tokens, vocabulary, width, ROWS, BLOCK)
    given = tl.load(d_listed + places, mask=there, other=0.0)
    made = given * scale
    if softcap is not None:
        ratio = tl.load(listed + places, mask=there, other=0.0) / softcap
        made = tl.where(given == 0.0, 0.0, made * (1.0 - ratio * ratio))
    if dz_scale is not None:
        made *= tl.load(dz_scale)
    tl.store(dz + at, made.to(dz.dtype.element_ty), mask=there)
