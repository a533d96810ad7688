"""The quantised sweep over many seeds: its loss and gradients are the exact ones in the mean, and err as their standard errors say."""

import math

import pytest
import torch
from accuracy import BACKENDS, Inputs, make_inputs, make_labels, with_gradients
from test_columns_statistics import unweighted

from distill_kernels import distillation_loss, distillation_loss_and_stats, prepare_head
from distill_kernels.backends import native
from distill_kernels.estimators import columns, sampling

TOKENS, VOCABULARY, SEEDS = 24, 3000, 150
GRADIENTS = ("d_student_hidden", "d_student_weight")
both = pytest.mark.parametrize("backend", BACKENDS)


def make(family):
    """Logits as coarse as real ones: a deviation of 2 nats, and an error of the sweep of some hundredths."""
    inputs = make_inputs(family, TOKENS, VOCABULARY, 64, 128)
    if family == "realistic":  # the student agrees for the most part; its outliers stay
        return Inputs(*(t / 4 if t is not None and t.shape[0] == TOKENS else t for t in inputs))
    return inputs


def run(inputs, backend, seed, fraction=0.1, **options):
    """Per-token losses, standard errors (2) and both gradients of their sum."""
    kept = {}

    def call(*args, **kwargs):
        loss, kept["stats"] = distillation_loss_and_stats(*args, **kwargs)
        return loss

    options |= {"reduction": "sum", "backend": backend, "seed": seed, "column_fraction": fraction, "sweep": "int8", "sweep_tolerance": None}
    return with_gradients(call, inputs, 1.0, **options), kept["stats"]


def samples(inputs, backend, **options):
    """Deviations of divergence and cross entropy (SEEDS, tokens), their standard errors, and of the gradients the mean deviation, its
    standard error, and each seed's deviation along the exact gradient."""
    _, exact_stats = distillation_loss_and_stats(*inputs[:4], backend=backend, **options)
    exact = with_gradients(distillation_loss, inputs, 1.0, backend=backend, reduction="sum", **options)
    off, errors = ([[], []] for _ in range(2))
    along = {name: [] for name in GRADIENTS}
    sums = {name: [torch.zeros_like(exact[name], dtype=torch.float64) for _ in range(2)] for name in GRADIENTS}
    for seed in range(SEEDS):
        got, stats = run(inputs, backend, seed, **options)
        off[0].append(stats.divergence - exact_stats.divergence)
        off[1].append(stats.cross_entropy - exact_stats.cross_entropy)
        errors[0].append(stats.divergence_error)
        errors[1].append(stats.logsumexp_error)
        for name in GRADIENTS:
            deviation = got[name].double() - exact[name].double()
            sums[name][0] += deviation
            sums[name][1] += deviation.square()
            along[name].append((deviation * exact[name]).sum() / exact[name].double().square().sum())
    gradients = {}
    for name in GRADIENTS:
        mean = sums[name][0] / SEEDS
        error = ((sums[name][1] / SEEDS - mean.square()) / (SEEDS - 1)).clamp(min=0).sqrt()
        gradients[name] = mean, error, torch.stack(along[name])
    return [torch.stack(part).double() for part in off], [torch.stack(part).double() for part in errors], gradients


def assert_unbiased(off, errors, gradients):
    for deviation, error in zip(off, errors, strict=True):
        # The logarithm's bias, half the relative variance of each of two sums at the most, is allowed for.
        spread = deviation.std(0) / math.sqrt(SEEDS)
        beyond = (deviation.mean(0).abs() - error.square().mean(0)).clamp(min=0)
        assert (beyond <= 4.5 * spread + 1e-5).all(), "a token's mean is off by more than 4.5 standard errors"
        total = deviation.mean(1)
        assert (total.mean().abs() - error.square().mean()).item() <= 4 * (total.std() / math.sqrt(SEEDS)).item() + 1e-5, "the mean is off"
    for mean, error, along in gradients.values():
        whole = (mean.square().sum() / error.square().sum()).item()
        assert whole < 2, f"the mean gradient is off by {math.sqrt(whole):.2f} standard errors"
        # A common factor, the bias that a wrong weight makes.
        spread = (along.std() / math.sqrt(SEEDS)).item() + 5e-5
        assert along.mean().abs() <= 4 * spread, f"off by {along.mean().abs() / spread:.1f} standard errors along the gradient"


