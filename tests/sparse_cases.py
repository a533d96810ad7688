"""Lists for the tests of sparse teachers, the eager torch that they are measured against, and the check by the rule of `accuracy`."""

from typing import NamedTuple

import torch
from accuracy import (
    EAGER_DIVERGENCES,
    EAGER_ORDERS,
    assert_as_good_as_eager,
    assert_close64,
    eager_log_probabilities,
    eager_logits,
    make_inputs,
    make_labels,
    make_token_weight,
)

from distill_kernels import reference, sparse_distillation_loss
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR, resolve

TOKENS, VOCABULARY, WIDTH = 21, 300, 11
TAILS = ("bucket", "renormalise", "ignore")


class Case(NamedTuple):
    hidden: torch.Tensor  # (N, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    ids: torch.Tensor  # (N, K)
    logprobs: torch.Tensor  # (N, K)

    def to(self, dtype_or_device):
        """Of a dtype the student; teacher_logprobs stay as they are."""
        student = [None if tensor is None else tensor.to(dtype_or_device) for tensor in self[:3]]
        if isinstance(dtype_or_device, torch.dtype):
            return Case(*student, *self[3:])
        return Case(*student, *(tensor.to(dtype_or_device) for tensor in self[3:]))


def make_case(
    family="moderate", tokens=TOKENS, vocabulary=VOCABULARY, dim=24, width=WIDTH, *, bias=False, dtype=torch.float32, temperature=1.0,
    ragged=True, top=True, seed=0,
) -> Case:  # fmt: skip
    """A student, and the log-probabilities of the teacher's top `width` (or of any entries) in random order; `ragged`: rows have fewer,
    the second has none, the third has one, and what is beside them is NaN."""
    inputs = make_inputs(family, tokens, vocabulary, dim, dim, bias=bias, seed=seed)
    y = reference.logits(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias)
    log_p = (y / temperature).log_softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    score = log_p if top else torch.rand(log_p.shape, generator=generator)
    ids = score.topk(width).indices
    ids = ids.gather(-1, torch.rand(ids.shape, generator=generator).argsort(-1))
    logprobs = log_p.gather(-1, ids).float()
    if ragged:
        kept = torch.rand(ids.shape, generator=generator) < 0.8
        kept[:, 0] = True
        kept[1:2] = False
        kept[2:3, 1:] = False
        ids, logprobs = torch.where(kept, ids, -1), torch.where(kept, logprobs, torch.nan)
    return Case(inputs.student_hidden, inputs.student_weight, inputs.student_bias, ids, logprobs).to(dtype)


def everything(case, *, seed=0):
    """Every option of the loss at once, none at its default; some labels are listed and some are not."""
    tokens = len(case.hidden)
    labels = make_labels(tokens, len(case.weight), seed=seed)
    labels[::3] = torch.where((labels[::3] >= 0) & (case.ids[::3, 0] >= 0), case.ids[::3, 0], labels[::3])
    return {
        "labels": labels, "temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.4, "z_loss_weight": 0.01, "student_logit_scale": 0.8,
        "student_softcap": 15.0, "token_weight": make_token_weight(tokens, seed=seed), "num_items": 13,
    }  # fmt: skip


