"""What torch's autograd, autocast and checkpointing see of the engine: graph behaviour, not accuracy."""

import copy
import pickle

import pytest
import torch
from op_samples import LEAVES, assert_same, backends, full_sample, leaves_of, loss_and_gradients, reductions, sample, upstream_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import distill_kernels
from distill_kernels import distillation_loss, divergences
from distill_kernels.schedule import chunked

pytestmark = pytest.mark.covering(2)


@pytest.fixture
def chunks(monkeypatch):
    """What every chunk's kernel was given: all that is multiplied is in there."""
    given = []

    def run(problem, tensors, plan, kernel, original=chunked.run):
        return original(problem, tensors, plan, lambda chunk: given.append(chunk) or kernel(chunk))

    monkeypatch.setattr(chunked, "run", run)
    return given


# Autocast


@backends
@reductions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_the_explicit_cast(backend, reduction, dtype):
    call = full_sample()
    explicit = {k: v.to(dtype) if isinstance(v, torch.Tensor) and k.startswith(("student", "teacher")) else v for k, v in call.items()}
    loss = distillation_loss(**explicit, backend=backend, reduction=reduction)
    wanted = loss, *torch.autograd.grad(loss, leaves_of(call), upstream_of(loss, 2.5))
    with torch.autocast("cpu", dtype=dtype):
        loss = distillation_loss(**call, backend=backend, reduction=reduction)
    got = loss, *torch.autograd.grad(loss, leaves_of(call), upstream_of(loss, 2.5))
    assert all(g.dtype is torch.float32 for g in got)
    assert_same(got, wanted)


@backends
def test_autocast_takes_the_dtypes_that_a_linear_layer_takes(backend):
    """Under autocast hidden states arrive in bfloat16 from the layer before, while the head is still a float32 parameter."""
    call = sample()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = nn.functional.linear(call["student_hidden"], torch.eye(8))
        assert hidden.dtype is torch.bfloat16
        nn.functional.linear(hidden, call["student_weight"])
        loss = distillation_loss(**call | {"student_hidden": hidden}, backend=backend)
        want = distillation_loss(**call, backend=backend)
    assert torch.equal(loss, want)
    got = torch.autograd.grad(loss, leaves_of(call))
    assert all(g.dtype is torch.float32 for g in got)
    assert_same(got, torch.autograd.grad(want, leaves_of(call)))


