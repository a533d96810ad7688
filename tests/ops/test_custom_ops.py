"""The custom ops under torch's own checks, and compiled: what they compute is what an eager call does, in one graph."""


import pytest
import torch
from op_samples import BACKENDS, LEAVES, OP_SAMPLES, backends, full_sample, leaves_of, loss_and_gradients, reductions, sample, upstream_of
from torch import nn

import distill_kernels
from distill_kernels import distillation_loss, divergences
from distill_kernels.ops import whole_vocabulary

pytestmark = pytest.mark.covering(2)


@pytest.fixture
def calls_of_op(monkeypatch):
    """Positional arguments of every call of the custom op."""
    recorded = []

    def record(*args, op=whole_vocabulary.terms):
        recorded.append(args)
        return op(*args)

    monkeypatch.setattr(whole_vocabulary, "terms", record)
    return recorded


# The custom op




@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])  # eager gradients, deferred ones
@pytest.mark.parametrize("make", OP_SAMPLES.values(), ids=OP_SAMPLES)
@pytest.mark.covering(1)
def test_custom_op_passes_opcheck(backend, reduction, make, calls_of_op, monkeypatch):
    stats = make in (full_sample, OP_SAMPLES["frozen_head"])
    function = distill_kernels.distillation_loss_and_stats if stats else distillation_loss
    function(**make(), backend=backend, reduction=reduction)
    monkeypatch.undo()
    (args,) = calls_of_op
    args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
    torch.library.opcheck(whole_vocabulary.terms, args)


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.covering(1)
def test_custom_ops_of_sampled_columns_pass_opcheck(backend, reduction, sampling_pays, calls_of_op, monkeypatch):
    late, multiply_kept = [], whole_vocabulary.multiply_kept
    monkeypatch.setattr(whole_vocabulary, "multiply_kept", lambda *args: late.append(args) or multiply_kept(*args))
    distillation_loss(**sample(), backend=backend, reduction=reduction, column_fraction=0.3, seed=1).sum().backward()
    monkeypatch.undo()
    assert len(late) == (reduction == "none")
    args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in calls_of_op[0]]
    torch.library.opcheck(whole_vocabulary.terms, args)
    for args in late:
        torch.library.opcheck(whole_vocabulary.multiply_kept, [a.detach() if isinstance(a, torch.Tensor) else a for a in args])


@backends
@pytest.mark.covering(1)
def test_compiled_sampled_loss_is_dynamic_in_tokens(backend, sampling_pays, fresh_compiler):
    compiled = torch.compile(distillation_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (12, 20, 33):
        call = sample(tokens=tokens) | {"backend": backend, "reduction": "none", "column_fraction": 0.3, "seed": 1}
        want = loss_and_gradients(call, 1.7)
        loss = compiled(**call)
        gradients = torch.autograd.grad(loss, leaves_of(call), upstream_of(loss, 1.7))
        for got, wanted in zip((loss, *gradients), (want[0], *want[1]), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


@backends
def test_custom_op_serves_token_logprobs_in_opcheck(backend, calls_of_op, monkeypatch):
    call = sample()
    distill_kernels.token_logprobs(call["student_hidden"], call["student_weight"], torch.arange(12), backend=backend)
    monkeypatch.undo()
    args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in calls_of_op[0]]
    torch.library.opcheck(whole_vocabulary.terms, args)


@reductions
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", divergences.jensen_shannon(beta=0.3)], ids=str)
@pytest.mark.covering(1)
def test_gradients_pass_gradcheck_in_float64(reduction, divergence):
    call = sample(*LEAVES, tokens=4, vocabulary=7, labels=True, bias=True, dtype=torch.float64)
    call |= {"temperature": 1.7, "student_softcap": 4.0, "student_logit_scale": 0.8, "z_loss_weight": 0.01, "label_smoothing": 0.1}

    def loss(*leaves):
        return distillation_loss(**call | dict(zip(LEAVES, leaves, strict=True)), divergence=divergence, reduction=reduction)

    # Undefined upstream gradients have their own test below.
    assert torch.autograd.gradcheck(loss, leaves_of(call), check_undefined_grad=False)


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [(r, b, "aot_eager", m) for r in ("mean", "none") for b in BACKENDS for m in ("plain", "full")]
COMPILED += [pytest.param("mean", "native", "inductor", "full", marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize(("reduction", "backend", "compiler", "make"), COMPILED)
def test_compiled_loss_equals_eager_without_graph_break(reduction, backend, compiler, make, fresh_compiler):
    call = OP_SAMPLES[make]()
    want = loss_and_gradients(call, 2.5, backend=backend, reduction=reduction)
    compiled = torch.compile(distillation_loss, fullgraph=True, backend=compiler)
    loss = compiled(**call, backend=backend, reduction=reduction)
    gradients = torch.autograd.grad(loss, leaves_of(call), upstream_of(loss, 2.5))
    # The compiler may reorder the few operations around the op, so equal to rounding, not to the bit.
    for got, wanted in zip((loss, *gradients), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


@backends
@reductions
@pytest.mark.covering(1)
def test_compiled_loss_is_dynamic_in_tokens(backend, reduction, fresh_compiler):
    compiled = torch.compile(distillation_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (12, 20, 33):
        call = full_sample(tokens=tokens)
        loss = compiled(**call, backend=backend, reduction=reduction)
        loss.sum().backward()
        assert loss.shape == (() if reduction != "none" else (tokens,))
        torch.testing.assert_close(loss.detach(), distillation_loss(**call, backend=backend, reduction=reduction).detach())


@backends
@pytest.mark.covering(1)
def test_compiled_loss_takes_other_token_counts_and_an_annealed_temperature(backend, fresh_compiler):
    """Whatever changes from step to step becomes symbolic to the compiler at the second step."""
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="aot_eager")
    for tokens, temperature in ((12, 4.0), (20, 3.0), (33, 2.0), (33, 1.5)):
        call = full_sample(tokens=tokens) | {"temperature": temperature}
        torch.testing.assert_close(compiled(**call, backend=backend), distillation_loss(**call, backend=backend))


@backends
def test_compiled_training_step_equals_eager(backend, fresh_compiler):
    """The module, inside a model, under autocast."""
    call = full_sample()
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    loss_module = distill_kernels.DistillationLoss(divergence="reverse_kl", temperature=2.0, ce_weight=0.5, backend=backend)
    tensors = [call[name] for name in ("student_weight", "teacher_hidden", "teacher_weight", "labels")]

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(x).float()
            return loss_module(hidden, *tensors, token_weight=call["token_weight"])

    wanted = torch.autograd.grad(step(call["student_hidden"]), model.parameters())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(call["student_hidden"]), model.parameters())
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@backends
def test_compiled_loss_still_refuses_a_label_out_of_range(backend, fresh_compiler):
    call = sample(labels=True)
    call["labels"][0] = 61
    with pytest.raises(ValueError, match="labels must be at least 0 and below the vocabulary size 61"):
        torch.compile(distillation_loss, fullgraph=True, backend="aot_eager")(**call, backend=backend)
