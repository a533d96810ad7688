"""Calls of a few tokens for the tests of this folder, their gradients, and what is compared of them."""


import pytest
import torch

from distill_kernels import distillation_loss

BACKENDS = ("torch", "native")
REDUCTIONS = ("mean", "sum", "none")
LEAVES = ("student_hidden", "student_weight", "student_bias")

backends = pytest.mark.parametrize("backend", BACKENDS)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def sample(*leaves, tokens=12, vocabulary=61, dtype=torch.float32, labels=False, token_weight=False, bias=False, teacher=True, seed=0):
    """Arguments of a call; the tensors named require grad (hidden states and head if none is named)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    call = {"student_hidden": normal(tokens, 8), "student_weight": normal(vocabulary, 8)}
    call |= {"teacher_hidden": normal(tokens, 6), "teacher_weight": normal(vocabulary, 6)}
    if bias:
        call |= {"student_bias": normal(vocabulary), "teacher_bias": normal(vocabulary)}
    if labels:
        call |= {"labels": torch.randint(vocabulary, (tokens,), generator=g), "ce_weight": 0.5}
        call["labels"][1::4] = -100
    if token_weight:
        call["token_weight"] = torch.rand(tokens, generator=g) + 0.5
    if not teacher:
        call |= {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None, "kd_weight": 0.0}
    for name in leaves or ("student_hidden", "student_weight"):
        call[name].requires_grad_()
    return call


def full_sample(**options):
    return sample(*LEAVES, labels=True, token_weight=True, bias=True, **options)


def leaves_of(call):
    return [call[name] for name in LEAVES if call.get(name) is not None and call[name].requires_grad]


def upstream_of(loss, factor):
    """An upstream gradient that differs from token to token where there are several."""
    return torch.full_like(loss, factor) if loss.dim() == 0 else factor * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype)


def loss_and_gradients(call, factor=1.0, **options):
    loss = distillation_loss(**call, **options)
    return loss.detach(), torch.autograd.grad(loss, leaves_of(call), upstream_of(loss, factor))


def assert_same(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)


OP_SAMPLES = {
    "plain": lambda: sample(),
    "full": full_sample,
    "labels": lambda: sample(labels=True),
    "no_teacher": lambda: sample(labels=True, teacher=False),
    "frozen_head": lambda: sample("student_hidden"),
    "bias_only": lambda: sample("student_bias", bias=True),
}