def test_autocast_leaves_float64_alone_as_a_linear_layer_does():
    call = sample(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.functional.linear(call["student_hidden"], call["student_weight"]).dtype is torch.float64
        loss = distillation_loss(**call)
    assert loss.dtype is torch.float64
    assert torch.equal(loss, distillation_loss(**call))


@backends
def test_autocast_disabled_inside_is_respected(backend):
    call = sample()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        loss = distillation_loss(**call, backend=backend)
    assert torch.equal(loss, distillation_loss(**call, backend=backend))


# Several backwards


@backends
@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_second_backward_gives_the_same_gradients_and_accumulates(backend, reduction, dtype, factor):
    call = full_sample(dtype=dtype)
    _, wanted = loss_and_gradients(call, factor, backend=backend, reduction=reduction)
    loss = distillation_loss(**call, backend=backend, reduction=reduction)
    loss.backward(upstream_of(loss, factor), retain_graph=True)
    assert_same([t.grad for t in leaves_of(call)], wanted)
    loss.backward(upstream_of(loss, factor), retain_graph=True)
    assert_same([t.grad for t in leaves_of(call)], [2 * g for g in wanted])
    # The last backward may scale in place; what it returns must still be right.
    assert_same(torch.autograd.grad(loss, leaves_of(call), upstream_of(loss, factor)), wanted)


@backends
@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_handed_out_survive_a_later_backward(backend, reduction, dtype):
    """The norms of each loss's gradient are taken first, then the weighted sum is differentiated: the first must not change."""
    call = full_sample(dtype=dtype)
    loss = distillation_loss(**call, backend=backend, reduction=reduction)
    first = torch.autograd.grad(loss, leaves_of(call), upstream_of(loss, 1.0), retain_graph=True)
    snapshot = [g.clone() for g in first]
    loss.backward(upstream_of(loss, 2.5))
    assert_same(first, snapshot)


@backends
@reductions
@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_handed_out_may_be_overwritten_by_the_caller(backend, reduction, factor, dtype):
    call = full_sample(dtype=dtype)
    _, wanted = loss_and_gradients(call, factor, backend=backend, reduction=reduction)
    loss = distillation_loss(**call, backend=backend, reduction=reduction)
    for g in torch.autograd.grad(loss, leaves_of(call), upstream_of(loss, factor), retain_graph=True):
        g.zero_()
    assert_same(torch.autograd.grad(loss, leaves_of(call), upstream_of(loss, factor)), wanted)


@backends
@reductions
def test_zeroing_grad_in_place_between_backwards_is_harmless(backend, reduction):
    call = full_sample()
    _, wanted = loss_and_gradients(call, backend=backend, reduction=reduction)
    loss = distillation_loss(**call, backend=backend, reduction=reduction)
    loss.backward(upstream_of(loss, 1.0), retain_graph=True)
    for t in leaves_of(call):
        t.grad.zero_()
    loss.backward(upstream_of(loss, 1.0))
    assert_same([t.grad for t in leaves_of(call)], wanted)


@backends
@reductions
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_backward_mutates_nothing_that_the_caller_holds(backend, reduction, factor):
    call = full_sample()
    held = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    loss = distillation_loss(**call, backend=backend, reduction=reduction)
    held |= {"loss": loss, "upstream": upstream_of(loss, factor)}
    before = {name: (tensor._version, tensor.detach().clone()) for name, tensor in held.items()}
    loss.backward(held["upstream"], retain_graph=True)
    loss.backward(held["upstream"])
    for name, (version, value) in before.items():
        assert held[name]._version == version, name
        assert torch.equal(held[name].detach(), value), name


@backends
@reductions
@pytest.mark.parametrize("outer", [lambda loss: loss.sum(), lambda loss: loss.sum() ** 2], ids=["linear", "squared"])
def test_second_derivative_is_refused_in_words(backend, reduction, outer):
    """A gradient penalty that contributes nothing would train on wrong numbers without a sound."""
    call = sample()
    loss = outer(distillation_loss(**call, backend=backend, reduction=reduction))

    def penalised_step():
        d_hidden, _ = torch.autograd.grad(loss, leaves_of(call), create_graph=True)
        (loss + d_hidden.square().sum()).backward()

    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)second derivative|differentiate twice"):
        penalised_step()


# Only what is asked for


@backends
@reductions
@pytest.mark.parametrize("asked", [LEAVES[:1], LEAVES[1:2], LEAVES[2:], LEAVES], ids=lambda names: "+".join(names))
def test_only_gradients_that_are_asked_for_are_computed(backend, reduction, asked, chunks, monkeypatch):
    allocated = []
    monkeypatch.setattr(chunked, "empty_outputs", lambda *args, new=chunked.empty_outputs: allocated.append(new(*args)) or allocated[-1])
    call = sample(*asked, bias=True)
    loss = distillation_loss(**call, backend=backend, reduction=reduction)
    if reduction == "none":  # nothing at all before backward
        assert [chunk.d_hidden is chunk.d_weight is chunk.d_bias is None for chunk in chunks] == [True]
    loss.sum().backward()
    assert len(allocated) == len(chunks) == (2 if reduction == "none" else 1)
    for name in LEAVES:
        gradient = "d_" + name.removeprefix("student_")
        assert getattr(allocated[-1], gradient).shape == (call[name].shape if name in asked else (0,))
        assert (getattr(chunks[-1], gradient) is not None) == (name in asked)
        assert (call[name].grad is not None) == (name in asked)


@backends
@reductions
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_differentiated_under_no_grad(backend, reduction, mode, chunks):
    call = full_sample()
    want = distillation_loss(**call, backend=backend, reduction=reduction).detach()
    chunks.clear()
    with mode():
        loss = distillation_loss(**call, backend=backend, reduction=reduction)
    assert not loss.requires_grad
    assert [chunk.d_hidden is chunk.d_weight is chunk.d_bias is None for chunk in chunks] == [True]
    assert torch.equal(loss.clone(), want)


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_tokens_cost_no_matrix_product(backend, reduction, chunks):
    call = full_sample(tokens=40)
    call["token_weight"][:5] = 0
    valid = (call["labels"] != -100) & (call["token_weight"] != 0)
    assert 0 < valid.sum() < 40
    distillation_loss(**call, backend=backend, reduction=reduction).sum().backward()
    assert len(chunks) == (2 if reduction == "none" else 1)
    for chunk in chunks:
        assert torch.equal(chunk.student_hidden, call["student_hidden"][valid])
        assert torch.equal(chunk.teacher_hidden, call["teacher_hidden"][valid])


