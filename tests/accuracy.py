"""The one tolerance rule of the tests, the eager torch that it measures against, and the inputs that they are measured on.

    max|got − truth|  ≤  max(2 · max|eager − truth|, 8 · eps32 · max|truth|)        3 in place of 2 for gradients

Truth is `distill_kernels.reference` in float64. Eager is what a careful user of torch would write for inputs of the test's dtype:
logits and everything after them in float32, gradients rounded to the inputs' dtype. The second term scales with the answer, so
zeros cannot pass; the rule takes a maximum and not a mean, so one bad column cannot hide.

A maximum over a few tokens is a matter of luck: the same eager code, its vocabulary and features in another order, is off by four
times as much or as little. Eager's error is therefore the largest over EAGER_ORDERS orders of summation, each as good as another.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import kl_div

from distill_kernels import distillation_loss, divergences, reference
from distill_kernels.backends import native
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR, resolve

EAGER_ORDERS = 4
NATIVE = pytest.param("native", marks=pytest.mark.skipif(native._native is None, reason="the compiled extension was not built"))
BACKENDS = ("torch", NATIVE)
# Every divergence, those with parameters at several, ends of the allowed range included.
DIVERGENCES = [
    divergences.resolve("forward_kl"),
    divergences.resolve("reverse_kl"),
    *(divergences.symmetric_kl(weight) for weight in (0.0, 0.3, 1.0)),
    *(divergences.jensen_shannon(beta) for beta in (0.1, 0.5, 0.9)),
    *(divergences.skew_forward_kl(alpha) for alpha in (0.1, 0.7)),
    *(divergences.skew_reverse_kl(alpha) for alpha in (0.1, 0.7)),
    divergences.resolve("total_variation"),
    *(divergences.alpha_beta(*pair) for pair in ((0.5, 0.5), (0.2, 0.7), (1.0, 0.5))),
    divergences.resolve("squared_hellinger"),
]
EPS32 = torch.finfo(torch.float32).eps
FAMILIES = ("flat", "moderate", "peaked", "equal", "huge", "realistic", "grid")
STUDENT = ("student_hidden", "student_weight", "student_bias")  # what gets a gradient


def assert_as_good_as_eager(name, got, eager, truth, gradient=False, slack=1):
    """The rule. `eager`: a tensor, or a list of equally good ones. All of one shape; `truth` float64.

    slack: multiplies what is allowed; a test that gives it says why.
    """
    eager = [eager] if isinstance(eager, torch.Tensor) else eager
    assert {x.shape for x in (got, *eager)} == {truth.shape}, f"{name}: shape {tuple(got.shape)}, wanted {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    error, allowed = error_and_allowance(got, eager, truth, gradient)
    allowed *= slack
    # Not `error > allowed`: a NaN has to fail.
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, for values up to {truth.abs().max():.3g}"


def error_and_allowance(got, eager, truth, gradient=False):
    assert truth.isfinite().all() and all(x.isfinite().all() for x in eager), "what is compared with is not finite"
    error, *eager_errors = ((x.detach().double() - truth).abs().max().item() for x in (got, *eager))
    return error, max((3 if gradient else 2) * max(eager_errors), 8 * EPS32 * truth.abs().max().item())


def assert_close64(name, got, truth):
    """float64 inputs are computed in float64, where eager is no measure: 1e-10 of the largest value, and no float32 on the way."""
    assert got.dtype == torch.float64 and got.shape == truth.shape, name
    error = (got.detach() - truth).abs().max().item()
    allowed = 1e-10 * max(1e-3, truth.abs().max().item())
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def relative(got, want):
    """Frobenius error of a tensor, relative."""
    return float((got.double() - want.double()).norm() / want.double().norm())


class Inputs(NamedTuple):
    student_hidden: torch.Tensor  # (N, D_s)
    student_weight: torch.Tensor  # (V, D_s)
    teacher_hidden: torch.Tensor  # (N, D_t)
    teacher_weight: torch.Tensor  # (V, D_t)
    student_bias: torch.Tensor | None = None  # (V,)
    teacher_bias: torch.Tensor | None = None  # (V,)

    def to(self, dtype_or_device):
        return Inputs(*(None if tensor is None else tensor.to(dtype_or_device) for tensor in self))


def make_inputs(
    family, tokens=21, vocabulary=300, student_dim=24, teacher_dim=40, *, dtype=torch.float32, teacher_vocabulary=None, bias=False, seed=0
) -> Inputs:
    """Hidden states and heads of one of FAMILIES, named by the logits they make:

    flat: all logits within ±0.5. moderate: standard deviation 2. peaked: one entry has nearly all the probability, not the same
    for teacher and student. equal: the teacher is the student. huge: logits up to ±640. realistic: a few channels of the hidden
    states 30 times the others, head rows of very different norms, and a student that agrees with its teacher for the most part.
    grid: moderate, but on a grid so coarse that logits are exact in every order of summation. With one token or two features, the
    rounding of a logit is one draw of luck that the rule cannot even out; this leaves the rounding that follows.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_vocabulary = vocabulary if teacher_vocabulary is None else teacher_vocabulary
    deviation = {"flat": 0.1, "peaked": 12.0}.get(family, 2.0)
    student_hidden, teacher_hidden = normal(tokens, student_dim), normal(tokens, teacher_dim)
    student_weight = normal(vocabulary, student_dim) * deviation / math.sqrt(student_dim)
    teacher_weight = normal(teacher_vocabulary, teacher_dim) * deviation / math.sqrt(teacher_dim)
    if family == "realistic":
        shared, rows = min(student_dim, teacher_dim), min(vocabulary, teacher_vocabulary)
        for hidden in (student_hidden, teacher_hidden):
            hidden[:, :: max(1, hidden.shape[1] // 3)] *= 30
        for weight in (student_weight, teacher_weight):
            weight[:, :: max(1, weight.shape[1] // 3)] /= 30
        student_weight *= (0.5 * normal(vocabulary, 1)).exp()
        teacher_hidden[:, :shared] = student_hidden[:, :shared]
        teacher_weight[:rows, :shared] = student_weight[:rows, :shared]
        teacher_weight[:, shared:] *= 0.3
    biases = (normal(vocabulary), normal(teacher_vocabulary)) if bias else (None, None)
    if family == "equal":
        teacher_hidden, teacher_weight = student_hidden, student_weight
        biases = (biases[0], biases[0])
    if family == "huge":
        student_weight *= 640 / (student_hidden @ student_weight.T).abs().max()
        teacher_weight *= 640 / (teacher_hidden @ teacher_weight.T).abs().max()
    inputs = Inputs(student_hidden, student_weight, teacher_hidden, teacher_weight, *biases)
    if family == "grid":
        steps = Inputs(8, 64, 8, 64, 64, 64)  # to a unit
        inputs = Inputs(*(None if x is None else (x * step).round() / step for x, step in zip(inputs, steps, strict=True)))
    return inputs.to(dtype)


def _mixture(log_a, log_b, weight):
    return torch.logsumexp(torch.stack([log_a + math.log(weight), log_b + math.log(1 - weight)]), 0)


def _kl(log_a, log_b):
    return kl_div(log_b, log_a, reduction="none", log_target=True)


def _jensen_shannon(log_p, log_q, beta):
    log_m = _mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _alpha_beta(log_p, log_q, alpha, beta):
    total = alpha + beta
    p_total, q_total = (total * log_p).exp(), (total * log_q).exp()
    return -((alpha * log_p).exp() * (beta * log_q).exp() - alpha / total * p_total - beta / total * q_total) / (alpha * beta)


# As released trainers write them, on torch's functions; gradients are left to autograd.
EAGER_DIVERGENCES = {
    "forward_kl": _kl,
    "reverse_kl": lambda log_p, log_q: _kl(log_q, log_p),
    "symmetric_kl": lambda log_p, log_q, weight: weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p),
    "jensen_shannon": _jensen_shannon,
    "skew_forward_kl": lambda log_p, log_q, alpha: _kl(log_p, _mixture(log_p, log_q, alpha)),
    "skew_reverse_kl": lambda log_p, log_q, alpha: _kl(log_q, _mixture(log_q, log_p, alpha)),
    "total_variation": lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs(),
    "alpha_beta": _alpha_beta,
    "squared_hellinger": lambda log_p, log_q: 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square(),
}


def eager_logits(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    z = hidden.float() @ weight.float().T
    if bias is not None:
        z = z + bias.float()
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def eager_log_probabilities(z):
    return z.log_softmax(-1).clamp(min=LOG_PROBABILITY_FLOOR)


def eager_terms(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels=None, *, divergence="forward_kl", temperature=1.0,
    label_smoothing=0.0, student_bias=None, teacher_bias=None, student_logit_scale=1.0, teacher_logit_scale=1.0, student_softcap=None,
    teacher_softcap=None, ignore_index=-100, vocab_mismatch="error",
):  # fmt: skip
    """(divergence, cross entropy, squared log-sum-exp) of every token and a dict of the diagnostics, in float32."""
    of_all = z = eager_logits(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    y = eager_logits(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    if vocab_mismatch == "truncate":
        shared = min(z.shape[-1], y.shape[-1])
        z, y = z[..., :shared], y[..., :shared]
    log_q, log_p = eager_log_probabilities(z / temperature), eager_log_probabilities(y / temperature)
    divergence = resolve(divergence)
    kd = EAGER_DIVERGENCES[divergence.name](log_p, log_q, *divergence.parameters).sum(-1)

    nll = ce = torch.zeros_like(kd)
    if labels is not None:
        log_q1 = eager_log_probabilities(of_all)
        valid = labels != ignore_index
        nll = -log_q1.gather(-1, (labels * valid).unsqueeze(-1)).squeeze(-1) * valid
        ce = (1 - label_smoothing) * nll - label_smoothing * log_q1.mean(-1) * valid
    stats = {
        "divergence": kd,
        "cross_entropy": nll,
        "student_entropy": -(log_q.exp() * log_q).sum(-1),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
        "top1_agreement": (z.argmax(-1) == y.argmax(-1)).float(),
        "tail_mass": (log_q.exp() * (log_p.exp() < 1e-4)).sum(-1),
    }
    return (kd, ce, of_all.logsumexp(-1).square()), stats


def eager_loss(
    *tensors, labels=None, temperature=1.0, temperature_squared=True, kd_weight=1.0, ce_weight=0.0, z_loss_weight=0.0, token_weight=None,
    ignore_index=-100, num_items=None, reduction="mean", **options,
):  # fmt: skip
    """The contract in plain torch."""
    (kd, ce, z_loss), _ = eager_terms(*tensors, labels, temperature=temperature, ignore_index=ignore_index, **options)
    loss = kd_weight * kd * (temperature**2 if temperature_squared else 1.0) + ce_weight * ce + z_loss_weight * z_loss
    valid = torch.ones_like(kd) if labels is None else (labels != ignore_index).float()
    loss = loss * valid if token_weight is None else loss * valid * token_weight.float()
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (valid.sum().clamp(min=1) if num_items is None else num_items)


def with_gradients(function, inputs, upstream, **options):
    """{"loss" or what `function` returns: its value, "d_" + name: gradient under `upstream`} for every student tensor there is."""
    leaves = inputs._replace(
        **{name: getattr(inputs, name).detach().clone().requires_grad_() for name in STUDENT if getattr(inputs, name) is not None}
    )
    biases = {name: getattr(leaves, name) for name in ("student_bias", "teacher_bias") if getattr(leaves, name) is not None}
    loss = function(*leaves[:4], **biases, **options)
    upstream = torch.as_tensor(upstream).to(loss.dtype).expand_as(loss)
    wanted = [name for name in STUDENT if getattr(leaves, name) is not None]
    gradients = torch.autograd.grad(loss, [getattr(leaves, name) for name in wanted], upstream)
    return {"loss": loss.detach(), **{f"d_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}}


def eager_with_gradients(function, inputs, upstream, **options):
    """`with_gradients` of an eager function, in EAGER_ORDERS orders of vocabulary and features: {name: list of tensors}."""
    results = []
    for permuted, changed, undo in eager_orders(inputs, options):
        result = with_gradients(function, permuted, upstream, **changed)
        results.append({name: undo[name](value) if name in undo else value for name, value in result.items()})
    return {name: [result[name] for result in results] for name in results[0]}


def eager_orders(inputs, options):
    """(inputs, options, functions that put gradients back in order, by name) of EAGER_ORDERS equally good orders; the first is as given."""
    yield inputs, options, {}
    shared = min(inputs.student_weight.shape[0], inputs.teacher_weight.shape[0])
    for seed in range(1, EAGER_ORDERS):
        generator = torch.Generator().manual_seed(seed)
        device = inputs.student_hidden.device
        columns_s, columns_t, order = (
            torch.randperm(size, generator=generator).to(device)
            for size in (inputs.student_hidden.shape[-1], inputs.teacher_hidden.shape[-1], shared)
        )

        def rows(tensor, order=order):  # what lies beyond the shared vocabulary stays where it is
            return None if tensor is None else torch.cat([tensor[:shared][order], tensor[shared:]])

        permuted = Inputs(
            inputs.student_hidden[..., columns_s],
            rows(inputs.student_weight)[:, columns_s],
            inputs.teacher_hidden[..., columns_t],
            rows(inputs.teacher_weight)[:, columns_t],
            rows(inputs.student_bias),
            rows(inputs.teacher_bias),
        )
        back, features = order.argsort(), columns_s.argsort()
        changed = dict(options)
        for name in ("labels", "token_ids"):
            if options.get(name) is not None:
                ids = options[name]
                moved_ids = (ids != options.get("ignore_index", -100)) & (ids < shared)
                changed[name] = torch.where(moved_ids, back[ids * moved_ids], ids)
        undo = {
            "d_student_hidden": lambda gradient, features=features: gradient[..., features],
            "d_student_weight": lambda gradient, rows=rows, back=back, features=features: rows(gradient, back)[..., features],
            "d_student_bias": lambda gradient, rows=rows, back=back: rows(gradient, back),
        }
        yield permuted, changed, undo


def eager_stats(inputs, **options):
    """The diagnostics of `eager_terms` in EAGER_ORDERS orders: {name: list of tensors}."""
    results = []
    for permuted, changed, _ in eager_orders(inputs, options):
        biases = {"student_bias": permuted.student_bias, "teacher_bias": permuted.teacher_bias}
        results.append(eager_terms(*permuted[:4], **biases, **changed)[1])
    return {name: [result[name] for result in results] for name in results[0]}


def moved(tensors, device):
    """A dict with its tensors on `device`."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}


def check_loss(inputs, *, backend, upstream=1.7, workspace_mib=64, slack=1, device="cpu", **options):
    """Loss and every gradient of `distillation_loss` against the reference, by the rule. Returns the results.

    device: where the loss and the eager torch that it is measured against run; the truth is made on CPU.
    """
    there, upstream_there = inputs.to(device), torch.as_tensor(upstream).to(device)
    options_there = moved(options, device)
    got = with_gradients(distillation_loss, there, upstream_there, backend=backend, workspace_mib=workspace_mib, **options_there)
    got = moved(got, "cpu")
    truth = with_gradients(reference.distillation_loss, inputs.to(torch.float64), upstream, **options)
    if inputs.student_hidden.dtype is torch.float64:
        for name in truth:
            assert_close64(name, got[name], truth[name])
        return got
    eager = eager_with_gradients(eager_loss, there, upstream_there, **options_there)
    eager = {name: [result.cpu() for result in results] for name, results in eager.items()}
    for name in truth:
        if name != "loss":
            assert got[name].dtype == inputs.student_hidden.dtype, f"{name} is {got[name].dtype}"
        assert_as_good_as_eager(name, got[name], eager[name], truth[name], gradient=name != "loss", slack=slack)
    return got


def make_labels(tokens, vocabulary, *, ignore_index=-100, masked=0.3, seed=0):
    """Labels (N,), some of them `ignore_index`; the first token always has a label, the second (if there is one) never."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[labels == ignore_index] = (ignore_index + 1) % max(vocabulary, 1)
    where = torch.rand(tokens, generator=generator) < masked
    where[:1] = False
    if masked:
        where[1:2] = True
    labels[where] = ignore_index
    return labels


def make_token_weight(tokens, *, seed=0):
    """Token weights (N,) between ½ and 2, and a few zeros and negative ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(tokens, generator=generator) * 1.5 + 0.5
    weight[3::7] = 0.0
    weight[5::8] *= -0.5
    return weight


def everything(tokens, vocabulary, *, seed=0):
    """Every option of the loss at once, none at its default."""
    return {
        "labels": make_labels(tokens, vocabulary, seed=seed),
        "temperature": 2.0,
        "kd_weight": 0.7,
        "ce_weight": 0.4,
        "z_loss_weight": 0.01,
        "label_smoothing": 0.1,
        "student_logit_scale": 0.8,
        "teacher_logit_scale": 1.3,
        "student_softcap": 15.0,
        "teacher_softcap": 20.0,
        "token_weight": make_token_weight(tokens, seed=seed),
        "num_items": 13,
    }
