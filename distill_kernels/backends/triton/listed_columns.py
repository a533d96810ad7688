"""The sweep's logits of listed columns, (n, m) float32: the pilot's before the sweep, and after it those of the columns kept.

    logits       the instructions of `quantised_sweep` over the same steps of the depth, a tile of tokens and listed columns to a program:
                 the float8 sums of sm_90, which keep some 14 bits, err here as they err there, and the correction stays without bias
    references   what the sweep's sums are relative to, from the pilot's partial statistics; one program owns a token

Integer operations of a model 2·n·m·D; bytes written 4 for each token and column.
"""

import triton
import triton.language as tl

from distill_kernels.backends.triton import tiles
from distill_kernels.backends.triton.quantised_sweep import Configuration, meant, multiply

# By the target's architecture, of either kind of quantisation. A list's rows of the head are no box that a descriptor describes.
CONFIGURATIONS = {
    "interpreter": Configuration(16, 32, 32, 1, 1, False, 1, "other tiles than the sweep's, and several of them"),
    "sm_80": Configuration(64, 128, 64, 8, 3, False, 1, "as the sweep; one model's products at a time"),
    "sm_90": Configuration(128, 128, 128, 8, 3, False, 1, "64 products a thread; 96 KiB in flight"),
    "sm_100": Configuration(128, 64, 128, 8, 3, False, 1, "two threads a row with 32 columns each"),
    "gfx942": Configuration(64, 128, 128, 8, 2, False, 1, "as the sweep; one model's products at a time"),
}


def configuration(architecture: str) -> Configuration:
    return CONFIGURATIONS[architecture]


@triton.jit
def logits_kernel(
    rows,  # (n, D') 8-bit
    head,  # (V, D')
    row_scales,  # (n, 3) float32
    head_scales,  # (V, 3) float32
    bias,  # (V,), or None
    columns,  # (m,) int64, of the vocabulary
    logits,  # (n, m) float32, written
    tokens,
    count,  # of columns
    blocks,  # of tokens
    dim,
    scale,
    softcap,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    """The sweep's logits of some columns."""
    first_row = tl.program_id(0) % blocks * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < tokens
    at = tl.program_id(0) // blocks * ENTRIES + tl.arange(0, ENTRIES)
    inside = at < count
    entries = tl.load(columns + at, mask=inside, other=0)
    product = multiply(rows, head, dim, row, there, entries, inside, 0, 0, ROWS, ENTRIES, DEPTH, INTEGERS, False)
    row_scale = tl.load(row_scales + row * 3, mask=there, other=0.0)
    z = meant(product, row_scale, head_scales, bias, entries, inside, scale, softcap)
    tl.store(logits + row.to(tl.int64)[:, None] * count + at[None, :], z, mask=there[:, None] & inside[None, :])


@triton.jit
def references_kernel(
    partial,  # (STATISTICS, n, splits) float32, of the pilot's logits
    references,  # (REFERENCES, n) float32, written
    tokens,
    splits,
    vocabulary,
    inverse_temperature,
    TEACHER: tl.constexpr,
    SEPARATE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < tokens
    max_q, log_sum_q, log_sum_bare, max_p, log_sum_p, _c, _s, _z, _a, _value, slope = tiles.merge_statistics(
        partial, rows, there, tokens, splits, vocabulary, inverse_temperature, TEACHER, SEPARATE, SEPARATE, False, False, RENORMALISE,
        SPLITS,
    )  # fmt: skip
    tl.store(references + rows, max_q * inverse_temperature + log_sum_q, mask=there)
    tl.store(references + tokens + rows, max_p * inverse_temperature + log_sum_p, mask=there)
    tl.store(references + 2 * tokens + rows, max_q + log_sum_bare, mask=there)
    tl.store(references + 3 * tokens + rows, slope, mask=there)