@backends
@reductions
def test_masked_tokens_may_hold_anything(backend, reduction):
    call = full_sample()
    want = loss_and_gradients(call, backend=backend, reduction=reduction)
    with torch.no_grad():
        call["student_hidden"][call["labels"] == -100] = float("nan")
        call["teacher_hidden"][call["labels"] == -100] = float("inf")
    got = loss_and_gradients(call, backend=backend, reduction=reduction)
    assert_same((got[0], *got[1]), (want[0], *want[1]))


def nothing_but_masked(call, how):
    if how == "labels":
        call["labels"].fill_(-100)
    elif how == "token_weight":
        call["token_weight"].zero_()
    return call


@backends
@reductions
@pytest.mark.parametrize("how", ["labels", "token_weight", "no_tokens"])
def test_loss_of_nothing_but_masked_tokens_is_zero_and_attached(backend, reduction, how, chunks):
    call = nothing_but_masked(full_sample(tokens=0 if how == "no_tokens" else 12), how)
    loss, stats = distill_kernels.distillation_loss_and_stats(**call, backend=backend, reduction=reduction)
    assert loss.requires_grad
    assert loss.shape == (() if reduction != "none" else call["labels"].shape)
    assert not loss.any()
    assert not any(value.any() for value in stats.mean().values()) and not stats.valid.any()
    loss.sum().backward()
    for tensor in leaves_of(call):
        assert tensor.grad is not None and not tensor.grad.any()
    assert not chunks


@backends
@reductions
def test_call_without_tokens_and_without_mask_gives_zero_gradients(backend, reduction):
    call = sample(*LEAVES, tokens=0, bias=True)
    loss = distillation_loss(**call, backend=backend, reduction=reduction)
    loss.sum().backward()
    assert not loss.any()
    assert all(not t.grad.any() for t in leaves_of(call))


# With the rest of torch


def backbone_and_call(seed=0):
    torch.manual_seed(seed)
    call = full_sample(seed=seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), call


@backends
@reductions
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_model_and_loss_changes_nothing(backend, reduction, reentrant):
    model, call = backbone_and_call()

    def loss_of(x):
        return distillation_loss(**call | {"student_hidden": model(x)}, backend=backend, reduction=reduction)

    inputs = [call["student_hidden"], *model.parameters(), call["student_weight"], call["student_bias"]]
    want = torch.autograd.grad((loss_of(inputs[0]) * 2.5).sum(), inputs)
    (checkpoint(loss_of, inputs[0], use_reentrant=reentrant) * 2.5).sum().backward()
    assert_same([t.grad for t in inputs], want)


@backends
@reductions
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_saved_tensor_hooks_see_tensors_that_stay_as_they_were(backend, reduction, factor):
    """Offloading hooks hold what was packed, and may unpack it again for another backward."""
    call = full_sample()
    packed = []

    def pack(tensor):
        packed.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = distillation_loss(**call, backend=backend, reduction=reduction)
    loss.backward(upstream_of(loss, factor), retain_graph=True)
    assert packed
    for tensor, snapshot in packed:
        assert torch.equal(tensor, snapshot)


@backends
@reductions
def test_hooks_see_and_replace_gradients(backend, reduction):
    model, call = backbone_and_call()

    def loss():
        return distillation_loss(**call | {"student_hidden": hidden}, backend=backend, reduction=reduction).sum()

    hidden = model(call["student_hidden"])
    want = torch.autograd.grad(loss(), [hidden, call["student_weight"], *model.parameters()], retain_graph=True)
    seen = []
    hidden.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    call["student_weight"].register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    loss().backward()
    assert_same(sorted(seen, key=len), sorted(want[:2], key=len))
    assert_same([p.grad for p in model.parameters()], [2 * g for g in want[2:]])


@backends
@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulated_microbatches_equal_the_big_batch(backend, as_tensor):
    call = full_sample(tokens=30)
    items = (call["labels"] != -100).sum()
    want, want_gradients = loss_and_gradients(call, backend=backend)
    total = 0
    for part in torch.arange(30).split(11):
        micro = {k: v[part] if k in ("student_hidden", "teacher_hidden", "labels", "token_weight") else v for k, v in call.items()}
        loss = distillation_loss(**micro, num_items=items if as_tensor else items.item(), backend=backend)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, want, rtol=1e-6, atol=0)
    for tensor, wanted in zip(leaves_of(call), want_gradients, strict=True):
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-5, atol=1e-6)


