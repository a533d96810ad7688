"""What the kernels do with a tile of logits: sums for the log-softmaxes and the loss, and the gradient of the logits.

A tile is (R, C): R tokens, C neighbouring vocabulary entries; z are the student's logits and y the teacher's, after their heads. A
program goes through some of a token's vocabulary, a split, and leaves partial sums for each; the sums of all splits are merged where
they are needed, which costs less than a launch. Two kinds of sums, each a tuple of (R,) vectors:

statistics  maxima and sums of an online softmax; what a divergence sums in the same pass if its sums can be renormalised afterwards
            (`divergences.renormalised_by`): taken with logits less the running maximum in place of log-probabilities.
totals      sums that need the log-sum-exps: every other divergence, the stats, and whatever has an entry below the floor.

Partial sums lie in memory as (fields, tokens, splits) float32. Where the vocabulary is in shards of several ranks, those of every rank's
splits lie one after the other: `vocabulary` of what merges them is the whole one's.
"""

import triton
import triton.language as tl

from distill_kernels.backends.triton.elementwise import FLOOR, raised, value_and_slope
from distill_kernels.call.problem import STATS, TAIL_PROBABILITY, TERMS

LOWEST = tl.constexpr(-3.4028234663852886e38)
# What labels that stand for none are below; one of another rank's shard may be negative, too.
NO_LABEL = tl.constexpr(-(2**31))
TAIL = tl.constexpr(TAIL_PROBABILITY)
STATISTICS = 13  # fields of `no_statistics`
PLACES = (6, 10)  # of them: entries of the vocabulary
TOTALS = 7  # fields of `no_totals`
MERGED = 6  # fields of `put_merged`
TERM_COUNT = tl.constexpr(len(TERMS))
STAT_COUNT = tl.constexpr(len(STATS))


@triton.jit
def no_statistics(ROWS: tl.constexpr):
    """student maximum, minimum, Σ exp tempered, Σ exp untempered, Σ logits, logit of the label, place of the maximum; teacher maximum,
    minimum, Σ exp, place of the maximum; Σ value, Σ slope."""
    lowest = tl.full((ROWS,), LOWEST, tl.float32)
    none = tl.zeros((ROWS,), tl.float32)
    return lowest, -lowest, none, none, none, none, none, lowest, -lowest, none, none, none, none


@triton.jit
def _extremes(z, entries, inside, maximum, minimum, top, TOP: tl.constexpr):
    high = tl.where(inside[None, :], z, LOWEST)
    here = tl.max(high, 1)
    minimum = tl.minimum(minimum, tl.min(tl.where(inside[None, :], z, -LOWEST), 1))
    if TOP:
        place = tl.min(tl.where(high == here[:, None], entries[None, :].to(tl.float32), -LOWEST), 1)
        top = tl.where(here > maximum, place, top)
    return tl.maximum(maximum, here), minimum, top


