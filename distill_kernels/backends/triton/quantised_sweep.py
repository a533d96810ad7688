"""The quantised sweep on tiles: sums of every token and scores of every column straight from 8-bit rows, no logits but a tile's kept.

One program owns a block of tokens and a split of the vocabulary, as in `sweep`. For each tile it multiplies both models' 8-bit rows, int8
into int32 or float8 into float32, scales the products by their rows' scales, and adds what the logits make to each token's sums
(`correction.Sums`). They are relative to the references that the pilot gives, so nothing is rescaled as the sweep goes on. A column's
scores are summed over the tile's tokens and written, a row for each block of tokens, which the caller adds up in their order.

Logits of listed entries, the pilot's before the sweep and those of the columns kept after it, are `listed_columns`'.

Integer operations 2·n·V·(D_s + D_t); bytes requested of L2 for each tile: (ROWS + ENTRIES) · (D_s + D_t).
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from distill_kernels.backends.triton import tiles
from distill_kernels.backends.triton.elementwise import FLOOR, apply_head, raised, value_and_slope
from distill_kernels.backends.triton.tiles import TERM_COUNT
from distill_kernels.estimators import quantised

AGREEMENT = tl.constexpr(quantised.AGREEMENT)
SUMS = 8  # fields of `no_sums`
REFERENCES = 4  # log-sum-exps over the pilot: student's, teacher's, student's untempered; Σ slope
NOBODY = tl.constexpr(1e30)  # reference of a row beyond the tokens: it has no mass, whatever the bias


@dataclass(frozen=True)
class Configuration:
    rows: int  # tokens of a tile
    entries: int
    depth: int  # of rows that are multiplied at a time
    warps: int
    stages: int
    descriptors: bool  # tensor descriptors, which the target's TMA reads
    parts: int  # of a tile's columns, whose sums are taken one after the other: fewer numbers are alive at a time
    reason: str
    bare: bool = False  # for a divergence alone: no stats, biases, softcaps, cross entropy or z-loss


# By the target's architecture and the kind of quantisation. Rows begin at multiples of 64 bytes: none is ever unaligned. None spills in any
# variant that it is for (benchmarks/results/triton_compile.csv).
_SM_80 = (Configuration(64, 128, 64, 8, 3, False, 8, "32 products of each model a thread, the most without a spill; 24 KiB in flight"),)
_SM_90 = (
    Configuration(64, 64, 128, 4, 4, True, 2, "one warpgroup, the fewest rows of wgmma; with 64 x 128 everything else spills"),
    Configuration(128, 64, 128, 8, 4, True, 2, "32 products of each model a thread leave room for whatever is made of them"),
    Configuration(128, 128, 128, 8, 3, True, 16, "64 of each fill 255 registers: sums are taken of 4 a thread at a time", True),
)
_SM_100_INT8 = (Configuration(128, 64, 128, 8, 4, True, 8, "32 products of each model a thread; in 4 parts the stats spill"),)
_SM_100_FP8 = (Configuration(128, 64, 128, 8, 4, True, 4, "two threads a row with 32 columns each, 8 at a time; 64 rows spill"),)
CONFIGURATIONS = {
    "interpreter": (Configuration(16, 64, 64, 1, 1, False, 2, "small, so that small tests have several tiles in every direction"),),
    ("sm_80", "int8"): _SM_80,
    ("sm_80", "fp8"): _SM_80,  # of 8.9 and 12.x
    ("sm_90", "int8"): _SM_90,
    ("sm_90", "fp8"): _SM_90,
    ("sm_100", "int8"): _SM_100_INT8,  # Triton has no tcgen05 of int8, but the older mma.sync: float8 is the kind for this one
    ("sm_100", "fp8"): _SM_100_FP8,
    ("gfx942", "int8"): (Configuration(64, 128, 128, 8, 2, False, 4, "32 KiB of shared memory; 128 x 64 spills with the stats"),),
}


def configuration(architecture: str, kind: str, tokens: int, bare: bool) -> Configuration:
    """The first whose rows hold all tokens, or the last; `bare`: of those for a divergence alone, too."""
    fitting = [c for c in CONFIGURATIONS.get((architecture, kind)) or CONFIGURATIONS[architecture] if bare or not c.bare]
    return next((c for c in fitting if c.rows >= tokens), fitting[-1])


@triton.jit
def multiply(
    rows,  # (n, D'), pointer or descriptor
    head,  # (V, D'), pointer or descriptor
    dim,
    tokens,  # (ROWS,)
    there,  # (ROWS,)
    entries,  # (ENTRIES,)
    inside,  # (ENTRIES,)
    first_token,
    first_entry,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
    INTEGERS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """(ROWS, ENTRIES) int32 or float32; what lies outside of either matrix counts as 0."""
    product = tl.zeros((ROWS, ENTRIES), tl.int32 if INTEGERS else tl.float32)
    if DESCRIPTORS:
        for k in range(0, dim, DEPTH):
            product = tl.dot(rows.load([first_token, k]), head.load([first_entry, k]).T, product, out_dtype=product.dtype)
    else:
        depth = tl.arange(0, DEPTH)
        rows_at = rows + tokens.to(tl.int64)[:, None] * dim + depth[None, :]
        head_at = head + entries.to(tl.int64)[None, :] * dim + depth[:, None]
        for k in range(0, dim, DEPTH):
            inner = k + depth < dim
            a = tl.load(rows_at + k, mask=there[:, None] & inner[None, :], other=0.0)
            b = tl.load(head_at + k, mask=inside[None, :] & inner[:, None], other=0.0)
            product = tl.dot(a, b, product, out_dtype=product.dtype)
    return product


@triton.jit
def _parts(tile, PARTS: tl.constexpr):
    """A tuple of the tile's columns (R, C / PARTS), from left to right: registers given other names."""
    parts = (tile,)
    if PARTS >= 2:
        parts = _halves(parts)
    if PARTS >= 4:
        parts = _halves(parts)
    if PARTS >= 8:
        parts = _halves(parts)
    if PARTS >= 16:
        parts = _halves(parts)
    return parts


