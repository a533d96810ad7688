"""Column-sampled gradients over many seeds: their mean is the exact gradient, and their error the predicted one."""

import math

import pytest
import torch
from accuracy import BACKENDS, Inputs, everything, make_inputs, with_gradients

from distill_kernels import distillation_loss, distillation_loss_and_stats, divergences
from distill_kernels.backends import native
from distill_kernels.call import worthwhile
from distill_kernels.estimators import columns, sampling

TOKENS, VOCABULARY = 12, 400
SEEDS = 600
GRADIENTS = ("d_student_hidden", "d_student_weight")
both = pytest.mark.parametrize("backend", BACKENDS)


def deviations(inputs, fraction, backend="torch", **options):
    """For both gradients: the exact one, and over SEEDS seeds the mean and the standard error of the sampled one, entry by entry."""
    exact = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **options)
    sums = {name: [torch.zeros_like(exact[name], dtype=torch.float64) for _ in range(2)] for name in GRADIENTS}
    for seed in range(SEEDS):
        got = with_gradients(distillation_loss, inputs, 1.0, backend=backend, column_fraction=fraction, seed=seed, **options)
        for name in GRADIENTS:
            off = got[name].double() - exact[name].double()
            sums[name][0] += off
            sums[name][1] += off.square()
    for name in GRADIENTS:
        mean = sums[name][0] / SEEDS
        yield exact[name].double(), mean, ((sums[name][1] / SEEDS - mean.square()) / (SEEDS - 1)).clamp(min=0).sqrt()


def assert_unbiased(inputs, fraction=0.1, **options):
    """The mean of SEEDS samples is off by what chance allows: overall, in single tokens or columns, and along the gradient itself."""
    for exact, mean, error in deviations(inputs, fraction, **options):
        # Squared norms of the mean's deviation against its expectation. Entries of a row go together, so that rows are the sample.
        whole = (mean.square().sum() / error.square().sum()).item()
        assert whole < 2, f"the mean is off by {math.sqrt(whole):.2f} standard errors"
        rows, expected = mean.square().sum(1), error.square().sum(1)
        some = expected > 1e-9 * exact.square().sum()  # the rest may be of columns so improbable that no seed drew them
        assert (rows[some] < 16 * expected[some]).all(), "a token or a column is off by more than 4 standard errors"
        assert (rows[~some] < 1e-7 * exact.square().sum()).all(), "what does not vary is not exact"
        # A common factor, the bias that a wrong weight makes.
        direction = exact / exact.norm()
        along, spread = (mean * direction).sum().abs().item(), (error * direction).norm().item() + 1e-6 * exact.norm().item()
        assert along < 6 * spread, f"off by {along / spread:.1f} standard errors along the gradient"


CASES = {
    "forward_kl": ("moderate", {}),
    "reverse_kl": ("moderate", {"divergence": "reverse_kl"}),
    "jensen_shannon": ("moderate", {"divergence": divergences.jensen_shannon(0.3), "temperature": 2.0}),
    "total_variation": ("moderate", {"divergence": "total_variation"}),
    "everything": ("realistic", everything(TOKENS, VOCABULARY)),
    "flat": ("flat", {"temperature": 4.0}),
    "peaked": ("peaked", {}),
}


@both
@pytest.mark.parametrize("family, options", CASES.values(), ids=CASES.keys())
@pytest.mark.covering(1)
def test_mean_over_seeds_is_the_exact_gradient(sampling_pays, family, options, backend):
    assert_unbiased(make_inputs(family, TOKENS, VOCABULARY, 16, 24), backend=backend, **options)


@pytest.mark.exhaustive
def test_mean_over_seeds_is_the_exact_gradient_near_the_teacher(sampling_pays):
    inputs = make_inputs("equal", TOKENS, VOCABULARY, 16, 16)
    nudged = inputs.student_hidden + 0.01 * torch.randn(inputs.student_hidden.shape, generator=torch.Generator().manual_seed(1))
    assert_unbiased(Inputs(nudged, *inputs[1:]))


