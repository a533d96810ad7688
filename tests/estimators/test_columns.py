"""Column-sampled gradients: what the backends make of a draw. The draw itself is test_columns_draw.py's, the estimate's bias and error
test_columns_statistics.py's."""

import contextlib

import pytest
import torch
from accuracy import BACKENDS, Inputs, everything, make_inputs, make_labels, make_token_weight, relative, with_gradients
from torch.utils.checkpoint import checkpoint

from distill_kernels import distillation_loss, distillation_loss_and_stats, plan, reference
from distill_kernels.backends import native
from distill_kernels.call import worthwhile
from distill_kernels.call.problem import Problem
from distill_kernels.call.worthwhile import kept_columns
from distill_kernels.estimators import sampling
from distill_kernels.estimators.columns import philox
from distill_kernels.schedule import chunked
from distill_kernels.schedule.plan import MIB

pytest.importorskip("triton")
TOKENS, VOCABULARY, FRACTION = 8, 300, 0.08
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_BACKENDS = [*BACKENDS, "triton"]
on_all = pytest.mark.parametrize("backend", ALL_BACKENDS)
on_cpu = pytest.mark.parametrize("backend", BACKENDS)
GRADIENTS = ("d_student_hidden", "d_student_weight")


def sampled(inputs, backend="torch", upstream=1.0, seed=3, fraction=FRACTION, **options):
    """Loss and gradients, on CPU; the interpreter of Triton runs there, and its compiled kernels on a GPU."""
    device = DEVICE if backend == "triton" else "cpu"
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    upstream = torch.as_tensor(upstream).to(device)
    got = with_gradients(distillation_loss, inputs.to(device), upstream, backend=backend, column_fraction=fraction, seed=seed, **options)
    return {name: value.cpu() for name, value in got.items()}


def assert_same(got, want, names=None):
    for name in names or want:
        assert torch.equal(got[name], want[name]), name


@on_cpu
def test_an_input_that_is_not_finite_shows_in_both_gradients(sampling_pays, backend):
    """A loss scaler looks for it there."""
    inputs = make_inputs("moderate", TOKENS, VOCABULARY)
    inputs.student_hidden[2, 3] = float("nan")
    got = sampled(inputs, backend)
    assert got["d_student_hidden"][2].isnan().all() and got["d_student_weight"].isnan().any()


def from_draws(inputs, draws, upstream=1.0, **options):
    """The gradients that the recorded draws should have given, from the reference's gradient of the logits; `upstream` (N,) came later."""
    inputs, made = inputs.to(torch.float64), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "logits", lambda *args, of=reference.logits: made.append(of(*args)) or made[-1])
        leaf = inputs.student_hidden.detach().requires_grad_()
        loss = reference.distillation_loss(leaf, *inputs[1:4], **options)
    (dz,) = torch.autograd.grad(loss, made[0])  # the student's come first
    d_hidden, d_weight, begin = torch.zeros_like(inputs.student_hidden), torch.zeros_like(inputs.student_weight), 0
    for drawn, weights, _, scores, count in draws:
        tokens = slice(begin, begin := begin + count)
        part = dz[tokens]
        torch.testing.assert_close(scores.double() / scores.norm(), part.norm(dim=0) / part.norm(), rtol=0.02, atol=1e-5)
        part = part * torch.as_tensor(upstream).expand(len(dz))[tokens, None]
        d_hidden[tokens] = (part[:, drawn] * weights) @ inputs.student_weight[drawn]
        d_weight[drawn] += (part[:, drawn] * weights).T @ inputs.student_hidden[tokens]
    assert begin == len(inputs.student_hidden)
    return dict(zip(GRADIENTS, (d_hidden, d_weight), strict=True))