def labelled(**options):
    return {"labels": make_labels(TOKENS, VOCABULARY, masked=0), "ce_weight": 0.5, **options}


CASES = {
    "forward_kl": ("moderate", {}),
    "reverse_kl": ("moderate", {"divergence": "reverse_kl"}),
    "tempered": ("moderate", {"temperature": 2.0}),
    "flat": ("flat", {}),
    "outliers": ("realistic", {}),
    "cross entropy": ("moderate", labelled(kd_weight=0.5, z_loss_weight=1e-3, temperature=1.5)),
}


@both
@pytest.mark.parametrize("family, options", CASES.values(), ids=CASES.keys())
@pytest.mark.covering(1)
def test_mean_is_exact_and_standard_errors_are_the_errors(sampling_pays, family, options, backend):
    off, errors, gradients = samples(make(family), backend, **options)
    assert_unbiased(off, errors, gradients)
    for deviation, error in zip(off, errors, strict=True):
        if error.any():
            observed, predicted = deviation.square().mean().sqrt(), error.square().mean().sqrt()
            assert 0.8 < observed / predicted < 1.2
            within = (deviation.abs() <= 1.96 * error + 2e-6).double().mean()
            assert 0.9 <= within <= 0.99, f"{within:.1%} of 95 % intervals contain the truth"


def thirty_percent_high(scores, kept, uniform):
    drawn, weights = columns.draw(scores, kept, uniform)
    return drawn, torch.where(weights > 1, 1.3 * weights, weights)


@both
@pytest.mark.parametrize("biased", [unweighted, thirty_percent_high])
@pytest.mark.covering(1)
def test_biased_estimate_is_found_out(sampling_pays, monkeypatch, biased, backend):
    monkeypatch.setattr(sampling, "draw", biased)
    monkeypatch.setattr(native.Kernels, "draw", staticmethod(biased))
    with pytest.raises(AssertionError, match="off"):
        assert_unbiased(*samples(make("flat"), backend, temperature=2.0))


@both
@pytest.mark.covering(1)
def test_outdated_copy_is_corrected(sampling_pays, backend):
    """The worst control variate: another head. Without the correction the loss would be far off."""
    inputs = make("moderate")
    head = prepare_head(inputs.teacher_weight)
    head.quantised("int8")
    inputs.teacher_weight.data.mul_(0.98).add_(0.01 * torch.randn(inputs.teacher_weight.shape, generator=torch.Generator().manual_seed(1)))
    exact = distillation_loss(*inputs[:4], backend=backend)
    options = {"column_fraction": 0.2, "sweep": "int8", "sweep_tolerance": None, "backend": backend}
    losses, stats = zip(*(distillation_loss_and_stats(*inputs[:3], head, **options, seed=seed) for seed in range(100)), strict=True)
    off = torch.stack(losses) - exact
    bias = torch.stack([s.divergence_error.square().mean() for s in stats]).mean()
    assert off.mean().abs() <= 4 * off.std() / 10 + bias
    assert off.std() > 1e-3


@both
@pytest.mark.parametrize("family", ["moderate", "realistic"])
@pytest.mark.parametrize("options", [{}, {"divergence": "reverse_kl"}, {"temperature": 2.0}], ids=["forward", "reverse", "tempered"])
@pytest.mark.covering(1)
def test_gradient_error_is_the_predicted_one(sampling_pays, family, options, backend):
    inputs = make(family)
    exact = with_gradients(distillation_loss, inputs, 1.0, backend=backend, reduction="sum", **options)
    observed, predicted = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for seed in range(40):
        got, stats = run(inputs, backend, seed, **options)
        observed += torch.tensor([((got[n] - exact[n]).norm() / exact[n].norm()).item() for n in GRADIENTS], dtype=torch.float64).square()
        predicted += stats.gradient_error.double().square()
    torch.testing.assert_close((observed / 40).sqrt(), (predicted / 40).sqrt(), rtol=0.1, atol=0)
