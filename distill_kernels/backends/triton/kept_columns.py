"""The columns kept of a quantised sweep: from their exact and their swept logits, (n, K) float32, what corrects the sums, and dz.

    difference    reads all of them     Σ w·δ of every sum, δ being exact less swept, and the moments that its errors follow from
    gradient      reads the exact ones  dz of the columns, once the log-sum-exps are known

One program owns a token (a few, in the interpreter) and a split of the columns; split sums are added up by the caller, in their order.
Bytes for each token and column: 8 of each model to correct, 4 of each and 4 written for dz.
"""

import triton
import triton.language as tl

from distill_kernels.backends.triton import tiles
from distill_kernels.backends.triton.quantised_sweep import SUMS, get_references, masses, no_sums

CORRECTED = SUMS - 1  # all but how many entries are below the floor
MOMENTS = 11  # products of the first four differences, i ≤ j, and the square of the fifth


@triton.jit
def _of_columns(logits, rows, there, at, inside, count):
    """(R, C) of (n, count)."""
    return tl.load(logits + rows.to(tl.int64)[:, None] * count + at[None, :], mask=there[:, None] & inside[None, :], other=0.0)


@triton.jit
def difference_kernel(
    x,  # (n, K) float32: exact logits of the columns kept
    y,  # (n, K), or None
    swept_x,  # (n, K): the sweep's
    swept_y,  # (n, K), or None
    weights,  # (K,) float32: 1/π
    references,  # (REFERENCES, n) float32
    differences,  # (CORRECTED + MOMENTS, n, splits) float32, written
    tokens,
    count,  # K
    splits,
    slice_entries,  # of a split, a multiple of BLOCK
    inverse_temperature,
    first,
    second,
    SEPARATE: tl.constexpr,
    STATS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    PARAMETERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ w·δ of every sum, δ being exact less swept; Σ w·(w − 1)·δ_i·δ_j of the first four, and of the fifth with itself."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < tokens
    student, teacher, untempered, _slope = get_references(references, rows, there, tokens)
    none = tl.zeros((ROWS,), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, _below = no_sums(ROWS)
    m00, m01, m02, m03, m11, m12, m13, m22, m23, m33, m44 = none, none, none, none, none, none, none, none, none, none, none
    begin = tl.program_id(1) * slice_entries
    for start in range(begin, tl.minimum(begin + slice_entries, count), BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < count
        weight = tl.load(weights + at, mask=inside, other=0.0)[None, :]
        exact_z, swept_z = _of_columns(x, rows, there, at, inside, count), _of_columns(swept_x, rows, there, at, inside, count)
        exact_y, late_y = exact_z, swept_z
        if y is not None:
            exact_y, late_y = _of_columns(y, rows, there, at, inside, count), _of_columns(swept_y, rows, there, at, inside, count)
        e0, e1, e2, e3, e4, e5, e6, _e7 = masses(
            exact_z, exact_y, student, teacher, untempered, inverse_temperature, first, second, y is not None, SEPARATE, STATS, DIVERGENCE,
            PARAMETERS,
        )  # fmt: skip
        l0, l1, l2, l3, l4, l5, l6, _l7 = masses(
            swept_z, late_y, student, teacher, untempered, inverse_temperature, first, second, y is not None, SEPARATE, STATS, DIVERGENCE,
            PARAMETERS,
        )  # fmt: skip
        # Beyond the columns the weight is 0, and so are both logits, but not what a reference far below 0 makes of them.
        d0, d1 = tl.where(inside[None, :], e0 - l0, 0.0), tl.where(inside[None, :], e1 - l1, 0.0)
        d2, d3 = tl.where(inside[None, :], e2 - l2, 0.0), tl.where(inside[None, :], e3 - l3, 0.0)
        d4 = tl.where(inside[None, :], e4 - l4, 0.0)
        s0 += tl.sum(weight * d0, 1)
        s1 += tl.sum(weight * d1, 1)
        s2 += tl.sum(weight * d2, 1)
        s3 += tl.sum(weight * d3, 1)
        s4 += tl.sum(weight * d4, 1)
        if STATS:
            s5 += tl.sum(tl.where(inside[None, :], weight * (e5 - l5), 0.0), 1)
            s6 += tl.sum(tl.where(inside[None, :], weight * (e6 - l6), 0.0), 1)
        uncertain = weight * (weight - 1.0)  # of a column kept surely the weight is 1
        if DIVERGENCE is not None:
            u0, u1, u2 = uncertain * d0, uncertain * d1, uncertain * d2
            m00 += tl.sum(u0 * d0, 1)
            m01 += tl.sum(u0 * d1, 1)
            m02 += tl.sum(u0 * d2, 1)
            m03 += tl.sum(u0 * d3, 1)
            m11 += tl.sum(u1 * d1, 1)
            m12 += tl.sum(u1 * d2, 1)
            m13 += tl.sum(u1 * d3, 1)
            m22 += tl.sum(u2 * d2, 1)
            m23 += tl.sum(u2 * d3, 1)
            m33 += tl.sum(uncertain * d3 * d3, 1)
        m44 += tl.sum(uncertain * d4 * d4, 1)
    tiles.put_statistics(
        differences, rows, there, tl.program_id(1), tokens, splits,
        (s0, s1, s2, s3, s4, s5, s6, m00, m01, m02, m03, m11, m12, m13, m22, m23, m33, m44),
    )  # fmt: skip


@triton.jit
def kept_gradient_kernel(
    x,  # (n, K) float32: exact logits of the columns kept
    y,  # (n, K), or None
    columns,  # (K,) int64
    weights,  # (K,) float32
    labels,  # (n,) int64, or None
    factors,  # (7, n) float32: `correction.Factors`
    dz,  # (n, K) float32, written
    tokens,
    count,  # K
    inverse_temperature,
    student_scale,
    student_softcap,
    first,
    second,
    UNTEMPERED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    PARAMETERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < tokens
    label = None
    if labels is not None:
        label = tl.load(labels + rows, mask=there, other=-1)
    lse_q = tl.load(factors + rows, mask=there, other=0.0)
    lse_p = tl.load(factors + tokens + rows, mask=there, other=0.0)
    lse_bare = tl.load(factors + 2 * tokens + rows, mask=there, other=0.0)
    slope_total = tl.load(factors + 3 * tokens + rows, mask=there, other=0.0)
    weight = tl.load(factors + 4 * tokens + rows, mask=there, other=0.0)
    pull = tl.load(factors + 5 * tokens + rows, mask=there, other=0.0)
    push = tl.load(factors + 6 * tokens + rows, mask=there, other=0.0)
    none = tl.zeros((ROWS,), tl.float32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    z = _of_columns(x, rows, there, at, inside, count)
    exact_y = z
    if y is not None:
        exact_y = _of_columns(y, rows, there, at, inside, count)
    made = tiles.gradient(
        z, exact_y, tl.load(columns + at, mask=inside, other=-1), label,
        (none, lse_q, lse_bare, none, lse_p, none, none, none, none, none, none),
        (none, none, none, none, slope_total, weight, pull, push, none, there),
        inverse_temperature, student_scale, student_softcap, first, second,
        y is not None, UNTEMPERED, False, DIVERGENCE, PARAMETERS,
    )  # fmt: skip
    made *= tl.load(weights + at, mask=inside, other=0.0)[None, :]
    tl.store(dz + rows.to(tl.int64)[:, None] * count + at[None, :], made, mask=there[:, None] & inside[None, :])