@on_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.covering(1)
def test_gradients_are_those_of_the_drawn_columns(sampling_pays, draws, backend, dtype):
    inputs = make_inputs("moderate", TOKENS, VOCABULARY, dtype=dtype)
    got = sampled(inputs, backend, temperature=2.0)
    want = from_draws(inputs, draws, temperature=2.0)
    assert len(draws) == 1 and len(draws[0][0]) == kept_columns(VOCABULARY, FRACTION) == 24
    for name in GRADIENTS:
        assert got[name].dtype == dtype
        assert relative(got[name], want[name]) <= {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert set(got["d_student_weight"].any(1).nonzero().flatten().tolist()) <= set(draws[0][0].tolist())


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_kernels_of_every_instruction_set_go_over_the_drawn_columns(sampling_pays, draws, monkeypatch, dtype, reduction, isa):
    """Several chunks, blocks of columns and groups of blocks, all of them ragged."""
    monkeypatch.setattr(native, "INSTRUCTION_SET", isa)
    tokens, vocabulary = 211, 10100
    inputs = make_inputs("moderate", tokens, vocabulary, 70, 24, dtype=dtype)
    upstream = make_token_weight(tokens) if reduction == "none" else 1.0
    got = sampled(inputs, "native", upstream, reduction=reduction, fraction=0.1)
    want = from_draws(inputs, draws, upstream, reduction="sum")
    bound = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert all(relative(got[name], want[name]) <= bound for name in GRADIENTS)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_scratch_is_what_every_stage_lays_out(sampling_pays, monkeypatch, dtype, reduction):
    stages = []

    def run(self, stage, *, run=native.Kernels.run, **changed):
        floats = native._native.chunk_scratch_floats(self.arguments | changed, self.call.threads, native.INSTRUCTION_SET)
        assert 4 * floats <= self.call.scratch.nbytes, stage
        stages.append(stage.name)
        run(self, stage, **changed)

    monkeypatch.setattr(native.Kernels, "run", run)
    inputs, upstream = make_inputs("moderate", TOKENS, VOCABULARY, 130, 70, dtype=dtype), torch.ones(TOKENS if reduction == "none" else ())
    before = torch.get_num_threads()
    try:
        for threads in (1, 8, 12):
            torch.set_num_threads(threads)
            sampled(inputs, "native", upstream, reduction=reduction)
            sampled(inputs, "native", upstream, reduction=reduction, fraction="auto", gradient_tolerance=1e-9)
    finally:
        torch.set_num_threads(before)
    assert {"scores", "gather", "multiply", "gradients"} <= set(stages)


@on_cpu
def test_every_chunk_draws_anew(sampling_pays, draws, backend):
    inputs = make_inputs("moderate", 400, VOCABULARY)
    got = sampled(inputs, backend, seed=11)
    assert len(draws) > 1
    uniforms = [uniform for _, _, uniform, _, _ in draws]
    assert uniforms == philox(torch.tensor(11), torch.arange(len(draws))).tolist() and len(set(uniforms)) == len(draws)
    want = from_draws(inputs, draws)
    assert all(relative(got[name], want[name]) <= 1e-5 for name in GRADIENTS)


def test_every_backend_keeps_the_same_columns(sampling_pays):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY)
    for seed in range(3):
        first, *others = (
            sampled(inputs, backend, seed=seed)
            for backend in ALL_BACKENDS
            if isinstance(backend, str) or not backend.marks[0].args[0]
            for backend in [backend if isinstance(backend, str) else backend.values[0]]
        )
        for other in others:
            assert torch.equal(first["d_student_weight"].any(1), other["d_student_weight"].any(1))
            assert all(relative(other[name], first[name]) <= 1e-5 for name in GRADIENTS)


@on_all
@pytest.mark.parametrize("options", [{}, everything(TOKENS, VOCABULARY), {"reduction": "none"}], ids=["plain", "everything", "none"])
@pytest.mark.covering(1)
def test_loss_and_bias_gradient_stay_exact(sampling_pays, backend, options):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY, bias=True)
    got, dense = sampled(inputs, backend, **options), sampled(inputs, backend, fraction=None, **options)
    assert torch.equal(got["loss"], dense["loss"])
    assert relative(got["d_student_bias"], dense["d_student_bias"]) <= 1e-6
    assert all(relative(got[name], dense[name]) > 1e-3 for name in GRADIENTS)


