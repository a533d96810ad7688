"""Which columns of dz are drawn: Philox, inclusion probabilities by either way to the threshold and by the native kernel, the draw."""

import pytest
import torch
from accuracy import NATIVE

from distill_kernels.backends import native
from distill_kernels.estimators.columns import UNIT, draw, inclusion, philox


def plain_philox(counter, key):
    """Philox-4x32-10 in Python's integers, all four words of it."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [second >> 32 ^ counter[1] ^ key[0], second % UNIT, first >> 32 ^ counter[3] ^ key[1], first % UNIT]
        key = [(key[0] + 0x9E3779B9) % UNIT, (key[1] + 0xBB67AE85) % UNIT]
    return tuple(counter)


def test_philox_is_the_published_one():
    # Known answers of Random123. Only the first of them has zeros in the words that the sampler leaves at zero.
    assert plain_philox((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert plain_philox((UNIT - 1,) * 4, (UNIT - 1,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert plain_philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert philox(torch.tensor(0), torch.tensor([0])).tolist() == [0x6627E8D5]

    generator = torch.Generator().manual_seed(0)
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, *torch.randint(2**63 - 1, (20,), generator=generator).tolist()]
    counters = torch.cat([torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1]), torch.randint(2**63 - 1, (20,), generator=generator)])
    for seed in seeds:
        want = [plain_philox((c % UNIT, c // UNIT, 0, 0), (seed % UNIT, seed // UNIT))[0] for c in counters.tolist()]
        assert philox(torch.tensor(seed), counters).tolist() == want


class OnDevice(torch.Tensor):
    """Of a CPU tensor that says it is a GPU's: takes the way to the threshold by sorting."""

    is_cuda = property(lambda self: True)


thresholds = pytest.mark.parametrize("kind", [torch.Tensor, OnDevice, NATIVE], ids=["loop", "sort", "native"])


def _scores():
    generator = torch.Generator().manual_seed(0)
    uniform, normal = torch.rand(500, generator=generator), torch.randn(500, generator=generator)
    few, one_hot = torch.zeros(500), torch.zeros(500)
    few[[5, 9, 200]] = torch.tensor([1.0, 1e-3, 1e-20])
    one_hot[77] = 1.0
    huge, spikes = uniform.clone(), uniform.clone()
    huge[7] = 1e30
    spikes[40:400:40] = 1e6
    return {
        "uniform": uniform, "spread": (2 * normal).exp(), "zero": torch.zeros(500), "one_hot": one_hot, "few": few, "huge": huge,
        "equal": torch.full((500,), 0.1), "spikes": spikes, "decades": torch.logspace(0, -30, 500), "wide": (10 * normal).exp(),
        "denormal": torch.full((500,), 1e-45),
    }  # fmt: skip


SCORES = _scores()
scores_and_kept = pytest.mark.parametrize("kept", [1, 2, 40, 250, 499, 500])
named_scores = pytest.mark.parametrize("name", SCORES)


def bisected(scores, kept):
    """min(1, c/t) for the t at which they sum to `kept`, or None where no t makes so many of them."""
    if (scores > 0).sum() <= kept:
        return None
    low, high = -1000.0, 1000.0  # log2 t
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (scores / 2.0**middle).clamp(max=1).sum() > kept else (low, middle)
    return (scores / 2.0**high).clamp(max=1)


def units_of(scores, kept, kind=torch.Tensor):
    if kind != "native":
        return inclusion(scores.as_subclass(kind), kept).as_subclass(torch.Tensor)
    units, columns, weights = torch.empty(len(scores), dtype=torch.int64), torch.empty(kept, dtype=torch.int64), torch.empty(kept)
    scores = scores.float()
    native._native.draw_columns(*(scores.data_ptr(), len(scores), kept, 0), *(t.data_ptr() for t in (units, columns, weights)))
    return units


def draws_of(scores, kept, uniform, kind):
    return native.Kernels.draw(scores.float(), kept, uniform) if kind == "native" else draw(scores.as_subclass(kind), kept, uniform)