def test_mean_converges_with_the_root_of_the_number_of_seeds(sampling_pays, monkeypatch):
    inputs = make_inputs("moderate", TOKENS, VOCABULARY, 16, 24)
    off = {}
    for count in (25, 400):
        monkeypatch.setattr("test_columns_statistics.SEEDS", count)
        off[count] = [(mean.norm() / exact.norm()).item() for exact, mean, _ in deviations(inputs, 0.1)]
    for few, many in zip(off[25], off[400], strict=True):
        assert 2 < few / many < 8  # 4 expected


def unweighted(scores, kept, uniform):
    drawn, weights = columns.draw(scores, kept, uniform)
    return drawn, torch.ones_like(weights)


def five_percent_high(scores, kept, uniform):
    drawn, weights = columns.draw(scores, kept, uniform)
    return drawn, torch.where(weights > 1, 1.05 * weights, weights)


@both
@pytest.mark.parametrize("biased", [unweighted, five_percent_high])
@pytest.mark.covering(1)
def test_biased_estimate_is_found_out(sampling_pays, monkeypatch, biased, backend):
    monkeypatch.setattr(sampling, "draw", biased)
    monkeypatch.setattr(native.Kernels, "draw", staticmethod(biased))
    with pytest.raises(AssertionError, match="standard errors"):
        assert_unbiased(make_inputs("flat", TOKENS, VOCABULARY, 16, 24), backend=backend, temperature=4.0)


def observed_and_predicted(inputs, seeds, backend="torch", **options):
    """Relative errors (2,) of d_hidden and d_weight: root mean square over seeds, and as the stats predict them."""
    plain = {name: value for name, value in options.items() if name not in ("column_fraction", "gradient_tolerance")}
    exact = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **plain)
    observed, predicted = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def call(*args, **kwargs):
        loss, stats = distillation_loss_and_stats(*args, **kwargs)
        predicted.add_(stats.gradient_error.double().square())
        return loss

    for seed in range(seeds):
        got = with_gradients(call, inputs, 1.0, backend=backend, seed=seed, **options)
        observed += torch.tensor([((got[n] - exact[n]).norm() / exact[n].norm()).item() for n in GRADIENTS], dtype=torch.float64).square()
    return (observed / seeds).sqrt(), (predicted / seeds).sqrt()


@both
@pytest.mark.parametrize("fraction, temperature", [(0.04, 1.0), (0.16, 1.0), (0.1, 2.0), (0.1, 4.0)])
@pytest.mark.parametrize("family", ["moderate", "realistic", "flat", "peaked"])
@pytest.mark.covering(1)
def test_error_is_the_predicted_one(sampling_pays, family, fraction, temperature, backend):
    inputs = make_inputs(family, 48, 3000, 64, 96)
    observed, predicted = observed_and_predicted(inputs, 40, backend, column_fraction=fraction, temperature=temperature)
    torch.testing.assert_close(observed, predicted, rtol=0.1, atol=0)


@both
@pytest.mark.parametrize("tolerance", [0.5, 0.2, 0.05])
@pytest.mark.covering(1)
def test_fraction_is_the_smallest_within_the_tolerance(sampling_pays, tolerance, backend):
    inputs = make_inputs("moderate", 48, 5000, 64, 64)
    errors = {f: observed_and_predicted(inputs, 10, backend, column_fraction=f)[0].max().item() for f in worthwhile.FRACTIONS}
    fitting = [fraction for fraction, error in errors.items() if error <= tolerance]
    if fitting:
        observed, _ = observed_and_predicted(inputs, 3, backend, column_fraction="auto", gradient_tolerance=tolerance)
        assert observed.max() == pytest.approx(errors[fitting[0]], rel=0.15)
    else:  # no fraction is good enough: the exact products run
        got, exact = (
            with_gradients(distillation_loss, inputs, 1.0, backend=backend, **options)
            for options in ({"column_fraction": "auto", "gradient_tolerance": tolerance}, {})
        )
        for name in GRADIENTS:
            torch.testing.assert_close(got[name], exact[name], rtol=1e-5, atol=1e-6 * exact[name].abs().max().item())