@on_cpu
def test_a_chosen_fraction_gives_what_it_gives_when_named(sampling_pays, backend):
    """Nothing is left of the trial, whether the fraction turns out smaller, the trial's own, or larger."""
    inputs = make_inputs("realistic", 400, 1000, 32, 48)  # several chunks
    named = {fraction: sampled(inputs, backend, fraction=fraction) for fraction in worthwhile.FRACTIONS}
    chosen = []
    for tolerance in (10.0, *(2 * 0.93**i for i in range(90))):
        got = sampled(inputs, backend, fraction="auto", gradient_tolerance=tolerance)
        alike = [fraction for fraction, want in named.items() if all(torch.equal(got[name], want[name]) for name in GRADIENTS)]
        if not alike:
            break
        chosen.extend(alike)
    assert chosen == sorted(chosen) and set(chosen) == set(worthwhile.FRACTIONS)
    dense = sampled(inputs, backend, fraction=None)
    assert all(relative(got[name], dense[name]) <= 1e-5 for name in GRADIENTS)


@on_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.covering(1)
def test_columns_are_multiplied_in_panels_where_their_rows_would_be_large(sampling_pays, draws, monkeypatch, backend, dtype):
    inputs = make_inputs("moderate", TOKENS, VOCABULARY, dtype=dtype)
    whole = sampled(inputs, backend)
    monkeypatch.setattr(sampling, "ROWS_BYTES", 7 * inputs.student_weight.shape[1] * (dtype.itemsize + 4))
    panels = sampled(inputs, backend)
    assert len(draws[0][0]) == 24 and all(relative(panels[name], whole[name]) <= {4: 1e-6, 2: 4e-3}[dtype.itemsize] for name in GRADIENTS)


@on_all
def test_bias_gradient_is_counted_once_where_no_fraction_will_do(sampling_pays, backend):
    tokens = TOKENS if backend == "triton" else 410  # several chunks
    inputs = make_inputs("moderate", tokens, VOCABULARY, bias=True)
    got = sampled(inputs, backend, fraction="auto", gradient_tolerance=1e-9)
    dense = sampled(inputs, backend, fraction=None)
    assert all(relative(got[name], dense[name]) <= 1e-5 for name in dense)


@on_all
def test_masked_tokens_draw_and_get_nothing(sampling_pays, draws, backend):
    inputs = make_inputs("moderate", TOKENS, VOCABULARY)
    labels = make_labels(TOKENS, VOCABULARY)
    valid = labels != -100
    got = sampled(inputs, backend, labels=labels, ce_weight=0.5, reduction="sum")
    few = Inputs(inputs.student_hidden[valid], inputs.student_weight, inputs.teacher_hidden[valid], inputs.teacher_weight)
    want = sampled(few, backend, labels=labels[valid], ce_weight=0.5, reduction="sum")
    assert torch.equal(draws[0][0], draws[1][0])
    assert not got["d_student_hidden"][~valid].any()
    assert relative(got["d_student_hidden"][valid], want["d_student_hidden"]) <= 1e-5
    assert relative(got["d_student_weight"], want["d_student_weight"]) <= 1e-5
    nothing = sampled(inputs, backend, labels=torch.full_like(labels, -100), ce_weight=0.5)
    assert not any(value.any() for value in nothing.values())


@on_all
@pytest.mark.parametrize("name", ["student_hidden", "student_weight"])
@pytest.mark.covering(1)
def test_a_frozen_side_leaves_the_other_gradient_as_it_is(sampling_pays, backend, name):
    device = DEVICE if backend == "triton" else "cpu"
    inputs = make_inputs("moderate", TOKENS, VOCABULARY)
    both = sampled(inputs, backend)
    call = inputs.to(device)
    leaf = getattr(call, name).requires_grad_()
    loss, stats = distillation_loss_and_stats(*call[:4], backend=backend, column_fraction=FRACTION, seed=3)
    loss.backward()
    assert relative(leaf.grad.cpu(), both[f"d_{name}"]) <= 1e-6
    at = ("student_hidden", "student_weight").index(name)
    assert stats.gradient_error[at] > 0 and stats.gradient_error[1 - at] == 0


