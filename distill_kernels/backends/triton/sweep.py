"""The tile-fused sweep: statistics of every token straight from hidden states and heads, the logits of a tile never leaving the chip.

One program owns a block of tokens and a split of the vocabulary. For each tile of its split it multiplies the student's and the
teacher's hidden states with the tile's rows of the heads, both products accumulating in registers, and takes the tile's statistics
(`tiles`). It writes its partial statistics and nothing else; `rows.gradient_kernel` merges them into the terms. Programs next to each other
share a tile of the heads and differ in their tokens: a head is read from memory once, and from L2 by the others.

Flops 2·N·V·(D_s + D_t); bytes requested of L2 for each tile: (ROWS + ENTRIES) · (D_s + D_t) · element.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from distill_kernels.backends.triton import tiles
from distill_kernels.backends.triton.elementwise import apply_head


@dataclass(frozen=True)
class Configuration:
    rows: int  # tokens of a tile
    entries: int
    depth: int  # of hidden states that are multiplied at a time
    warps: int
    stages: int
    descriptors: bool  # tensor descriptors, which the target's TMA reads
    reason: str


# By the target's architecture, or "unaligned" where rows do not begin at multiples of 16 bytes, and the bytes of an element. None spills
# in any variant (benchmarks/results/triton_compile.csv).
CONFIGURATIONS = {
    "interpreter": (Configuration(16, 32, 16, 1, 1, False, "small, so that small tests have several tiles in every direction"),),
    # Also of 8.6, 8.9 and 12.x, which have 99 KiB of shared memory.
    ("sm_80", 2): (
        Configuration(32, 64, 64, 8, 4, False, "36 KiB in flight, for few tokens wait for memory; on 4 warps, or 128 entries, it spills"),
        Configuration(64, 64, 32, 8, 3, False, "the largest that never spills: 64 x 128, more depth or more stages lack a register"),
    ),
    ("sm_80", 4): (
        Configuration(32, 128, 32, 8, 3, False, "no tensor cores; 40 KiB in flight, for few tokens wait for memory"),
        Configuration(64, 64, 16, 8, 3, False, "no tensor cores: operands take registers, which a depth of 32 spills"),
    ),
    ("sm_90", 2): (
        Configuration(16, 128, 64, 4, 5, True, "72 KiB in flight, for few tokens wait for memory; too few rows for wgmma"),
        Configuration(32, 64, 64, 4, 6, True, "likewise, 72 KiB; 32 x 128 spills"),
        Configuration(64, 64, 64, 4, 4, True, "one warpgroup, the fewest rows of wgmma; 64 x 128 leaves no register"),
        Configuration(128, 128, 128, 8, 2, True, "64 logits of each model a thread fill 255 registers; with 3 stages they spill"),
    ),
    ("sm_90", 4): (
        Configuration(32, 64, 16, 8, 3, True, "fma, unless TF32 is on: operands take registers, which a depth of 32 spills"),
        Configuration(64, 64, 16, 8, 3, True, "the largest that spills neither as fma nor, with TF32 on, as wgmma"),
    ),
    ("sm_100", 2): (
        Configuration(32, 128, 64, 8, 4, True, "60 KiB in flight, for few tokens wait for memory; 16 rows spill"),
        Configuration(64, 64, 64, 4, 4, True, "the fewest rows of tcgen05; 64 columns a thread, of 64 x 128, spill"),
        Configuration(128, 64, 64, 8, 4, True, "two threads a row with 32 columns each; the numbers of 64 columns spill"),
    ),
    ("sm_100", 4): (
        Configuration(32, 64, 16, 8, 3, True, "fma, unless TF32 is on: operands take registers, which a depth of 32 spills"),
        Configuration(64, 64, 16, 8, 3, True, "the largest that spills neither as fma nor, with TF32 on, as tcgen05"),
    ),
    # Loads of one element, an address each: on any target, of no more at a time than registers hold.
    ("unaligned", 2): (Configuration(64, 64, 32, 8, 2, False, "the largest that spills nowhere"),),
    ("unaligned", 4): (Configuration(32, 32, 16, 8, 2, False, "the largest that spills nowhere"),),
    ("gfx942", 2): (
        Configuration(16, 128, 64, 4, 2, False, "few tokens wait for memory; 18 KiB of shared memory"),
        Configuration(64, 128, 64, 8, 2, False, "two wavefronts a SIMD, 256 registers each"),
        Configuration(128, 128, 64, 8, 2, False, "32 logits of each model a thread, the most that 256 registers hold"),
    ),
    ("gfx942", 4): (
        Configuration(64, 64, 32, 8, 2, False, "two wavefronts a SIMD; few tokens wait for memory"),
        Configuration(128, 128, 32, 8, 2, False, "32 logits of each model a thread, the most that 256 registers hold"),
    ),
}


def configuration(architecture: str, dtype: torch.dtype, tokens: int) -> Configuration:
    """The first whose rows hold all tokens, or the last."""
    fitting = CONFIGURATIONS.get((architecture, dtype.itemsize)) or CONFIGURATIONS[architecture]
    return next((c for c in fitting if c.rows >= tokens), fitting[-1])


def splits_of(blocks: int, vocabulary: int, multiprocessors: int, configuration: Configuration) -> int:
    """Programs that share a block's vocabulary: as many as fill the chip once, each with a tile at least."""
    return max(1, min(multiprocessors // blocks, -(-vocabulary // configuration.entries)))


@triton.jit
def _product(
    hidden,  # (N, D), pointer or descriptor
    weight,  # (V, D), pointer or descriptor
    hidden_stride,
    weight_stride,
    dim,
    rows,  # (ROWS,)
    entries,  # (ENTRIES,)
    first_row,
    first_entry,
    tokens,
    vocabulary,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(ROWS, ENTRIES) float32; what lies outside of either matrix counts as 0."""
    product = tl.zeros((ROWS, ENTRIES), tl.float32)
    if DESCRIPTORS:
        for k in range(0, dim, DEPTH):
            product = tl.dot(hidden.load([first_row, k]), weight.load([first_entry, k]).T, product, input_precision=PRECISION)
    else:
        depth = tl.arange(0, DEPTH)
        hidden_at = hidden + rows.to(tl.int64)[:, None] * hidden_stride + depth[None, :]
        weight_at = weight + entries.to(tl.int64)[None, :] * weight_stride + depth[:, None]
        for k in range(0, dim, DEPTH):
            inside = k + depth < dim
            a = tl.load(hidden_at + k, mask=(rows < tokens)[:, None] & inside[None, :], other=0.0)
            b = tl.load(weight_at + k, mask=(entries < vocabulary)[None, :] & inside[:, None], other=0.0)
            product = tl.dot(a, b, product, input_precision=PRECISION)
    return product


@triton.jit
def sweep_kernel(
    student_hidden,  # (N, D_s), pointer or descriptor
    student_weight,  # (V, D_s)
    teacher_hidden,  # (N, D_t), or None
    teacher_weight,  # (V, D_t), or None
    student_bias,  # (V,), or None
    teacher_bias,  # (V,), or None
    labels,  # (N,) int64, or None
    partial,  # (STATISTICS, N, splits) float32, written if `totals` is None
    merged,  # (MERGED, N) float32, read if it is not
    totals,  # (TOTALS, N, splits) float32, written; None: `partial` is
    tokens,
    vocabulary,
    splits,
    blocks,  # of tokens
    slice_entries,  # of a split, a multiple of ENTRIES
    student_dim,
    teacher_dim,
    student_hidden_stride,
    student_weight_stride,
    teacher_hidden_stride,
    teacher_weight_stride,
    inverse_temperature,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    first,
    second,
    SEPARATE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    PARAMETERS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first_row = block * ROWS
    rows = first_row + tl.arange(0, ROWS)
    there = rows < tokens
    label = None
    if labels is not None:
        label = tl.load(labels + rows, mask=there, other=-1)
    begin = split * slice_entries
    end = tl.minimum(begin + slice_entries, vocabulary)
    if totals is None:
        sums = tiles.no_statistics(ROWS)
    else:  # once the log-sum-exps are known, and only for a block with an entry below the floor
        max_q, log_sum_q, log_sum_bare, max_p, log_sum_p, clamped = tiles.get_merged(merged, rows, there, tokens)
        end = tl.where(tl.max((clamped & there).to(tl.int32), 0) != 0, end, begin)
        sums = tiles.no_totals(ROWS)
    for at in range(begin, end, ENTRIES):
        entries = at + tl.arange(0, ENTRIES)
        inside = entries < vocabulary
        z = _product(
            student_hidden, student_weight, student_hidden_stride, student_weight_stride, student_dim, rows, entries, first_row, at,
            tokens, vocabulary, ROWS, ENTRIES, DEPTH, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        z = apply_head(z, student_bias, entries, inside, student_scale, student_softcap)
        y = z
        if teacher_hidden is not None:
            y = _product(
                teacher_hidden, teacher_weight, teacher_hidden_stride, teacher_weight_stride, teacher_dim, rows, entries, first_row, at,
                tokens, vocabulary, ROWS, ENTRIES, DEPTH, DESCRIPTORS, PRECISION,
            )  # fmt: skip
            y = apply_head(y, teacher_bias, entries, inside, teacher_scale, teacher_softcap)
        if totals is None:
            sums = tiles.take_statistics(
                sums, z, y, entries, inside, label, inverse_temperature, first, second,
                teacher_hidden is not None, SEPARATE, SMOOTHING, False, DIVERGENCE, RENORMALISE, PARAMETERS,
            )  # fmt: skip
        else:
            sums = tiles.take_totals(
                sums, z, y, inside, max_q, log_sum_q, log_sum_bare, max_p, log_sum_p, inverse_temperature, first, second,
                teacher_hidden is not None, SMOOTHING, False, DIVERGENCE, PARAMETERS,
            )  # fmt: skip
    tiles.put_statistics(partial if totals is None else totals, rows, there, split, tokens, splits, sums)
