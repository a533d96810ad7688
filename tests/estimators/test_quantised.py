"""Matrices in 8 bits: what quantising does to them, and heads that are prepared for a sweep. The sweep itself is test_sweep.py's."""

import math

import pytest
import torch
from accuracy import BACKENDS, make_inputs, relative, with_gradients

from distill_kernels import PreparedHead, backends, distillation_loss, distillation_loss_and_stats, prepare_head
from distill_kernels.backends import native
from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem
from distill_kernels.estimators import quantised
from distill_kernels.ops import whole_vocabulary

TOKENS, VOCABULARY = 21, 700
on_all = pytest.mark.parametrize("backend", BACKENDS)
needs_native = pytest.mark.skipif(native._native is None, reason="the compiled extension was not built")
NEVER = {"sweep": "int8", "column_fraction": 0.3, "seed": 3, "sweep_tolerance": None}


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 24, 64, 100, 576])
def test_native_quantises_as_torch_does(dim, dtype):
    matrix = make_inputs("realistic", 3, 401, dim, 8).student_weight.to(dtype)
    matrix[7] = 0
    (rows, scales), (want, want_scales) = native.quantise(matrix), quantised.quantise(matrix, "int8")
    torch.testing.assert_close(scales[:, 0], want_scales[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(scales[:, 2], want_scales[:, 2], rtol=1e-5, atol=0)
    off = (rows.int() - want.int()).abs()  # a number half-way between two integers may go either way
    assert off.max() <= 1 and off.float().mean() <= 1e-3 and not rows[7].any()
    assert torch.equal(scales[:, 1], 128.0 * rows.float().sum(1))


@pytest.mark.parametrize("kind, bound", [("int8", 0.02), ("fp8", 0.05)])
def test_quantised_products_are_the_products(kind, bound):
    """Turning both sides leaves them as they are; what is off is rounding, outliers or not."""
    inputs = make_inputs("moderate", 64, 500, 130, 8)
    inputs.student_hidden[:, 5::40] *= 30
    a, a_scales = quantised.quantise(inputs.student_hidden, kind)
    b, b_scales = quantised.quantise(inputs.student_weight, kind)
    assert a.shape == (64, 192) and a.dtype is quantised.KINDS[kind][0]
    got = (a.float() * a_scales[:, :1]) @ (b.float() * b_scales[:, :1]).T
    want = inputs.student_hidden @ inputs.student_weight.T
    assert relative(got, want) <= bound
    rounding = torch.nn.functional.normalize(got - want) @ torch.nn.functional.normalize(want).T
    assert rounding.diagonal().abs().mean() < 0.1


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_noise_is_that_of_the_logits(kind):
    inputs = make_inputs("moderate", 64, 500, 128, 8)
    inputs.student_weight[:] = torch.nn.functional.normalize(inputs.student_weight)  # so that the longest row is like the others
    sizes = {"tokens": 64, "vocabulary": 500, "student_dim": 128, "teacher_dim": 0}
    dtypes = {"student_dtype": torch.float32, "teacher_dtype": torch.float32, "device": torch.device("cpu")}
    problem = Problem(**sizes, **dtypes, options=Options(sweep=kind, column_fraction=0.08))
    rows, scales = quantised.quantise(inputs.student_weight, kind)
    hidden, hidden_scales = quantised.quantise(inputs.student_hidden, kind)
    got = (hidden.float() * hidden_scales[:, :1]) @ (rows.float() * scales[:, :1]).T
    observed = (got - inputs.student_hidden @ inputs.student_weight.T).square().mean(1).sqrt()
    ratio = observed / quantised.noise(problem, hidden_scales, scales.square().mean(0).sqrt(), "student")
    assert 0.5 < ratio.median() < 1.05


@on_all
def test_prepared_heads_give_the_same_loss(sampling_pays, backend):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY)
    plain = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **NEVER)
    student, teacher = inputs.student_weight.clone().requires_grad_(), prepare_head(inputs.teacher_weight)
    head = prepare_head(student)
    assert head.nbytes == teacher.nbytes == 0
    loss = distillation_loss(inputs.student_hidden, head, inputs.teacher_hidden, teacher, backend=backend, **NEVER)
    loss.backward()
    assert torch.equal(loss, plain["loss"]) and torch.equal(student.grad, plain["d_student_weight"])
    assert head.nbytes == VOCABULARY * (64 + 12) and repr(head) == "PreparedHead((700, 24), torch.float32, int8: 0 MiB)"