@on_cpu
def test_where_sampling_does_not_pay_everything_is_exact(backend):
    least, few = worthwhile.LEAST_VOCABULARY, worthwhile.LEAST_TOKENS
    for tokens, vocabulary, fraction in ((few, least - 1, FRACTION), (few, least, 0.41), (few - 1, least, FRACTION)):
        inputs = make_inputs("moderate", tokens, vocabulary, 8, 8)
        assert_same(sampled(inputs, backend, fraction=fraction), sampled(inputs, backend, fraction=None))
        inputs.student_hidden.requires_grad_()
        assert distillation_loss_and_stats(*inputs[:4], backend=backend, column_fraction=fraction)[1].gradient_error is None
    assert kept_columns(least, 0.4) == round(0.4 * least)
    assert distillation_loss_and_stats(*inputs[:4], backend=backend)[1].gradient_error is None
    inputs = make_inputs("moderate", few, least, 8, 8)
    inputs.student_hidden.requires_grad_()
    assert distillation_loss_and_stats(*inputs[:4], backend=backend, column_fraction=0.4)[1].gradient_error is not None


@on_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [TOKENS, 410])
@pytest.mark.covering(1)
def test_per_token_losses_keep_the_columns_that_their_gradients_are_made_of(sampling_pays, draws, backend, dtype, tokens):
    if backend == "triton" and tokens > TOKENS and DEVICE == "cpu":
        pytest.skip("minutes in the interpreter")
    inputs = make_inputs("moderate", tokens, VOCABULARY, dtype=dtype)
    upstream = make_token_weight(tokens) - 0.5
    with multiplied_anew() as calls:
        got = sampled(inputs, backend, upstream, reduction="none")
    assert calls == ["forward", "kept"]
    want = from_draws(inputs, draws, upstream, reduction="sum")
    bound = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert all(relative(got[name], want[name]) <= bound for name in GRADIENTS)
    draws.clear()
    summed = sampled(inputs, backend, reduction="sum")
    alike = sampled(inputs, backend, torch.ones(tokens), reduction="none")
    assert all(relative(alike[name], summed[name]) <= bound for name in GRADIENTS)


@contextlib.contextmanager
def multiplied_anew():
    """What runs meanwhile: "forward" for a run of the loss's op, "kept" for products of kept columns alone."""
    calls, run, kept = [], chunked.run, chunked.multiply_kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "run", lambda *args: calls.append("forward") or run(*args))
        patch.setattr(chunked, "multiply_kept", lambda *args: calls.append("kept") or kept(*args))
        yield calls