@triton.jit
def _halves(parts):
    halves = ()
    for i in tl.static_range(len(parts)):
        tile = parts[i]
        left, right = tl.split(tile.reshape((tile.shape[0], 2, tile.shape[1] // 2)).permute((0, 2, 1)))
        halves = halves + (left, right)  # noqa: RUF005  (which Triton does not compile)
    return halves


@triton.jit
def meant(product, row_scale, head_scales, bias, entries, inside, scale, softcap):
    """Logits (R, C) of a product of 8-bit rows."""
    head_scale = tl.load(head_scales + entries.to(tl.int64) * 3, mask=inside, other=0.0)
    return apply_head(product.to(tl.float32) * row_scale[:, None] * head_scale[None, :], bias, entries, inside, scale, softcap)


@triton.jit
def masses(
    z,  # (R, C)
    y,  # (R, C), z if there is no teacher
    student,  # (R,) references: log-sum-exps, or what stands for them
    teacher,
    untempered,
    inverse_temperature,
    first,
    second,
    TEACHER: tl.constexpr,
    SEPARATE: tl.constexpr,  # the untempered softmax is wanted, and another one
    ENTROPIES: tl.constexpr,
    DIVERGENCE: tl.constexpr,  # None: there is none
    PARAMETERS: tl.constexpr,
):
    """(R, C) each, as `correction.Sums`."""
    log_q = z * inverse_temperature - student[:, None]
    q = tl.exp(log_q)
    q1, log_p, p = q, log_q, q
    if SEPARATE:
        q1 = tl.exp(z - untempered[:, None])
    if TEACHER:
        log_p = y * inverse_temperature - teacher[:, None]
        p = tl.exp(log_p)
    value, slope, below = q * 0.0, q * 0.0, q * 0.0
    if DIVERGENCE is not None:
        value, slope = value_and_slope(raised(log_p), raised(log_q), first, second, DIVERGENCE, PARAMETERS)
        if TEACHER:
            below = tl.where(((log_q < FLOOR) & (p > 0.0)) | ((log_p < FLOOR) & (q > 0.0)), 1.0, 0.0)
    entropy_q, entropy_p = q * 0.0, q * 0.0
    if ENTROPIES:
        entropy_q, entropy_p = q * raised(log_q), p * raised(log_p)
    return q, p, value, slope, q1, entropy_q, entropy_p, below


@triton.jit
def no_sums(ROWS: tl.constexpr):
    none = tl.zeros((ROWS,), tl.float32)
    return none, none, none, none, none, none, none, none


@triton.jit
def _at_most_one(mass):
    """A comparison and not a minimum, which would make a number of NaN."""
    return tl.where(mass > 1.0, 1.0, mass)


@triton.jit
def get_references(references, rows, there, tokens):
    """(R,) each of REFERENCES."""
    student = tl.load(references + rows, mask=there, other=NOBODY)
    teacher = tl.load(references + tokens + rows, mask=there, other=NOBODY)
    untempered = tl.load(references + 2 * tokens + rows, mask=there, other=NOBODY)
    return student, teacher, untempered, tl.load(references + 3 * tokens + rows, mask=there, other=0.0)


@triton.jit
def _summed(mass, inside, STATS: tl.constexpr):
    """Beyond the vocabulary there is no mass: of its logits, -inf, or with the stats by a select of each sum. Either spills elsewhere."""
    if STATS:
        mass = tl.where(inside[None, :], mass, 0.0)
    return tl.sum(mass, 1)


@triton.jit
def _take(
    taken,  # of no_sums
    product_z,  # (R, C)
    product_y,
    at,  # the first of C neighbouring entries
    token,  # (R,) each: see the kernel
    student_head_scales,
    teacher_head_scales,
    student_bias,
    teacher_bias,
    squares,  # (V,), of the block
    vocabulary,
    inverse_temperature,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    first,
    second,
    TEACHER: tl.constexpr,
    LABELS: tl.constexpr,
    UNTEMPERED: tl.constexpr,
    SEPARATE: tl.constexpr,
    STATS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    """The sums with those of a tile added; writes its columns' squared scores."""
    student_sum, teacher_sum, value_sum, slope_sum, untempered_sum, entropy_q_sum, entropy_p_sum, below_sum = taken
    (
        student_row_scale, teacher_row_scale, student, teacher, untempered, slope_total, divergence_weight, untempered_weight, label_square,
        label,
    ) = token  # fmt: skip
    entries = at + tl.arange(0, product_z.shape[1])
    inside = entries < vocabulary
    z = meant(product_z, student_row_scale, student_head_scales, student_bias, entries, inside, student_scale, student_softcap)
    if not STATS:
        z = tl.where(inside[None, :], z, -float("inf"))
    y = z
    if TEACHER:
        y = meant(product_y, teacher_row_scale, teacher_head_scales, teacher_bias, entries, inside, teacher_scale, teacher_softcap)
        if not STATS:
            y = tl.where(inside[None, :], y, -float("inf"))
    q, p, value, slope, q1, entropy_q, entropy_p, below = masses(
        z, y, student, teacher, untempered, inverse_temperature, first, second, TEACHER, SEPARATE, STATS, DIVERGENCE, PARAMETERS,
    )  # fmt: skip
    student_sum += _summed(q, inside, STATS)
    if TEACHER:
        teacher_sum += _summed(p, inside, STATS)
    if SEPARATE:
        untempered_sum += _summed(q1, inside, STATS)
    if STATS:
        entropy_q_sum += _summed(entropy_q, inside, STATS)
        entropy_p_sum += _summed(entropy_p, inside, STATS)
    square = tl.zeros_like(z)
    if DIVERGENCE is not None:
        value_sum += _summed(value, inside, STATS)
        slope_sum += _summed(slope, inside, STATS)
        if TEACHER:
            below_sum += _summed(below, inside, STATS)
        dz = slope - q * slope_total[:, None]
        mass = _at_most_one(q) + _at_most_one(p)
        square = divergence_weight[:, None] * (_at_most_one(dz * dz) + AGREEMENT * mass * mass)
    if UNTEMPERED:
        mass = _at_most_one(q1)
        square += untempered_weight[:, None] * mass * mass
    if LABELS:
        square += tl.where(entries[None, :] == label[:, None], label_square[:, None], 0.0)
    tl.store(squares + entries, tl.sum(square, 0), mask=inside)
    return student_sum, teacher_sum, value_sum, slope_sum, untempered_sum, entropy_q_sum, entropy_p_sum, below_sum


@triton.jit
def _all_sums(taken, TEACHER: tl.constexpr, SEPARATE: tl.constexpr):
    """With those that are another's."""
    student_sum, teacher_sum, value_sum, slope_sum, untempered_sum, entropy_q_sum, entropy_p_sum, below_sum = taken
    return (
        student_sum, teacher_sum if TEACHER else student_sum, value_sum, slope_sum, untempered_sum if SEPARATE else student_sum,
        entropy_q_sum, entropy_p_sum, below_sum,
    )  # fmt: skip


@triton.jit
def quantised_sweep_kernel(
    student_rows,  # (n, D_s padded), pointer or descriptor
    student_head,  # (V, D_s padded)
    student_row_scales,  # (n, 3) float32
    student_head_scales,  # (V, 3) float32
    teacher_rows,  # (n, D_t padded), or None
    teacher_head,  # (V, D_t padded), or None
    teacher_row_scales,
    teacher_head_scales,
    student_bias,  # (V,), or None
    teacher_bias,  # (V,), or None
    labels,  # (n,) int64, or None
    coefficients,  # (n, 3) float32
    references,  # (REFERENCES, n) float32
    sums,  # (SUMS, n, splits) float32, written
    squares,  # (blocks, V) float32, written: squared scores of the columns, summed over the block's tokens
    tokens,
    vocabulary,
    splits,
    blocks,  # of tokens
    slice_entries,  # of a split, a multiple of ENTRIES
    student_dim,  # padded
    teacher_dim,
    inverse_temperature,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    first,
    second,
    UNTEMPERED: tl.constexpr,
    SEPARATE: tl.constexpr,
    STATS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    PARAMETERS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
    INTEGERS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile, a power of two to 16, whose sums are taken one after the other
):
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first_row = block * ROWS
    rows = first_row + tl.arange(0, ROWS)
    there = rows < tokens
    student, teacher, untempered, slope_total = get_references(references, rows, there, tokens)
    kd = tl.load(coefficients + rows * TERM_COUNT, mask=there, other=0.0)
    ce = tl.load(coefficients + rows * TERM_COUNT + 1, mask=there, other=0.0)
    z_loss = tl.load(coefficients + rows * TERM_COUNT + 2, mask=there, other=0.0)
    divergence_weight = student_scale * kd * inverse_temperature
    divergence_weight *= divergence_weight
    untempered_weight = student_scale * (tl.abs(ce) + 2.0 * tl.abs(z_loss * untempered))
    untempered_weight *= untempered_weight
    label_square = student_scale * ce
    label_square *= label_square
    label = rows
    if labels is not None:
        label = tl.load(labels + rows, mask=there, other=-1)
        label = tl.where(label < 0, -1, label).to(tl.int32)  # of NO_LABEL the lower half alone would be 0
    student_row_scale = tl.load(student_row_scales + rows * 3, mask=there, other=0.0)
    teacher_row_scale = student_row_scale
    if teacher_rows is not None:
        teacher_row_scale = tl.load(teacher_row_scales + rows * 3, mask=there, other=0.0)
    token = (
        student_row_scale, teacher_row_scale, student, teacher, untempered, slope_total, divergence_weight, untempered_weight, label_square,
        label,
    )  # fmt: skip
    squares += block.to(tl.int64) * vocabulary
    taken = no_sums(ROWS)
    begin = split * slice_entries
    for at in range(begin, tl.minimum(begin + slice_entries, vocabulary), ENTRIES):
        entries = at + tl.arange(0, ENTRIES)
        inside = entries < vocabulary
        z = multiply(
            student_rows, student_head, student_dim, rows, there, entries, inside, first_row, at, ROWS, ENTRIES, DEPTH, INTEGERS,
            DESCRIPTORS,
        )  # fmt: skip
        y = z
        if teacher_rows is not None:
            y = multiply(
                teacher_rows, teacher_head, teacher_dim, rows, there, entries, inside, first_row, at, ROWS, ENTRIES, DEPTH, INTEGERS,
                DESCRIPTORS,
            )  # fmt: skip
        zs, ys = _parts(z, PARTS), _parts(y, PARTS)
        for part in tl.static_range(PARTS):
            taken = _take(
                taken, zs[part], ys[part], at + part * (ENTRIES // PARTS), token, student_head_scales, teacher_head_scales, student_bias,
                teacher_bias, squares, vocabulary, inverse_temperature, student_scale, teacher_scale, student_softcap, teacher_softcap,
                first, second, teacher_rows is not None, labels is not None, UNTEMPERED, SEPARATE, STATS, DIVERGENCE, PARAMETERS,
            )  # fmt: skip
    tiles.put_statistics(sums, rows, there, split, tokens, splits, _all_sums(taken, teacher_rows is not None, SEPARATE))