def test_prepared_head_is_quantised_when_it_changed(monkeypatch):
    calls, quantise = [], backends.quantise
    monkeypatch.setattr(backends, "quantise", lambda *args: calls.append(args) or quantise(*args))
    weight = torch.randn(40, 24, requires_grad=True)
    head = prepare_head(weight)
    head.quantised("int8"), head.quantised("int8")
    assert len(calls) == 1
    with torch.no_grad():
        weight.add_(1)  # as an optimizer does
    assert torch.equal(head.quantised("int8")[0], quantise(weight.detach(), "int8")[0]) and len(calls) == 2
    head.quantised("fp8")
    assert len(calls) == 3 and head.nbytes == 2 * 40 * (64 + 12)
    weight.data = torch.randn(40, 24)
    assert torch.equal(head.quantised("int8")[0], quantise(weight.detach(), "int8")[0])
    weight.data.mul_(2)  # not counted by torch
    outdated = head.quantised("int8")[1].clone()
    head.refresh()
    assert head.nbytes == 0 and torch.allclose(head.quantised("int8")[1][:, 0], 2 * outdated[:, 0])
    with torch.inference_mode():
        assert prepare_head(torch.randn(40, 24)).quantised("int8")[0].shape == (40, 64)


@on_all
def test_outdated_copy_costs_accuracy_and_shows(sampling_pays, backend):
    inputs = make_inputs("moderate", TOKENS, VOCABULARY)
    head = prepare_head(inputs.teacher_weight)
    _, fresh = distillation_loss_and_stats(*inputs[:3], head, backend=backend, **NEVER)
    inputs.teacher_weight.data.mul_(1.1)
    exact = distillation_loss(*inputs[:4], backend=backend)
    losses, errors = zip(
        *(distillation_loss_and_stats(*inputs[:3], head, backend=backend, **{**NEVER, "seed": seed}) for seed in range(40)), strict=True
    )
    error = torch.stack([stats.divergence_error.square().mean().sqrt() for stats in errors]).mean()
    assert error > 2 * fresh.divergence_error.square().mean().sqrt()
    off = torch.stack(losses) - exact
    assert off.mean().abs() <= 4 * off.std() / math.sqrt(40) + 0.5 * error**2 * 2  # and no bias, but for the logarithms'


def test_prepared_head_without_sweep_is_the_head():
    inputs = make_inputs("realistic", TOKENS, VOCABULARY)
    head = prepare_head(inputs.teacher_weight)
    assert torch.equal(distillation_loss(*inputs[:3], head), distillation_loss(*inputs[:4])) and head.nbytes == 0
    assert isinstance(head, PreparedHead)


def test_prepared_heads_of_different_vocabularies_are_truncated(sampling_pays):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY, teacher_vocabulary=VOCABULARY + 33)
    options = {**NEVER, "vocab_mismatch": "truncate"}
    want = distillation_loss(*inputs[:4], **options)
    got = distillation_loss(
        inputs.student_hidden, prepare_head(inputs.student_weight), inputs.teacher_hidden, prepare_head(inputs.teacher_weight), **options
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("weight, exception, message", [
    ([1.0], TypeError, r"^weight must be a torch.Tensor, got list$"),
    (torch.zeros(3), ValueError, r"^weight must have 2 dimensions, got shape \(3,\)$"),
    (torch.zeros(3, 3, dtype=torch.float64), TypeError, r"^weight must be float32, bfloat16 or float16 to be quantised, got"),
    (torch.zeros(3, 3, dtype=torch.int64), TypeError, r"^weight must be float32, bfloat16, float16 or float64, got torch.int64$"),
])  # fmt: skip
def test_what_is_no_head_is_refused(weight, exception, message):
    with pytest.raises(exception, match=message):
        prepare_head(weight)


def test_ops_pass_torch_checks():
    torch.library.opcheck(whole_vocabulary.quantise, (torch.randn(40, 24), "int8"))
    torch.library.opcheck(whole_vocabulary.quantise, (torch.randn(40, 24), "fp8"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_autocast_casts_nothing_within(sampling_pays, dtype, kind):
    """The sweep of tensors that autocast has cast is that of tensors cast before: products and sums in float32, heads quantised alike."""
    inputs = make_inputs("realistic", TOKENS, VOCABULARY)
    cast = inputs.to(dtype)
    for backend in ("torch", "native") if native._native and kind == "int8" else ("torch",):
        options = {**NEVER, "sweep": kind, "backend": backend}
        want = distillation_loss(*cast[:4], **options)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(distillation_loss(*inputs[:4], **options), want)
            got = whole_vocabulary.quantise(inputs.student_weight, kind)
        for copy, exact in zip(got, whole_vocabulary.quantise(inputs.student_weight, kind), strict=True):
            assert torch.equal(copy.float(), exact.float())