@on_all
def test_per_token_losses_with_masks_and_a_second_backward(sampling_pays, draws, backend):
    device = DEVICE if backend == "triton" else "cpu"
    inputs, labels = make_inputs("moderate", TOKENS, VOCABULARY), make_labels(TOKENS, VOCABULARY)
    valid, upstream = labels != -100, make_token_weight(TOKENS)
    options = {"reduction": "none", "ce_weight": 0.5, "temperature": 2.0}
    got = sampled(inputs, backend, upstream, labels=labels, **options)
    few = Inputs(inputs.student_hidden[valid], inputs.student_weight, inputs.teacher_hidden[valid], inputs.teacher_weight)
    want = sampled(few, backend, upstream[valid], labels=labels[valid], **options)
    assert torch.equal(draws[0][0], draws[1][0])
    assert not got["d_student_hidden"][~valid].any() and not got["loss"][~valid].any()
    assert relative(got["d_student_hidden"][valid], want["d_student_hidden"]) <= 1e-5
    assert relative(got["d_student_weight"], want["d_student_weight"]) <= 1e-5

    call = inputs.to(device)
    leaves = [x.requires_grad_() for x in call[:2]]
    losses = distillation_loss(*call[:4], labels.to(device), backend=backend, column_fraction=FRACTION, **options)
    first, second = (torch.autograd.grad(losses, leaves, upstream.to(device), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_cpu
def test_per_token_losses_draw_anew_where_columns_cannot_be_kept(sampling_pays, draws, backend, monkeypatch):
    """With the bias's gradient, which is of all columns; with a tolerance; and beyond half of the workspace."""
    tokens, upstream = 40, make_token_weight(40)
    inputs = make_inputs("moderate", tokens, VOCABULARY)
    for options in ({"student_bias": torch.zeros(VOCABULARY, requires_grad=True)}, {"fraction": "auto", "gradient_tolerance": 0.3}):
        with multiplied_anew() as calls:
            sampled(inputs, backend, upstream, reduction="none", **options)
        assert calls == ["forward", "forward"]
    monkeypatch.setattr(Problem, "can_keep_dz", False)
    draws.clear()
    with multiplied_anew() as calls:
        got = sampled(inputs, backend, upstream, reduction="none")
    assert calls == ["forward", "forward"]
    weighted = sampled(inputs, backend, reduction="sum", token_weight=upstream)
    assert all(relative(got[name], weighted[name]) <= 1e-5 for name in GRADIENTS)


def test_columns_are_kept_within_half_of_the_workspace():
    few = plan(1024, 49152, 576, 576, reduction="none", column_fraction=0.08, backend="torch")
    many = plan(16384, 49152, 576, 576, reduction="none", column_fraction=0.08, backend="torch")
    assert few.saved_bytes >= 1024 * kept_columns(49152, 0.08) * 4 and few.workspace_bytes + few.saved_bytes <= 192 * MIB
    assert few.forward_flops == 2 * 1024 * 49152 * 2 * 576 and few.backward_flops == 2 * 1024 * kept_columns(49152, 0.08) * 2 * 576
    assert many.saved_bytes == 0 and many.backward_flops > many.forward_flops


@pytest.mark.parametrize("fraction", [0.08, "auto"])
@pytest.mark.parametrize("shape", [(8192, 262144, 2304, 3584), (4096, 128256, 4096, 4096), (512, 151936, 1024, 1024)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@on_cpu
def test_large_heads_leave_room_for_chunks(shape, fraction, reduction, backend):
    dense, sampled = (plan(*shape, column_fraction=f, backend=backend, reduction=reduction) for f in (None, fraction))
    assert sampled.chunk_tokens >= 0.4 * (dense.chunk_tokens if dense.schedule == "chunked" else 64)
    assert sampled.workspace_bytes + sampled.saved_bytes <= 192 * MIB
    with pytest.raises(ValueError, match="cannot hold the logits of"):
        plan(*shape, column_fraction=fraction, backend=backend, workspace_mib=1)


# Reproducibility


@on_cpu
def test_the_seed_and_nothing_else_fixes_the_draw(sampling_pays, backend):
    inputs = make_inputs("moderate", TOKENS, VOCABULARY)
    torch.manual_seed(5)
    first, second = sampled(inputs, backend, seed=None), sampled(inputs, backend, seed=None)
    torch.manual_seed(5)
    assert_same(sampled(inputs, backend, seed=None), first)
    assert not torch.equal(first["d_student_weight"], second["d_student_weight"])

    state = torch.get_rng_state()
    given = sampled(inputs, backend, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert_same(sampled(inputs, backend, seed=5), given)
    for seed in (0, 6, 2**32 + 5, 2**63 - 1):
        assert not torch.equal(sampled(inputs, backend, seed=seed)["d_student_weight"], given["d_student_weight"])


@on_cpu
@pytest.mark.parametrize("seed", [None, 3])
def test_checkpointing_draws_the_same_again(sampling_pays, backend, seed):
    def gradients(call):
        inputs = make_inputs("moderate", TOKENS, VOCABULARY)
        leaves = [x.requires_grad_() for x in inputs[:2]]
        torch.manual_seed(5)
        loss = call(lambda *args: distillation_loss(*args, backend=backend, column_fraction=FRACTION, seed=seed), *inputs[:4])
        torch.manual_seed(99)  # what comes between forward and backward
        return torch.autograd.grad(loss, leaves)

    plain = gradients(lambda function, *args: function(*args))
    again = gradients(lambda function, *args: checkpoint(function, *args, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@on_cpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.covering(1)
def test_compiled_as_eager(sampling_pays, backend, reduction):
    inputs, upstream = make_inputs("moderate", TOKENS, VOCABULARY), 1.7 if reduction == "mean" else make_token_weight(TOKENS)
    torch.compiler.reset()
    for seed in (3, None):

        def loss(*args, seed=seed):
            return distillation_loss(*args, backend=backend, column_fraction=FRACTION, seed=seed, reduction=reduction)

        results = []
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(5)
            results.append([with_gradients(function, inputs, upstream) for _ in range(2)])
        eager, compiled = results
        for e, c in zip(eager, compiled, strict=True):
            assert_same(c, e)
        assert torch.equal(compiled[0]["d_student_weight"], compiled[1]["d_student_weight"]) == (seed is not None)
