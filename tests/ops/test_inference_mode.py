"""Constants that were made under torch.inference_mode(): a teacher's, and whatever else gets no gradient."""

import pytest
import torch
from accuracy import BACKENDS

import distill_kernels
from distill_kernels import distillation_loss, selected_logprobs, sparse_distillation_loss, token_logprobs

TOKENS, VOCABULARY = 100, 9000  # enough for sampled columns


def tensors():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    logprobs, ids = normal(TOKENS, VOCABULARY).log_softmax(-1).topk(4)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::7] = -100
    return {
        "student": (normal(TOKENS, 8), normal(VOCABULARY, 8), normal(VOCABULARY)),
        "teacher": (normal(TOKENS, 12), normal(VOCABULARY, 12), normal(VOCABULARY)),
        "labels": labels, "token_weight": normal(TOKENS), "num_items": torch.tensor(50.0), "ids": ids, "logprobs": logprobs,
        "tail_mass": 1 - logprobs.exp().sum(-1),
    }  # fmt: skip


def dense(made, hidden, weight, bias, **options):
    teacher_hidden, teacher_weight, teacher_bias = made["teacher"]
    if options.pop("prepared", False):
        teacher_weight = distill_kernels.prepare_head(teacher_weight)
    constants = {"labels": made["labels"], "token_weight": made["token_weight"], "student_bias": bias, "teacher_bias": teacher_bias}
    return distillation_loss(hidden, weight, teacher_hidden, teacher_weight, **constants, ce_weight=0.5, **options)


def listed(made, hidden, weight, bias, **options):
    constants = {"labels": made["labels"], "token_weight": made["token_weight"], "teacher_tail_mass": made["tail_mass"]}
    return sparse_distillation_loss(
        hidden, weight, made["ids"], made["logprobs"], **constants, student_bias=bias, tail="bucket", ce_weight=0.5, **options
    )


def of_tokens(made, hidden, weight, bias, **options):
    log_q, entropy = token_logprobs(hidden, weight, made["labels"], bias=bias, **options)
    return log_q + 0.1 * entropy


def of_lists(made, hidden, weight, bias, **options):
    log_q, rest = selected_logprobs(hidden, weight, made["ids"], bias=bias, **options)
    return log_q.sum(-1) + 0.1 * rest


CALLS = [
    (dense, {}), (dense, {"reduction": "none"}), (dense, {"reduction": "none", "frozen": True}), (dense, {"num_items": True}),
    (dense, {"reduction": "none", "column_fraction": 0.05, "seed": 0, "biased": False}),
    (dense, {"reduction": "none", "column_fraction": 0.05, "seed": 0}),
    (dense, {"column_fraction": 0.05, "seed": 0, "sweep": "int8", "prepared": True, "reduction": "none"}),
    (listed, {}), (listed, {"reduction": "none"}), (listed, {"reduction": "none", "frozen": True}),
    (of_tokens, {}), (of_tokens, {"frozen": True}), (of_lists, {}),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call, options", CALLS, ids=lambda part: part.__name__ if callable(part) else "-".join(map(str, part)) or "plain")
def test_constants_of_inference_mode_give_the_gradients_of_ordinary_ones(call, options, backend):
    """frozen: the student's head and bias are constants, too."""
    frozen, biased, options = options.get("frozen", False), options.get("biased", True), dict(options)
    options.pop("frozen", None), options.pop("biased", None)

    def gradients(mode):
        with mode:
            made = tensors()
        hidden, *head = made["student"]
        leaves = [hidden.clone().requires_grad_()]
        if not frozen:
            head = [tensor.clone().requires_grad_() for tensor in head]
            leaves += head if biased else head[:1]
        asked = options | ({"num_items": made["num_items"]} if options.get("num_items") else {})
        loss = call(made, leaves[0], head[0], head[1] if biased else None, backend=backend, **asked)
        upstream = torch.linspace(0.2, 2.0, loss.numel()).view(loss.shape)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

    for got, wanted in zip(gradients(torch.inference_mode()), gradients(torch.no_grad()), strict=True):
        assert torch.equal(got, wanted)