@triton.jit
def take_statistics(
    statistics,
    z,  # (R, C)
    y,  # (R, C), z if there is no teacher
    entries,  # (C,)
    inside,  # (C,) whether the entry is of the vocabulary
    label,  # (R,), or None
    inverse_temperature,
    first,
    second,
    TEACHER: tl.constexpr,
    SEPARATE: tl.constexpr,  # the untempered log-sum-exp is wanted, and another one
    SMOOTHING: tl.constexpr,
    TOP: tl.constexpr,
    DIVERGENCE: tl.constexpr,  # None: none is summed here
    RENORMALISE: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    max_q, min_q, sum_q, sum_bare, sum_z, label_z, top_q, max_p, min_p, sum_p, top_p, value, slope = statistics
    now_q, min_q, top_q = _extremes(z, entries, inside, max_q, min_q, top_q, TOP)
    if SEPARATE:
        sum_bare = sum_bare * tl.exp(max_q - now_q) + tl.sum(tl.where(inside[None, :], tl.exp(z - now_q[:, None]), 0.0), 1)
    if SMOOTHING:
        sum_z += tl.sum(tl.where(inside[None, :], z, 0.0), 1)
    if label is not None:
        label_z += tl.sum(tl.where(entries[None, :] == label[:, None], z, 0.0), 1)
    log_q = (z - now_q[:, None]) * inverse_temperature
    grown_q = (now_q - max_q) * inverse_temperature
    sum_q = sum_q * tl.exp(-grown_q) + tl.sum(tl.where(inside[None, :], tl.exp(log_q), 0.0), 1)
    now_p, log_p, grown_p = now_q, log_q, grown_q
    if TEACHER:
        now_p, min_p, top_p = _extremes(y, entries, inside, max_p, min_p, top_p, TOP)
        log_p = (y - now_p[:, None]) * inverse_temperature
        grown_p = (now_p - max_p) * inverse_temperature
        sum_p = sum_p * tl.exp(-grown_p) + tl.sum(tl.where(inside[None, :], tl.exp(log_p), 0.0), 1)
    if DIVERGENCE is not None:
        # Before the first tile there is nothing to bring to the new maximum, which has grown beyond all bounds.
        excess_q = tl.where(max_q == LOWEST, 0.0, grown_q)
        excess_p = tl.where((max_p if TEACHER else max_q) == LOWEST, 0.0, grown_p)
        value, slope = RENORMALISE(value, slope, excess_p, excess_q)
        added_value, added_slope = value_and_slope(raised(log_p), raised(log_q), first, second, DIVERGENCE, PARAMETERS)
        value += tl.sum(tl.where(inside[None, :], added_value, 0.0), 1)
        slope += tl.sum(tl.where(inside[None, :], added_slope, 0.0), 1)
    return now_q, min_q, sum_q, sum_bare, sum_z, label_z, top_q, now_p, min_p, sum_p, top_p, value, slope


@triton.jit
def _put(partial, field, rows, there, split, tokens, splits, value):
    tl.store(partial + (field * tokens + rows) * splits + split, value, mask=there)


@triton.jit
def _get(partial, field, rows, there, tokens, splits, other, SPLITS: tl.constexpr):
    """(R, SPLITS): one field of some tokens, `other` where there is nothing."""
    columns = tl.arange(0, SPLITS)
    at = partial + (field * tokens + rows)[:, None] * splits + columns[None, :]
    return tl.load(at, mask=there[:, None] & (columns < splits)[None, :], other=other)


@triton.jit
def put_statistics(partial, rows, there, split, tokens, splits, statistics):
    for field in tl.static_range(len(statistics)):
        _put(partial, field, rows, there, split, tokens, splits, statistics[field])


@triton.jit
def _log_sum(maxima, sums, inverse_temperature):
    """(maximum, log Σ exp less the maximum) of each row, from those of its splits."""
    maximum = tl.max(maxima, 1)
    return maximum, tl.log(tl.sum(sums * tl.exp((maxima - maximum[:, None]) * inverse_temperature), 1))


@triton.jit
def merge_statistics(
    partial,
    rows,  # (R,)
    there,  # (R,)
    tokens,
    splits,
    vocabulary,
    inverse_temperature,
    TEACHER: tl.constexpr,
    UNTEMPERED: tl.constexpr,  # the untempered log-sum-exp is wanted
    SEPARATE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    TOP: tl.constexpr,
    RENORMALISE: tl.constexpr,  # None: no sums of a divergence
    SPLITS: tl.constexpr,  # a power of two, at least `splits`
):
    """(R,) each: student maximum, log-sum-exp less it tempered and untempered; teacher maximum and log-sum-exp; whether the token has an
    entry below the floor; Σ log q untempered; logit of the label; whether both maxima are at one place; Σ value, Σ slope."""
    maxima_q = _get(partial, 0, rows, there, tokens, splits, LOWEST, SPLITS)
    max_q, log_sum_q = _log_sum(maxima_q, _get(partial, 2, rows, there, tokens, splits, 0.0, SPLITS), inverse_temperature)
    min_q = tl.min(_get(partial, 1, rows, there, tokens, splits, -LOWEST, SPLITS), 1)
    clamped = (min_q - max_q) * inverse_temperature - log_sum_q < FLOOR
    log_sum_bare = log_sum_q
    if SEPARATE:
        _, log_sum_bare = _log_sum(maxima_q, _get(partial, 3, rows, there, tokens, splits, 0.0, SPLITS), 1.0)
    if UNTEMPERED:
        clamped = clamped | (min_q - max_q - log_sum_bare < FLOOR)
    none = tl.zeros_like(max_q)
    smoothing = none
    if SMOOTHING:
        smoothing = tl.sum(_get(partial, 4, rows, there, tokens, splits, 0.0, SPLITS), 1) - vocabulary * (max_q + log_sum_bare)
    label_z = tl.sum(_get(partial, 5, rows, there, tokens, splits, 0.0, SPLITS), 1)
    maxima_p, max_p, log_sum_p = maxima_q, max_q, log_sum_q
    agreement = none
    if TEACHER:
        maxima_p = _get(partial, 7, rows, there, tokens, splits, LOWEST, SPLITS)
        max_p, log_sum_p = _log_sum(maxima_p, _get(partial, 9, rows, there, tokens, splits, 0.0, SPLITS), inverse_temperature)
        min_p = tl.min(_get(partial, 8, rows, there, tokens, splits, -LOWEST, SPLITS), 1)
        clamped = clamped | ((min_p - max_p) * inverse_temperature - log_sum_p < FLOOR)
        if TOP:
            tops_q = _get(partial, 6, rows, there, tokens, splits, 0.0, SPLITS)
            tops_p = _get(partial, 10, rows, there, tokens, splits, 0.0, SPLITS)
            top_q = tl.min(tl.where(maxima_q == max_q[:, None], tops_q, -LOWEST), 1)
            top_p = tl.min(tl.where(maxima_p == max_p[:, None], tops_p, -LOWEST), 1)
            agreement = tl.where(top_q == top_p, 1.0, 0.0)
    value, slope = none, none
    if RENORMALISE is not None:
        # A split of nothing has no maximum to exceed.
        excess_q = tl.where(maxima_q == LOWEST, 0.0, (max_q[:, None] - maxima_q) * inverse_temperature + log_sum_q[:, None])
        excess_p = tl.where(maxima_p == LOWEST, 0.0, (max_p[:, None] - maxima_p) * inverse_temperature + log_sum_p[:, None])
        values = _get(partial, 11, rows, there, tokens, splits, 0.0, SPLITS)
        slopes = _get(partial, 12, rows, there, tokens, splits, 0.0, SPLITS)
        values, slopes = RENORMALISE(values, slopes, excess_p, excess_q)
        value, slope = tl.sum(values, 1), tl.sum(slopes, 1)
    return max_q, log_sum_q, log_sum_bare, max_p, log_sum_p, clamped, smoothing, label_z, agreement, value, slope


@triton.jit
def put_merged(merged, rows, there, tokens, statistics):
    """Of merge_statistics, what `take_totals` needs and whether it must be called; for tiles of so many tokens that each holding the sums
    of every split would spill registers."""
    for field in tl.static_range(6):
        tl.store(merged + field * tokens + rows, statistics[field].to(tl.float32), mask=there)


@triton.jit
def get_merged(merged, rows, there, tokens):
    """(R,) each: student maximum, log-sum-exp less it tempered and untempered; teacher maximum and log-sum-exp; whether the token has an
    entry below the floor."""
    max_q = tl.load(merged + rows, mask=there, other=0.0)
    log_sum_q = tl.load(merged + tokens + rows, mask=there, other=0.0)
    log_sum_bare = tl.load(merged + 2 * tokens + rows, mask=there, other=0.0)
    max_p = tl.load(merged + 3 * tokens + rows, mask=there, other=0.0)
    log_sum_p = tl.load(merged + 4 * tokens + rows, mask=there, other=0.0)
    return max_q, log_sum_q, log_sum_bare, max_p, log_sum_p, tl.load(merged + 5 * tokens + rows, mask=there, other=0.0) != 0.0


@triton.jit
def no_totals(ROWS: tl.constexpr):
    """Σ value, Σ slope, Σ log q untempered, entries not below the floor untempered, student's entropy, teacher's, tail mass."""
    none = tl.zeros((ROWS,), tl.float32)
    return none, none, none, none, none, none, none


@triton.jit
def take_totals(
    totals,
    z,  # (R, C)
    y,  # (R, C)
    inside,  # (C,)
    max_q,  # (R,) and so on, of merge_statistics
    log_sum_q,
    log_sum_bare,
    max_p,
    log_sum_p,
    inverse_temperature,
    first,
    second,
    TEACHER: tl.constexpr,
    SMOOTHING: tl.constexpr,
    STATS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    value, slope, smoothing, unclamped, entropy_q, entropy_p, tail = totals
    bare_q = (z - max_q[:, None]) * inverse_temperature - log_sum_q[:, None]
    log_q = raised(bare_q)
    log_p = log_q
    if TEACHER:
        log_p = raised((y - max_p[:, None]) * inverse_temperature - log_sum_p[:, None])
    if DIVERGENCE is not None:
        added_value, added_slope = value_and_slope(log_p, log_q, first, second, DIVERGENCE, PARAMETERS)
        value += tl.sum(tl.where(inside[None, :], added_value, 0.0), 1)
        slope += tl.sum(tl.where(inside[None, :], tl.where(bare_q < FLOOR, 0.0, added_slope), 0.0), 1)
    if SMOOTHING:
        bare = z - max_q[:, None] - log_sum_bare[:, None]
        smoothing += tl.sum(tl.where(inside[None, :], raised(bare), 0.0), 1)
        unclamped += tl.sum(tl.where(inside[None, :], tl.where(bare < FLOOR, 0.0, 1.0), 0.0), 1)
    if STATS:
        q = tl.where(inside[None, :], tl.exp(log_q), 0.0)
        entropy_q -= tl.sum(q * log_q, 1)
        if TEACHER:
            p = tl.where(inside[None, :], tl.exp(log_p), 0.0)
            entropy_p -= tl.sum(p * log_p, 1)
            tail += tl.sum(tl.where(p < TAIL, q, 0.0), 1)
    return value, slope, smoothing, unclamped, entropy_q, entropy_p, tail


@triton.jit
def merge_totals(partial, field, rows, there, tokens, splits, SPLITS: tl.constexpr):
    return tl.sum(_get(partial, field, rows, there, tokens, splits, 0.0, SPLITS), 1)


@triton.jit
def finish(
    statistics,  # of merge_statistics, (R,) each
    totals,  # partial sums; None: none were needed
    coefficients,  # (tokens, 3)
    label,  # (R,), or None
    rows,  # (R,)
    there,  # (R,)
    tokens,
    splits,
    vocabulary,
    inverse_temperature,
    label_smoothing,
    SMOOTHING: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """(R,) each: divergence, cross entropy, −log q of the label, log-sum-exp; Σ slope; weight of the divergence's gradient, pull of the
    untempered softmax, push of the label and of label smoothing. A token without any coefficient gets zeros, whatever it holds."""
    max_q, _log_sum_q, log_sum_bare, _max_p, _log_sum_p, clamped, smoothing, label_z, _agreement, value, slope = statistics
    kd = tl.load(coefficients + rows * TERM_COUNT, mask=there, other=0.0)
    ce = tl.load(coefficients + rows * TERM_COUNT + 1, mask=there, other=0.0)
    z_loss = tl.load(coefficients + rows * TERM_COUNT + 2, mask=there, other=0.0)
    active = (kd != 0.0) | (ce != 0.0) | (z_loss != 0.0)
    unclamped = tl.zeros_like(max_q) + vocabulary
    if DIVERGENCE is not None:
        if RENORMALISE is None:
            value = merge_totals(totals, 0, rows, there, tokens, splits, SPLITS)
            slope = merge_totals(totals, 1, rows, there, tokens, splits, SPLITS)
        else:
            value = tl.where(clamped, merge_totals(totals, 0, rows, there, tokens, splits, SPLITS), value)
            slope = tl.where(clamped, merge_totals(totals, 1, rows, there, tokens, splits, SPLITS), slope)
    if SMOOTHING:
        smoothing = tl.where(clamped, merge_totals(totals, 2, rows, there, tokens, splits, SPLITS), smoothing)
        unclamped = tl.where(clamped, merge_totals(totals, 3, rows, there, tokens, splits, SPLITS), unclamped)
    lse = max_q + log_sum_bare
    pull = 2.0 * z_loss * lse
    cross_entropy, nll, label_push, smoothing_push = kd * 0.0, kd * 0.0, kd * 0.0, kd * 0.0
    if label is not None:
        bare = label_z - max_q - log_sum_bare
        nll = tl.where(label < NO_LABEL, 0.0, -raised(bare))
        label_weight = tl.where((label < NO_LABEL) | (bare < FLOOR), 0.0, 1.0 - label_smoothing)
        cross_entropy = (1.0 - label_smoothing) * nll
        label_push = ce * label_weight
        pull += label_push
        if SMOOTHING:
            share = tl.where(label < NO_LABEL, 0.0, label_smoothing / vocabulary)
            cross_entropy -= share * smoothing
            smoothing_push = ce * share
            pull += smoothing_push * unclamped
    weight = kd * inverse_temperature
    return (
        tl.where(active, value, 0.0), tl.where(active, cross_entropy, 0.0), tl.where(active, nll, 0.0), tl.where(active, lse, 0.0),
        slope, weight, pull, label_push, smoothing_push, active,
    )  # fmt: skip


@triton.jit
def gradient(
    z,  # (R, C)
    y,  # (R, C)
    entries,  # (C,)
    label,  # (R,), or None
    statistics,  # of merge_statistics
    factors,  # of finish
    inverse_temperature,
    scale,
    softcap,
    first,
    second,
    TEACHER: tl.constexpr,
    UNTEMPERED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    """dz (R, C): the gradient of the bare products."""
    max_q, log_sum_q, log_sum_bare, max_p, log_sum_p, _c, _s, _z, _a, _v, _t = statistics
    _value, _ce, _nll, _lse, slope_total, weight, pull, label_push, smoothing_push, active = factors
    dz = tl.zeros_like(z)
    if DIVERGENCE is not None:
        bare_q = (z - max_q[:, None]) * inverse_temperature - log_sum_q[:, None]
        log_q = raised(bare_q)
        log_p = log_q
        if TEACHER:
            log_p = raised((y - max_p[:, None]) * inverse_temperature - log_sum_p[:, None])
        _, slope = value_and_slope(log_p, log_q, first, second, DIVERGENCE, PARAMETERS)
        slope = tl.where(bare_q < FLOOR, 0.0, slope)
        dz = weight[:, None] * (slope - tl.exp(log_q) * slope_total[:, None])
    if UNTEMPERED:
        bare = z - max_q[:, None] - log_sum_bare[:, None]
        dz += pull[:, None] * tl.exp(bare)
        if label is not None:
            dz -= tl.where(entries[None, :] == label[:, None], label_push[:, None], 0.0)
        if SMOOTHING:
            dz -= tl.where(bare < FLOOR, 0.0, smoothing_push[:, None])
    if softcap is not None:
        ratio = z / softcap
        dz *= 1.0 - ratio * ratio
    return tl.where(active[:, None], dz * scale, 0.0)