@thresholds
@scores_and_kept
@named_scores
def test_inclusion_is_proportional_up_to_one_and_sums_to_what_is_kept(name, kept, kind):
    scores = SCORES[name]
    units = units_of(scores, kept, kind)
    assert units.dtype == torch.int64
    assert int(units.sum()) == kept * UNIT
    assert int(units.min()) >= 0 and int(units.max()) <= UNIT
    assert (units[scores > 0] > 0).all()
    want = bisected(scores.double().clamp(max=1e40), kept)
    if want is None:  # all that have a score, surely, and of the others equally many
        others = units[scores == 0]
        assert (units[scores > 0] == UNIT).all()
        assert others.numel() == 0 or int(others.max() - others.min()) <= len(scores)
        return
    off = (units - (want * UNIT).round().long()).abs().sort(descending=True).values
    # A unit by rounding or for being positive, and a few parts in 1e13 of t; on one column what the others were off by.
    assert off[0] <= 2 * len(scores) and (off[1:] <= 2).all(), off[:3]


@thresholds
@pytest.mark.parametrize("columns_", [4099, 4111])
def test_a_column_that_is_almost_sure_is_not_more_than_sure(columns_, kind):
    """What rounding leaves over, of thousands of columns, is more than such a column has room for."""
    scores = torch.full((columns_,), 1.0000001 / (columns_ - 1), dtype=torch.float64)
    scores[0] = 1.0
    assert int(units_of(scores, 2, kind).max()) <= UNIT
    assert len(set(draws_of(scores, 2, torch.tensor(0), kind)[0].tolist())) == 2


@thresholds
def test_columns_of_next_to_no_score_keep_a_positive_probability(kind):
    """Each has a unit at least; where all the probability is on K others, those have to give it up."""
    scores = torch.full((300,), 1e-15)
    scores[100:104] = 1.0
    assert int(units_of(scores, 4, kind).min()) > 0


@pytest.mark.parametrize("kind", [torch.Tensor, NATIVE], ids=["loop", "native"])
@scores_and_kept
@named_scores
def test_draws_distinct_ascending_columns_and_the_sure_ones_always(name, kept, kind):
    scores = SCORES[name]
    units = units_of(scores, kept, kind)
    for uniform in (0, 1, UNIT // 3, UNIT - 1):
        drawn, weights = draws_of(scores, kept, torch.tensor(uniform), kind)
        if kind == "native":  # the same as the other's, but for what the order of summation does to a probability's last unit
            assert torch.equal(drawn, draw(scores, kept, torch.tensor(uniform))[0])
        assert drawn.shape == weights.shape == (kept,) and drawn.dtype == torch.int64 and weights.dtype == torch.float32
        assert (drawn.diff() > 0).all() and drawn[0] >= 0 and drawn[-1] < len(scores)
        assert torch.isin((units == UNIT).nonzero().flatten(), drawn).all()
        assert (units[drawn] > 0).all()
        torch.testing.assert_close(weights.double(), UNIT / units[drawn].double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["uniform", "spread", "zero", "few", "spikes", "wide"])
def test_columns_are_drawn_as_often_as_they_should(name):
    """Over evenly spaced uniforms a column's points fall evenly on it: the count is right to one."""
    steps, kept = 2048, 40
    counts = torch.zeros(500)
    for step in range(steps):
        counts[draw(SCORES[name], kept, torch.tensor(step * (UNIT // steps)))[0]] += 1
    probability = inclusion(SCORES[name], kept).double() / UNIT
    assert counts.sum() == steps * kept
    assert (counts / steps - probability).abs().max() <= 1 / steps


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [slice(7, 8), slice(None)], ids=["one", "all"])
@thresholds
def test_scores_that_are_not_finite_draw_columns_that_exist(bad, where, kind):
    """Nothing sensible can be drawn; but an index out of range would bring a GPU's whole process down."""
    scores = SCORES["uniform"].clone()
    scores[where] = bad
    drawn, _ = (x.as_subclass(torch.Tensor) for x in draws_of(scores, 40, torch.tensor(12345), kind))
    assert drawn.shape == (40,) and drawn.min() >= 0 and drawn.max() < len(scores)
