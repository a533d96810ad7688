"""The specification: what every backend must compute, in float64, with the logits in memory and the gradients by autograd.

Slow and large on purpose. Read it as the definition of the contract: z are logits, x = z/τ tempered ones, p the teacher, q the
student, and a log-probability below `LOG_PROBABILITY_FLOOR` is a constant of that value.

    loss_n = kd_weight·τ²·D(p‖q) + ce_weight·CE + z_loss_weight·lse(z)²           (no τ² if not temperature_squared)
    CE     = −(1 − ε)·log q_label − ε·(1/V)·Σ_v log q_v                           at temperature 1, ε = label_smoothing
    loss   = Σ_n valid_n·token_weight_n·loss_n / (number of valid tokens)         reduction="mean"; num_items replaces the number
"""

import torch

from distill_kernels.divergences import LOG_PROBABILITY_FLOOR, resolve


def logits(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    z = logit_scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def log_probabilities(z):
    return z.log_softmax(-1).clamp(min=LOG_PROBABILITY_FLOOR)


def distillation_terms(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels=None, *, divergence="forward_kl", temperature=1.0,
    label_smoothing=0.0, student_bias=None, teacher_bias=None, student_logit_scale=1.0, teacher_logit_scale=1.0, student_softcap=None,
    teacher_softcap=None, ignore_index=-100, vocab_mismatch="error",
):  # fmt: skip
    """(divergence, cross entropy, squared log-sum-exp) of every token, each (...), and a dict of the diagnostics."""
    if vocab_mismatch == "truncate":
        shared = min(student_weight.shape[0], teacher_weight.shape[0])
        student_weight, teacher_weight = student_weight[:shared], teacher_weight[:shared]
        student_bias, teacher_bias = (None if b is None else b[:shared] for b in (student_bias, teacher_bias))
    z = logits(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    y = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    log_q, log_p = log_probabilities(z / temperature), log_probabilities(y / temperature)
    value, _ = resolve(divergence)(log_p, log_q)
    kd = value.sum(-1)

    ce = nll = torch.zeros_like(kd)
    if labels is not None:
        log_q1 = log_probabilities(z)
        valid = labels != ignore_index
        at_label = log_q1.gather(-1, torch.where(valid, labels, 0).unsqueeze(-1)).squeeze(-1)
        nll = torch.where(valid, -at_label, 0)
        ce = torch.where(valid, -(1 - label_smoothing) * at_label - label_smoothing * log_q1.mean(-1), 0)

    q, p = log_q.exp(), log_p.exp()
    stats = {
        "divergence": kd,
        "cross_entropy": nll,
        "student_entropy": -(q * log_q).sum(-1),
        "teacher_entropy": -(p * log_p).sum(-1),
        "top1_agreement": (z.argmax(-1) == y.argmax(-1)).double(),
        "tail_mass": (q * (p < 1e-4)).sum(-1),
    }
    return (kd, ce, z.logsumexp(-1).square()), stats


def distillation_loss(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels=None, *, temperature=1.0, temperature_squared=True,
    kd_weight=1.0, ce_weight=0.0, z_loss_weight=0.0, token_weight=None, ignore_index=-100, num_items=None, reduction="mean", **options,
):  # fmt: skip
    """The loss of the contract, float64, differentiable by autograd in whatever requires grad."""
    (kd, ce, z_loss), _ = distillation_terms(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        temperature=temperature,
        ignore_index=ignore_index,
        **options,
    )
    loss = kd_weight * (temperature**2 if temperature_squared else 1.0) * kd + ce_weight * ce + z_loss_weight * z_loss
    valid = torch.ones_like(kd, dtype=torch.bool) if labels is None else labels != ignore_index
    factor = valid.double() if token_weight is None else valid * token_weight.double()
    loss = torch.where(factor != 0, loss * factor, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (valid.sum().clamp(min=1) if num_items is None else num_items)


def token_logprobs(hidden, weight, token_ids, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, ignore_index=-100):
    """(log q_id, entropy of q) of every token, float64; 0 where the id is `ignore_index`."""
    log_q = log_probabilities(logits(hidden, weight, bias, logit_scale, softcap) / temperature)
    valid = token_ids != ignore_index
    at_id = log_q.gather(-1, torch.where(valid, token_ids, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(valid, at_id, 0), torch.where(valid, -(log_q.exp() * log_q).sum(-1), 0)
