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
    of_all = z = logits(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    y = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    if vocab_mismatch == "truncate":  # the divergence, to what both have
        shared = min(z.shape[-1], y.shape[-1])
        z, y = z[..., :shared], y[..., :shared]
    log_q, log_p = log_probabilities(z / temperature), log_probabilities(y / temperature)
    value, _ = resolve(divergence)(log_p, log_q)
    kd = value.sum(-1)

    nll, ce = _cross_entropy(of_all, labels, label_smoothing, ignore_index)

    q, p = log_q.exp(), log_p.exp()
    stats = {
        "divergence": kd,
        "cross_entropy": nll,
        "student_entropy": -(q * log_q).sum(-1),
        "teacher_entropy": -(p * log_p).sum(-1),
        "top1_agreement": (z.argmax(-1) == y.argmax(-1)).double(),
        "tail_mass": (q * (p < 1e-4)).sum(-1),
    }
    return (kd, ce, of_all.logsumexp(-1).square()), stats


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
    weights = kd_weight * (temperature**2 if temperature_squared else 1.0), ce_weight, z_loss_weight
    return _reduced((kd, ce, z_loss), weights, labels, token_weight, ignore_index, num_items, reduction)


def _cross_entropy(z, labels, label_smoothing, ignore_index):
    """(−log q_label, cross entropy) of every token, 0 without a label."""
    if labels is None:
        return (torch.zeros_like(z[..., 0]),) * 2
    log_q = log_probabilities(z)
    valid = labels != ignore_index
    at_label = log_q.gather(-1, torch.where(valid, labels, 0).unsqueeze(-1)).squeeze(-1)
    ce = torch.where(valid, -(1 - label_smoothing) * at_label - label_smoothing * log_q.mean(-1), 0)
    return torch.where(valid, -at_label, 0), ce


def _reduced(terms, weights, labels, token_weight, ignore_index, num_items, reduction):
    loss = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    valid = torch.ones_like(loss, dtype=torch.bool) if labels is None else labels != ignore_index
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


def of_lists(log_q, ids):
    """(listed (..., V) bool, log Σ of q not listed (..., 1)) of ids (..., K), negative where there is none."""
    listed = torch.zeros(*log_q.shape[:-1], log_q.shape[-1] + 1, dtype=torch.bool)  # a place more, for what is none
    listed = listed.scatter(-1, torch.where(ids < 0, log_q.shape[-1], ids), True)[..., :-1]
    # Far below the floor, and finite, so that autograd has nothing to stumble over where everything is listed.
    return listed, torch.where(listed, 100 * LOG_PROBABILITY_FLOOR, log_q).logsumexp(-1, keepdim=True)


def selected_logprobs(hidden, weight, token_ids, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    """(log q of each id (..., K), 0 where there is none; log Σ q of all others (...), 0 where there is no id at all), float64."""
    log_q = (logits(hidden, weight, bias, logit_scale, softcap) / temperature).log_softmax(-1)
    there = token_ids >= 0
    _, rest = of_lists(log_q, token_ids)
    at_ids = log_q.clamp(min=LOG_PROBABILITY_FLOOR).gather(-1, token_ids.clamp(min=0))
    rest = rest.clamp(min=LOG_PROBABILITY_FLOOR).squeeze(-1)
    return torch.where(there, at_ids, 0), torch.where(there.any(-1), rest, 0)


def sparse_divergence(
    student_logits, teacher_ids, teacher_logprobs, *, tail, divergence="forward_kl", temperature=1.0, teacher_temperature=None,
    teacher_tail_mass=None,
):  # fmt: skip
    """Divergence (...) from a teacher of whom some log-probabilities are known, from meant logits (..., V): `listed` has the definition."""
    log_q = (student_logits / temperature).log_softmax(-1)
    listed, rest = of_lists(log_q, teacher_ids)
    there = teacher_ids >= 0
    # The teacher over the whole vocabulary, 0 where nothing is known of it.
    given = torch.where(there, teacher_logprobs.double(), -torch.inf)
    log_p = torch.full((*log_q.shape[:-1], log_q.shape[-1] + 1), -torch.inf, dtype=torch.float64)
    log_p = log_p.scatter(-1, torch.where(there, teacher_ids, log_q.shape[-1]), given)[..., :-1]
    if tail == "renormalise":
        log_p = log_p * (1.0 if teacher_temperature is None else teacher_temperature / temperature)
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
        log_q = log_q - torch.where(listed, log_q, 100 * LOG_PROBABILITY_FLOOR).logsumexp(-1, keepdim=True)
    value, _ = resolve(divergence)(*(torch.where(listed, z, 0).clamp(min=LOG_PROBABILITY_FLOOR) for z in (log_p, log_q)))
    value = torch.where(listed, value, 0).sum(-1)
    if tail == "bucket":
        mass = 1 - given.exp().sum(-1) if teacher_tail_mass is None else teacher_tail_mass.double()
        of_rest, _ = resolve(divergence)(*(z.clamp(min=LOG_PROBABILITY_FLOOR) for z in (mass.clamp(min=0).log(), rest.squeeze(-1))))
        value = value + torch.where(there.any(-1) & ~listed.all(-1), of_rest, 0)
    return value


def sparse_distillation_loss(
    student_hidden, student_weight, teacher_ids, teacher_logprobs, labels=None, *, tail, temperature=1.0, temperature_squared=True,
    kd_weight=1.0, ce_weight=0.0, z_loss_weight=0.0, student_bias=None, student_logit_scale=1.0, student_softcap=None, token_weight=None,
    ignore_index=-100, num_items=None, reduction="mean", **teacher,
):  # fmt: skip
    """`distillation_loss` with `sparse_divergence` in the divergence's place."""
    z = logits(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    kd = sparse_divergence(z, teacher_ids, teacher_logprobs, tail=tail, temperature=temperature, **teacher)
    terms = kd, _cross_entropy(z, labels, 0.0, ignore_index)[1], z.logsumexp(-1).square()
    weights = kd_weight * (temperature**2 if temperature_squared else 1.0), ce_weight, z_loss_weight
    return _reduced(terms, weights, labels, token_weight, ignore_index, num_items, reduction)
