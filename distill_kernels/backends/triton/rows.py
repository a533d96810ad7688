"""Row kernels of the chunked schedule: a chunk's logits, student's and teacher's (n, V) float32, become loss terms, stats and dz.

    statistics   reads both logits     log-sum-exps, and what a divergence sums in the same pass
    totals       reads both logits     only for what needs the log-sum-exps first; else only tokens with an entry below the floor
    gradient     reads both logits     terms and stats of the token, dz of its vocabulary

One program owns ROWS tokens (one, on a GPU) and one split of their vocabulary, in every kernel, so that a single token fills the chip
too. It writes nothing that another reads in the same launch: sums are merged in the next, in the order of the vocabulary, by everyone
who needs them.
Bytes of logits for each token and entry: 8 a pass, two passes for divergences that can be renormalised and three for the others, and 4
(float32) or 2 written.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from distill_kernels.backends.triton import tiles
from distill_kernels.backends.triton.elementwise import apply_head
from distill_kernels.backends.triton.tiles import STAT_COUNT, STATISTICS, TERM_COUNT, TOTALS


@dataclass(frozen=True)
class Configuration:
    rows: int  # tokens of a tile
    block: int  # entries of a tile
    warps: int
    programs: int  # in a launch, at least; a token's vocabulary is split where there are fewer tokens
    reason: str


# By the target's architecture. None spills in any variant (benchmarks/results/triton_compile.csv).
CONFIGURATIONS = {
    "cuda": Configuration(
        1, 1024, 4, 1024, "8 entries a thread and model: two 16-byte loads of each in flight; on 8 warps the totals spill a register or two"
    ),
    "interpreter": Configuration(8, 128, 1, 6, "several tiles and splits in small tests, many rows for each interpreted operation"),
    "hip": Configuration(1, 2048, 4, 1216, "4 wavefronts of 64: the same 8 entries a thread; 4 programs for each of 304 compute units"),
}


def configuration(architecture: str) -> Configuration:
    return CONFIGURATIONS["hip" if architecture.startswith("gfx") else architecture if architecture in CONFIGURATIONS else "cuda"]


def splits_of(tokens: int, vocabulary: int, configuration: Configuration) -> int:
    """Programs that share a token's vocabulary: a power of two."""
    most = triton.next_power_of_2(-(-vocabulary // configuration.block))
    blocks = max(1, -(-tokens // configuration.rows))
    return min(64, most, triton.next_power_of_2(-(-configuration.programs // blocks)))


def partial_bytes(tokens: int, splits: int) -> int:
    return 4 * (STATISTICS + TOTALS) * tokens * splits


@triton.jit
def _logits(logits, bias, rows, there, entries, inside, vocabulary, scale, softcap):
    """(R, C): meant logits of some tokens."""
    product = tl.load(logits + rows.to(tl.int64)[:, None] * vocabulary + entries[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    return apply_head(product, bias, entries, inside, scale, softcap)


@triton.jit
def statistics_kernel(
    student_logits,  # (n, V) float32, bare products
    teacher_logits,  # (n, V) float32, or None
    student_bias,  # (V,), or None
    teacher_bias,  # (V,), or None
    labels,  # (n,) int64, or None
    partial,  # (STATISTICS, n, splits) float32, written
    tokens,
    vocabulary,
    splits,
    slice_entries,  # of a split, a multiple of BLOCK
    inverse_temperature,
    student_scale,
    teacher_scale,
    student_softcap,  # None: none
    teacher_softcap,
    first,  # parameters of the divergence
    second,
    SEPARATE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    TOP: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    PARAMETERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < tokens
    begin = tl.program_id(1) * slice_entries
    label = None
    if labels is not None:
        label = tl.load(labels + rows, mask=there, other=-1)
    statistics = tiles.no_statistics(ROWS)
    for at in range(begin, tl.minimum(begin + slice_entries, vocabulary), BLOCK):
        entries = at + tl.arange(0, BLOCK)
        inside = entries < vocabulary
        z = _logits(student_logits, student_bias, rows, there, entries, inside, vocabulary, student_scale, student_softcap)
        y = z
        if teacher_logits is not None:
            y = _logits(teacher_logits, teacher_bias, rows, there, entries, inside, vocabulary, teacher_scale, teacher_softcap)
        statistics = tiles.take_statistics(
            statistics, z, y, entries, inside, label, inverse_temperature, first, second,
            teacher_logits is not None, SEPARATE, SMOOTHING, TOP, DIVERGENCE, RENORMALISE, PARAMETERS,
        )  # fmt: skip
    tiles.put_statistics(partial, rows, there, tl.program_id(1), tokens, splits, statistics)


@triton.jit
def merge_kernel(
    partial,  # (STATISTICS, n, splits) float32
    merged,  # (MERGED, n) float32, written
    tokens,
    vocabulary,
    splits,
    inverse_temperature,
    TEACHER: tl.constexpr,
    UNTEMPERED: tl.constexpr,
    SEPARATE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Between the two passes of the tile-fused sweep, whose tiles have many tokens: their splits' sums are merged once, token by token."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < tokens
    statistics = tiles.merge_statistics(
        partial, rows, there, tokens, splits, vocabulary, inverse_temperature, TEACHER, UNTEMPERED, SEPARATE, False, False, None, SPLITS,
    )  # fmt: skip
    tiles.put_merged(merged, rows, there, tokens, statistics)


@triton.jit
def totals_kernel(
    student_logits,  # (n, V) float32, bare products
    teacher_logits,  # (n, V) float32, or None
    student_bias,  # (V,), or None
    teacher_bias,  # (V,), or None
    partial,  # (STATISTICS, n, splits) float32
    totals,  # (TOTALS, n, splits) float32, written
    tokens,
    vocabulary,
    splits,
    slice_entries,
    inverse_temperature,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    first,
    second,
    ALWAYS: tl.constexpr,  # False: only for a token with an entry below the floor
    UNTEMPERED: tl.constexpr,
    SEPARATE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    STATS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    PARAMETERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < tokens
    max_q, log_sum_q, log_sum_bare, max_p, log_sum_p, clamped, _s, _z, _a, _v, _t = tiles.merge_statistics(
        partial, rows, there, tokens, splits, vocabulary, inverse_temperature,
        teacher_logits is not None, UNTEMPERED, SEPARATE, False, False, None, SPLITS,
    )  # fmt: skip
    begin = tl.program_id(1) * slice_entries
    end = tl.minimum(begin + slice_entries, vocabulary)
    if not ALWAYS:
        end = tl.where(tl.max((clamped & there).to(tl.int32), 0) != 0, end, begin)
    sums = tiles.no_totals(ROWS)
    for at in range(begin, end, BLOCK):
        entries = at + tl.arange(0, BLOCK)
        inside = entries < vocabulary
        z = _logits(student_logits, student_bias, rows, there, entries, inside, vocabulary, student_scale, student_softcap)
        y = z
        if teacher_logits is not None:
            y = _logits(teacher_logits, teacher_bias, rows, there, entries, inside, vocabulary, teacher_scale, teacher_softcap)
        sums = tiles.take_totals(
            sums, z, y, inside, max_q, log_sum_q, log_sum_bare, max_p, log_sum_p, inverse_temperature, first, second,
            teacher_logits is not None, SMOOTHING, STATS, DIVERGENCE, PARAMETERS,
        )  # fmt: skip
    tiles.put_statistics(totals, rows, there, tl.program_id(1), tokens, splits, sums)


@triton.jit
def gradient_kernel(
    student_logits,  # (n, V) float32, bare products
    teacher_logits,  # (n, V) float32, or None
    student_bias,  # (V,), or None
    teacher_bias,  # (V,), or None
    labels,  # (n,) int64, or None
    coefficients,  # (n, 3) float32
    partial,  # (STATISTICS, n, splits) float32
    totals,  # (TOTALS, n, splits) float32
    terms,  # (n, 3) float32, written
    stats,  # (n, 6) float32, written; None: not wanted
    dz,  # (n, V), written, may be student_logits; None: not wanted
    dz_scale,  # () float32: multiplies dz; None: 1
    tokens,
    vocabulary,
    whole,  # vocabulary that the partial sums are of
    splits,  # of it
    slice_entries,
    inverse_temperature,
    label_smoothing,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    first,
    second,
    TEACHER: tl.constexpr,
    UNTEMPERED: tl.constexpr,
    SEPARATE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    PARAMETERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < tokens
    label = None
    if labels is not None:
        label = tl.load(labels + rows, mask=there, other=-1)
    statistics = tiles.merge_statistics(
        partial, rows, there, tokens, splits, whole, inverse_temperature,
        TEACHER, UNTEMPERED, SEPARATE, SMOOTHING, stats is not None, RENORMALISE, SPLITS,
    )  # fmt: skip
    factors = tiles.finish(
        statistics, totals, coefficients, label, rows, there, tokens, splits, whole, inverse_temperature, label_smoothing,
        SMOOTHING, DIVERGENCE, RENORMALISE, SPLITS,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        value, cross_entropy, nll, lse = factors[0], factors[1], factors[2], factors[3]
        tl.store(terms + rows * TERM_COUNT, value, mask=there)
        tl.store(terms + rows * TERM_COUNT + 1, cross_entropy, mask=there)
        tl.store(terms + rows * TERM_COUNT + 2, lse * lse if UNTEMPERED else lse * 0.0, mask=there)
        if stats is not None:
            active = factors[9]
            tl.store(stats + rows * STAT_COUNT, value, mask=there)
            tl.store(stats + rows * STAT_COUNT + 1, nll, mask=there)
            tl.store(stats + rows * STAT_COUNT + 4, tl.where(active, statistics[8], 0.0), mask=there)
            for field in tl.static_range(3):  # both entropies and the tail mass are columns 2, 3 and 5
                total = tiles.merge_totals(totals, 4 + field, rows, there, tokens, splits, SPLITS)
                tl.store(stats + rows * STAT_COUNT + 2 + field + field // 2, tl.where(active, total, 0.0), mask=there)
    if dz is not None:
        scale = student_scale
        if dz_scale is not None:
            scale *= tl.load(dz_scale)
        begin = tl.program_id(1) * slice_entries
        for at in range(begin, tl.minimum(begin + slice_entries, vocabulary), BLOCK):
            entries = at + tl.arange(0, BLOCK)
            inside = entries < vocabulary
            z = _logits(student_logits, student_bias, rows, there, entries, inside, vocabulary, student_scale, student_softcap)
            y = z
            if TEACHER:
                y = _logits(teacher_logits, teacher_bias, rows, there, entries, inside, vocabulary, teacher_scale, teacher_softcap)
            made = tiles.gradient(
                z, y, entries, label, statistics, factors, inverse_temperature, scale, student_softcap, first, second,
                TEACHER, UNTEMPERED, SMOOTHING, DIVERGENCE, PARAMETERS,
            )  # fmt: skip
            at_row = dz + rows.to(tl.int64)[:, None] * vocabulary + entries[None, :]
            tl.store(at_row, made.to(dz.dtype.element_ty), mask=there[:, None] & inside[None, :])