@backends
def test_per_token_losses_compose_with_torch_operations(backend):
    """Σ f(loss_n) has the gradient of Σ f'(loss_n)·loss_n, which is a call with those token weights."""
    call = sample(*LEAVES, labels=True, bias=True)
    per_token = distillation_loss(**call, backend=backend, reduction="none")
    detached = per_token.detach().requires_grad_()

    def composed(loss):
        return (loss.reshape(3, 4).softmax(-1) * loss.reshape(3, 4).sqrt()).sum()

    (slopes,) = torch.autograd.grad(composed(detached + 1), detached)
    got = torch.autograd.grad(composed(per_token + 1), leaves_of(call))
    _, want = loss_and_gradients(call, backend=backend, reduction="sum", token_weight=slopes)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@backends
@reductions
def test_undefined_upstream_gradient_passes_through(backend, reduction):
    """A function that returns None for the loss's gradient asks for nothing, which is not an error."""

    class Ignore(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, other):
            return other.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None, gradient

    call, other = full_sample(), torch.ones((), requires_grad=True)
    Ignore.apply(distillation_loss(**call, backend=backend, reduction=reduction), other).backward()
    assert other.grad == 1
    assert all(t.grad is None or not t.grad.any() for t in leaves_of(call))


@backends
def test_gradient_of_stats_is_not_offered_and_none_of_it_reaches_the_loss(backend):
    call = full_sample()
    loss, stats = distill_kernels.distillation_loss_and_stats(**call, backend=backend)
    assert not any(value.requires_grad for value in vars(stats).values() if value is not None)
    assert_same(torch.autograd.grad(loss, leaves_of(call)), loss_and_gradients(call, backend=backend)[1])


@backends
@reductions
def test_scaled_float16_gradients_do_not_underflow(backend, reduction):
    """A loss scaler multiplies before rounding: a float16 gradient of 1e-8 must come out as 65536e-8, not as 0."""
    call = full_sample(dtype=torch.float16) | {"kd_weight": 1e-7, "ce_weight": 1e-7}
    wide = {k: v.detach().float().requires_grad_() if k in LEAVES else v for k, v in call.items()}
    wide |= {k: wide[k].float() for k in ("teacher_hidden", "teacher_weight", "teacher_bias")}
    _, unscaled = loss_and_gradients(call, backend=backend, reduction=reduction)
    assert all((g == 0).float().mean() > 0.2 for g in unscaled)  # else the sample shows nothing
    _, got = loss_and_gradients(call, 65536.0, backend=backend, reduction=reduction)
    _, want = loss_and_gradients(wide, 65536.0, backend=backend, reduction=reduction)
    for g, w in zip(got, want, strict=True):
        assert g.dtype is torch.float16
        torch.testing.assert_close(g.float(), w, rtol=2**-10, atol=2**-23)


@backends
@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_inputs_give_the_same_bits(backend, reduction, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        call = full_sample(tokens=160, vocabulary=3001, dtype=dtype)
        first, *others = (loss_and_gradients(call, 2.5, backend=backend, reduction=reduction, workspace_mib=3) for _ in range(3))
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert_same((other[0], *other[1]), (first[0], *first[1]))


@backends
def test_gradients_of_tied_hidden_and_head_add_up(backend):
    """One tensor in both places: its gradient is the sum of the two."""
    call = sample(tokens=61)
    tied = call["student_weight"].detach().requires_grad_()
    loss = distillation_loss(**call | {"student_hidden": tied, "student_weight": tied}, backend=backend)
    (got,) = torch.autograd.grad(loss * 2.5, tied)
    apart = call | {"student_hidden": tied.detach().requires_grad_(), "student_weight": tied.detach().requires_grad_()}
    torch.testing.assert_close(got, sum(loss_and_gradients(apart, 2.5, backend=backend)[1]))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_module_can_be_copied_and_sent_to_another_process(clone):
    module = distill_kernels.DistillationLoss(divergence=divergences.jensen_shannon(beta=0.1), temperature=2.0)
    call = sample()
    assert torch.equal(clone(module)(**call), module(**call))