def eager_sparse_loss(
    hidden, weight, ids, logprobs, labels=None, *, tail, divergence="forward_kl", temperature=1.0, teacher_temperature=None,
    teacher_tail_mass=None, temperature_squared=True, kd_weight=1.0, ce_weight=0.0, z_loss_weight=0.0, student_bias=None,
    student_logit_scale=1.0, student_softcap=None, token_weight=None, ignore_index=-100, num_items=None, reduction="mean",
):  # fmt: skip
    """As a trainer with all logits in memory would write it, float32."""
    z = eager_logits(hidden, weight, student_bias, student_logit_scale, student_softcap)
    log_q = (z / temperature).log_softmax(-1)
    there = ids >= 0
    places = torch.where(there, ids, 0)
    log_p = torch.where(there, logprobs.float(), LOG_PROBABILITY_FLOOR)
    at_ids = torch.where(there, log_q.gather(-1, places), LOG_PROBABILITY_FLOOR)
    if tail == "renormalise":
        log_p = log_p * (1.0 if teacher_temperature is None else teacher_temperature / temperature)
        log_p, at_ids = log_p.log_softmax(-1), at_ids.log_softmax(-1)
    if tail == "bucket":
        is_listed = torch.zeros_like(log_q).scatter_add(-1, places, there.float()) > 0
        rest = torch.where(is_listed, 3 * LOG_PROBABILITY_FLOOR, log_q).logsumexp(-1, keepdim=True)
        mass = 1 - log_p.double().exp().sum(-1, keepdim=True) if teacher_tail_mass is None else teacher_tail_mass[:, None].double()
        log_p = torch.cat([log_p, mass.clamp(min=0).log().float()], -1)
        at_ids = torch.cat([at_ids, rest], -1)
        there = torch.cat([there, there.any(-1, keepdim=True) & ~is_listed.all(-1, keepdim=True)], -1)
    chosen = resolve(divergence)
    floored = (x.clamp(min=LOG_PROBABILITY_FLOOR) for x in (log_p, at_ids))
    kd = torch.where(there, EAGER_DIVERGENCES[chosen.name](*floored, *chosen.parameters), 0).sum(-1)
    loss = kd_weight * kd * (temperature**2 if temperature_squared else 1.0) + z_loss_weight * z.logsumexp(-1).square()
    valid = torch.ones_like(kd, dtype=torch.bool) if labels is None else labels != ignore_index
    if labels is not None:
        nll = -eager_log_probabilities(z).gather(-1, torch.where(valid, labels, 0)[:, None]).squeeze(-1)
        loss = loss + ce_weight * torch.where(valid, nll, 0)
    factor = valid.float() if token_weight is None else valid * token_weight.float()
    loss = torch.where(factor != 0, loss * factor, 0)
    if reduction == "none":
        return loss
    return loss.sum() / (1 if reduction == "sum" else valid.sum().clamp(min=1) if num_items is None else num_items)


def results_of(function, case, upstream, **options):
    """{"loss": value, "d_hidden", "d_weight", "d_bias": gradients under `upstream`}."""
    names = [name for name in ("hidden", "weight", "bias") if getattr(case, name) is not None]
    leaves = case._replace(**{name: getattr(case, name).detach().clone().requires_grad_() for name in names})
    if leaves.bias is not None:
        options["student_bias"] = leaves.bias
    loss = function(leaves.hidden, leaves.weight, leaves.ids, leaves.logprobs, **options)
    upstream = torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand_as(loss)
    gradients = torch.autograd.grad(loss, [getattr(leaves, name) for name in names], upstream)
    return {"loss": loss.detach()} | {f"d_{name}": gradient for name, gradient in zip(names, gradients, strict=True)}


def eager_results(case, upstream, **options):
    """{name: results in EAGER_ORDERS orders of vocabulary and features}."""
    made = [results_of(eager_sparse_loss, case, upstream, **options)]
    for seed in range(1, EAGER_ORDERS):
        generator = torch.Generator().manual_seed(seed)
        order, features = (torch.randperm(size, generator=generator).to(case.ids.device) for size in case.weight.shape)
        back = order.argsort()

        def renamed(ids, back=back):
            return None if ids is None else torch.where(ids >= 0, back[ids.clamp(min=0)], ids)

        turned = Case(
            case.hidden[:, features], case.weight[order][:, features], None if case.bias is None else case.bias[order], renamed(case.ids),
            case.logprobs,
        )  # fmt: skip
        result = results_of(eager_sparse_loss, turned, upstream, **options | {"labels": renamed(options.get("labels"))})
        result["d_hidden"] = result["d_hidden"][:, features.argsort()]
        result["d_weight"] = result["d_weight"][back][:, features.argsort()]
        if case.bias is not None:
            result["d_bias"] = result["d_bias"][back]
        made.append(result)
    return {name: [result[name] for result in made] for name in made[0]}


def check_sparse(case, *, backend, upstream=1.7, workspace_mib=64, slack=1, device="cpu", **options):
    """Loss and every gradient against the reference, by the rule; returns the results."""

    def there(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    moved = {name: there(value) for name, value in options.items()}
    got = results_of(sparse_distillation_loss, case.to(device), there(upstream), backend=backend, workspace_mib=workspace_mib, **moved)
    got = {name: value.cpu() for name, value in got.items()}
    truth = results_of(reference.sparse_distillation_loss, case.to(torch.float64), upstream, **options)
    if case.hidden.dtype is torch.float64:
        for name, value in truth.items():
            assert_close64(name, got[name], value)
        return got
    eager = eager_results(case, upstream, **options)
    for name, value in truth.items():
        if name != "loss":
            assert got[name].dtype == case.hidden.dtype, name
        assert_as_good_as_eager(name, got[name], eager[name], value, gradient=name != "loss", slack=slack)
    return got
