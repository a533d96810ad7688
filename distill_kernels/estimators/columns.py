"""Column-sampled gradients: which vocabulary entries a chunk's gradient products go over, and with what weight.

After the softmax most of dz (n, V) is negligible, and a product over the vocabulary is a sum over its columns. Column v is kept with
probability π_v = min(1, c_v / t), c_v = ‖dz[:, v]‖, t such that Σ π = K, and scaled by 1/π_v. That makes

    Σ_{v kept} (1/π_v) · dz[:, v] ⊗ weight[v]        an unbiased estimate of dz · weight, and likewise of dzᵀ · hidden

whatever π is, so long as it is positive where dz is not zero (Horvitz and Thompson 1952; norms below 1e-22, whose squares float32 does
not have, count as zero here); probabilities proportional to the columns' norms make its variance least (Drineas, Kannan and Mahoney
2006). Columns with c_v ≥ t are kept surely and are exact; a label's column, of a gradient near 1, is among them by its norm and needs no
rule of its own. K is fixed: so are the cost and all shapes.

The K columns are drawn by systematic sampling: with the probabilities laid end to end on a line of length K, those on which the points
u, u + 1, …, u + K − 1 fall. One uniform u is drawn for each chunk, by Philox (Salmon et al. 2011) keyed by the seed and counting chunks.
From π on everything is integer arithmetic, in units of 2⁻³²: exact, so in any order of summation, and the same on every device.
"""

import torch

UNIT = 2**32
_MASK = 0xFFFFFFFF


def philox(seed: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Uniform integers in [0, 2³²), int64, one for each of `counters` (n,) int64: the first word of Philox-4x32-10 keyed by `seed` ()."""
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    zero = torch.zeros_like(counters)
    words = [counters & _MASK, (counters >> 32) & _MASK, zero, zero]
    for _ in range(10):
        high0, low0 = _product(words[0], 0xD2511F53)
        high1, low1 = _product(words[2], 0xCD9E8D57)
        words = [high1 ^ words[1] ^ key0, low1, high0 ^ words[3] ^ key1, low0]
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return words[0]


def _product(word, factor):
    """(high, low) halves of a 32-bit product, in int64 that cannot hold it: by halves of the factor."""
    low, high = word * (factor & 0xFFFF), word * (factor >> 16)
    low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (low >> 32), low & _MASK


def inclusion(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """π (V,) in units of 2⁻³², int64, of scores (V,) ≥ 0: min(1, c/t), summing to `kept` exactly, positive where the score is."""
    scores = scores.double()
    probability = (scores / _threshold(scores, kept)).clamp(max=1.0)
    # No score, or fewer than `kept`: what is left goes to all alike.
    lacking = kept - probability.sum()
    spare = probability.numel() - probability.sum()
    probability = torch.where(lacking > 1e-6, probability + (1 - probability) * (lacking / spare), probability)
    units = (probability * UNIT).round().long()
    units = units.maximum((scores > 0).long())
    # What rounding left over or took, V units at most, goes to the likeliest column that can take it and is not sure; else to a sure one.
    rest = kept * UNIT - units.sum()
    takes = (units + rest <= UNIT) & (units + rest > 0)
    place = torch.where(takes, torch.where(units < UNIT, units, 0), -1).argmax()
    return units.index_add(0, place.view(1), rest.view(1))


def _threshold(scores, kept):
    """t with Σ min(1, c/t) = `kept`, as a tensor (): the columns above it are the k largest for the first k where the next is below."""
    if scores.is_cuda:  # a loop would wait for the device at every turn, as would `candidates[...]`: an index of no dimension is read
        ordered = scores.sort(descending=True).values
        rest = _running_sum(ordered.flip(0)).flip(0)  # from the k-th on; the smallest first, which a difference of sums would lose
        count = torch.arange(len(ordered), device=scores.device)
        candidates = rest / (kept - count).clamp(min=1)
        fits = (ordered <= candidates) & (count < kept)
        return candidates.take(fits.int().argmax()).clamp(min=torch.finfo(scores.dtype).tiny)
    total, sure = scores.sum(), 0
    threshold = total / kept
    while True:
        above = scores > threshold
        count = int(above.sum())
        if count <= sure or count >= kept:
            return threshold.clamp(min=torch.finfo(scores.dtype).tiny)
        sure = count
        threshold = torch.where(above, 0.0, scores).sum() / (kept - sure)


def _running_sum(values):
    """Of values (n,) float64, by products with triangles of ones: torch's own has no fixed order of summation on a GPU."""
    width = 1 << (max(1, len(values) - 1).bit_length() + 1) // 2  # about √n, and so the triangles are of about n entries
    blocks = torch.nn.functional.pad(values, (0, -len(values) % width)).view(-1, width)
    upto = torch.ones(width, width, dtype=values.dtype, device=values.device).triu()
    inside = blocks @ upto
    before = inside[:, -1] @ torch.ones(len(blocks), len(blocks), dtype=values.dtype, device=values.device).triu(1)
    return (inside + before[:, None]).view(-1)[: len(values)]


def spread(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """Σ (1/π − 1)·c², float64: the squared error of dz itself, and for any `kept` about in proportion to that of its products."""
    probability = inclusion(scores, kept).double() / UNIT
    return ((1 / probability.clamp(min=1 / UNIT) - 1) * scores.double().square()).sum()


def draw(scores: torch.Tensor, kept: int, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns kept (K,) int64, ascending, and their weights 1/π (K,) float32; `uniform` () int64 in [0, 2³²)."""
    units = inclusion(scores, kept)
    points = torch.arange(kept, device=scores.device) * UNIT + uniform
    columns = torch.searchsorted(units.cumsum(0), points, right=True)
    return columns, (UNIT / units[columns].double()).float()
